//! The journal: encoding records into its buffer, and a group commit of 256 records to a real file.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures::FutureExt;
use volley_server::journal::{Journal, Lsn, Record};
use volley_server::platform::blocking::Blocking;
use volley_server::types::{ChunkResidency, VolumeId};

/// Records that share one sync on a busy shard.
const RECORDS: u64 = 256;

/// A write into a chunk that is not resident yet: one bitmap.
fn record(n: u64) -> Record {
    let partial = ChunkResidency::Partial(Box::new([1 << (n % 64), 0]));
    Record::Residency { volume: VolumeId(n), chunks: vec![(u32::try_from(n).expect("small"), partial)] }
}

fn new_journal(dir: &std::path::Path) -> Journal<Blocking> {
    // Futures of the blocking platform are ready at once.
    let created = Journal::create(&Blocking, dir, 1, 0, std::iter::empty()).now_or_never();
    created.expect("ready").expect("create a journal")
}

fn append_all(journal: &Journal<Blocking>) -> Lsn {
    (1..RECORDS).fold(journal.append(&record(0)), |_, n| journal.append(&record(n)))
}

fn journal(c: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder");
    let mut group = c.benchmark_group("journal");
    group.throughput(Throughput::Elements(RECORDS));
    group.bench_function("append", |b| {
        b.iter_batched_ref(|| new_journal(dir.path()), |journal| append_all(journal), BatchSize::PerIteration);
    });
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
