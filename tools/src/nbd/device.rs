//! Requests of any alignment over an export of 512-byte blocks, whoever sends them.
//!
//! NBD clients that never asked for the block size may read and write single bytes. Edges of such writes are
//! read-modify-written under a range lock shared by all connections to the export, so two clients that write different
//! bytes of one block both find theirs. Aligned requests pass through and copy nothing; those that overlap run one
//! after the other.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::backend::{ErrorKind, Export, ExportError, Extent, Result};
use super::range_lock::RangeLock;
use super::wire;

const BLOCK: u64 = wire::BLOCK_BYTES_MIN as u64;
/// Zeroes written at a time where a client insists on allocated storage.
const ZERO_WRITE_BYTES: u64 = 1 << 20;
static ZEROES: [u8; ZERO_WRITE_BYTES as usize] = [0; ZERO_WRITE_BYTES as usize];

/// An attached export behind its range locks.
#[derive(Debug)]
pub struct Device<E> {
    export: E,
    locks: RangeLock,
}

impl<E: Export> Device<E> {
    /// Wraps an attached export.
    pub fn new(export: E) -> Device<E> {
        Device { export, locks: RangeLock::default() }
    }

    /// The export inside.
    pub fn export(&self) -> &E {
        &self.export
    }

    /// Exactly `len` bytes from `offset`.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let wanted = offset..offset + u64::from(len);
        let cover = cover(&wanted);
        let data = self.export.read(cover.start, length_u32(&cover)?).await?;
        if data.len() as u64 != cover.end - cover.start {
            let want = cover.end - cover.start;
            return Err(ExportError::new(ErrorKind::Io, format!("read of {want} bytes returned {}", data.len())));
        }
        let skip = (wanted.start - cover.start) as usize;
        Ok(data.slice(skip..skip + len as usize))
    }

    /// Writes `data` at `offset`, whole blocks or not.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        if data.is_empty() {
            return if fua { self.export.flush().await } else { Ok(()) };
        }
        let wanted = offset..offset + data.len() as u64;
        let cover = cover(&wanted);
        let _held = self.locks.lock(cover.clone()).await;
        if cover == wanted {
            return self.export.write(offset, data, fua).await;
        }
        let whole = self.merge(&cover, &wanted, &data).await?;
        self.export.write(cover.start, whole, fua).await
    }

    /// Zeroes a range, whole blocks or not; `allocate` writes the zeroes out so that storage stays allocated.
    pub async fn write_zeroes(&self, offset: u64, len: u32, fua: bool, allocate: bool) -> Result<()> {
        let wanted = offset..offset + u64::from(len);
        let inner = inner(&wanted);
        if inner.is_empty() {
            return self.write(offset, Bytes::from_static(&ZEROES[..len as usize]), fua).await;
        }
        let edges = [wanted.start..inner.start, inner.end..wanted.end];
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            let zeroes = Bytes::from_static(&ZEROES[..(edge.end - edge.start) as usize]);
            self.write(edge.start, zeroes, fua).await?;
        }
        let _held = self.locks.lock(inner.clone()).await;
        if !allocate {
            return self.export.write_zeroes(inner.start, inner.end - inner.start, fua).await;
        }
        let mut at = inner.start;
        while at < inner.end {
            let len = ZERO_WRITE_BYTES.min(inner.end - at);
            self.export.write(at, Bytes::from_static(&ZEROES[..len as usize]), fua).await?;
            at += len;
        }
        Ok(())
    }

    /// Discards the whole blocks of a range. TRIM is advice: bytes of blocks it covers in part stay as they are.
    pub async fn trim(&self, offset: u64, len: u32, fua: bool) -> Result<()> {
        let inner = inner(&(offset..offset + u64::from(len)));
        if !inner.is_empty() {
            let _held = self.locks.lock(inner.clone()).await;
            self.export.discard(inner.start, inner.end - inner.start).await?;
        }
        if fua { self.export.flush().await } else { Ok(()) }
    }

    /// Makes every answered write durable.
    pub async fn flush(&self) -> Result<()> {
        self.export.flush().await
    }

    /// Brings a range into the volume ahead of background work.
    pub async fn prefetch(&self, offset: u64, len: u32) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let cover = cover(&(offset..offset + u64::from(len)));
        self.export.prefetch(cover.start, cover.end - cover.start).await
    }

    /// Extents that start exactly at `offset` and cover at most `len` bytes, or only a first part of them.
    pub async fn extents(&self, offset: u64, len: u32) -> Result<Vec<Extent>> {
        let wanted = offset..offset + u64::from(len);
        let cover = cover(&wanted);
        let found = self.export.extents(cover.start, cover.end - cover.start).await?;
        let clipped = clip(&found, cover.start, &wanted);
        if clipped.is_empty() {
            return Err(ExportError::new(ErrorKind::Io, "the residency map came back empty"));
        }
        Ok(clipped)
    }

    /// The blocks of `cover` as they are, with `data` laid over `wanted`. The caller holds the lock of `cover`.
    async fn merge(&self, cover: &Range<u64>, wanted: &Range<u64>, data: &[u8]) -> Result<Bytes> {
        let mut whole = BytesMut::with_capacity((cover.end - cover.start) as usize);
        if cover.start < wanted.start {
            let first = self.export.read(cover.start, BLOCK as u32).await?;
            whole.extend_from_slice(&first[..(wanted.start - cover.start) as usize]);
        }
        whole.extend_from_slice(data);
        if wanted.end < cover.end {
            let last_start = cover.end - BLOCK;
            let last = self.export.read(last_start, BLOCK as u32).await?;
            whole.extend_from_slice(&last[(wanted.end - last_start) as usize..]);
        }
        Ok(whole.freeze())
    }
}

/// The blocks that a range touches. The device ends on a block, so this never leaves it.
fn cover(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK * BLOCK..range.end.div_ceil(BLOCK) * BLOCK
}

/// The blocks that lie whole in a range; empty if there is none.
fn inner(range: &Range<u64>) -> Range<u64> {
    let start = range.start.div_ceil(BLOCK) * BLOCK;
    start..(range.end / BLOCK * BLOCK).max(start)
}

fn length_u32(range: &Range<u64>) -> Result<u32> {
    u32::try_from(range.end - range.start).map_err(|_| ExportError::new(ErrorKind::Invalid, "request of 4 GiB or more"))
}

/// The parts of `extents`, which start at `start`, that lie in `wanted`.
fn clip(extents: &[Extent], start: u64, wanted: &Range<u64>) -> Vec<Extent> {
    let mut at = start;
    let mut clipped = Vec::with_capacity(extents.len());
    for extent in extents {
        let end = at.saturating_add(extent.len_bytes);
        let (from, to) = (at.max(wanted.start), end.min(wanted.end));
        if from < to {
            clipped.push(Extent { len_bytes: to - from, ..*extent });
        }
        at = end;
    }
    clipped
}

#[cfg(test)]
mod tests;
