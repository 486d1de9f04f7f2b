//! What a volume's disk really holds, chunk by chunk, and putting back what rotted there.

use std::ops::Range;

use crate::error::{Error, Result, Status};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::CheckedChunk;
use crate::shard::fill_turns::FillTurn;
use crate::shard::hydration_queue::Class;
use crate::shard::locks::Mode;
use crate::shard::residency::SectorRange;
use crate::shard::volume::Volume;
use crate::snapshot::is_zero;
use crate::types::{SECTOR, SnapshotRef, VolumeId};

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Reads a chunk from the volume's disk, when its turn has come.
    pub(super) async fn check_chunk(
        &self,
        id: VolumeId,
        chunk: u32,
        len: u32,
        base: Option<&SnapshotRef>,
        content: bool,
    ) -> Result<CheckedChunk> {
        self.refuse_when_stopping()?;
        let volume = self.volume(id)?;
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let bytes = (whole.end - whole.start) * SECTOR;
        let _turn =
            self.0.stores[volume.store].fills.turn(&self.0.platform, bytes, FillTurn::Paced(Class::Background)).await;
        // Guests that write meanwhile would be seen half.
        let _alone = volume.locks.lock(chunk, Mode::Alone).await;
        check_base(&volume, base)?;
        let changed = volume.changes.borrow().is_changed(chunk);
        if !volume.map.borrow().is_chunk_resident(chunk) {
            let content = if content { resident_parts(&volume, whole).await? } else { Vec::new() };
            return Ok(CheckedChunk { digest: None, rest_is_zero: false, changed, content });
        }
        let read = volume.read_sectors(whole).await?;
        let read = &read[..bytes_in_device(&volume, whole)];
        let (data, rest) = read.split_at((len as usize).min(read.len()));
        let (digest, rest_is_zero) = (Some(*blake3::hash(data).as_bytes()), is_zero(rest));
        let content = if content { vec![(whole.start * SECTOR, read.to_vec())] } else { Vec::new() };
        Ok(CheckedChunk { digest, rest_is_zero, changed, content })
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

    /// Writes over a chunk what it has in `base`. `false`: a guest has written to it, so nobody knows what it should hold.
    pub(super) async fn repair_chunk(
        &self,
        id: VolumeId,
        chunk: u32,
        base: Option<&SnapshotRef>,
        content: &[u8],
    ) -> Result<bool> {
        self.refuse_when_stopping()?;
        let volume = self.volume(id)?;
        let rotted = |volume: &Volume<P>| {
            check_base(volume, base)?;
            Ok(volume.changes.borrow().is_changed(chunk) == Some(false))
        };
        let repaired = volume.overwrite(chunk, content, rotted).await?;
        self.note_dirty(&volume);
        Ok(repaired)
    }
}

/// What of the range is in the volume. Under the chunk's lock.
async fn resident_parts<P: Platform>(volume: &Volume<P>, range: SectorRange) -> Result<Vec<(u64, Vec<u8>)>> {
    let runs = volume.map.borrow().runs(range);
    let mut parts = Vec::new();
    for run in runs.into_iter().filter(|run| run.resident) {
        let run = SectorRange { start: run.start, end: run.end };
        let read = volume.read_sectors(run).await?;
        parts.push((run.start * SECTOR, read[..bytes_in_device(volume, run)].to_vec()));
    }
    Ok(parts)
}

/// How much of these sectors lies in the device.
fn bytes_in_device<P: Platform>(volume: &Volume<P>, range: SectorRange) -> usize {
    (range.end * SECTOR).min(volume.spec.size_bytes).saturating_sub(range.start * SECTOR) as usize
}

/// What was asked about goes by an account of changes that is still the volume's.
pub(super) fn check_base<P: Platform>(volume: &Volume<P>, base: Option<&SnapshotRef>) -> Result<()> {
    match volume.changes.borrow().base() == base {
        true => Ok(()),
        false => {
            let text = format!("a snapshot of volume {:?} was taken meanwhile: try again", &*volume.spec.name);
            Err(Error::new(Status::Conflict, text))
        }
    }
}
