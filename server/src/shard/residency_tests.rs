//! The residency map against a plain model: one bool per sector, now and durable.

use proptest::prelude::*;

use super::{ResidencyMap, SectorRange};
use crate::types::ChunkResidency;

const CHUNK: u32 = 64 << 10;
const SECTORS: u64 = 16 * 5 + 3;

fn fresh() -> ResidencyMap {
    ResidencyMap::new(SECTORS * 4096 - 512, CHUNK, 0)
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64),
    SyncOk,
    SyncFail,
    CaptureThenWriteThenDone(u64, u64, bool),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..SECTORS, 1..40_u64).prop_map(|(s, n)| (s, (s + n).min(SECTORS)));
    prop_oneof![
        range().prop_map(|(a, b)| Op::Write(a, b)),
        range().prop_map(|(a, b)| Op::Zero(a, b)),
        Just(Op::SyncOk),
        Just(Op::SyncFail),
        (range(), any::<bool>()).prop_map(|((a, b), ok)| Op::CaptureThenWriteThenDone(a, b, ok)),
    ]
}

fn restored(states: &[(u32, ChunkResidency)]) -> Vec<bool> {
    let mut map = fresh();
    map.restore(states).unwrap();
    (0..SECTORS).map(|s| map.is_sector_resident(s)).collect()
}

proptest! {
    #[test]
    fn agrees_with_a_plain_model(ops in prop::collection::vec(op(), 1..60)) {
        let mut map = fresh();
        let (mut now, mut durable) = (vec![false; SECTORS as usize], vec![false; SECTORS as usize]);
        let mark = |now: &mut Vec<bool>, a: u64, b: u64| (a..b).for_each(|s| now[s as usize] = true);
        for op in ops {
            match op {
                Op::Write(start, end) => { map.mark_written(SectorRange { start, end }); mark(&mut now, start, end); }
                Op::Zero(start, end) => { map.mark_zeroed(SectorRange { start, end }); mark(&mut now, start, end); }
                Op::SyncOk => { map.capture_dirty(); map.sync_done(); durable.clone_from(&now); }
                Op::SyncFail => { map.capture_dirty(); map.sync_failed(); }
                Op::CaptureThenWriteThenDone(start, end, ok) => {
                    let captured = now.clone();
                    map.capture_dirty();
                    map.mark_written(SectorRange { start, end });
                    mark(&mut now, start, end);
                    prop_assert_eq!(restored(&map.durable(true)), durable.clone(), "dump during a sync");
                    if ok {
                        map.sync_appended();
                        prop_assert_eq!(restored(&map.durable(true)), captured.clone(), "dump after the append");
                    }
                    if ok { map.sync_done(); durable = captured; } else { map.sync_failed(); }
                }
            }
            prop_assert_eq!((0..SECTORS).map(|s| map.is_sector_resident(s)).collect::<Vec<_>>(), now.clone());
            prop_assert_eq!(map.resident_sectors(), now.iter().filter(|r| **r).count() as u64);
            prop_assert_eq!(restored(&map.durable(true)), durable.clone());
            let whole = SectorRange { start: 0, end: SECTORS };
            let runs = map.runs(whole);
            prop_assert_eq!(runs.first().unwrap().start, 0);
            prop_assert_eq!(runs.last().unwrap().end, SECTORS);
            prop_assert!(runs.windows(2).all(|w| w[0].end == w[1].start));
            let some = map.runs_at_most(whole, 2);
            prop_assert!(some.len() >= runs.len().min(2) && some.last().unwrap().end > 0);
            prop_assert!(some[..some.len() - 1] == runs[..some.len() - 1] && some.last().unwrap().end <= SECTORS);
            prop_assert!(runs.iter().all(|r| (r.start..r.end).all(|s| now[s as usize] == r.resident)));
            prop_assert_eq!(map.is_resident(whole), now.iter().all(|r| *r));
            for pair in 0..SECTORS - 1 {
                let (first, second) = (now[pair as usize], now[pair as usize + 1]);
                prop_assert_eq!(map.is_absent(SectorRange { start: pair, end: pair + 2 }), !first && !second);
            }
            prop_assert_eq!(map.is_full_and_durable(), now.iter().all(|r| *r) && !map.has_dirty());
            let absent = (0..6u32).find(|c| !map.is_resident(map.chunk_sectors(*c)));
            prop_assert_eq!(map.next_absent_chunk(0), absent);
        }
    }
}

#[test]
fn a_zero_chunk_written_by_the_guest_is_journaled() {
    let mut map = fresh();
    map.mark_zero_by_nature(1);
    assert!(!map.has_dirty());
    assert!(map.is_resident(map.chunk_sectors(1)));
    map.mark_written(SectorRange { start: 17, end: 18 });
    assert!(map.has_dirty());
    assert_eq!(map.capture_dirty(), vec![(1, ChunkResidency::Resident)]);
}

#[test]
fn records_that_do_not_fit_are_refused() {
    assert!(fresh().restore(&[(6, ChunkResidency::Resident)]).is_err());
    assert!(fresh().restore(&[(0, ChunkResidency::Partial(vec![1, 1].into()))]).is_err());
}
