//! RAM cache of verified chunks, one per shard, keyed by digest. Plain synchronous core.
//!
//! Eviction is SIEVE: a FIFO with one visited bit and a hand that keeps its place. A chunk enters unvisited, so a
//! background scan that is never read again leaves first; eviction never waits for I/O since nothing is dirty.

use std::sync::Arc;

use crate::transfer::Digest;

/// A verified chunk, shared between shards by reference count.
pub type ChunkData = Arc<Vec<u8>>;

struct Slot {
    digest: Digest,
    data: ChunkData,
    visited: bool,
    newer: usize,
    older: usize,
}

const NONE: usize = usize::MAX;

pub struct ChunkCache {
    budget_bytes: usize,
    used_bytes: usize,
    index: hashbrown::HashMap<Digest, usize, ahash::RandomState>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    newest: usize,
    oldest: usize,
    hand: usize,
}

impl ChunkCache {
    #[must_use]
    pub fn new(budget_bytes: usize) -> ChunkCache {
        ChunkCache {
            budget_bytes,
            used_bytes: 0,
            index: hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(5, 6, 7, 8)),
            slots: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            hand: NONE,
        }
    }

    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    pub fn get(&mut self, digest: &Digest) -> Option<ChunkData> {
        let slot = &mut self.slots[*self.index.get(digest)?];
        slot.visited = true;
        Some(slot.data.clone())
    }

    /// Inserts a chunk; evicts until it fits. A chunk larger than the budget is not kept.
    pub fn insert(&mut self, digest: Digest, data: ChunkData) {
        if data.len() > self.budget_bytes || self.index.contains_key(&digest) {
            return;
        }
        while self.used_bytes + data.len() > self.budget_bytes {
            self.evict_one();
        }
        self.used_bytes += data.len();
        let slot = Slot { digest, data, visited: false, newer: NONE, older: self.newest };
        let at = match self.free.pop() {
            Some(at) => {
                self.slots[at] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        match self.newest {
            NONE => self.oldest = at,
            newest => self.slots[newest].newer = at,
        }
        self.newest = at;
        self.index.insert(digest, at);
    }

    /// Checks the cache against itself and its budget.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let held: usize = self.index.values().map(|at| self.slots[*at].data.len()).sum();
        if held != self.used_bytes || held > self.budget_bytes {
            let (used, budget) = (self.used_bytes, self.budget_bytes);
            return Err(format!("the cache holds {held} bytes, counts {used} and may have {budget}"));
        }
        Ok(())
    }

    fn evict_one(&mut self) {
        let mut at = if self.hand == NONE { self.oldest } else { self.hand };
        assert!(at != NONE, "the budget is exceeded only while something is cached");
        while self.slots[at].visited {
            self.slots[at].visited = false;
            at = if self.slots[at].newer == NONE { self.oldest } else { self.slots[at].newer };
        }
        self.hand = self.slots[at].newer;
        self.unlink(at);
    }

    fn unlink(&mut self, at: usize) {
        let (newer, older) = (self.slots[at].newer, self.slots[at].older);
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older].newer = newer,
        }
        let data = std::mem::take(&mut self.slots[at].data);
        self.used_bytes -= data.len();
        self.index.remove(&self.slots[at].digest);
        self.free.push(at);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::ChunkCache;

    proptest! {
        #[test]
        fn stays_in_budget_and_returns_what_was_put(ops in prop::collection::vec((0_u8..30, any::<bool>()), 1..500)) {
            let mut cache = ChunkCache::new(1000);
            for (key, insert) in ops {
                let (digest, data) = ([key; 32], Arc::new(vec![key; 40 + usize::from(key) * 3]));
                if insert {
                    cache.insert(digest, data.clone());
                    prop_assert!(cache.get(&digest).is_some());
                }
                prop_assert!(cache.used_bytes() <= 1000);
                if let Some(found) = cache.get(&digest) { prop_assert_eq!(found, data); }
            }
            let sum: usize = (0_u8..30).filter_map(|k| cache.get(&[k; 32])).map(|d| d.len()).sum();
            prop_assert_eq!(sum, cache.used_bytes());
        }
    }

    #[test]
    fn a_scan_does_not_evict_what_is_used() {
        let mut cache = ChunkCache::new(10 * 100);
        let chunk = |k: u8| ([k; 32], Arc::new(vec![k; 100]));
        for k in 0..5 {
            let (digest, data) = chunk(k);
            cache.insert(digest, data);
            cache.get(&digest);
        }
        for k in 100..140 {
            let (digest, data) = chunk(k);
            cache.insert(digest, data);
            (0..5).for_each(|k| assert!(cache.get(&[k; 32]).is_some(), "hot chunk {k} evicted by the scan"));
        }
    }

    #[test]
    fn larger_than_the_budget_is_not_kept() {
        let mut cache = ChunkCache::new(10);
        cache.insert([1; 32], Arc::new(vec![0; 11]));
        assert!(cache.is_empty() && cache.used_bytes() == 0);
    }
}
