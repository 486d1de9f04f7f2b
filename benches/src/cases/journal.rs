//! The journal: encoding records into its buffer, and replaying them from a file.

use std::path::Path;

use futures::FutureExt;
use volley_server::journal::{Journal, Lsn, Record, commit_epoch, recover_existing};
use volley_server::platform::blocking::Blocking;
use volley_server::types::{CHUNK_BYTES_DEFAULT, ChunkResidency, HydrationRate, VolumeId, VolumeSpec};

use super::{Case, Work};

/// Records that share one sync on a busy shard.
pub const JOURNAL_RECORDS: u32 = 256;
/// Appended records are committed when they are so many bytes, lest they fill the memory.
const PENDING_BYTES: usize = 4 << 20;
/// In the journal that is replayed, each with so many written chunks.
const VOLUMES: u32 = 64;
const CHUNKS: u32 = 64;

pub(super) const CASES: [Case; 2] = [
    Case::new("journal/append", (JOURNAL_RECORDS, "record"), append),
    Case::new("journal/replay", (VOLUMES * CHUNKS, "record"), replay),
];

/// A write into a chunk that is not resident yet: one bitmap.
fn record(volume: u64, chunk: u32) -> Record {
    let partial = ChunkResidency::Partial(Box::new([1 << (volume % 64), 0]));
    Record::Residency { volume: VolumeId(volume), chunks: vec![(chunk, partial)] }
}

/// What a future of the blocking platform gives: it is ready at once.
fn ready<T>(future: impl Future<Output = volley_server::error::Result<T>>) -> T {
    future.now_or_never().expect("ready").expect("the journal is sound")
}

/// An empty journal in a folder.
///
/// # Panics
/// When it can't be made.
#[must_use]
pub fn new_journal(dir: &Path) -> Journal<Blocking> {
    ready(Journal::create(&Blocking, dir, 1, 0, std::iter::empty()))
}

/// Appends [`JOURNAL_RECORDS`] records, which are not committed yet.
pub fn append_all(journal: &Journal<Blocking>) -> Lsn {
    let append = |n: u32| journal.append(&record(n.into(), n));
    (1..JOURNAL_RECORDS).fold(append(0), |_, n| append(n))
}

struct Appending {
    journal: Journal<Blocking>,
    last: Lsn,
    _dir: tempfile::TempDir,
}

fn append() -> Box<dyn Work> {
    let dir = tempfile::tempdir().expect("temporary folder");
    Box::new(Appending { journal: new_journal(dir.path()), last: Lsn::default(), _dir: dir })
}

impl Work for Appending {
    fn renew(&mut self) {
        if self.journal.pending_bytes() > PENDING_BYTES {
            ready(self.journal.commit(self.last));
        }
        // Commits of a full log wait for a checkpoint: nobody else makes one here.
        if self.journal.checkpoint_due() {
            ready(self.journal.checkpoint(|| None));
        }
    }

    fn run(&mut self) {
        self.last = append_all(&self.journal);
    }
}

fn spec(volume: u32) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId(volume.into()),
        name: format!("volume-{volume}").into(),
        size_bytes: u64::from(CHUNKS) * u64::from(CHUNK_BYTES_DEFAULT),
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        snapshot: Some(volley_server::types::SnapshotRef { name: "debian".into(), id: 1 }),
        store: "default".into(),
        rate: HydrationRate::Unlimited,
        batch: None,
        created_unix_ms: 0,
    }
}

/// Reads the journal from its file, with all that recovery does.
fn replay() -> Box<dyn Work> {
    let dir = tempfile::tempdir().expect("temporary folder");
    let journal = new_journal(dir.path());
    for volume in 0..VOLUMES {
        journal.append(&Record::Created(spec(volume)));
    }
    for chunk in 0..CHUNKS {
        for volume in 0..VOLUMES {
            journal.append(&record(volume.into(), chunk));
        }
    }
    ready(journal.close());
    ready(commit_epoch(&Blocking, dir.path(), 1, 1));
    Box::new(move || {
        let recovered = ready(recover_existing(&Blocking, dir.path()));
        assert_eq!((recovered.volumes.len(), recovered.files[0].closed), (VOLUMES as usize, true));
    })
}
