//! SIEVE: a FIFO with one visited bit and a hand that keeps its place and evicts what was not visited since it passed.

use std::collections::{BTreeMap, HashMap};

use super::{Access, Key, Policy};

pub struct Sieve {
    size: usize,
    turn: u64,
    /// Turn of insertion, and whether it was asked for since the hand passed.
    held: HashMap<Key, (u64, bool)>,
    order: BTreeMap<u64, Key>,
    hand: u64,
}

impl Sieve {
    #[must_use]
    pub fn new(size: usize) -> Sieve {
        Sieve { size, turn: 0, held: HashMap::new(), order: BTreeMap::new(), hand: 0 }
    }

    fn evict(&mut self) {
        loop {
            let next = self.order.range(self.hand..).next().or_else(|| self.order.first_key_value());
            let Some((&turn, &key)) = next else { return };
            self.hand = turn + 1;
            match self.held.get_mut(&key) {
                Some((_, visited)) if *visited => *visited = false,
                _ => {
                    self.order.remove(&turn);
                    self.held.remove(&key);
                    return;
                }
            }
        }
    }
}

impl Policy for Sieve {
    fn access(&mut self, access: Access) -> bool {
        if let Some((_, visited)) = self.held.get_mut(&access.key) {
            *visited = true;
            return true;
        }
        if self.held.len() >= self.size {
            self.evict();
        }
        self.turn += 1;
        self.held.insert(access.key, (self.turn, false));
        self.order.insert(self.turn, access.key);
        false
    }

    fn len(&self) -> usize {
        self.held.len()
    }
}
