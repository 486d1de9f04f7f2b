//! FIFO: the oldest leaves, whatever was asked for.

use std::collections::{HashSet, VecDeque};

use super::{Access, Key, Policy};

pub struct Fifo {
    size: usize,
    queue: VecDeque<Key>,
    held: HashSet<Key>,
}

impl Fifo {
    #[must_use]
    pub fn new(size: usize) -> Fifo {
        Fifo { size, queue: VecDeque::new(), held: HashSet::new() }
    }
}

impl Policy for Fifo {
    fn access(&mut self, access: Access) -> bool {
        if !self.held.insert(access.key) {
            return true;
        }
        self.queue.push_back(access.key);
        if self.queue.len() > self.size
            && let Some(oldest) = self.queue.pop_front()
        {
            self.held.remove(&oldest);
        }
        false
    }

    fn len(&self) -> usize {
        self.held.len()
    }
}
