//! Locks on byte ranges: of two writes that touch the same block, one is begun only when the other is done.
//!
//! Two reasons: the edges of unaligned writes are read-modify-written, and the client must not have overlapping writes
//! in flight (after a restart of the server it repeats them, and their order would be lost). Grants are in order of
//! arrival, so none starves. The list is short (writes in flight), so it is scanned.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The locks of one device.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    queue: Mutex<Queue>,
    released: Notify,
}

/// Holds a range until dropped.
#[derive(Debug)]
pub(crate) struct Guard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    /// Ranges in order of arrival: those that are held and those that wait.
    entries: Vec<(u64, Range<u64>)>,
}

impl RangeLock {
    /// Waits until nobody who came earlier has a range that overlaps. Dropping the future gives the place up.
    pub(crate) async fn lock(&self, range: Range<u64>) -> Guard<'_> {
        let guard = Guard { lock: self, id: self.queue().push(range) };
        loop {
            let mut released = std::pin::pin!(self.released.notified());
            // Listens before it looks, so that no release falls between.
            released.as_mut().enable();
            if self.queue().is_granted(guard.id) {
                return guard;
            }
            released.await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // The list is consistent after every statement under the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&mut self, range: Range<u64>) -> u64 {
        self.next_id += 1;
        self.entries.push((self.next_id, range));
        self.next_id
    }

    /// No earlier entry stands in the way.
    fn is_granted(&self, id: u64) -> bool {
        let at = self.entries.iter().position(|entry| entry.0 == id).expect("entries live as long as their guard");
        let range = &self.entries[at].1;
        !self.entries[..at].iter().any(|(_, earlier)| earlier.start < range.end && range.start < earlier.end)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.queue();
        queue.entries.retain(|entry| entry.0 != self.id);
        let waiters = !queue.entries.is_empty();
        drop(queue);
        if waiters {
            self.lock.released.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::RangeLock;

    #[tokio::test]
    async fn what_overlaps_waits_in_order_and_what_does_not_passes() {
        let lock = RangeLock::default();
        let first = lock.lock(0..1024).await;
        let mut second = Box::pin(lock.lock(512..2048));
        assert!(second.as_mut().now_or_never().is_none());
        let mut third = Box::pin(lock.lock(1024..4096));
        assert!(third.as_mut().now_or_never().is_none(), "free, but an earlier one waits for it");
        let elsewhere = lock.lock(4096..8192).now_or_never();
        assert!(elsewhere.is_some());
        drop(first);
        let second = second.await;
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        drop(third.await);
        drop(elsewhere);
        assert!(lock.queue().entries.is_empty());
    }

    #[tokio::test]
    async fn giving_up_waiting_frees_the_place() {
        let lock = RangeLock::default();
        let held = lock.lock(0..512).await;
        let mut waiting = Box::pin(lock.lock(0..1024));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(waiting);
        assert!(lock.lock(512..1024).now_or_never().is_some());
        drop(held);
    }
}
