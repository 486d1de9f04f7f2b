//! Which sectors of a volume differ from its snapshot: what a verification says of chunks that are not equal as a whole.

use serde::{Deserialize, Serialize};

use crate::snapshot::is_zero;
use crate::types::SECTOR_BYTES;

/// Runs that one answer, and a report, names.
const RUNS_MAX: usize = 10_000;

/// Sectors that hold something else than the snapshot has there.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differing {
    /// Chunks of which something was fetched from the object store, to compare it.
    chunks_compared: u32,
    pub differing_bytes: u64,
    /// Runs of neighbouring sectors.
    pub differing_runs: u64,
    /// The first of them, in order.
    pub runs: Vec<Run>,
    /// Where the last run ends.
    #[serde(skip)]
    end: u64,
}

/// Bytes of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub offset: u64,
    pub bytes: u64,
}

impl Differing {
    /// Compares a chunk. Of the volume are given the parts that are in it, with their offsets in the device; `wanted` is what the
    /// snapshot has from `offset` on, behind which are zeroes.
    pub fn compare(&mut self, parts: &[(u64, Vec<u8>)], offset: u64, wanted: &[u8]) {
        self.chunks_compared += 1;
        for (at, part) in parts {
            for (number, sector) in part.chunks(SECTOR_BYTES as usize).enumerate() {
                let at = at + number as u64 * u64::from(SECTOR_BYTES);
                let from = usize::try_from(at - offset).unwrap_or(usize::MAX).min(wanted.len());
                let wanted = &wanted[from..(from + sector.len()).min(wanted.len())];
                let (data, rest) = sector.split_at(wanted.len());
                if data != wanted || !is_zero(rest) {
                    self.differing_bytes += sector.len() as u64;
                    self.add(Run { offset: at, bytes: sector.len() as u64 });
                }
            }
        }
    }

    /// Adds what was found behind this, which may go on where the last run ends. All of its runs have to be named.
    pub fn join(&mut self, next: Differing) {
        self.chunks_compared += next.chunks_compared;
        self.differing_bytes += next.differing_bytes;
        next.runs.into_iter().for_each(|run| self.add(run));
    }

    fn add(&mut self, run: Run) {
        let joins = self.differing_runs > 0 && run.offset == self.end;
        self.end = run.offset + run.bytes;
        if !joins {
            self.differing_runs += 1;
            if self.runs.len() < RUNS_MAX {
                self.runs.push(run);
            }
        } else if self.differing_runs == self.runs.len() as u64
            && let Some(last) = self.runs.last_mut()
        {
            last.bytes += run.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTOR: usize = SECTOR_BYTES as usize;

    #[test]
    fn neighbours_make_a_run_also_over_the_border_of_chunks() {
        let wanted = vec![7; 4 * SECTOR];
        let mut volume = wanted.clone();
        for sector in [0, 2, 3] {
            volume[sector * SECTOR + 5] = 8;
        }
        let mut found = Differing::default();
        let chunk = volume.len() as u64;
        found.compare(&[(0, volume.clone())], 0, &wanted);
        found.compare(&[(chunk, volume)], chunk, &wanted);
        let runs: Vec<(u64, u64)> = found.runs.iter().map(|run| (run.offset, run.bytes)).collect();
        let sector = u64::from(SECTOR_BYTES);
        assert_eq!(runs, [(0, sector), (2 * sector, 3 * sector), (6 * sector, 2 * sector)]);
        assert_eq!((found.chunks_compared, found.differing_bytes, found.differing_runs), (2, 6 * sector, 3));
    }

    #[test]
    fn behind_the_snapshot_are_zeroes_and_a_last_sector_may_be_short() {
        let wanted = vec![7; SECTOR + 512];
        let mut volume = wanted.clone();
        volume.resize(3 * SECTOR - 1024, 0);
        let mut found = Differing::default();
        found.compare(&[(0, volume.clone())], 0, &wanted);
        assert_eq!((found.differing_runs, found.chunks_compared), (0, 1));
        volume[SECTOR + 512] = 1;
        volume[3 * SECTOR - 1025] = 1;
        found.compare(&[(0, volume)], 0, &wanted);
        assert_eq!(found.runs, [Run { offset: SECTOR as u64, bytes: 2 * SECTOR as u64 - 1024 }]);
    }

    #[test]
    fn parts_are_compared_with_what_the_snapshot_has_at_their_place() {
        let wanted: Vec<u8> = (0..4).flat_map(|sector| vec![sector; SECTOR]).collect();
        let at = |sector: usize| (1 << 20) + (sector * SECTOR) as u64;
        let mut found = Differing::default();
        found.compare(&[(at(1), vec![1; SECTOR]), (at(3), vec![4; SECTOR])], at(0), &wanted);
        assert_eq!(found.runs, [Run { offset: at(3), bytes: SECTOR as u64 }]);
    }

    #[test]
    fn more_runs_than_are_listed_are_counted() {
        let (wanted, sectors) = (Vec::new(), 2 * RUNS_MAX + 6);
        let mut volume = vec![0; sectors * SECTOR];
        (0..sectors).step_by(2).for_each(|sector| volume[sector * SECTOR] = 1);
        let mut found = Differing::default();
        found.compare(&[(0, volume)], 0, &wanted);
        assert_eq!((found.runs.len(), found.differing_runs), (RUNS_MAX, RUNS_MAX as u64 + 3));
        assert_eq!(found.differing_bytes, (RUNS_MAX as u64 + 3) * u64::from(SECTOR_BYTES));
    }
}
