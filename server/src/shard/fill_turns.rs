//! When a fill may be written into its volume store: what guests feel of fills is bounded here and nowhere else.
//!
//! A guest's read or write queues behind whatever the device has been given before it, so what is bounded is the bytes
//! of fills in flight, and how fast they follow each other; [`Harm`] says both. What a guest waits for goes first and is
//! only counted. The others wait in the order of their class.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use crate::budget::TokenBucket;
use crate::histogram::Histogram;
use crate::platform::{Platform, Time};
use crate::shard::harm::{Allowed, GuestIo, Harm, HarmLimits};
use crate::shard::hydration_queue::Class;
use crate::shard::signal::{Signal, within};
use crate::transfer::FetchClass;

/// Who waits for the pace looks again after this at the latest: guests may have gone.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Who waits for the end of a probe looks again after this.
const PROBED_AGAIN: Duration = Duration::from_millis(20);

/// When a fill may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillTurn {
    /// Now: a guest waits for it.
    AtOnce,
    /// When there is room; its bytes are off the pace already.
    Admitted(Class),
    /// When there is room and the pace allows it.
    Paced(Class),
}

impl FillTurn {
    /// Of what should have been shared and is fetched after all.
    #[must_use]
    pub fn fetch_class(self) -> FetchClass {
        match self {
            FillTurn::AtOnce => FetchClass::Priority,
            FillTurn::Admitted(_) => FetchClass::ReadAhead,
            FillTurn::Paced(class) => class.fetch_class(),
        }
    }

    /// On whose account it goes.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            FillTurn::AtOnce => Class::Priority,
            FillTurn::Admitted(class) | FillTurn::Paced(class) => class,
        }
    }
}

enum Room {
    Now,
    WhenOneEnds,
    After(Duration),
}

/// The fills of one store and shard.
pub struct FillTurns {
    bytes: Cell<u64>,
    waiting: [Cell<usize>; Class::ALL.len()],
    waited: [Histogram; Class::ALL.len()],
    harm: RefCell<Harm>,
    pace: RefCell<TokenBucket>,
    ended: Signal,
}

impl FillTurns {
    #[must_use]
    pub fn new(limits: HarmLimits, now: Time) -> FillTurns {
        FillTurns {
            bytes: Cell::default(),
            waiting: Default::default(),
            waited: Default::default(),
            harm: RefCell::new(Harm::new(limits, now)),
            pace: RefCell::new(TokenBucket::new(None, now)),
            ended: Signal::default(),
        }
    }

    pub fn guest_begins(&self, now: Time) {
        self.harm.borrow_mut().guest_begins(now);
    }

    pub fn guest_ends(&self, io: GuestIo, begun: Time, now: Time) {
        self.harm.borrow_mut().guest_ends(io, begun, now);
    }

    fn allowed(&self, now: Time) -> Allowed {
        let allowed = self.harm.borrow_mut().allowed(now);
        self.pace.borrow_mut().set_rate(allowed.bytes_per_second, allowed.burst_bytes, now);
        allowed
    }

    /// Bytes per second that fills may go at now; `None`: as fast as they can.
    pub fn bytes_per_second(&self, now: Time) -> Option<u64> {
        self.allowed(now).bytes_per_second
    }

    /// Whether a fill that need not be now may be [`FillTurn::Admitted`].
    pub fn may_admit(&self, now: Time) -> bool {
        self.pace_wait(now).is_zero()
    }

    /// When to look again whether it may.
    pub fn pace_wait(&self, now: Time) -> Duration {
        match self.allowed(now).paused {
            true => PROBED_AGAIN,
            false => self.pace.borrow_mut().wait(now).min(LOOK_AGAIN),
        }
    }

    /// One is.
    pub fn admit(&self, bytes: u64, now: Time) {
        self.pace.borrow_mut().charge(bytes, now);
    }

    fn room(&self, bytes: u64, turn: FillTurn, now: Time) -> Room {
        let allowed = self.allowed(now);
        if allowed.paused {
            return Room::After(PROBED_AGAIN);
        }
        let better = &self.waiting[..turn.class() as usize];
        let full = self.bytes.get() > 0 && self.bytes.get() + bytes > allowed.in_flight_bytes;
        if full || better.iter().any(|waiting| waiting.get() > 0) {
            return Room::WhenOneEnds;
        }
        match turn {
            FillTurn::AtOnce | FillTurn::Admitted(_) => Room::Now,
            FillTurn::Paced(_) => match self.pace.borrow_mut().take(bytes, now) {
                Ok(()) => Room::Now,
                Err(wait) => Room::After(wait.min(LOOK_AGAIN)),
            },
        }
    }

    /// Until it is dropped a fill of `bytes` is in flight. A fill larger than what is allowed has its turn when it is alone.
    pub async fn turn<'a, P: Platform>(&'a self, platform: &'a P, bytes: u64, turn: FillTurn) -> InFlight<'a, P> {
        if turn != FillTurn::AtOnce {
            let begun = platform.now();
            let _waiting = Waiting::begin(self, turn.class());
            loop {
                let ended = self.ended.waiter();
                match self.room(bytes, turn, platform.now()) {
                    Room::Now => break,
                    Room::WhenOneEnds => drop(ended.await),
                    Room::After(pause) => drop(within(platform, pause, ended).await),
                }
            }
            self.waited[turn.class() as usize].add(platform.now().since(begun));
        }
        self.bytes.set(self.bytes.get() + bytes);
        self.harm.borrow_mut().fill_begins(bytes, turn == FillTurn::AtOnce, platform.now());
        InFlight { turns: self, platform, bytes }
    }

    /// Bytes of fills in flight.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Fills of a class that wait for their turn, and how long those before them did.
    #[must_use]
    pub fn waiting(&self, class: Class) -> (usize, &Histogram) {
        (self.waiting[class as usize].get(), &self.waited[class as usize])
    }

    /// What the controller says.
    pub fn with_harm<T>(&self, look: impl FnOnce(&Harm) -> T) -> T {
        look(&self.harm.borrow())
    }
}

/// A fill that waits. Those of lesser classes look again when it no longer does.
struct Waiting<'a> {
    turns: &'a FillTurns,
    class: Class,
}

impl<'a> Waiting<'a> {
    fn begin(turns: &'a FillTurns, class: Class) -> Waiting<'a> {
        let waiting = &turns.waiting[class as usize];
        waiting.set(waiting.get() + 1);
        Waiting { turns, class }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waiting = &self.turns.waiting[self.class as usize];
        waiting.set(waiting.get() - 1);
        if waiting.get() == 0 {
            self.turns.ended.wake_all();
        }
    }
}

/// Bytes of a fill in flight.
pub struct InFlight<'a, P: Platform> {
    turns: &'a FillTurns,
    platform: &'a P,
    bytes: u64,
}

impl<P: Platform> Drop for InFlight<'_, P> {
    fn drop(&mut self) {
        self.turns.bytes.set(self.turns.bytes.get() - self.bytes);
        self.turns.harm.borrow_mut().fill_ends(self.platform.now());
        self.turns.ended.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::{FillTurn, FillTurns, InFlight};
    use crate::platform::sim::{Sim, SimWorld};
    use crate::platform::{Platform, Time};
    use crate::shard::harm::{GUEST_PAUSE, GuestIo, HarmLimits, IN_FLIGHT_BUSY_BYTES, IN_FLIGHT_QUIET_BYTES};
    use crate::shard::hydration_queue::Class;

    const CHUNK: u64 = 512 << 10;
    const WAITS: FillTurn = FillTurn::Paced(Class::Background);

    fn turns(bound_percent: Option<u32>) -> FillTurns {
        FillTurns::new(HarmLimits { bound_percent, floor: 4 << 20 }, Time(0))
    }

    fn at_once<'a>(turns: &'a FillTurns, sim: &'a Sim, bytes: u64) -> InFlight<'a, Sim> {
        turns.turn(sim, bytes, FillTurn::AtOnce).now_or_never().expect("it waits for nothing")
    }

    #[test]
    fn guests_leave_fills_less_and_get_it_at_once() {
        let (world, turns) = (SimWorld::new(1), turns(None));
        let sim = world.platform();
        let ask = || turns.turn(&sim, CHUNK, WAITS).now_or_never();
        let quiet: Vec<_> = std::iter::from_fn(ask).collect();
        assert_eq!(quiet.len() as u64, IN_FLIGHT_QUIET_BYTES / CHUNK);
        drop(quiet);
        turns.guest_begins(sim.now());
        turns.guest_ends(GuestIo::Read, sim.now(), sim.now());
        let mut busy: Vec<_> = std::iter::from_fn(ask).collect();
        assert_eq!(busy.len() as u64, IN_FLIGHT_BUSY_BYTES / CHUNK);
        let urgent = at_once(&turns, &sim, CHUNK);
        drop(busy.pop());
        assert!(ask().is_none(), "what a guest waits for counts");
        drop(urgent);
        assert!(ask().is_some());
        world.block_on(async { sim.sleep(GUEST_PAUSE).await });
        let again: Vec<_> = std::iter::from_fn(ask).collect();
        assert_eq!((again.len() + busy.len()) as u64, IN_FLIGHT_QUIET_BYTES / CHUNK);
    }

    #[test]
    fn a_fill_that_waits_is_woken_and_a_large_one_goes_alone() {
        let (world, turns) = (SimWorld::new(2), turns(Some(120)));
        let sim = world.platform();
        let small = at_once(&turns, &sim, 1);
        let mut large = Box::pin(turns.turn(&sim, 2 * IN_FLIGHT_QUIET_BYTES, WAITS));
        assert!(large.as_mut().now_or_never().is_none());
        drop(small);
        let large = large.now_or_never().expect("alone");
        assert!(turns.turn(&sim, 1, WAITS).now_or_never().is_none());
        drop(large);
        assert!(turns.turn(&sim, 1, WAITS).now_or_never().is_some());
    }

    #[test]
    fn of_fills_that_wait_the_better_class_goes_first_and_one_that_gives_up_holds_up_nobody() {
        let (world, turns) = (SimWorld::new(3), turns(None));
        let sim = world.platform();
        let whole = at_once(&turns, &sim, IN_FLIGHT_QUIET_BYTES);
        let ask = |class| Box::pin(turns.turn(&sim, IN_FLIGHT_QUIET_BYTES, FillTurn::Paced(class)));
        let (mut background, mut boot_set) = (ask(Class::Background), ask(Class::BootSet));
        let mut priority = ask(Class::Priority);
        for waiting in [&mut background, &mut boot_set, &mut priority] {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        assert_eq!(Class::ALL.map(|class| turns.waiting(class).0), [1, 1, 1]);
        drop(whole);
        assert!(background.as_mut().now_or_never().is_none() && boot_set.as_mut().now_or_never().is_none());
        drop(priority.as_mut().now_or_never().expect("its turn"));
        drop(boot_set);
        drop(background.as_mut().now_or_never().expect("the others have gone"));
        assert_eq!(Class::ALL.map(|class| turns.waiting(class).0), [0, 0, 0]);
    }

    #[test]
    fn fills_keep_the_pace_while_guests_are_there_and_forget_it_when_they_go() {
        let (world, turns) = (SimWorld::new(4), turns(Some(120)));
        let sim = world.platform();
        world.block_on(async {
            turns.guest_begins(sim.now());
            let rate = turns.bytes_per_second(sim.now()).expect("a pace");
            let begun = sim.now();
            for _ in 0..rate / CHUNK {
                drop(turns.turn(&sim, CHUNK, WAITS).await);
            }
            let took = sim.now().since(begun);
            assert!(
                took > Duration::from_millis(700) && took < Duration::from_millis(1100),
                "a second's worth: {took:?}"
            );
            turns.guest_ends(GuestIo::Read, begun, sim.now());
            sim.sleep(GUEST_PAUSE).await;
            let begun = sim.now();
            for _ in 0..rate / CHUNK {
                drop(turns.turn(&sim, CHUNK, WAITS).await);
            }
            assert!(sim.now().since(begun) < Duration::from_millis(100));
        });
    }
}
