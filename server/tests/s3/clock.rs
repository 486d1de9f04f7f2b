//! A machine whose clock is off: the store refuses its signatures, and the line says why.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use futures::executor::block_on;
use volley_server::object_store::ObjectError;
use volley_server::object_store::any::StoreChoice;
use volley_server::object_store::s3::{RequestPolicy, S3Store};
use volley_server::platform::blocking::{Blocking, BlockingFile, BlockingHttp};
use volley_server::platform::{DirEntry, OpenMode, Platform, Queue, SpaceInfo, Time};

use crate::lab::Lab;

/// The tools' platform with a calendar that is this far ahead.
#[derive(Clone)]
struct Skewed(i64);

impl Platform for Skewed {
    type File = BlockingFile;
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    fn now(&self) -> Time {
        Blocking.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        Blocking.wall_clock_ms().saturating_add_signed(self.0 * 1000)
    }

    fn random_u64(&self) -> u64 {
        Blocking.random_u64()
    }

    async fn sleep(&self, duration: Duration) {
        Blocking.sleep(duration).await;
    }

    async fn yield_now(&self) {}

    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static) {
        Blocking.spawn(queue, task);
    }

    fn alloc(&self, len: usize) -> Vec<u8> {
        Blocking.alloc(len)
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<BlockingFile> {
        Blocking.open(path, mode).await
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
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
        Blocking.sync_dir(path).await
    }

    async fn space(&self, path: &Path) -> io::Result<SpaceInfo> {
        Blocking.space(path).await
    }
}

#[test]
fn a_clock_that_is_off_by_an_hour_is_named() {
    let lab = Lab::new();
    let StoreChoice::S3(settings) = lab.choice() else { panic!("a bucket") };
    let check = |seconds| {
        let http = BlockingHttp::new(None).expect("transport");
        let store = S3Store::new(Skewed(seconds), http, (*settings).clone(), RequestPolicy::TOOL).expect("store");
        (block_on(store.check()), block_on(store.clock_skew_seconds()))
    };
    let (sound, skew) = check(0);
    sound.expect("a sound clock");
    assert!(skew.expect("answer").expect("a date").abs() <= 2);
    for (seconds, side) in [(3600, "s ahead of"), (-3600, "s behind")] {
        match check(seconds).0 {
            Err(ObjectError::Fatal(line)) => {
                assert!(line.contains("s3://images/prod at http://127.0.0.1") && line.contains("NTP"), "{line}");
                assert!(line.contains("clock is 3") && line.contains(side), "{line}");
            }
            other => panic!("{seconds}: {other:?}"),
        }
    }
}
