//! The residency map: the question of every request, and the mark of every write.

use std::hint::black_box;

use volley_server::shard::residency::{ResidencyMap, SectorRange};
use volley_server::types::CHUNK_BYTES_DEFAULT;

use super::{Case, Work};

/// Look-ups or marks of a run.
const BATCH: u32 = 1024;
/// Of the volume that is asked.
const ASKED_BYTES: u64 = 100 << 30;
/// Of the volume that is written: 4 KiB in the middle of each absent chunk.
const WRITTEN_BYTES: u64 = BATCH as u64 * 2 * CHUNK_BYTES_DEFAULT as u64;

pub(super) const CASES: [Case; 3] = [
    Case::new("residency/is_resident_4k", (BATCH, "look-up"), is_resident),
    Case::new("residency/next_absent_chunk", (BATCH, "look-up"), next_absent_chunk),
    Case::new("residency/mark_written_4k", (BATCH, "mark"), mark_written),
];

/// Every other chunk resident, as in the middle of a boot storm.
fn half_resident(bytes: u64) -> ResidencyMap {
    let mut map = ResidencyMap::new(bytes, CHUNK_BYTES_DEFAULT, 0);
    for chunk in (0..map.chunks()).step_by(2) {
        map.mark_written(map.chunk_sectors(chunk));
    }
    map
}

fn is_resident() -> Box<dyn Work> {
    let map = half_resident(ASKED_BYTES);
    let mut at = 0;
    Box::new(move || {
        for _ in 0..BATCH {
            // A stride without a short period visits all of the map.
            at = (at + 7_919 * 4096) % (ASKED_BYTES - 4096);
            black_box(map.is_resident(SectorRange::covering(at, 4096)));
        }
    })
}

fn next_absent_chunk() -> Box<dyn Work> {
    let map = half_resident(ASKED_BYTES);
    Box::new(move || {
        for n in 0..BATCH {
            black_box(map.next_absent_chunk(black_box(n * 193)));
        }
    })
}

struct Marking(ResidencyMap);

fn mark_written() -> Box<dyn Work> {
    Box::new(Marking(half_resident(WRITTEN_BYTES)))
}

impl Work for Marking {
    fn renew(&mut self) {
        self.0 = half_resident(WRITTEN_BYTES);
    }

    fn run(&mut self) {
        let chunk = u64::from(CHUNK_BYTES_DEFAULT);
        for n in 0..u64::from(BATCH) {
            self.0.mark_written(SectorRange::covering((2 * n + 1) * chunk + chunk / 2, 4096));
        }
    }
}
