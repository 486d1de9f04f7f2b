//! S3-FIFO: which cached chunk leaves first. Plain synchronous core, used by both tiers.
//!
//! A chunk enters the new queue and leaves from its end, unless it was asked for again meanwhile; then it goes to the main
//! queue, a FIFO with second chances. A chunk that comes back soon after it left the new queue (its *ghost* is remembered)
//! goes to the main queue at once. Requests at low rank bring chunks into the new queue and count for nothing else, so that
//! background scans pass through it, share what they bring among each other, and take nothing of the main queue with
//! them. Pinned chunks are in no queue. No step waits for anything; costs are bytes (RAM) or slots (disk).

use std::collections::BTreeMap;

use hashbrown::HashMap;

use crate::transfer::Digest;

/// How much a chunk is expected to be wanted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Background fills: read in order, and mostly once.
    Low,
    /// What a guest or a boot reads.
    Normal,
}

/// The new queue has this part of the budget that is not pinned. (Its authors have a tenth: then the hydrators of a wave, which follow each
/// other at some distance, no longer find what the first one brought. `tools/bench cache`.)
const NEW_PART: usize = 2;
/// More requests than this do not keep a chunk longer.
const REQUESTS_MAX: u8 = 3;
/// Pinned chunks may have this part of the budget: the rest stays a cache.
pub const PINNED_PART: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    New,
    Main,
    Pinned,
}

struct Entry<V> {
    value: V,
    cost: usize,
    queue: Queue,
    turn: u64,
    /// At normal rank, since it is in its queue.
    requests: u8,
    /// The rank it came with.
    rank: Rank,
    /// How many have pinned it; 0 in a queue.
    pins: u32,
}

/// Values by digest, within a budget that the caller keeps with [`S3Fifo::make_room`].
pub struct S3Fifo<V> {
    budget: usize,
    entries: HashMap<Digest, Entry<V>, ahash::RandomState>,
    new: BTreeMap<u64, Digest>,
    main: BTreeMap<u64, Digest>,
    new_cost: usize,
    pinned_cost: usize,
    used: usize,
    ghosts: BTreeMap<u64, Digest>,
    ghost_turns: HashMap<Digest, u64, ahash::RandomState>,
    turn: u64,
}

impl<V> S3Fifo<V> {
    #[must_use]
    pub fn new(budget: usize) -> S3Fifo<V> {
        S3Fifo {
            budget,
            entries: HashMap::with_hasher(ahash::RandomState::with_seeds(5, 6, 7, 8)),
            new: BTreeMap::new(),
            main: BTreeMap::new(),
            new_cost: 0,
            pinned_cost: 0,
            used: 0,
            ghosts: BTreeMap::new(),
            ghost_turns: HashMap::with_hasher(ahash::RandomState::with_seeds(33, 34, 35, 36)),
            turn: 0,
        }
    }

    #[must_use]
    pub fn budget(&self) -> usize {
        self.budget
    }

    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    #[must_use]
    pub fn pinned(&self) -> usize {
        self.pinned_cost
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Looks without leaving a trace.
    #[must_use]
    pub fn peek(&self, digest: &Digest) -> Option<&V> {
        self.entries.get(digest).map(|entry| &entry.value)
    }

    /// A request for the chunk.
    pub fn get(&mut self, digest: &Digest, rank: Rank) -> Option<&V> {
        let entry = self.entries.get_mut(digest)?;
        if rank == Rank::Normal {
            entry.requests = (entry.requests + 1).min(REQUESTS_MAX);
        }
        Some(&entry.value)
    }

    /// Whether something of this cost can be kept at all.
    #[must_use]
    pub fn fits(&self, cost: usize) -> bool {
        cost <= self.budget - self.pinned_cost
    }

    /// Evicts until `cost` more fits; returns what left. `cost` must fit at all.
    pub fn make_room(&mut self, cost: usize) -> Vec<(Digest, V)> {
        assert!(self.fits(cost), "the caller asks first");
        let mut left = Vec::new();
        while self.used + cost > self.budget {
            left.extend(self.evict());
        }
        left
    }

    /// Puts in a chunk that is not there and for which there is room.
    pub fn insert(&mut self, digest: Digest, value: V, cost: usize, rank: Rank) {
        let came_back = self.forget_ghost(&digest);
        let queue = if came_back && rank == Rank::Normal { Queue::Main } else { Queue::New };
        self.put(digest, Entry { value, cost, queue, turn: 0, requests: 0, rank, pins: 0 });
    }

    /// Puts in a chunk that an earlier life kept: its probation is over. Oldest first.
    pub fn restore(&mut self, digest: Digest, value: V, cost: usize) {
        self.put(digest, Entry { value, cost, queue: Queue::Main, turn: 0, requests: 0, rank: Rank::Normal, pins: 0 });
    }

    fn put(&mut self, digest: Digest, entry: Entry<V>) {
        assert!(self.used + entry.cost <= self.budget, "the caller made room");
        self.used += entry.cost;
        let (queue, cost) = (entry.queue, entry.cost);
        let before = self.entries.insert(digest, entry);
        assert!(before.is_none(), "the caller looked");
        self.enqueue(digest, queue, cost);
    }

    fn enqueue(&mut self, digest: Digest, queue: Queue, cost: usize) {
        self.turn += 1;
        match queue {
            Queue::New => {
                self.new_cost += cost;
                self.new.insert(self.turn, digest);
            }
            Queue::Main => drop(self.main.insert(self.turn, digest)),
            Queue::Pinned => self.pinned_cost += cost,
        }
        let entry = self.entries.get_mut(&digest).expect("only what is there has a turn");
        (entry.queue, entry.turn) = (queue, self.turn);
    }

    /// Takes the chunk out of its queue, not out of the cache.
    fn dequeue(&mut self, digest: &Digest) {
        let Entry { queue, turn, cost, .. } = self.entries[digest];
        match queue {
            Queue::New => {
                self.new_cost -= cost;
                self.new.remove(&turn);
            }
            Queue::Main => drop(self.main.remove(&turn)),
            Queue::Pinned => self.pinned_cost -= cost,
        }
    }

    pub fn remove(&mut self, digest: &Digest) -> Option<V> {
        if !self.entries.contains_key(digest) {
            return None;
        }
        self.dequeue(digest);
        let entry = self.entries.remove(digest)?;
        self.used -= entry.cost;
        Some(entry.value)
    }

    /// Evicts one chunk; `None` when all are pinned.
    pub fn evict(&mut self) -> Option<(Digest, V)> {
        loop {
            let from_new = self.new_cost > (self.budget - self.pinned_cost) / NEW_PART || self.main.is_empty();
            let queue = if from_new { &self.new } else { &self.main };
            let digest = *queue.first_key_value()?.1;
            self.dequeue(&digest);
            let entry = self.entries.get_mut(&digest).expect("queued chunks are there");
            if entry.requests > 0 {
                entry.requests = if from_new { 0 } else { entry.requests - 1 };
                let cost = entry.cost;
                self.enqueue(digest, Queue::Main, cost);
                continue;
            }
            let entry = self.entries.remove(&digest)?;
            self.used -= entry.cost;
            if from_new && entry.rank == Rank::Normal {
                self.remember_ghost(digest);
            }
            return Some((digest, entry.value));
        }
    }

    /// As many ghosts as there are chunks.
    fn remember_ghost(&mut self, digest: Digest) {
        self.turn += 1;
        self.ghosts.insert(self.turn, digest);
        self.ghost_turns.insert(digest, self.turn);
        while self.ghosts.len() > self.entries.len().max(1) {
            if let Some((_, oldest)) = self.ghosts.pop_first() {
                self.ghost_turns.remove(&oldest);
            }
        }
    }

    fn forget_ghost(&mut self, digest: &Digest) -> bool {
        let turn = self.ghost_turns.remove(digest);
        turn.is_some_and(|turn| self.ghosts.remove(&turn).is_some())
    }

    /// Whether so much more may be pinned.
    #[must_use]
    pub fn can_pin(&self, cost: usize) -> bool {
        self.pinned_cost + cost <= self.budget / PINNED_PART
    }

    /// Keeps the chunk until as many have unpinned as have pinned it. `false`: it is not there, or the pinned part of
    /// the budget is spent.
    pub fn pin(&mut self, digest: &Digest) -> bool {
        let Some(entry) = self.entries.get(digest) else { return false };
        let (pins, cost) = (entry.pins, entry.cost);
        if pins == 0 && !self.can_pin(cost) {
            return false;
        }
        let entry = self.entries.get_mut(digest).expect("it was there");
        entry.pins += 1;
        if pins == 0 {
            self.dequeue(digest);
            self.enqueue(*digest, Queue::Pinned, cost);
        }
        true
    }

    /// Takes one pin back. The last one gives the chunk to the main queue.
    pub fn unpin(&mut self, digest: &Digest) {
        let Some(entry) = self.entries.get_mut(digest).filter(|entry| entry.pins > 0) else { return };
        entry.pins -= 1;
        if entry.pins == 0 {
            let cost = entry.cost;
            self.dequeue(digest);
            self.enqueue(*digest, Queue::Main, cost);
        }
    }

    /// Checks queues and sums against the chunks and the budget.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let sum = |which: Option<Queue>| {
            let of = self.entries.values().filter(|entry| which.is_none_or(|queue| entry.queue == queue));
            of.map(|entry| entry.cost).sum::<usize>()
        };
        let (new, pinned, all) = (sum(Some(Queue::New)), sum(Some(Queue::Pinned)), sum(None));
        if (new, pinned, all) != (self.new_cost, self.pinned_cost, self.used) || all > self.budget {
            let counted = (self.new_cost, self.pinned_cost, self.used);
            return Err(format!("the cache holds {:?}, counts {counted:?}, may {}", (new, pinned, all), self.budget));
        }
        let count = |queue| self.entries.values().filter(|entry| entry.queue == queue).count();
        if (count(Queue::New), count(Queue::Main)) != (self.new.len(), self.main.len()) {
            return Err(format!("{} and {} chunks have a turn", self.new.len(), self.main.len()));
        }
        if pinned > self.budget / PINNED_PART || self.ghosts.len() != self.ghost_turns.len() {
            return Err(format!("{pinned} of {} is pinned, {} ghosts", self.budget, self.ghosts.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "s3fifo_tests.rs"]
mod tests;
