//! What a range of a volume consists of: whether it is resident says the map, whether anything is stored the file.
//!
//! The file is asked each time, because it can't be wrong: a record of what is a hole would have to be taken back, durably,
//! before each write into one.

use volley_protocol::limits::EXTENTS_MAX;

use super::Shard;
use super::api::{Extent, Reply};
use super::residency::{SectorRange, SectorRun};
use super::volume::Volume;
use crate::error::{Error, Result, Status};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::types::{SECTOR, VolumeId};

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Extents of as much of the range as one reply can tell.
    pub(super) async fn residency(&self, id: VolumeId, offset: u64, len: u64) -> Result<Reply> {
        let volume = self.volume(id)?;
        let size = volume.spec.size_bytes;
        if offset >= size || len == 0 {
            let message = format!("volume {:?}: offset {offset} is past the end of {size} bytes", &*volume.spec.name);
            return Err(Error::new(Status::OutOfRange, message));
        }
        let end = offset.saturating_add(len).min(size);
        // The map first: what is resident stays so, and then the file has the truth of it. The other way round, a hole
        // filled in between would look like zeroes.
        let (version, mut runs) = {
            let map = volume.map.borrow();
            (map.version(), map.runs_at_most(SectorRange::covering(offset, end - offset), EXTENTS_MAX))
        };
        let stored = stored(&volume, &mut runs).await?;
        let mut extents = extents(&runs, &stored, offset, end);
        extents.truncate(EXTENTS_MAX);
        Ok(Reply::Residency { version, extents })
    }
}

/// Sectors of the resident `runs` that take storage. Runs beyond what the file told of are dropped.
async fn stored<P: Platform>(volume: &Volume<P>, runs: &mut Vec<SectorRun>) -> Result<Vec<SectorRange>> {
    let resident = || runs.iter().filter(|run| run.resident);
    let (Some(first), Some(last)) = (resident().next(), resident().next_back()) else { return Ok(Vec::new()) };
    let asked = SectorRange { start: first.start, end: last.end };
    let stored = volume.stored_sectors(asked, EXTENTS_MAX).await?;
    if stored.len() == EXTENTS_MAX {
        let known = stored[EXTENTS_MAX - 1].end;
        runs.retain_mut(|run| {
            run.end = run.end.min(known);
            run.start < run.end
        });
    }
    Ok(stored)
}

/// Runs of the map, those that are resident divided into what is stored and what is not, clipped to `offset..end`.
fn extents(runs: &[SectorRun], stored: &[SectorRange], offset: u64, end: u64) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(runs.len());
    let mut push = |start: u64, stop: u64, resident: bool, hole: bool| {
        let (start, stop) = ((start * SECTOR).max(offset), (stop * SECTOR).min(end));
        match extents.last_mut() {
            _ if start >= stop => {}
            Some(last) if last.resident == resident && last.hole == hole => last.len_bytes += stop - start,
            _ => extents.push(Extent { len_bytes: stop - start, resident, hole }),
        }
    };
    let mut stored = stored.iter().copied().peekable();
    for run in runs {
        let mut at = run.start;
        while run.resident && at < run.end {
            while stored.next_if(|data| data.end <= at).is_some() {}
            let data = stored.peek().map_or(run.end..run.end, |data| {
                data.start.clamp(at, run.end)..data.end.min(run.end).max(data.start.clamp(at, run.end))
            });
            push(at, data.start, true, true);
            push(data.start, data.end, true, false);
            at = data.end;
        }
        push(at, run.end, false, false);
    }
    extents
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECTORS: usize = 40;

    fn runs_of(flags: &[bool]) -> Vec<(u64, u64, bool)> {
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for (at, flag) in (0..).zip(flags) {
            match runs.last_mut() {
                Some(last) if last.2 == *flag => last.1 = at + 1,
                _ => runs.push((at, at + 1, *flag)),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn every_byte_is_in_the_extent_that_map_and_file_say(
            resident in prop::collection::vec(any::<bool>(), SECTORS),
            data in prop::collection::vec(any::<bool>(), SECTORS),
            from in 0u64..SECTORS as u64 * 8, blocks in 1u64..SECTORS as u64 * 8,
        ) {
            let (offset, end) = (from * 512, (from + blocks).min(SECTORS as u64 * 8) * 512);
            let touched = SectorRange::covering(offset, end - offset);
            let clip = |(start, end, flag)| (touched.start.max(start), touched.end.min(end), flag);
            let runs: Vec<_> = runs_of(&resident).into_iter().map(clip).filter(|r| r.0 < r.1)
                .map(|(start, end, resident)| SectorRun { start, end, resident }).collect();
            let stored: Vec<_> = runs_of(&data).into_iter().filter(|r| r.2)
                .map(|(start, end, _)| SectorRange { start, end }).collect();
            let found = extents(&runs, &stored, offset, end);
            prop_assert_eq!(found.iter().map(|e| e.len_bytes).sum::<u64>(), end - offset);
            let mut at = offset;
            for (n, extent) in found.iter().enumerate() {
                for block in at / 512..(at + extent.len_bytes) / 512 {
                    let sector = (block / 8) as usize;
                    prop_assert_eq!(extent.resident, resident[sector]);
                    prop_assert_eq!(extent.hole, resident[sector] && !data[sector]);
                }
                at += extent.len_bytes;
                prop_assert!(extent.len_bytes > 0);
                prop_assert!(n == 0 || (found[n - 1].resident, found[n - 1].hole) != (extent.resident, extent.hole));
            }
        }
    }
}
