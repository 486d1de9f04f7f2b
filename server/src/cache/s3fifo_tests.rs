//! S3-FIFO against a naive model that says the rules in other words: lists searched from end to end.

use proptest::prelude::*;

use super::{PINNED_PART, Rank, S3Fifo};

type Key = u8;

fn digest(key: Key) -> [u8; 32] {
    [key; 32]
}

/// Key, cost, requests.
type Chunk = (Key, usize, u8);

/// The first in a list is the oldest; pinned chunks with their pins.
#[derive(Default)]
struct Model {
    budget: usize,
    fresh: Vec<Chunk>,
    main: Vec<Chunk>,
    pinned: Vec<(Chunk, u32)>,
    ghosts: Vec<Key>,
    /// Keys that came at low rank.
    low: Vec<Key>,
}

impl Model {
    fn cost(list: &[Chunk]) -> usize {
        list.iter().map(|c| c.1).sum()
    }

    fn pinned_cost(&self) -> usize {
        self.pinned.iter().map(|(c, _)| c.1).sum()
    }

    fn used(&self) -> usize {
        Model::cost(&self.fresh) + Model::cost(&self.main) + self.pinned_cost()
    }

    fn keys(&self) -> Vec<Key> {
        let queued = self.fresh.iter().chain(&self.main).map(|c| c.0);
        let mut keys: Vec<Key> = queued.chain(self.pinned.iter().map(|(c, _)| c.0)).collect();
        keys.sort_unstable();
        keys
    }

    fn get(&mut self, key: Key, low: bool) -> bool {
        let pinned = self.pinned.iter_mut().map(|(c, _)| c);
        let found = self.fresh.iter_mut().chain(&mut self.main).chain(pinned).find(|c| c.0 == key);
        found.map(|c| c.2 = if low { c.2 } else { (c.2 + 1).min(3) }).is_some()
    }

    fn insert(&mut self, key: Key, cost: usize, low: bool) {
        while self.used() + cost > self.budget {
            self.evict();
        }
        let ghost = self.ghosts.contains(&key);
        self.ghosts.retain(|g| *g != key);
        self.low.retain(|l| *l != key);
        self.low.extend(low.then_some(key));
        if ghost && !low { self.main.push((key, cost, 0)) } else { self.fresh.push((key, cost, 0)) }
    }

    fn evict(&mut self) {
        if Model::cost(&self.fresh) > (self.budget - self.pinned_cost()) / 2 || self.main.is_empty() {
            let (key, cost, requests) = self.fresh.remove(0);
            if requests > 0 {
                self.main.push((key, cost, 0));
            } else if !self.low.contains(&key) {
                self.ghosts.push(key);
                while self.ghosts.len() > self.keys().len().max(1) {
                    self.ghosts.remove(0);
                }
            }
        } else {
            let (key, cost, requests) = self.main.remove(0);
            if requests > 0 {
                self.main.push((key, cost, requests - 1));
            }
        }
    }

    fn remove(&mut self, key: Key) {
        self.fresh.retain(|c| c.0 != key);
        self.main.retain(|c| c.0 != key);
        self.pinned.retain(|(c, _)| c.0 != key);
    }

    fn pin(&mut self, key: Key) -> bool {
        if let Some((_, pins)) = self.pinned.iter_mut().find(|(c, _)| c.0 == key) {
            *pins += 1;
            return true;
        }
        let Some(chunk) = self.fresh.iter().chain(&self.main).find(|c| c.0 == key).copied() else { return false };
        if self.pinned_cost() + chunk.1 > self.budget / PINNED_PART {
            return false;
        }
        self.remove(key);
        self.pinned.push((chunk, 1));
        true
    }

    fn unpin(&mut self, key: Key) {
        let Some(at) = self.pinned.iter().position(|(c, _)| c.0 == key) else { return };
        self.pinned[at].1 -= 1;
        if self.pinned[at].1 == 0 {
            self.main.push(self.pinned.remove(at).0);
        }
    }
}

fn cost_of(key: Key) -> usize {
    1 + usize::from(key) % 7
}

proptest! {
    #[test]
    fn does_what_the_model_does(budget in 0_usize..80, ops in prop::collection::vec((0_u8..24, 0_u8..12), 1..600)) {
        let mut cache = S3Fifo::new(budget);
        let mut model = Model { budget, ..Model::default() };
        for (key, op) in ops {
            let (digest, cost) = (digest(key), cost_of(key));
            match op {
                0 => {
                    prop_assert_eq!(cache.remove(&digest).is_some(), model.keys().contains(&key));
                    model.remove(key);
                }
                1 => prop_assert_eq!(cache.pin(&digest), model.pin(key)),
                2 => {
                    cache.unpin(&digest);
                    model.unpin(key);
                }
                _ => {
                    let rank = if op < 6 { Rank::Low } else { Rank::Normal };
                    let found = cache.get(&digest, rank).copied();
                    prop_assert_eq!(found.is_some(), model.get(key, rank == Rank::Low));
                    prop_assert!(found.is_none_or(|value| value == key));
                    if found.is_none() && cache.fits(cost) {
                        drop(cache.make_room(cost));
                        cache.insert(digest, key, cost, rank);
                        model.insert(key, cost, rank == Rank::Low);
                    }
                }
            }
            prop_assert_eq!(cache.check(), Ok(()));
            let kept: Vec<Key> = (0..24).filter(|key| cache.peek(&[*key; 32]).is_some()).collect();
            prop_assert_eq!(kept, model.keys());
            prop_assert_eq!(cache.used(), model.used());
        }
    }
}

fn put(cache: &mut S3Fifo<Key>, key: Key, rank: Rank) {
    if cache.get(&digest(key), rank).is_none() {
        drop(cache.make_room(1));
        cache.insert(digest(key), key, 1, rank);
    }
}

#[test]
fn a_scan_at_low_rank_does_not_evict_what_is_used() {
    let mut cache = S3Fifo::new(40);
    for _ in 0..2 {
        (0..18).for_each(|key| put(&mut cache, key, Rank::Normal));
    }
    for _ in 0..2 {
        (100..=255).for_each(|key| put(&mut cache, key, Rank::Low));
    }
    assert!((0..18).all(|key| cache.peek(&digest(key)).is_some()), "the scan evicted something");
}

#[test]
fn what_comes_back_soon_is_kept_and_what_is_pinned_stays() {
    let mut cache = S3Fifo::new(10);
    put(&mut cache, 1, Rank::Normal);
    put(&mut cache, 2, Rank::Normal);
    assert!(cache.pin(&digest(2)));
    (10..20).for_each(|key| put(&mut cache, key, Rank::Normal));
    assert!(cache.peek(&digest(1)).is_none() && cache.peek(&digest(2)).is_some());
    put(&mut cache, 1, Rank::Normal);
    (30..60).for_each(|key| put(&mut cache, key, Rank::Low));
    assert!(cache.get(&digest(40), Rank::Low).is_none(), "a scan leaves no trace");
    assert!(cache.peek(&digest(1)).is_some() && cache.peek(&digest(2)).is_some());
    cache.unpin(&digest(2));
    assert_eq!((cache.pinned(), cache.check()), (0, Ok(())));
}

#[test]
fn pins_are_counted_and_bounded() {
    let mut cache = S3Fifo::new(8);
    (0..8).for_each(|key| put(&mut cache, key, Rank::Normal));
    let pinned: Vec<Key> = (0..8).filter(|key| cache.pin(&digest(*key))).collect();
    assert_eq!(pinned, [0, 1, 2, 3]);
    assert!(cache.pin(&digest(0)) && !cache.fits(5) && cache.fits(4));
    cache.unpin(&digest(0));
    assert_eq!(cache.pinned(), 4, "another one still has it pinned");
    cache.unpin(&digest(0));
    assert_eq!(cache.pinned(), 3);
}
