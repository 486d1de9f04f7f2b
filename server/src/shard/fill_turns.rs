//! How much of a volume store's disk fills may keep busy: much while guests leave it alone, little while they use it.
//!
//! A guest's read or write queues behind whatever the device has been given before it. So what is bounded is the bytes of
//! fills in flight, whoever asked for them; what a guest waits for goes first and is only counted.

use std::cell::Cell;
use std::time::Duration;

use crate::platform::Time;
use crate::shard::signal::Signal;
use crate::transfer::FetchClass;

/// Bytes of fills in flight per store and shard while no guest uses it: what it takes to keep a fast disk busy.
const QUIET_BYTES_MAX: u64 = 4 << 20;
/// While guests do: about half a millisecond of a disk with 2 GB/s.
const BUSY_BYTES_MAX: u64 = 1 << 20;
/// So long after a guest's last I/O its store counts as used.
const GUEST_PAUSE: Duration = Duration::from_millis(10);

/// When a fill may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillTurn {
    /// When there is room.
    Waits,
    /// Now: a guest waits for it.
    AtOnce,
}

impl FillTurn {
    /// Of what was fetched so urgently.
    #[must_use]
    pub fn of(class: FetchClass) -> FillTurn {
        if class == FetchClass::Priority { FillTurn::AtOnce } else { FillTurn::Waits }
    }
}

#[derive(Default)]
pub struct FillTurns {
    bytes: Cell<u64>,
    guest_until: Cell<Time>,
    ended: Signal,
}

impl FillTurns {
    /// A guest's I/O begins or ends.
    pub fn note_guest(&self, now: Time) {
        self.guest_until.set(now.after(GUEST_PAUSE));
    }

    /// Until it is dropped a fill of `bytes` is in flight. A fill larger than what is allowed has its turn when it is alone.
    pub async fn turn(&self, bytes: u64, turn: FillTurn, now: impl Fn() -> Time) -> InFlight<'_> {
        if turn == FillTurn::Waits {
            self.ended
                .until(|| {
                    let most = if now() < self.guest_until.get() { BUSY_BYTES_MAX } else { QUIET_BYTES_MAX };
                    self.bytes.get() == 0 || self.bytes.get() + bytes <= most
                })
                .await;
        }
        self.bytes.set(self.bytes.get() + bytes);
        InFlight { turns: self, bytes }
    }
}

/// Bytes of a fill in flight.
pub struct InFlight<'a> {
    turns: &'a FillTurns,
    bytes: u64,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.turns.bytes.set(self.turns.bytes.get() - self.bytes);
        self.turns.ended.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures::FutureExt;

    use super::{BUSY_BYTES_MAX, FillTurn, FillTurns, GUEST_PAUSE, InFlight, QUIET_BYTES_MAX};
    use crate::platform::Time;

    const CHUNK: u64 = 512 << 10;

    fn at_once(turns: &FillTurns, bytes: u64) -> InFlight<'_> {
        turns.turn(bytes, FillTurn::AtOnce, Time::default).now_or_never().expect("it waits for nothing")
    }

    #[test]
    fn guests_leave_fills_less_and_get_it_at_once() {
        let (turns, clock) = (FillTurns::default(), Cell::new(Time(1)));
        let ask = |bytes| turns.turn(bytes, FillTurn::Waits, || clock.get()).now_or_never();
        let quiet: Vec<_> = std::iter::from_fn(|| ask(CHUNK)).collect();
        assert_eq!(quiet.len() as u64, QUIET_BYTES_MAX / CHUNK);
        drop(quiet);
        turns.note_guest(clock.get());
        let mut busy: Vec<_> = std::iter::from_fn(|| ask(CHUNK)).collect();
        assert_eq!(busy.len() as u64, BUSY_BYTES_MAX / CHUNK);
        let urgent = at_once(&turns, CHUNK);
        drop(busy.pop());
        assert!(ask(CHUNK).is_none(), "what a guest waits for counts");
        drop(urgent);
        assert!(ask(CHUNK).is_some());
        clock.set(clock.get().after(GUEST_PAUSE));
        let again: Vec<_> = std::iter::from_fn(|| ask(CHUNK)).collect();
        assert_eq!((again.len() + busy.len()) as u64, QUIET_BYTES_MAX / CHUNK);
    }

    #[test]
    fn a_fill_that_waits_is_woken_and_a_large_one_goes_alone() {
        let (turns, now) = (FillTurns::default(), || Time(1));
        let small = at_once(&turns, 1);
        let mut large = Box::pin(turns.turn(2 * QUIET_BYTES_MAX, FillTurn::Waits, now));
        assert!(large.as_mut().now_or_never().is_none());
        drop(small);
        let large = large.now_or_never().expect("alone");
        assert!(turns.turn(1, FillTurn::Waits, now).now_or_never().is_none());
        drop(large);
        assert!(turns.turn(1, FillTurn::Waits, now).now_or_never().is_some());
    }
}
