//! All sleeps of an executor on one timer of glommio.
//!
//! glommio looks at every timer there is in each turn of its reactor. Each request that waits for an object store has a deadline, so
//! thousands of timers are ordinary here, and nearly all of them are dropped long before they are due. They stand in an
//! ordered map, and one task sleeps for the earliest.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use glommio::TaskQueueHandle;

/// The sleeper looks again this late at least when nothing wakes it.
const IDLE: Duration = Duration::from_secs(3600);

/// When, and which one of those.
type Key = (Instant, u64);

pub struct Timers {
    /// Where the task runs.
    queue: TaskQueueHandle,
    waiting: RefCell<BTreeMap<Key, Waker>>,
    next: Cell<u64>,
    /// Until when the task sleeps; `None`: there is no task yet.
    sleeps_until: Cell<Option<Instant>>,
    /// The task, to tell it that it sleeps for too long.
    sleeper: Cell<Option<Waker>>,
}

impl Timers {
    pub fn new(queue: TaskQueueHandle) -> Timers {
        let (waiting, next) = (RefCell::default(), Cell::default());
        Timers { queue, waiting, next, sleeps_until: Cell::new(None), sleeper: Cell::new(None) }
    }

    /// Completes after `duration`. Dropping it earlier costs a look-up.
    pub fn sleep(self: &Rc<Timers>, duration: Duration) -> Sleep {
        let now = Instant::now();
        let due = now.checked_add(duration).unwrap_or(now + IDLE);
        let number = self.next.get();
        self.next.set(number + 1);
        Sleep { timers: self.clone(), key: (due, number), waits: false }
    }

    /// Sees to it that the task wakes up in time for the earliest.
    fn arm(self: &Rc<Timers>, due: Instant) {
        match self.sleeps_until.get() {
            None => {
                self.sleeps_until.set(Some(due));
                let task = glommio::spawn_local_into(wake_in_time(Rc::downgrade(self)), self.queue);
                task.expect("the queues live as long as the executor").detach();
            }
            Some(until) if due < until => {
                self.sleeps_until.set(Some(due));
                if let Some(sleeper) = self.sleeper.take() {
                    sleeper.wake();
                }
            }
            Some(_) => {}
        }
    }

    /// Wakes what is due; when the next one will be.
    fn wake_due(&self, now: Instant) -> Option<Instant> {
        loop {
            let mut waiting = self.waiting.borrow_mut();
            let first = waiting.first_entry()?;
            if first.key().0 > now {
                return Some(first.key().0);
            }
            let waker = first.remove();
            drop(waiting);
            waker.wake();
        }
    }
}

async fn wake_in_time(timers: Weak<Timers>) {
    loop {
        let Some(all) = timers.upgrade() else { return };
        let now = Instant::now();
        let until = all.wake_due(now).unwrap_or(now + IDLE);
        all.sleeps_until.set(Some(until));
        drop(all);
        let mut timer = pin!(glommio::timer::sleep(until.saturating_duration_since(now)));
        poll_fn(|context| {
            let Some(all) = timers.upgrade() else { return Poll::Ready(()) };
            if all.sleeps_until.get().is_none_or(|sooner| sooner < until) {
                return Poll::Ready(());
            }
            all.sleeper.set(Some(context.waker().clone()));
            timer.as_mut().poll(context)
        })
        .await;
    }
}

/// See [`Timers::sleep`].
pub struct Sleep {
    timers: Rc<Timers>,
    key: Key,
    /// It stands in the map.
    waits: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.key.0 {
            return Poll::Ready(());
        }
        let (timers, key) = (self.timers.clone(), self.key);
        timers.waiting.borrow_mut().insert(key, context.waker().clone());
        if !self.waits {
            self.waits = true;
            timers.arm(key.0);
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.waits {
            self.timers.waiting.borrow_mut().remove(&self.key);
        }
    }
}
