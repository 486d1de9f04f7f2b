//! Writing a segment file: batches at the end of it, space reserved ahead, and what a failure means.

use std::io;
use std::path::{Path, PathBuf};

use super::frame::{self, BLOCK_BYTES, SegmentHeader, SegmentName};
use crate::platform::{File, OpenMode, Platform};

/// Zeroes written ahead of the log at once, so that a commit overwrites allocated blocks: its datasync then flushes data
/// only, not the file's length and extents. One more megabyte written per megabyte of log; a full disk shows here.
const RESERVE_BYTES: u64 = 1 << 20;

/// The half of a batch that failed.
#[derive(Debug)]
pub(super) enum BatchError {
    /// Nothing is acknowledged and nothing is lost: the same bytes may be written to the same place again.
    Write(io::Error),
    /// What is on the disk is unknown, and a second sync may lie about it.
    Sync(io::Error),
}

/// A segment file open for appending.
pub(super) struct Segment<P: Platform> {
    file: P::File,
    pub(super) path: PathBuf,
    segment_id: u64,
    next_number: u64,
    /// Where the next batch goes.
    pub(super) end: u64,
    /// Blocks before this are allocated.
    reserved_end: u64,
}

impl<P: Platform> Segment<P> {
    /// Makes the file under its temporary name, replacing one that a crash left. Nothing is synced yet.
    pub(super) async fn create_tmp(platform: &P, dir: &Path, name: SegmentName) -> io::Result<Segment<P>> {
        let path = dir.join(name.tmp_file_name());
        remove_if_exists(platform, &path).await?;
        let file = platform.open(&path, OpenMode::CreateNew).await?;
        let segment_id = platform.random_u64();
        let mut block = platform.alloc(BLOCK_BYTES);
        SegmentHeader { name, segment_id }.encode(&mut block);
        let end = BLOCK_BYTES as u64;
        let segment: Segment<P> = Segment { file, path, segment_id, next_number: 0, end, reserved_end: end };
        match segment.file.write_at(0, block).await {
            Ok(()) => Ok(segment),
            Err(error) => {
                segment.remove(platform).await;
                Err(error)
            }
        }
    }

    /// Writes a batch without syncing it: part of a checkpoint.
    pub(super) async fn write(&mut self, platform: &P, payload: &[u8]) -> io::Result<()> {
        let bytes = frame::batch_bytes(payload.len());
        let mut buf = platform.alloc(bytes);
        frame::encode_batch(self.segment_id, self.next_number, payload, &mut buf);
        self.file.write_at(self.end, buf).await?;
        self.next_number += 1;
        self.end += bytes as u64;
        self.reserved_end = self.reserved_end.max(self.end);
        Ok(())
    }

    pub(super) async fn sync(&self) -> io::Result<()> {
        self.file.datasync().await
    }

    /// Writes a batch and makes it durable.
    pub(super) async fn commit(&mut self, platform: &P, payload: &[u8]) -> Result<(), BatchError> {
        self.reserve(platform, payload.len()).await.map_err(BatchError::Write)?;
        self.write(platform, payload).await.map_err(BatchError::Write)?;
        self.sync().await.map_err(BatchError::Sync)
    }

    /// Gives the synced file its final name, durably. On an error it may have either name.
    pub(super) async fn publish(&mut self, platform: &P, dir: &Path, name: SegmentName) -> io::Result<()> {
        let path = dir.join(name.file_name());
        platform.rename(&self.path, &path).await?;
        self.path = path;
        platform.sync_dir(dir).await
    }

    /// Closes the file; the data's fate was decided by its syncs, so an error here changes nothing.
    pub(super) async fn close(self) {
        if let Err(error) = self.file.close().await {
            tracing::warn!("journal file {}: closing: {error}", self.path.display());
        }
    }

    /// Closes and removes the file; failing to remove it costs only space.
    pub(super) async fn remove(self, platform: &P) {
        let path = self.path.clone();
        self.close().await;
        if let Err(error) = platform.remove_file(&path).await {
            tracing::warn!("journal file {}: removing: {error}; it is no longer needed", path.display());
        }
    }

    /// Zeroes lie behind the coming batch, never under it: no block is written twice between two syncs.
    async fn reserve(&mut self, platform: &P, payload_len: usize) -> io::Result<()> {
        let batch_end = self.end + frame::batch_bytes(payload_len) as u64;
        if batch_end <= self.reserved_end {
            return Ok(());
        }
        let reserve_end = batch_end.next_multiple_of(RESERVE_BYTES);
        let len = usize::try_from(reserve_end - batch_end).expect("less than RESERVE_BYTES");
        if len > 0 {
            self.file.write_at(batch_end, frame::zeroed(platform, len)).await?;
        }
        self.reserved_end = reserve_end;
        Ok(())
    }
}

/// Removes a file that may not be there.
pub(super) async fn remove_if_exists<P: Platform>(platform: &P, path: &Path) -> io::Result<()> {
    match platform.remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
