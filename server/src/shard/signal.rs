//! Waiting inside one shard: a wake-up for all waiters, and a wait with a deadline.

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
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

/// Who is at work now, and on which chunk.
#[derive(Default)]
pub struct Busy {
    now: RefCell<Vec<u32>>,
    done: Signal,
}

impl Busy {
    /// One more, until this is dropped.
    pub fn begin(self: &Rc<Busy>, chunk: u32) -> AtWork {
        self.now.borrow_mut().push(chunk);
        AtWork { busy: self.clone(), chunk }
    }

    pub fn count(&self) -> usize {
        self.now.borrow().len()
    }

    pub async fn ended(&self) {
        self.done.until(|| self.now.borrow().is_empty()).await;
    }

    /// Nobody is at work on this chunk.
    pub async fn ended_on(&self, chunk: u32) {
        self.done.until(|| !self.now.borrow().contains(&chunk)).await;
    }
}

pub struct AtWork {
    busy: Rc<Busy>,
    chunk: u32,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let mut now = self.busy.now.borrow_mut();
        let at = now.iter().position(|chunk| *chunk == self.chunk).expect("it was begun");
        now.swap_remove(at);
        drop(now);
        self.busy.done.wake_all();
    }
}

/// `None` when the time passed first. The future is dropped then: it must only wait, never hold I/O half done.
pub async fn within<P: Platform, T>(platform: &P, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    match select(pin!(future), pin!(platform.sleep(limit))).await {
        Either::Left((value, _)) => Some(value),
        Either::Right(_) => None,
    }
}
