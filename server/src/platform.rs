//! The platform seam: all that shard code may know of the world outside it.
//!
//! Three implementations: `glommio` (production shards), `sim` (deterministic, seeded, virtual time, a disk that
//! loses or tears unsynced writes), `blocking` (std, for command-line tools that need no server; its futures are
//! ready at once). Everything under `shard/`, `journal/`, `object_store/` and `cache/` is generic over [`Platform`].

pub mod blocking;
pub mod glommio;
mod memory;
pub mod sim;

use std::future::Future;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use memory::AlignedBytes;

/// Monotonic time in nanoseconds since an arbitrary origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

impl Time {
    #[must_use]
    pub fn after(self, d: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time passed since `earlier`; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Which task queue a task runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Guest I/O, priority fetches, connections, messages between shards: latency matters.
    Serve,
    /// Background hydration and upkeep.
    Background,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Existing file, read only.
    Read,
    /// Existing file, read and write.
    ReadWrite,
    /// New file, read and write; fails with `AlreadyExists`.
    CreateNew,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    pub name: String,
    pub is_dir: bool,
    pub len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceInfo {
    pub total_bytes: u64,
    pub free_bytes: u64,
}

pub trait Platform: Clone + 'static {
    type File: File<WriteBuf = Self::WriteBuf, ReadBuf = Self::ReadBuf>;
    /// Aligned for direct I/O; contents are unspecified until written.
    type WriteBuf: DerefMut<Target = [u8]> + 'static;
    type ReadBuf: Deref<Target = [u8]> + Into<Vec<u8>> + 'static;

    fn now(&self) -> Time;
    fn wall_clock_ms(&self) -> u64;
    fn random_u64(&self) -> u64;
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()>;
    /// Gives way to other tasks if this one has had its share.
    fn yield_now(&self) -> impl Future<Output = ()>;
    /// Runs a task to its end, detached.
    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static);
    fn alloc(&self, len: usize) -> Self::WriteBuf;

    /// Direct I/O: offsets, lengths and buffers are multiples of 4096.
    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = io::Result<Self::File>>;
    /// Replaces `to`. Durable after [`Platform::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;
    /// Creates `to` as another name of `from`; `AlreadyExists` if taken. The atomic step of put-if-absent.
    fn hard_link(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;
    fn remove_file(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    fn create_dir_all(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Sorted by name.
    fn list_dir(&self, path: &Path) -> impl Future<Output = io::Result<Vec<DirEntry>>>;
    fn sync_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    fn space(&self, path: &Path) -> impl Future<Output = io::Result<SpaceInfo>>;
}

/// An open file; clones are handles to the same file. Every implementation splits large requests itself
/// (at most 1 MiB in one system call).
#[allow(clippy::len_without_is_empty, reason = "a file's length is I/O, and nobody asks whether it is zero")]
pub trait File: Clone + 'static {
    type WriteBuf;
    type ReadBuf;

    /// Reads `len` bytes at `offset` (both multiples of 4096); shorter only at the end of the file.
    fn read_at(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Self::ReadBuf>>;
    /// Writes the whole buffer (a multiple of 4096 long) at `offset`.
    fn write_at(&self, offset: u64, buf: Self::WriteBuf) -> impl Future<Output = io::Result<()>>;
    /// Writes `data[range]` (offset and both ends multiples of 4096) at `offset` from where it is. Meant for large
    /// pieces of memory that others use too: for small ones [`File::write_at`] costs less.
    fn write_shared_at(
        &self,
        offset: u64,
        data: Arc<AlignedBytes>,
        range: Range<usize>,
    ) -> impl Future<Output = io::Result<()>>;
    /// Makes `len` bytes at `offset` those of `source` at `source_offset` (all three multiples of 4096, both ranges inside
    /// their files): the two share them on the disk until one is written. `Unsupported` where the filesystem can't. What
    /// `source` holds there was written before the call. A later [`File::datasync`] of this file makes the bytes durable
    /// in it, whether or not `source` is ever synced.
    fn clone_range(
        &self,
        offset: u64,
        source: &Self,
        source_offset: u64,
        len: u64,
    ) -> impl Future<Output = io::Result<()>>;
    /// Makes every completed write, clone, deallocation and length change durable.
    fn datasync(&self) -> impl Future<Output = io::Result<()>>;
    /// Punches a hole: the range (multiples of 4096) reads as zeroes.
    fn deallocate(&self, offset: u64, len: u64) -> impl Future<Output = io::Result<()>>;
    /// The parts of a byte range that take storage, in order: at most `max` of them. All else reads as zeroes.
    fn stored(&self, range: Range<u64>, max: usize) -> impl Future<Output = io::Result<Vec<Range<u64>>>>;
    fn set_len(&self, len: u64) -> impl Future<Output = io::Result<()>>;
    fn len(&self) -> impl Future<Output = io::Result<u64>>;
    fn close(self) -> impl Future<Output = io::Result<()>>;
}

/// A connection's byte stream, already accepted. Reader and writer halves are used by one task each.
pub trait Connection: 'static {
    type Reader: ByteReader;
    type Writer: ByteWriter;
    fn split(self) -> (Self::Reader, Self::Writer);
    fn peer(&self) -> String;
    /// What closes the connection in both directions: a read that waits ends, a write that waits fails.
    fn hang_up(&self) -> impl Fn() + 'static;
}

pub trait ByteReader: 'static {
    /// Reads some bytes into `buf`; 0 means the peer closed. Never dropped half-way.
    fn read(&mut self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>>;
}

pub trait ByteWriter: 'static {
    fn write_all(&mut self, buf: &[u8]) -> impl Future<Output = io::Result<()>>;
}
