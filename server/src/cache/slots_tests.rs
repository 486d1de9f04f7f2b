//! Slots: a slot has one owner, restarts find what was complete, and what is dirty is what changed.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::record::{PART_BYTES, RECORD_BYTES, Record, RecordRead};
use super::super::s3fifo::Rank;
use super::{Place, Slots, places, stride};
use crate::snapshot::Encoding;

fn record(key: u8, parts: usize, sequence: u64) -> Record {
    let stored_len = (parts * PART_BYTES) as u32;
    Record {
        digest: [key; 32],
        sequence,
        placement: 0,
        stored_len,
        chunk_len: stored_len,
        encoding: Encoding::Raw,
        part: 0,
    }
}

fn put(slots: &mut Slots, key: u8, parts: usize) -> bool {
    let Some((sequence, taken)) = slots.begin(parts) else { return false };
    slots.complete(Place { record: record(key, parts, sequence), slots: taken }, Rank::Normal);
    true
}

/// What a restart reads from the index files.
fn written(slots: &mut Slots, disk: &mut BTreeMap<u32, [u8; RECORD_BYTES]>) {
    while let Some((page, bytes)) = slots.take_dirty() {
        for (at, record) in bytes.chunks(RECORD_BYTES).enumerate() {
            disk.insert(page * super::RECORDS_PER_PAGE + at as u32, record.try_into().unwrap());
        }
    }
}

fn valid(disk: &BTreeMap<u32, [u8; RECORD_BYTES]>) -> Vec<(u32, Record)> {
    let read = |(slot, bytes): (&u32, &[u8; RECORD_BYTES])| match Record::decode(bytes) {
        RecordRead::Valid(record) => Some((*slot, record)),
        RecordRead::Free => None,
        RecordRead::Unreadable => panic!("slot {slot}"),
    };
    disk.iter().filter_map(read).collect()
}

proptest! {
    #[test]
    fn every_slot_has_one_owner_and_a_restart_finds_the_same(
        ops in prop::collection::vec((0_u8..20, 1_usize..6, any::<bool>()), 1..200),
        (files, per_file) in (1_u32..4, 3_u32..70),
    ) {
        let mut slots = Slots::new(files, per_file);
        let mut disk = BTreeMap::new();
        for (key, parts, drop) in ops {
            if drop {
                let was = slots.place(&[key; 32]).is_some();
                prop_assert_eq!(slots.remove(&[key; 32]), was);
            } else if parts <= slots.budget() {
                prop_assert!(put(&mut slots, key, parts) && slots.place(&[key; 32]).is_some());
            }
            prop_assert_eq!(slots.check(), Ok(()));
            let mut seen = std::collections::BTreeSet::new();
            for place in (0..20).filter_map(|key| slots.place(&[key; 32])) {
                prop_assert!(place.slots.iter().all(|slot| seen.insert(*slot) && slot % stride(per_file) < per_file));
            }
        }
        written(&mut slots, &mut disk);
        let mut again = Slots::new(files, per_file);
        again.adopt(valid(&disk));
        prop_assert_eq!(again.check(), Ok(()));
        for key in 0..20 {
            prop_assert_eq!(again.place(&[key; 32]), slots.place(&[key; 32]));
        }
    }
}

#[test]
fn only_whole_chunks_are_found_and_of_two_copies_the_younger() {
    let (old, new, torn) = (record(1, 2, 5), record(1, 2, 9), record(2, 3, 7));
    let found = places([
        (3, old),
        (4, old.with_part(1)),
        (10, new.with_part(1)),
        (8, new),
        (20, torn),
        (21, torn.with_part(2)),
        (30, Record { stored_len: 10, ..record(3, 1, 8) }),
    ]);
    let found: Vec<_> = found.iter().map(|place| (place.record.digest[0], place.slots.to_vec())).collect();
    assert_eq!(found, [(3, vec![30]), (1, vec![8, 10])]);
}

#[test]
fn a_smaller_file_forgets_what_lies_beyond_its_end() {
    let mut slots = Slots::new(1, 4);
    slots.adopt([(3, record(1, 1, 1)), (4, record(2, 1, 2))]);
    assert!(slots.place(&[1; 32]).is_some() && slots.place(&[2; 32]).is_none());
    assert_eq!(slots.begin(1).map(|(sequence, _)| sequence), Some(3), "sequences go on");
}

#[test]
fn slots_being_written_are_nobodys_and_come_back() {
    let mut slots = Slots::new(1, 4);
    let (_, first) = slots.begin(3).unwrap();
    assert!(slots.begin(2).is_none(), "one is left and nothing can be evicted");
    assert_eq!(slots.begin(1).map(|(_, taken)| taken.to_vec()), Some(vec![3]));
    slots.abort(&first);
    assert_eq!(slots.begin(3).map(|(_, taken)| taken.to_vec()), Some(vec![0, 1, 2]));
    assert!(slots.take_dirty().is_none(), "nothing of it was ever in the index");
}

#[test]
fn a_walk_meets_every_chunk_once_in_the_order_of_its_first_slot() {
    let mut slots = Slots::new(2, 70);
    for key in 0..20 {
        assert!(put(&mut slots, key, 1 + usize::from(key % 5)));
    }
    (0..20).step_by(3).for_each(|key| assert!(slots.remove(&[key; 32])));
    // Into what became free, so not in order any more.
    assert!(put(&mut slots, 30, 5));
    for count in [1, 7, u32::MAX] {
        let (mut met, mut next) = (Vec::new(), Some(0));
        while let Some(from) = next {
            let (place, after) = slots.next_chunk(from, count);
            met.extend(place.map(|place| (place.slots[0], place.record.digest)));
            next = after;
        }
        assert!(met.is_sorted() && met.len() == slots.len(), "{count} at once: {met:?}");
    }
    assert_eq!(slots.next_chunk(10_000, 5), (None, None));
}
