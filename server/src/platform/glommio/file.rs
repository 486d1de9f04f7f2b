//! Direct-I/O files: every transfer aligned, none larger than 1 MiB, all closed by name where it matters.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use futures::stream::{self, StreamExt};
use glommio::io::{DmaBuffer, DmaFile, ReadResult};

use super::clones::{self, Clone as Cloning};
use super::plain_error;
use crate::platform::blocking::stored;
use crate::platform::{AlignedBytes, File};

/// Largest transfer in one system call: a single direct read of 6 MB has hung a process on today's kernels.
const TRANSFER_BYTES_MAX: usize = 1 << 20;
/// Pieces of one large transfer in flight: keeps the device busy without flooding its queue.
const TRANSFERS_IN_FLIGHT_MAX: usize = 4;
/// Alignment of offsets, lengths and buffers: the page size satisfies every device's logical block.
const ALIGNMENT_BYTES: u64 = 4096;
/// Helper threads of an executor.
pub const HELPERS: usize = 4;
/// Of these may write shared memory at a time; the rest is left for the calls that only block.
const SHARED_WRITES_MAX: usize = HELPERS - 1;

thread_local! {
    /// Held once more by each shared write of this executor that a helper thread has.
    static SHARED_WRITES: Arc<()> = Arc::default();
}

/// A handle to an open file; the descriptor closes with the last clone.
#[derive(Clone)]
pub struct GlommioFile {
    file: Rc<DmaFile>,
}

/// What a read returned: the kernel's own buffer, or several joined.
pub enum ReadBytes {
    Single(ReadResult),
    Joined(Vec<u8>),
}

impl Deref for ReadBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            ReadBytes::Single(result) => result,
            ReadBytes::Joined(bytes) => bytes,
        }
    }
}

impl From<ReadBytes> for Vec<u8> {
    fn from(read: ReadBytes) -> Vec<u8> {
        match read {
            ReadBytes::Single(result) => result.to_vec(),
            ReadBytes::Joined(bytes) => bytes,
        }
    }
}

/// Memory for direct writes, registered with the kernel while that lasts.
pub struct WriteBytes(DmaBuffer);

impl WriteBytes {
    pub(super) fn new(len: usize) -> WriteBytes {
        WriteBytes(glommio::allocate_dma_buffer(len))
    }
}

impl Deref for WriteBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl DerefMut for WriteBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_bytes_mut()
    }
}

impl GlommioFile {
    pub(super) fn new(file: DmaFile) -> GlommioFile {
        GlommioFile { file: Rc::new(file) }
    }

    async fn read_piece(&self, offset: u64, len: usize) -> io::Result<ReadResult> {
        self.file.read_at_aligned(offset, len).await.map_err(plain_error)
    }

    /// Reads up to the first short piece, which is the end of the file.
    async fn read_joined(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut pieces = stream::iter(pieces(len))
            .map(|(at, piece_len)| async move { (piece_len, self.read_piece(offset + at as u64, piece_len).await) })
            .buffered(TRANSFERS_IN_FLIGHT_MAX);
        let mut joined = Vec::with_capacity(len);
        let mut outcome = Ok(());
        let mut ended = false;
        // Every piece is awaited even after an error: a read in flight is never dropped.
        while let Some((piece_len, result)) = pieces.next().await {
            match result {
                Ok(bytes) if !ended && outcome.is_ok() => {
                    joined.extend_from_slice(&bytes);
                    ended = bytes.len() < piece_len;
                }
                Ok(_) => {}
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| joined)
    }

    /// A descriptor of its own, for a call that outlives a caller that goes away. (`DmaFile` reads and writes at
    /// offsets, so nobody minds that the two share their position.)
    pub(super) fn own_descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor is open as long as `self.file` lives.
        unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) }.try_clone_to_owned()
    }

    async fn write_piece(&self, offset: u64, buf: WriteBytes) -> io::Result<()> {
        let len = buf.len();
        let written = self.file.write_at(buf.0, offset).await.map_err(plain_error)?;
        if written == len {
            return Ok(());
        }
        Err(short_write(written, len, offset))
    }
}

impl File for GlommioFile {
    type WriteBuf = WriteBytes;
    type ReadBuf = ReadBytes;

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<ReadBytes> {
        check_aligned("read", offset, len as u64)?;
        if len <= TRANSFER_BYTES_MAX {
            return Ok(ReadBytes::Single(self.read_piece(offset, len).await?));
        }
        Ok(ReadBytes::Joined(self.read_joined(offset, len).await?))
    }

    async fn write_at(&self, offset: u64, buf: WriteBytes) -> io::Result<()> {
        check_aligned("write", offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        if buf.len() <= TRANSFER_BYTES_MAX {
            return self.write_piece(offset, buf).await;
        }
        // A DmaBuffer can't be cut, so large writes pay one copy; the data path never writes more than a chunk.
        for (at, piece_len) in pieces(buf.len()) {
            let mut piece = WriteBytes::new(piece_len);
            piece.copy_from_slice(&buf[at..at + piece_len]);
            self.write_piece(offset + at as u64, piece).await?;
        }
        Ok(())
    }

    /// io_uring through glommio takes only glommio's own memory: a helper thread writes any other. When those are
    /// busy, which a stalled disk may keep them, a copy goes the usual way.
    async fn write_shared_at(&self, offset: u64, data: Arc<AlignedBytes>, range: Range<usize>) -> io::Result<()> {
        check_aligned("write", offset, range.len() as u64)?;
        check_aligned("write from memory", range.start as u64, 0)?;
        let helper = SHARED_WRITES.with(Arc::clone);
        if Arc::strong_count(&helper) > SHARED_WRITES_MAX + 1 {
            let mut copy = WriteBytes::new(range.len());
            copy.copy_from_slice(&data[range]);
            return self.write_at(offset, copy).await;
        }
        let file = std::fs::File::from(self.own_descriptor()?);
        super::off_reactor(move || {
            let written = write_direct(&file, offset, &data[range]);
            drop(helper);
            written
        })
        .await
    }

    async fn clone_range(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> io::Result<()> {
        check_aligned("clone", offset, len)?;
        check_aligned("clone from", source_offset, 0)?;
        let clone = Cloning { file: self.clone(), offset, source: source.clone(), source_offset, len };
        clones::join(source.file.as_raw_fd(), clone).await
    }

    async fn datasync(&self) -> io::Result<()> {
        self.file.fdatasync().await.map_err(plain_error)
    }

    async fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        check_aligned("deallocation", offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.file.deallocate(offset, len).await.map_err(plain_error)
    }

    async fn stored(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Range<u64>>> {
        let file = self.own_descriptor()?;
        super::off_reactor(move || stored(&file, range, max)).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.truncate(len).await.map_err(plain_error)
    }

    async fn len(&self) -> io::Result<u64> {
        self.file.file_size().await.map_err(plain_error)
    }

    async fn close(self) -> io::Result<()> {
        // With other clones alive the descriptor stays open for them and closes with the last.
        self.file.close_rc().await.map(|_| ()).map_err(plain_error)
    }
}

fn write_direct(file: &std::fs::File, offset: u64, data: &[u8]) -> io::Result<()> {
    for (at, piece_len) in pieces(data.len()) {
        let offset = offset + at as u64;
        let written = loop {
            match file.write_at(&data[at..at + piece_len], offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        if written != piece_len {
            return Err(short_write(written, piece_len, offset));
        }
    }
    Ok(())
}

/// A short direct write means that the device or quota is full, or failed in the middle: never a signal.
fn short_write(written: usize, len: usize, offset: u64) -> io::Error {
    io::Error::new(io::ErrorKind::WriteZero, format!("wrote only {written} of {len} bytes at {offset}"))
}

/// Offset and length of each piece of a transfer.
fn pieces(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(TRANSFER_BYTES_MAX).map(move |at| (at, TRANSFER_BYTES_MAX.min(len - at)))
}

fn check_aligned(what: &str, offset: u64, len: u64) -> io::Result<()> {
    if offset.is_multiple_of(ALIGNMENT_BYTES) && len.is_multiple_of(ALIGNMENT_BYTES) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{what} of {len} bytes at {offset} is not aligned to {ALIGNMENT_BYTES}"),
    ))
}
