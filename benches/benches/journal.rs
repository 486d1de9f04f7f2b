//! The journal on a real file: a group commit of the records that share one sync.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::FutureExt;
use volley_benches::cases::{JOURNAL_RECORDS, append_all, new_journal};

fn journal(c: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder");
    let mut group = c.benchmark_group("journal");
    group.throughput(Throughput::Elements(JOURNAL_RECORDS.into()));
    let journal = new_journal(dir.path());
    group.bench_function("append_and_commit", |b| {
        b.iter(|| {
            journal.commit(append_all(&journal)).now_or_never().expect("ready").expect("commit");
            // Commits of a full log wait for a checkpoint: nobody else makes one here.
            if journal.checkpoint_due() {
                journal.checkpoint(|| None).now_or_never().expect("ready").expect("checkpoint");
            }
        });
    });
    group.finish();
}

criterion_group!(benches, journal);
criterion_main!(benches);
