//! Locks on the chunks of one volume: guest writes share a chunk, hydration and read-modify-write have it alone.
//!
//! **Invariant:** hydration writes into a chunk only while it holds the chunk alone, and decides which sectors to
//! write after it got it; so it never overwrites a guest write in any interleaving. First come, first served: a
//! stream of guest writes cannot starve a fill. Held over local disk I/O only, never over a fetch. Whoever takes
//! several locks takes them in ascending order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::rc::Rc;

use futures::channel::oneshot;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Shared,
    Alone,
}

#[derive(Default)]
struct Lock {
    shared: u32,
    alone: bool,
    waiters: VecDeque<(Mode, oneshot::Sender<()>)>,
}

impl Lock {
    fn try_hold(&mut self, mode: Mode) -> bool {
        let free = !self.alone && (mode == Mode::Shared || self.shared == 0);
        if free {
            match mode {
                Mode::Shared => self.shared += 1,
                Mode::Alone => self.alone = true,
            }
        }
        free
    }

    fn release(&mut self, mode: Mode) {
        match mode {
            Mode::Shared => self.shared -= 1,
            Mode::Alone => self.alone = false,
        }
    }

    /// Lets in whoever may come in now, in order.
    fn grant(&mut self) {
        while let Some((mode, _)) = self.waiters.front() {
            let mode = *mode;
            if !self.try_hold(mode) {
                return;
            }
            let (_, waiter) = self.waiters.pop_front().expect("front exists");
            if waiter.send(()).is_err() {
                self.release(mode);
            }
        }
    }
}

type Table = hashbrown::HashMap<u32, Lock, ahash::RandomState>;

pub struct ChunkLocks(RefCell<Table>);

impl Default for ChunkLocks {
    fn default() -> ChunkLocks {
        ChunkLocks(RefCell::new(Table::with_hasher(ahash::RandomState::with_seeds(13, 14, 15, 16))))
    }
}

/// Releases the lock when dropped.
pub struct Guard {
    locks: Rc<ChunkLocks>,
    chunk: u32,
    mode: Mode,
}

impl ChunkLocks {
    pub async fn lock(self: &Rc<Self>, chunk: u32, mode: Mode) -> Guard {
        let waiter = {
            let mut table = self.0.borrow_mut();
            let lock = table.entry(chunk).or_default();
            if lock.waiters.is_empty() && lock.try_hold(mode) {
                None
            } else {
                let (sender, receiver) = oneshot::channel();
                lock.waiters.push_back((mode, sender));
                Some(receiver)
            }
        };
        // The guard exists only once the lock is held; a waiter that is dropped is skipped by `grant`.
        if let Some(waiter) = waiter {
            waiter.await.expect("a lock with waiters outlives them");
        }
        Guard { locks: self.clone(), chunk, mode }
    }

    pub async fn lock_all(self: &Rc<Self>, chunks: RangeInclusive<u32>, mode: Mode) -> Vec<Guard> {
        let mut guards = Vec::with_capacity(chunks.clone().count());
        for chunk in chunks {
            guards.push(self.lock(chunk, mode).await);
        }
        guards
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut table = self.locks.0.borrow_mut();
        let lock = table.get_mut(&self.chunk).expect("a held lock is in the table");
        lock.release(self.mode);
        lock.grant();
        if lock.shared == 0 && !lock.alone && lock.waiters.is_empty() {
            table.remove(&self.chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use futures::FutureExt;

    use super::{ChunkLocks, Mode};

    #[test]
    fn shared_together_alone_alone_in_order() {
        let locks = Rc::new(ChunkLocks::default());
        let first = locks.lock(1, Mode::Shared).now_or_never().expect("free");
        let second = locks.lock(1, Mode::Shared).now_or_never().expect("shared");
        let mut fill = Box::pin(locks.lock(1, Mode::Alone));
        assert!(fill.as_mut().now_or_never().is_none());
        let mut late = Box::pin(locks.lock(1, Mode::Shared));
        assert!(late.as_mut().now_or_never().is_none(), "a fill that waits is not overtaken");
        assert!(locks.lock(2, Mode::Alone).now_or_never().is_some(), "other chunks are free");
        drop((first, second));
        let fill = fill.now_or_never().expect("granted");
        assert!(late.as_mut().now_or_never().is_none());
        drop(fill);
        drop(late.now_or_never().expect("granted after the fill"));
        assert!(locks.0.borrow().is_empty());
    }

    #[test]
    fn a_waiter_that_gave_up_is_skipped() {
        let locks = Rc::new(ChunkLocks::default());
        let held = locks.lock(1, Mode::Alone).now_or_never().expect("free");
        let mut gives_up = Box::pin(locks.lock(1, Mode::Alone));
        assert!(gives_up.as_mut().now_or_never().is_none());
        drop(gives_up);
        drop(held);
        assert!(locks.lock(1, Mode::Alone).now_or_never().is_some());
    }
}
