//! The order of the queue beside a plain list, and who is woken when.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Class, HydrationQueue, Rank};
use crate::platform::Time;

fn rank() -> impl Strategy<Value = Rank> {
    (0..3_usize, prop::option::of(0..3_u64)).prop_map(|(class, deadline)| Rank::new(Class::ALL[class], deadline))
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, Rank),
    Sleep(u8, Rank, u64),
    ChangeRank(u8, Rank),
    Remove(u8),
    /// Time passes, and whoever is first has its turn and stands in line again.
    Turn(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let key = || 0..12_u8;
    prop_oneof![
        3 => (key(), rank()).prop_map(|(key, rank)| Step::Put(key, rank)),
        2 => (key(), rank(), 0..20_u64).prop_map(|(key, rank, span)| Step::Sleep(key, rank, span)),
        1 => (key(), rank()).prop_map(|(key, rank)| Step::ChangeRank(key, rank)),
        1 => key().prop_map(Step::Remove),
        4 => (0..4_u64).prop_map(Step::Turn),
    ]
}

/// The same by looking at everybody each time: who is ready since when, who sleeps until when.
#[derive(Default)]
struct Model {
    ready: Vec<(u8, Rank)>,
    asleep: BTreeMap<u8, (u64, Rank)>,
}

impl Model {
    fn remove(&mut self, key: u8) {
        self.ready.retain(|(other, _)| *other != key);
        self.asleep.remove(&key);
    }

    fn put(&mut self, key: u8, rank: Rank) {
        if !self.ready.contains(&(key, rank)) {
            self.remove(key);
            self.ready.push((key, rank));
        }
    }

    fn first(&mut self, now: u64) -> Option<(u8, Rank)> {
        let mut due: Vec<_> = self.asleep.iter().filter(|(_, (until, _))| *until <= now).collect();
        due.sort_by_key(|(key, (until, _))| (*until, **key));
        let due: Vec<(u8, Rank)> = due.into_iter().map(|(key, (_, rank))| (*key, *rank)).collect();
        due.into_iter().for_each(|(key, rank)| self.put(key, rank));
        // The first of equal ones, as they came.
        self.ready.iter().copied().min_by_key(|(_, rank)| *rank)
    }
}

proptest! {
    #[test]
    fn it_does_what_looking_at_everybody_would_do(steps in prop::collection::vec(step(), 1..120)) {
        let (mut queue, mut model, mut now) = (HydrationQueue::default(), Model::default(), 0);
        for step in steps {
            match step {
                Step::Put(key, rank) => {
                    queue.put(key, rank);
                    model.put(key, rank);
                }
                Step::Sleep(key, rank, span) => {
                    queue.sleep(key, rank, Time(now + span));
                    model.remove(key);
                    model.asleep.insert(key, (now + span, rank));
                }
                Step::ChangeRank(key, rank) => {
                    queue.change_rank(key, rank);
                    if let Some((_, asleep)) = model.asleep.get_mut(&key) {
                        *asleep = rank;
                    } else if model.ready.iter().any(|(other, _)| *other == key) {
                        model.put(key, rank);
                    }
                }
                Step::Remove(key) => {
                    queue.remove(key);
                    model.remove(key);
                }
                Step::Turn(pause) => {
                    now += pause;
                    let first = queue.first(Time(now));
                    prop_assert_eq!(first, model.first(now));
                    if let Some((key, rank)) = first {
                        queue.remove(key);
                        queue.put(key, rank);
                        model.remove(key);
                        model.put(key, rank);
                    }
                }
            }
            queue.check().map_err(TestCaseError::fail)?;
            prop_assert_eq!(queue.asleep(), model.asleep.len());
            prop_assert_eq!(queue.wakes_at(), model.asleep.values().map(|(until, _)| Time(*until)).min());
            for class in Class::ALL {
                let ready = model.ready.iter().filter(|(_, rank)| rank.class() == class).count();
                prop_assert_eq!(queue.ready(class), ready);
            }
        }
    }

    /// Between two turns of a volume every other one of its rank has exactly one, whoever sleeps meanwhile.
    #[test]
    fn equal_volumes_take_turns(volumes in 2..50_u32, rounds in 2..5_u32, rank in rank(), sleeper in 0..50_u32) {
        let mut queue = HydrationQueue::default();
        (0..volumes).for_each(|volume| queue.put(volume, rank));
        let sleeper = (sleeper < volumes).then_some(sleeper);
        sleeper.into_iter().for_each(|volume| queue.sleep(volume, rank, Time(1_000_000)));
        let mut turns = Vec::new();
        for _ in 0..rounds * volumes {
            let (volume, rank) = queue.first(Time(0)).expect("somebody is ready");
            turns.push(volume);
            queue.remove(volume);
            queue.put(volume, rank);
        }
        let awake: Vec<u32> = (0..volumes).filter(|volume| Some(*volume) != sleeper).collect();
        for (turn, volume) in turns.iter().enumerate() {
            prop_assert_eq!(*volume, awake[turn % awake.len()]);
        }
    }

    /// Work of one unit each that is feasible at all is done in time: the earliest deadline goes first.
    #[test]
    fn what_can_be_in_time_is(work in prop::collection::vec((1..6_u64, 0..6_u64), 1..20)) {
        // Each deadline is late enough for all that is due before or with it.
        let mut due: Vec<(usize, u64)> = Vec::new();
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by_key(|volume| work[*volume].1);
        let mut total = 0;
        for volume in order {
            total += work[volume].0;
            due.push((volume, total + work[volume].1));
        }
        let mut queue = HydrationQueue::default();
        let mut left: Vec<u64> = work.iter().map(|(units, _)| *units).collect();
        let deadlines: BTreeMap<usize, u64> = due.iter().copied().collect();
        for (volume, deadline) in &deadlines {
            queue.put(*volume, Rank::new(Class::Background, Some(*deadline)));
        }
        queue.put(work.len(), Rank::new(Class::Background, None));
        let mut now = 0;
        while let Some((volume, rank)) = queue.first(Time(now)).filter(|(volume, _)| *volume < work.len()) {
            queue.remove(volume);
            (now, left[volume]) = (now + 1, left[volume] - 1);
            prop_assert!(now <= deadlines[&volume], "volume {} at {}", volume, now);
            if left[volume] > 0 {
                queue.put(volume, rank);
            }
        }
        prop_assert!(left.iter().all(|units| *units == 0), "who has no deadline comes last");
    }
}

#[test]
fn a_chunk_that_is_owed_lifts_its_volume_over_all_others_at_once() {
    let mut queue = HydrationQueue::default();
    (0..1000).for_each(|volume| queue.put(volume, Rank::new(Class::Background, Some(volume))));
    queue.put(2000, Rank::new(Class::Background, None));
    queue.put(2001, Rank::new(Class::BootSet, None));
    assert_eq!(queue.first(Time(0)).map(|(volume, _)| volume), Some(2001));
    queue.put(2000, Rank::new(Class::Priority, None));
    assert_eq!(queue.first(Time(0)).map(|(volume, _)| volume), Some(2000));
    // A sleeper too.
    queue.sleep(3000, Rank::new(Class::Background, None), Time(u64::MAX));
    queue.put(3000, Rank::new(Class::Priority, Some(1)));
    assert_eq!(queue.first(Time(0)).map(|(volume, _)| volume), Some(3000));
    assert_eq!((queue.asleep(), queue.ready(Class::Priority)), (0, 2));
}

/// A step looks at a few of 100,000 volumes and not at all of them: otherwise this takes minutes.
#[test]
fn a_hundred_thousand_volumes_sleep_wake_and_take_turns() {
    const VOLUMES: u64 = 100_000;
    let mut queue = HydrationQueue::default();
    for volume in 0..VOLUMES {
        queue.sleep(volume, Rank::new(Class::Background, Some(volume % 7)), Time(volume));
    }
    for now in 0..VOLUMES {
        let (volume, rank) = queue.first(Time(now)).expect("one wakes each time");
        queue.sleep(volume, rank, Time(VOLUMES + now));
    }
    assert_eq!(queue.asleep() as u64, VOLUMES);
    for turn in 0..VOLUMES {
        let (volume, _) = queue.first(Time(2 * VOLUMES)).expect("all are ready");
        assert!(volume % 7 == 0 || turn >= VOLUMES / 7);
        queue.remove(volume);
    }
}
