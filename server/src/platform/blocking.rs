//! The platform of command-line tools: plain std calls whose futures are ready at once.
//!
//! It serves one thread at a time, so it is cheap to clone and may be used from many threads. It has no executor:
//! [`Platform::spawn`] runs the task to its end before it returns. The page cache is used, as tools share no memory with guests.
#![allow(clippy::disallowed_methods)] // This is one of the implementations the seam hides.

mod http;

use std::fs::{self, OpenOptions};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{AlignedBytes, DirEntry, File, OpenMode, Platform, Queue, SpaceInfo, Time};
use crate::object_store::ObjectError;
use crate::object_store::any::{AnyStore, StoreChoice};
use crate::object_store::s3::RequestPolicy;
pub use http::BlockingHttp;

/// An object store as tools use it.
pub type ToolStore = AnyStore<Blocking, BlockingHttp>;

/// The object store, asked once whether it is there, lets us in, and is ours.
///
/// # Errors
/// One line that says where, why and what to do.
pub fn open_store(choice: &StoreChoice) -> Result<ToolStore, ObjectError> {
    let http = || BlockingHttp::new(choice.http_settings().0);
    let store = choice.store(&Blocking, http, RequestPolicy::TOOL)?;
    futures::executor::block_on(store.check())?;
    Ok(store)
}

/// Blocking std I/O behind the platform seam.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blocking;

/// An open file.
#[derive(Clone, Debug)]
pub struct BlockingFile(Arc<fs::File>);

impl Platform for Blocking {
    type File = BlockingFile;
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    fn now(&self) -> Time {
        static ORIGIN: OnceLock<Instant> = OnceLock::new();
        Time::default().after(ORIGIN.get_or_init(Instant::now).elapsed())
    }

    fn wall_clock_ms(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
    }

    fn random_u64(&self) -> u64 {
        let mut bytes = [0u8; 8];
        // SAFETY: the pointer and the length are those of `bytes`; getrandom has no safe form in std.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        // Requests of up to 256 bytes are never short and fail only before the pool is initialised at boot.
        assert_eq!(got, 8, "getrandom: {}", io::Error::last_os_error());
        u64::from_ne_bytes(bytes)
    }

    async fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    async fn yield_now(&self) {}

    fn spawn(&self, _queue: Queue, task: impl Future<Output = ()> + 'static) {
        futures::executor::block_on(task);
    }

    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<BlockingFile> {
        let mut options = OpenOptions::new();
        match mode {
            OpenMode::Read => options.read(true),
            OpenMode::ReadWrite => options.read(true).write(true),
            OpenMode::CreateNew => options.read(true).write(true).create_new(true),
        };
        Ok(BlockingFile(Arc::new(options.open(path)?)))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    async fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                // Removed between the listing and the look at it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push(DirEntry { name, is_dir: metadata.is_dir(), len: metadata.len() });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    async fn space(&self, path: &Path) -> io::Result<SpaceInfo> {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        let mut info = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: `path` is NUL-terminated and `info` is writable memory of the right type.
        if unsafe { libc::statvfs(path.as_ptr(), info.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: statvfs succeeded, so it filled `info`.
        let info = unsafe { info.assume_init() };
        Ok(SpaceInfo { total_bytes: info.f_blocks * info.f_frsize, free_bytes: info.f_bavail * info.f_frsize })
    }
}

/// The parts of a byte range of a file that take storage, at most `max` of them. The file's position moves.
pub(super) fn stored(file: &impl AsRawFd, range: Range<u64>, max: usize) -> io::Result<Vec<Range<u64>>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end && parts.len() < max {
        let Some(start) = seek(file, at, libc::SEEK_DATA)?.filter(|start| *start < range.end) else { break };
        // The end of the file is a hole, so there always is one; unless the file was cut just now.
        let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(start).min(range.end);
        parts.push(start..end);
        at = end.max(at + 1);
    }
    parts.retain(|part| !part.is_empty());
    Ok(parts)
}

/// Has `file` share a part of `source`; `Unsupported` where their filesystem can't, or not at these offsets.
pub(super) fn clone_range(
    file: &impl AsRawFd,
    offset: u64,
    source: &impl AsRawFd,
    source_offset: u64,
    len: u64,
) -> io::Result<()> {
    if len == 0 {
        // The system call would take it for "up to the end".
        return Ok(());
    }
    let range = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: source_offset,
        src_length: len,
        dest_offset: offset,
    };
    // SAFETY: both descriptors are open as long as the files are borrowed, and `range` outlives the call, which reads it.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::FICLONERANGE, &raw const range) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY) => io::Error::new(io::ErrorKind::Unsupported, error),
        _ => error,
    })
}

/// Where data or a hole begins from `at` on; `None` if nowhere.
fn seek(file: &impl AsRawFd, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call touches no memory of ours.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            none if none.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

impl File for BlockingFile {
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match self.0.read_at(&mut buf[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buf.truncate(filled);
        Ok(buf)
    }

    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> io::Result<()> {
        self.0.write_all_at(&buf, offset)
    }

    async fn write_shared_at(&self, offset: u64, data: Arc<AlignedBytes>, range: Range<usize>) -> io::Result<()> {
        self.write_at(offset, data[range].to_vec()).await
    }

    async fn clone_range(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> io::Result<()> {
        clone_range(&self.0, offset, &source.0, source_offset, len)
    }

    async fn datasync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    async fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (offset, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open as long as `self.0` lives; the call touches no memory of ours.
        if unsafe { libc::fallocate(self.0.as_raw_fd(), mode, offset, len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    async fn stored(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Range<u64>>> {
        stored(&self.0, range, max)
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    async fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    async fn close(self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    #[test]
    fn files_do_what_the_seam_promises() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        block_on(async {
            let file = Blocking.open(&path, OpenMode::CreateNew).await.unwrap();
            let again = Blocking.open(&path, OpenMode::CreateNew).await.unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
            file.write_at(4096, vec![7; 8192]).await.unwrap();
            file.deallocate(8192, 4096).await.unwrap();
            file.datasync().await.unwrap();
            assert_eq!(file.read_at(4096, 12288).await.unwrap(), [vec![7; 4096], vec![0; 4096]].concat());
            let stored = async |range, max| {
                let parts = file.stored(range, max).await.unwrap();
                parts.into_iter().map(|part| (part.start, part.end)).collect::<Vec<_>>()
            };
            assert_eq!(stored(0..1 << 20, 9).await, [(4096, 8192)]);
            assert_eq!(stored(6144..7168, 9).await, [(6144, 7168)]);
            assert_eq!(stored(8192..9000, 9).await, []);
            file.write_at(20480, vec![7; 4096]).await.unwrap();
            assert_eq!(stored(0..1 << 20, 9).await, [(4096, 8192), (20480, 24576)]);
            assert_eq!(stored(0..1 << 20, 1).await, [(4096, 8192)]);
            // A clone, or a refusal that says what it is.
            match file.clone_range(12288, &file, 4096, 4096).await {
                Ok(()) => assert_eq!(file.read_at(12288, 4096).await.unwrap(), [7; 4096]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
            }
            file.set_len(5000).await.unwrap();
            assert_eq!(file.len().await.unwrap(), 5000);
            file.close().await.unwrap();
            Blocking.create_dir_all(&dir.path().join("a/b")).await.unwrap();
            Blocking.hard_link(&path, &dir.path().join("g")).await.unwrap();
            let names: Vec<_> = Blocking.list_dir(dir.path()).await.unwrap().into_iter().map(|e| e.name).collect();
            assert_eq!(names, ["a", "f", "g"]);
            assert!(Blocking.space(dir.path()).await.unwrap().total_bytes > 0);
            let before = Blocking.now();
            assert!(Blocking.now() >= before);
            assert_ne!(Blocking.random_u64(), Blocking.random_u64());
        });
    }
}
