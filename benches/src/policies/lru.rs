//! LRU: what was asked for longest ago leaves.

use std::collections::{BTreeMap, HashMap};

use super::{Access, Key, Policy};

pub struct Lru {
    size: usize,
    turn: u64,
    turns: HashMap<Key, u64>,
    order: BTreeMap<u64, Key>,
}

impl Lru {
    #[must_use]
    pub fn new(size: usize) -> Lru {
        Lru { size, turn: 0, turns: HashMap::new(), order: BTreeMap::new() }
    }
}

impl Policy for Lru {
    fn access(&mut self, access: Access) -> bool {
        self.turn += 1;
        let before = self.turns.insert(access.key, self.turn);
        if let Some(turn) = before {
            self.order.remove(&turn);
        }
        self.order.insert(self.turn, access.key);
        if self.turns.len() > self.size
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.turns.remove(&oldest);
        }
        before.is_some()
    }

    fn len(&self) -> usize {
        self.turns.len()
    }
}
