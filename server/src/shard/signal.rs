//! Waiting inside one shard: a wake-up for all waiters, and a wait with a deadline.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::channel::oneshot;
use futures::future::{Either, select};

use crate::platform::Platform;

/// Wakes everyone who waits. Take the waiter first, then check the condition, then await it.
#[derive(Default)]
pub struct Signal(RefCell<Vec<oneshot::Sender<()>>>);

impl Signal {
    pub fn waiter(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut waiters = self.0.borrow_mut();
        waiters.retain(|w| !w.is_canceled());
        waiters.push(sender);
        receiver
    }

    pub fn wake_all(&self) {
        for waiter in self.0.take() {
            let _ = waiter.send(());
        }
    }

    /// Waits until `done` holds, checked at each wake-up.
    pub async fn until(&self, mut done: impl FnMut() -> bool) {
        loop {
            let waiter = self.waiter();
            if done() {
                return;
            }
            let _ = waiter.await;
        }
    }
}

/// How many are at something now.
#[derive(Default)]
pub struct Busy {
    now: Cell<u32>,
    done: Signal,
}

impl Busy {
    /// One more, until this is dropped.
    pub fn begin(&self) -> AtWork<'_> {
        self.now.set(self.now.get() + 1);
        AtWork(self)
    }

    pub async fn ended(&self) {
        self.done.until(|| self.now.get() == 0).await;
    }
}

pub struct AtWork<'a>(&'a Busy);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.now.set(self.0.now.get() - 1);
        self.0.done.wake_all();
    }
}

/// `None` when the time passed first. The future is dropped then: it must only wait, never hold I/O half done.
pub async fn within<P: Platform, T>(platform: &P, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    match select(pin!(future), pin!(platform.sleep(limit))).await {
        Either::Left((value, _)) => Some(value),
        Either::Right(_) => None,
    }
}
