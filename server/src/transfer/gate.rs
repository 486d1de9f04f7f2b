//! When another GET may start on one shard: slots, a congestion window, and budgets in bytes and requests per second.
//! Plain synchronous core: time is an argument.
//!
//! The window is AIMD: it grows by one for each window of answers, halves when the object store asks to slow down or
//! does not answer in time, and never exceeds the slots. A part of it is priority's: background work leaves it free. The
//! budgets are the shard's share of the node's; background work waits for them, priority goes into debt that
//! background work pays.

use std::time::Duration;

use super::FetchClass;
use crate::budget::TokenBucket;
use crate::platform::Time;

/// After the window was halved, further complaints are about GETs that were sent before: they count once.
const DECREASE_PAUSE: Duration = Duration::from_millis(500);
/// A store that refuses everything is still asked: one GET at a time, spaced by the back-off of its retries.
const WINDOW_MIN: f64 = 1.0;

/// Bounds of a shard's GETs.
#[derive(Clone, Copy, Debug)]
pub struct GateLimits {
    /// GETs in flight at once, of all classes.
    pub gets_max: usize,
    /// Of those, how many may be boot-set or background; the rest is reserved for priority.
    pub gets_background_max: usize,
    /// `None`: unlimited.
    pub bytes_per_second: Option<u64>,
    pub gets_per_second: Option<u64>,
}

impl Default for GateLimits {
    fn default() -> GateLimits {
        // 16 × 512 KiB covers the bandwidth-delay product of 2.5 Gbit/s at 25 ms; a quarter stays for priority.
        GateLimits { gets_max: 16, gets_background_max: 12, bytes_per_second: None, gets_per_second: None }
    }
}

/// How a GET ended, as far as the pace of the next ones is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The store answered, whatever it said.
    Answered,
    /// It asked to slow down, or did not answer in time.
    Throttled,
}

/// Whether a GET may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    Now,
    /// When this time has passed.
    After(Duration),
    /// When another GET has ended.
    WhenOneEnds,
}

pub struct Gate {
    limits: GateLimits,
    window: f64,
    halved_at: Option<Time>,
    bytes: TokenBucket,
    gets: TokenBucket,
    in_flight: usize,
    in_flight_background: usize,
}

impl Gate {
    #[must_use]
    pub fn new(limits: GateLimits, now: Time) -> Gate {
        assert!(limits.gets_background_max < limits.gets_max, "priority needs reserved slots");
        Gate {
            limits,
            window: limits.gets_max as f64,
            halved_at: None,
            bytes: TokenBucket::new(limits.bytes_per_second, now),
            gets: TokenBucket::new(limits.gets_per_second, now),
            in_flight: 0,
            in_flight_background: 0,
        }
    }

    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// GETs of all classes that may be in flight now.
    #[must_use]
    pub fn window(&self) -> usize {
        self.window as usize
    }

    /// Slots of background work: its share of the window, at least one.
    fn background_max(&self) -> usize {
        (self.window() * self.limits.gets_background_max / self.limits.gets_max).max(1)
    }

    pub fn admits(&mut self, class: FetchClass, now: Time) -> Admission {
        if class == FetchClass::Priority {
            // A window that background work fills while it shrinks still has a place for priority.
            let most = self.window().max(self.in_flight_background + 1).min(self.limits.gets_max);
            return if self.in_flight < most { Admission::Now } else { Admission::WhenOneEnds };
        }
        if self.in_flight >= self.window() || self.in_flight_background >= self.background_max() {
            return Admission::WhenOneEnds;
        }
        match self.bytes.wait(now).max(self.gets.wait(now)) {
            Duration::ZERO => Admission::Now,
            wait => Admission::After(wait),
        }
    }

    /// A GET of so many bytes starts.
    pub fn start(&mut self, class: FetchClass, bytes: u64, now: Time) {
        self.in_flight += 1;
        self.in_flight_background += usize::from(class != FetchClass::Priority);
        self.charge(bytes, now);
    }

    /// What is sent beside the GETs in flight (a repetition, a second attempt) counts in the budgets too.
    pub fn charge(&mut self, bytes: u64, now: Time) {
        self.bytes.charge(bytes, now);
        self.gets.charge(1, now);
    }

    /// A GET ended, with all its repetitions.
    pub fn done(&mut self, class: FetchClass) {
        self.in_flight -= 1;
        self.in_flight_background -= usize::from(class != FetchClass::Priority);
    }

    /// An answer came, or none in time. `true`: the window was halved.
    pub fn note(&mut self, pace: Pace, now: Time) -> bool {
        match pace {
            Pace::Answered => {
                self.window = (self.window + 1.0 / self.window).min(self.limits.gets_max as f64);
                false
            }
            Pace::Throttled => {
                let again = self.halved_at.is_some_and(|at| now.since(at) < DECREASE_PAUSE);
                if !again {
                    self.window = (self.window / 2.0).max(WINDOW_MIN);
                    self.halved_at = Some(now);
                }
                !again
            }
        }
    }

    /// Checks the counts against the slots.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let (all, background) = (self.in_flight, self.in_flight_background);
        if all > self.limits.gets_max || background > self.limits.gets_background_max {
            return Err(format!("{all} GETs in flight, {background} of them background, exceed {:?}", self.limits));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{Admission, Gate, GateLimits, Pace};
    use crate::platform::Time;
    use crate::transfer::FetchClass::{Background, Priority};

    const LIMITS: GateLimits =
        GateLimits { gets_max: 8, gets_background_max: 6, bytes_per_second: None, gets_per_second: None };

    fn at(ms: u64) -> Time {
        Time::default().after(Duration::from_millis(ms))
    }

    fn fill(gate: &mut Gate, class: super::FetchClass) -> usize {
        let mut started = 0;
        while gate.admits(class, at(0)) == Admission::Now {
            gate.start(class, 1, at(0));
            started += 1;
        }
        started
    }

    #[test]
    fn background_leaves_the_reserved_slots_to_priority() {
        let mut gate = Gate::new(LIMITS, at(0));
        assert_eq!((fill(&mut gate, Background), fill(&mut gate, Priority)), (6, 2));
        gate.done(Priority);
        assert_eq!(gate.admits(Background, at(0)), Admission::WhenOneEnds);
        assert_eq!(gate.admits(Priority, at(0)), Admission::Now);
    }

    #[test]
    fn the_window_halves_once_for_a_burst_of_complaints_and_grows_by_one_for_a_window_of_answers() {
        let mut gate = Gate::new(LIMITS, at(0));
        assert!(gate.note(Pace::Throttled, at(0)));
        (1..400).for_each(|ms| assert!(!gate.note(Pace::Throttled, at(ms))));
        assert_eq!(gate.window(), 4);
        (0..5).for_each(|_| assert!(!gate.note(Pace::Answered, at(400))));
        assert_eq!(gate.window(), 5);
        (1..10).for_each(|n| assert!(gate.note(Pace::Throttled, at(n * 1000))));
        assert_eq!(gate.window(), 1, "it never closes");
        (0..1000).for_each(|_| assert!(!gate.note(Pace::Answered, at(20_000))));
        assert_eq!(gate.window(), 8, "and never exceeds the slots");
    }

    #[test]
    fn a_window_that_background_work_fills_has_a_place_for_priority() {
        let mut gate = Gate::new(LIMITS, at(0));
        fill(&mut gate, Background);
        (1..10).for_each(|n| assert!(gate.note(Pace::Throttled, at(n * 1000))));
        assert_eq!(gate.admits(Background, at(0)), Admission::WhenOneEnds);
        assert_eq!(fill(&mut gate, Priority), 1);
    }

    #[test]
    fn background_waits_for_the_budgets_and_pays_what_priority_took() {
        let limits = GateLimits { bytes_per_second: Some(1000), gets_per_second: Some(10), ..LIMITS };
        let mut gate = Gate::new(limits, at(0));
        gate.start(Priority, 2000, at(0));
        assert_eq!(gate.admits(Priority, at(0)), Admission::Now, "priority never waits for a budget");
        let Admission::After(wait) = gate.admits(Background, at(0)) else { panic!("the bytes are spent") };
        assert!((1800..2000).contains(&wait.as_millis()), "{wait:?}");
        assert_eq!(gate.admits(Background, at(0).after(wait)), Admission::Now);
        (0..5).for_each(|_| gate.charge(0, at(10_000)));
        let Admission::After(wait) = gate.admits(Background, at(10_000)) else { panic!("the requests are spent") };
        assert!((300..400).contains(&wait.as_millis()), "{wait:?}");
    }

    proptest! {
        /// Whatever happens, bounds hold, and when nothing is in flight something may start sooner or later.
        #[test]
        fn bounds_hold_and_nothing_is_stuck(ops in prop::collection::vec(0_u8..6, 1..300)) {
            let mut gate = Gate::new(GateLimits { gets_per_second: Some(50), ..LIMITS }, at(0));
            let (mut flying, mut ms) = (Vec::new(), 0);
            for op in ops {
                ms += 7;
                match op {
                    0 | 1 => {
                        let class = if op == 0 { Priority } else { Background };
                        if gate.admits(class, at(ms)) == Admission::Now {
                            gate.start(class, 100, at(ms));
                            flying.push(class);
                        }
                    }
                    2 | 3 => if let Some(class) = flying.pop() { gate.done(class); },
                    4 => drop(gate.note(Pace::Throttled, at(ms))),
                    _ => drop(gate.note(Pace::Answered, at(ms))),
                }
                prop_assert_eq!(gate.check(), Ok(()));
                prop_assert_eq!(gate.in_flight(), flying.len());
            }
            flying.into_iter().for_each(|class| gate.done(class));
            prop_assert_eq!(gate.admits(Priority, at(ms)), Admission::Now);
            prop_assert_eq!(gate.admits(Background, at(ms + 60_000)), Admission::Now);
        }
    }
}
