//! What becomes a snapshot, chunk by chunk: an image, or a volume.

use std::io;

use super::source::Source;

/// What a chunk holds.
pub(crate) enum Found {
    /// Zeroes, without looking.
    Zero,
    Bytes(Vec<u8>),
    /// What is stored under this digest already.
    Stored([u8; 32]),
}

/// A device that many threads read at once.
pub(crate) trait Device: Sync {
    /// A positive multiple of 512.
    fn device_bytes(&self) -> u64;
    /// Chunk `index`: `len` bytes at `offset`.
    fn chunk(&self, index: u32, offset: u64, len: u32) -> io::Result<Found>;
}

impl Device for Source {
    fn device_bytes(&self) -> u64 {
        Source::device_bytes(self)
    }

    fn chunk(&self, _index: u32, offset: u64, len: u32) -> io::Result<Found> {
        Ok(self.read(offset, len)?.map_or(Found::Zero, Found::Bytes))
    }
}
