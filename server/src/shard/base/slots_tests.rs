//! Tests of the slots of a base: what is found is what was written, and nothing in use leaves.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use super::{Claim, Lease, Seat, Slots};
use crate::transfer::Digest;

const SLOT: u64 = 4096;

fn digest(n: u8) -> Digest {
    [n; 32]
}

/// Claims and writes a chunk; what was evicted for it.
fn put(slots: &mut Slots, n: u8) -> Vec<Range<u64>> {
    let Claim::Write { evicted, .. } = slots.claim(&digest(n), SLOT, None) else { panic!("chunk {n} has no place") };
    slots.written(&digest(n));
    evicted
}

#[test]
fn the_slot_unused_for_longest_leaves_first_and_its_place_is_not_used_again() {
    let mut slots = Slots::new(3 * SLOT);
    (1..=3).for_each(|n| assert_eq!(put(&mut slots, n), []));
    let (first, _) = slots.find(&digest(1)).expect("kept");
    assert_eq!(first, 0..SLOT);
    assert_eq!(put(&mut slots, 4), vec![SLOT..2 * SLOT]);
    assert!(slots.find(&digest(2)).is_none());
    assert_eq!(slots.find(&digest(4)).expect("kept").0, 3 * SLOT..4 * SLOT);
    assert_eq!((slots.used(), slots.len()), (3 * SLOT, 3));
}

#[test]
fn a_slot_in_use_or_being_written_does_not_leave() {
    let mut slots = Slots::new(2 * SLOT);
    put(&mut slots, 1);
    let (_, lease) = slots.find(&digest(1)).expect("kept");
    assert!(matches!(slots.claim(&digest(2), SLOT, None), Claim::Write { .. }));
    assert!(matches!(slots.claim(&digest(2), SLOT, None), Claim::Coming));
    assert!(matches!(slots.claim(&digest(3), SLOT, None), Claim::Full));
    assert_eq!(slots.drop_idle(), []);
    assert_eq!(slots.failed(&digest(2)), SLOT..2 * SLOT);
    drop(lease);
    assert_eq!(slots.drop_idle(), vec![0..SLOT]);
    assert_eq!((slots.used(), slots.len()), (0, 0));
}

#[test]
fn a_chunk_larger_than_the_budget_evicts_nothing() {
    let mut slots = Slots::new(2 * SLOT);
    put(&mut slots, 1);
    assert!(matches!(slots.claim(&digest(2), 3 * SLOT, None), Claim::Full));
    assert!(slots.find(&digest(1)).is_some());
}

fn seat_of(image: &str, chunk: u32, chunk_bytes: u64) -> Seat {
    Seat { image: image.into(), chunk, chunks: 12, chunk_bytes: chunk_bytes as u32 }
}

#[test]
fn an_image_lies_in_its_order_whatever_comes_first_and_a_seat_is_taken_once() {
    let mut slots = Slots::new(3 * SLOT);
    let mut claim = |n: u8, seat: Seat| {
        let claimed = slots.claim(&digest(n), SLOT, Some(&seat));
        let Claim::Write { place, .. } = claimed else { panic!("chunk {n} has no place") };
        slots.written(&digest(n));
        place.start / SLOT
    };
    assert_eq!(claim(5, seat_of("a", 5, SLOT)), 5);
    assert_eq!(claim(20, seat_of("b", 0, SLOT)), 12, "behind all that the first may have");
    assert_eq!(claim(4, seat_of("a", 4, SLOT)), 4);
    // The chunk that was unused for longest has left; its place is not used again.
    assert_eq!(claim(21, seat_of("a", 5, SLOT)), 24);
    assert_eq!(claim(22, seat_of("a", 6, 2 * SLOT)), 25, "another image had the name");
    assert_eq!(claim(23, seat_of("a", 6, SLOT)), 6);
    slots.check().expect("sound");
}

#[derive(Clone, Debug)]
enum Step {
    Claim(u8, u64),
    Written(u8),
    Failed(u8),
    Find(u8),
    Release(usize),
    DropIdle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..12_u8, 1..4_u64).prop_map(|(n, blocks)| Step::Claim(n, blocks * SLOT)),
        4 => (0..12_u8).prop_map(Step::Written),
        1 => (0..12_u8).prop_map(Step::Failed),
        4 => (0..12_u8).prop_map(Step::Find),
        3 => any::<usize>().prop_map(Step::Release),
        1 => Just(Step::DropIdle),
    ]
}

/// Of two images; every third chunk is of none.
fn seat(n: u8) -> Option<Seat> {
    let image = ["a", "b"].get(usize::from(n % 3))?;
    Some(seat_of(image, n.into(), 3 * SLOT))
}

/// The file beside the slots: which chunk each place holds.
#[derive(Default)]
struct Model {
    file: BTreeMap<u64, u8>,
    coming: BTreeMap<u8, Range<u64>>,
    leases: Vec<(Range<u64>, u8, Lease)>,
}

impl Model {
    fn punch(&mut self, places: Vec<Range<u64>>) {
        for place in places {
            assert!(self.leases.iter().all(|(leased, ..)| *leased != place), "a place in use is punched");
            assert!(self.coming.values().all(|coming| *coming != place), "a place being written is punched");
            self.file.remove(&place.start);
        }
    }

    fn lend(&mut self, n: u8, place: Range<u64>, lease: Lease) {
        assert_eq!(self.file.get(&place.start), Some(&n), "the place holds another chunk or nothing");
        self.leases.push((place, n, lease));
    }
}

proptest! {
    #[test]
    fn what_is_found_is_there_and_what_is_in_use_stays(budget in 1..12_u64, steps in proptest::collection::vec(step(), 1..200)) {
        let mut slots = Slots::new(budget * SLOT);
        let mut model = Model::default();
        let mut ever: Vec<Range<u64>> = Vec::new();
        for step in steps {
            match step {
                Step::Claim(n, len) => match slots.claim(&digest(n), len, seat(n).as_ref()) {
                    Claim::Ready(place, lease) => model.lend(n, place, lease),
                    Claim::Coming => prop_assert!(model.coming.contains_key(&n)),
                    Claim::Write { place, evicted } => {
                        let meets = |used: &Range<u64>| used.start < place.end && place.start < used.end;
                        prop_assert!(!ever.iter().any(meets), "a place is used again");
                        prop_assert_eq!(place.end - place.start, len);
                        ever.push(place.clone());
                        model.punch(evicted);
                        model.coming.insert(n, place);
                    }
                    Claim::Full => prop_assert!(!model.coming.contains_key(&n)),
                },
                Step::Written(n) => {
                    if let Some(place) = model.coming.remove(&n) {
                        model.file.insert(place.start, n);
                        let (written, lease) = slots.written(&digest(n));
                        prop_assert_eq!(&written, &place);
                        model.lend(n, written, lease);
                    }
                }
                Step::Failed(n) => {
                    if let Some(place) = model.coming.remove(&n) {
                        prop_assert_eq!(slots.failed(&digest(n)), place);
                    }
                }
                Step::Find(n) => {
                    let found = slots.find(&digest(n));
                    let kept = model.file.values().any(|kept| *kept == n);
                    prop_assert_eq!(found.is_some(), kept);
                    if let Some((place, lease)) = found {
                        model.lend(n, place, lease);
                    }
                }
                Step::Release(which) => {
                    if !model.leases.is_empty() {
                        let which = which % model.leases.len();
                        model.leases.swap_remove(which);
                    }
                }
                Step::DropIdle => {
                    let dropped = slots.drop_idle();
                    model.punch(dropped);
                }
            }
            prop_assert_eq!(slots.check(), Ok(()));
        }
    }
}
