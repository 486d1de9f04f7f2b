//! The production platform: glommio executors, direct I/O through io_uring, real clocks and sockets.
//!
//! Owns the two task queues of a shard and the translation of glommio's errors back to plain `io::Error`s, so that
//! `StorageFull`, `NotFound` and `AlreadyExists` mean the same here and in the simulator. What the kernel can only
//! do blocking (directories, links, `statvfs`) runs on glommio's helper threads, never on the reactor.
#![allow(clippy::disallowed_methods)] // This is the seam: the one place that may touch std time, files and glommio.

mod clones;
mod file;
mod http;
mod net;
mod pulse;
#[cfg(test)]
mod tests;
mod timers;

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use glommio::io::OpenOptions;
use glommio::{GlommioError, Latency, Shares, TaskQueueHandle};

pub use self::file::{GlommioFile, HELPERS, ReadBytes, WriteBytes};
pub use self::http::{GlommioHttp, Resolver};
pub use self::net::{Acceptor, GlommioConnection, StreamReader, StreamWriter};
use self::pulse::Pulse;
use self::timers::Timers;
use crate::platform::{DirEntry, OpenMode, Platform, Queue, SpaceInfo, Time};

/// Serving gets ten times the time of background work when both are runnable.
const SERVE_SHARES: usize = 1000;
const BACKGROUND_SHARES: usize = 100;
/// Within this a runnable task of the serve queue is looked at: glommio preempts background work for it. What comes by the
/// ring for it does so at once. glommio sets the timer in each turn, which costs more where it is the next to be due: one of
/// 1 ms took a fifth of the reads of one request at a time.
const SERVE_LATENCY: Duration = Duration::from_millis(10);
/// A tenth of the weight of a thread that serves guests: little beside them, and never nothing.
const BACKGROUND_NICE: libc::c_int = 10;
/// Volume files hold guests' data: nobody but the server's user and group reads them.
const FILE_MODE: libc::mode_t = 0o640;

/// A handle to this thread's executor and its task queues; clones are the same platform.
#[derive(Clone)]
pub struct Glommio {
    inner: Rc<Inner>,
}

struct Inner {
    serve: TaskQueueHandle,
    background: TaskQueueHandle,
    random_state: Cell<u64>,
    timers: Rc<Timers>,
    _pulse: Pulse,
}

impl Glommio {
    /// Makes the task queues of a shard on the executor that runs the caller.
    ///
    /// # Errors
    /// When the kernel gives no random seed or no thread.
    ///
    /// # Panics
    /// Outside a glommio executor.
    pub fn new() -> io::Result<Glommio> {
        let executor = glommio::executor();
        let serve = executor.create_task_queue(Shares::Static(SERVE_SHARES), Latency::Matters(SERVE_LATENCY), "serve");
        let background =
            executor.create_task_queue(Shares::Static(BACKGROUND_SHARES), Latency::NotImportant, "background");
        clones::send_by(serve);
        let random_state = Cell::new(kernel_random_u64()?);
        let timers = Rc::new(Timers::new(serve));
        let pulse = Pulse::start(background)?;
        Ok(Glommio { inner: Rc::new(Inner { serve, background, random_state, timers, _pulse: pulse }) })
    }
}

impl Platform for Glommio {
    type File = GlommioFile;
    type WriteBuf = WriteBytes;
    type ReadBuf = ReadBytes;

    fn now(&self) -> Time {
        // One origin for the process: shards may compare the times in each other's messages.
        static ORIGIN: OnceLock<Instant> = OnceLock::new();
        Time::default().after(ORIGIN.get_or_init(Instant::now).elapsed())
    }

    fn wall_clock_ms(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
    }

    fn random_u64(&self) -> u64 {
        // SplitMix64 over a seed of the kernel: ids and jitter, nothing secret.
        let state = self.inner.random_state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.inner.random_state.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    async fn sleep(&self, duration: Duration) {
        self.inner.timers.sleep(duration).await;
    }

    async fn yield_now(&self) {
        glommio::yield_if_needed().await;
    }

    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static) {
        let queue = match queue {
            Queue::Serve => self.inner.serve,
            Queue::Background => self.inner.background,
        };
        glommio::spawn_local_into(task, queue).expect("the queues live as long as the executor").detach();
    }

    fn alloc(&self, len: usize) -> WriteBytes {
        WriteBytes::new(len)
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<GlommioFile> {
        let mut options = OpenOptions::new();
        options.read(true).mode(FILE_MODE);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
        }
        // glommio asks for the file system of the path after it opened the file, and panics where the path is gone by
        // then: a deletion or a rename would end the process. The path of an open descriptor stays.
        let opened = options.buffered_open(path).await.map_err(plain_error)?;
        let of_descriptor = format!("/proc/self/fd/{}", opened.as_raw_fd());
        options.create_new(false);
        let file = options.dma_open(of_descriptor).await.map_err(plain_error);
        opened.close().await.map_err(plain_error)?;
        Ok(GlommioFile::new(file?))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (from.to_owned(), to.to_owned());
        off_reactor(move || std::fs::rename(from, to)).await
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (from.to_owned(), to.to_owned());
        off_reactor(move || std::fs::hard_link(from, to)).await
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        off_reactor(move || std::fs::remove_file(path)).await
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        off_reactor(move || std::fs::create_dir_all(path)).await
    }

    async fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let path = path.to_owned();
        off_reactor(move || list_dir(&path)).await
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        off_reactor(move || std::fs::File::open(path)?.sync_all()).await
    }

    async fn space(&self, path: &Path) -> io::Result<SpaceInfo> {
        let path = path.to_owned();
        off_reactor(move || space(&path)).await
    }
}

/// Runs a blocking call on a helper thread of the executor.
async fn off_reactor<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    glommio::executor().spawn_blocking(call).await
}

fn list_dir(path: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            // Removed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let name = entry.file_name().to_string_lossy().into_owned();
        entries.push(DirEntry { name, is_dir: metadata.is_dir(), len: metadata.len() });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn space(path: &Path) -> io::Result<SpaceInfo> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is NUL-terminated and `stats` is writable; both outlive the call.
    let result = unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statvfs returned success, so it filled the whole struct.
    let stats = unsafe { stats.assume_init() };
    let block_bytes = stats.f_frsize;
    Ok(SpaceInfo {
        total_bytes: stats.f_blocks.saturating_mul(block_bytes),
        // What an unprivileged writer may still use.
        free_bytes: stats.f_bavail.saturating_mul(block_bytes),
    })
}

/// A random number of the kernel.
///
/// # Errors
/// As `getrandom(2)`.
pub fn kernel_random_u64() -> io::Result<u64> {
    let mut bytes = [0_u8; 8];
    // SAFETY: the buffer is writable for the length passed; 8 bytes are never returned short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != 8 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from_ne_bytes(bytes))
}

/// Lets this thread, and those it starts from now on, give way to all others: for work that nobody waits for.
pub fn lower_priority() {
    // SAFETY: no memory is passed; on Linux, 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, BACKGROUND_NICE) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "the priority of a thread stays as it is");
    }
}

/// glommio wraps OS errors with the file's name and loses the number on conversion: keep the number.
fn plain_error(error: GlommioError<()>) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.into(),
    }
}
