//! A platform for tests: real files, tasks on a local pool that interleave at every I/O, and failures on demand.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::executor::{LocalPool, LocalSpawner};
use futures::task::LocalSpawnExt;

use crate::platform::blocking::{Blocking, BlockingFile};
use crate::platform::{AlignedBytes, DirEntry, File, OpenMode, Platform, Queue, SpaceInfo, Time};

/// Calls that can be counted and made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Write,
    Sync,
    Rename,
    SyncDir,
}

#[derive(Default)]
struct Faults {
    writes: Cell<u64>,
    syncs: Cell<u64>,
    /// Fails calls of this kind after letting the given number pass, until cleared.
    plan: RefCell<Option<(Call, u64, io::ErrorKind)>>,
}

#[derive(Clone)]
pub(super) struct TestPlatform {
    spawner: LocalSpawner,
    faults: Rc<Faults>,
}

/// Runs `test` with a platform and an empty directory; leaves nothing behind.
pub(super) fn run<T, F: Future<Output = T>>(test: impl FnOnce(TestPlatform, std::path::PathBuf) -> F) -> T {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut pool = LocalPool::new();
    let platform = TestPlatform { spawner: pool.spawner(), faults: Rc::default() };
    pool.run_until(test(platform, dir.path().join("journal")))
}

impl TestPlatform {
    pub(super) fn fail(&self, call: Call, after: u64, kind: io::ErrorKind) {
        *self.faults.plan.borrow_mut() = Some((call, after, kind));
    }

    pub(super) fn heal(&self) {
        *self.faults.plan.borrow_mut() = None;
    }

    pub(super) fn syncs(&self) -> u64 {
        self.faults.syncs.get()
    }

    /// Lets other tasks run, counts, and fails if it is planned.
    async fn call(&self, call: Call) -> io::Result<()> {
        yield_once().await;
        match call {
            Call::Write => self.faults.writes.set(self.faults.writes.get() + 1),
            Call::Sync => self.faults.syncs.set(self.faults.syncs.get() + 1),
            Call::Rename | Call::SyncDir => {}
        }
        match &mut *self.faults.plan.borrow_mut() {
            Some((planned, 0, kind)) if *planned == call => Err(io::Error::new(*kind, "injected")),
            Some((planned, after, _)) if *planned == call => {
                *after -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Pending once, so that every other ready task gets a turn.
pub(super) async fn yield_once() {
    let mut yielded = false;
    futures::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

impl Platform for TestPlatform {
    type File = TestFile;
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    fn now(&self) -> Time {
        Time(0)
    }

    fn wall_clock_ms(&self) -> u64 {
        0
    }

    fn random_u64(&self) -> u64 {
        Blocking.random_u64()
    }

    async fn sleep(&self, _duration: Duration) {
        yield_once().await;
    }

    async fn yield_now(&self) {
        yield_once().await;
    }

    fn spawn(&self, _queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.spawner.spawn_local(task).expect("the pool runs");
    }

    /// Filled with rubbish: contents are unspecified until written.
    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![0xa5; len]
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<TestFile> {
        Ok(TestFile { file: Blocking.open(path, mode).await?, platform: self.clone() })
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Call::Rename).await?;
        Blocking.rename(from, to).await
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        Blocking.hard_link(from, to).await
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        Blocking.remove_file(path).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        Blocking.create_dir_all(path).await
    }

    async fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        Blocking.list_dir(path).await
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.call(Call::SyncDir).await?;
        Blocking.sync_dir(path).await
    }

    async fn space(&self, path: &Path) -> io::Result<SpaceInfo> {
        Blocking.space(path).await
    }
}

#[derive(Clone)]
pub(super) struct TestFile {
    file: BlockingFile,
    platform: TestPlatform,
}

impl File for TestFile {
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        assert!(len <= 1 << 20, "recovery reads at most 1 MiB at once");
        self.file.read_at(offset, len).await
    }

    /// A failing write leaves a part of it behind.
    async fn write_at(&self, offset: u64, mut buf: Vec<u8>) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && buf.len().is_multiple_of(4096), "direct I/O is aligned");
        let outcome = self.platform.call(Call::Write).await;
        if outcome.is_err() {
            buf.truncate(512);
        }
        self.file.write_at(offset, buf).await?;
        outcome
    }

    async fn write_shared_at(&self, offset: u64, data: Arc<AlignedBytes>, range: Range<usize>) -> io::Result<()> {
        self.write_at(offset, data[range].to_vec()).await
    }

    async fn clone_range(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> io::Result<()> {
        self.file.clone_range(offset, &source.file, source_offset, len).await
    }

    async fn datasync(&self) -> io::Result<()> {
        self.platform.call(Call::Sync).await?;
        self.file.datasync().await
    }

    async fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.deallocate(offset, len).await
    }

    async fn stored(&self, range: std::ops::Range<u64>, max: usize) -> io::Result<Vec<std::ops::Range<u64>>> {
        self.file.stored(range, max).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len).await
    }

    async fn len(&self) -> io::Result<u64> {
        self.file.len().await
    }

    async fn close(self) -> io::Result<()> {
        self.file.close().await
    }
}
