//! What a volume's disk really holds, chunk by chunk, and putting back what rotted there.

use std::ops::Range;

use crate::error::Result;
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::CheckedChunk;
use crate::shard::fill_turns::FillTurn;
use crate::shard::hydration_queue::Class;
use crate::shard::locks::Mode;
use crate::shard::residency::SectorRange;
use crate::snapshot::is_zero;
use crate::types::{SECTOR_BYTES, VolumeId};

const SECTOR: u64 = SECTOR_BYTES as u64;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Reads a chunk from the volume's disk, when its turn has come.
    pub(super) async fn check_chunk(&self, id: VolumeId, chunk: u32) -> Result<CheckedChunk> {
        self.refuse_when_stopping()?;
        let volume = self.volume(id)?;
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let bytes = (whole.end - whole.start) * SECTOR;
        let _turn =
            self.0.stores[volume.store].fills.turn(&self.0.platform, bytes, FillTurn::Paced(Class::Background)).await;
        // Guests that write meanwhile would be seen half.
        let _alone = volume.locks.lock(chunk, Mode::Alone).await;
        let changed = volume.changes.borrow().is_changed(chunk);
        if !volume.map.borrow().is_chunk_resident(chunk) {
            return Ok(CheckedChunk { digest: None, zero: false, changed });
        }
        let read = volume.read_sectors(whole).await?;
        let content = &read[..self.bytes_in_device(volume.spec.size_bytes, whole)];
        Ok(CheckedChunk { digest: Some(*blake3::hash(content).as_bytes()), zero: is_zero(content), changed })
    }

    /// What is not in the volume: as bytes of the device.
    pub(super) fn absent(&self, name: &str, max: usize) -> Result<Vec<Range<u64>>> {
        let volume = self.by_name(name)?;
        let (map, size) = (volume.map.borrow(), volume.spec.size_bytes);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut next = map.next_absent_chunk(0);
        while let Some(chunk) = next {
            for absent in map.absent_runs(chunk) {
                let range = absent.start * SECTOR..(absent.end * SECTOR).min(size);
                let full = ranges.len() >= max;
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ if full => return Ok(ranges),
                    _ => ranges.push(range),
                }
            }
            next = map.next_absent_chunk(chunk + 1);
        }
        Ok(ranges)
    }

    /// Writes over a chunk what it should hold. `false`: a guest has written to it, so nobody knows what it should hold.
    pub(super) async fn repair_chunk(&self, id: VolumeId, chunk: u32, content: Vec<u8>) -> Result<bool> {
        self.refuse_when_stopping()?;
        let volume = self.volume(id)?;
        let _alone = volume.locks.lock(chunk, Mode::Alone).await;
        if volume.changes.borrow().is_changed(chunk) != Some(false) || !volume.map.borrow().is_chunk_resident(chunk) {
            return Ok(false);
        }
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let mut buf = self.0.platform.alloc(((whole.end - whole.start) * SECTOR) as usize);
        crate::shard::volume::copy_padded(&mut buf, &content, 0);
        volume.write_sectors(whole.start, buf).await?;
        self.note_dirty(&volume);
        Ok(true)
    }

    fn bytes_in_device(&self, size_bytes: u64, sectors: SectorRange) -> usize {
        ((sectors.end * SECTOR).min(size_bytes) - sectors.start * SECTOR) as usize
    }
}
