//! Token bucket: a rate in units per second with a burst. Pure: time is an argument.

use std::time::Duration;

use crate::platform::Time;

const NANOS: u128 = 1_000_000_000;

/// Takes may exceed what is there once the bucket is positive (and `charge` always may): the debt is paid by later
/// takers, so that one request larger than the burst still passes and the long-run rate holds.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    per_second: Option<u64>,
    burst: u64,
    /// Units times 10⁹: refills lose nothing to rounding.
    tokens_nanos: i128,
    at: Time,
}

impl TokenBucket {
    /// `None`: unlimited. The burst is a tenth of a second's worth, at least one unit.
    #[must_use]
    pub fn new(per_second: Option<u64>, now: Time) -> TokenBucket {
        let burst = per_second.unwrap_or(0) / 10 + 1;
        TokenBucket { per_second, burst, tokens_nanos: i128::from(burst) * NANOS as i128, at: now }
    }

    /// Another rate and burst from now on; what is there or owed stays, up to the burst.
    pub fn set_rate(&mut self, per_second: Option<u64>, burst: u64, now: Time) {
        if (per_second, burst) == (self.per_second, self.burst) {
            return;
        }
        self.refill(now);
        let unlimited = self.per_second.is_none();
        self.burst = burst;
        let ceiling = i128::from(self.burst) * NANOS as i128;
        // What was moved while there was no limit is not owed.
        self.tokens_nanos = if unlimited { ceiling } else { self.tokens_nanos.min(ceiling) };
        (self.per_second, self.at) = (per_second, self.at.max(now));
    }

    fn refill(&mut self, now: Time) {
        let Some(rate) = self.per_second else { return };
        let nanos = now.since(self.at).as_nanos();
        self.at = self.at.max(now);
        let ceiling = i128::from(self.burst) * NANOS as i128;
        let gained = i128::try_from(u128::from(rate).saturating_mul(nanos)).unwrap_or(i128::MAX);
        self.tokens_nanos = self.tokens_nanos.saturating_add(gained).min(ceiling);
    }

    /// Takes `units` if the bucket is positive, else says how long until it is.
    ///
    /// # Errors
    /// The time to wait before trying again.
    pub fn take(&mut self, units: u64, now: Time) -> Result<(), Duration> {
        let wait = self.wait(now);
        if wait.is_zero() {
            self.charge(units, now);
            return Ok(());
        }
        Err(wait)
    }

    /// Time until the bucket is positive; zero if it is.
    pub fn wait(&mut self, now: Time) -> Duration {
        self.refill(now);
        let Some(rate) = self.per_second.filter(|_| self.tokens_nanos <= 0) else { return Duration::ZERO };
        let missing = self.tokens_nanos.unsigned_abs() + 1;
        Duration::from_nanos(u64::try_from(missing.div_ceil(u128::from(rate.max(1)))).unwrap_or(u64::MAX))
    }

    /// Takes `units` without asking: priority work goes into debt that background work pays.
    pub fn charge(&mut self, units: u64, now: Time) {
        self.refill(now);
        if self.per_second.is_some() {
            self.tokens_nanos -= i128::from(units) * NANOS as i128;
        }
    }

    /// Returns what was charged and turned out not to be needed.
    pub fn give_back(&mut self, units: u64, now: Time) {
        self.refill(now);
        let ceiling = i128::from(self.burst) * NANOS as i128;
        self.tokens_nanos = (self.tokens_nanos + i128::from(units) * NANOS as i128).min(ceiling);
    }
}

/// Seconds a [`RateMeter`] looks back.
const METER_SECONDS: u64 = 5;

/// Units per second over the last seconds.
#[derive(Clone, Debug, Default)]
pub struct RateMeter {
    /// Units of each of the last seconds, at second number modulo the window.
    units: [u64; METER_SECONDS as usize + 1],
    second: u64,
    started: Option<Time>,
}

impl RateMeter {
    pub fn add(&mut self, units: u64, now: Time) {
        self.advance(now);
        self.units[(self.second % (METER_SECONDS + 1)) as usize] += units;
    }

    /// Zero when nothing came for the length of the window.
    pub fn per_second(&mut self, now: Time) -> u64 {
        self.advance(now);
        let Some(started) = self.started else { return 0 };
        let into_second = now.0 % 1_000_000_000;
        let window = Duration::from_nanos(METER_SECONDS * 1_000_000_000 + into_second).min(now.since(started));
        let sum: u64 = self.units.iter().sum();
        (sum as f64 / window.as_secs_f64().max(0.1)) as u64
    }

    fn advance(&mut self, now: Time) {
        let second = now.0 / 1_000_000_000;
        if self.started.is_none() || second > self.second + METER_SECONDS {
            self.units = Default::default();
            self.started = Some(now);
        } else {
            (self.second + 1..=second).for_each(|s| self.units[(s % (METER_SECONDS + 1)) as usize] = 0);
        }
        self.second = second.max(self.second);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{RateMeter, TokenBucket};
    use crate::platform::Time;

    proptest! {
        #[test]
        fn never_more_than_rate_plus_burst_and_one_request(
            rate in 1_u64..1_000_000, takes in prop::collection::vec((1_u64..5_000, 0_u64..2_000_000_000), 1..200)
        ) {
            let mut bucket = TokenBucket::new(Some(rate), Time(0));
            let (mut now, mut taken, mut largest) = (0_u64, 0_u64, 0_u64);
            for (units, pause) in takes {
                now += pause;
                if bucket.take(units, Time(now)).is_ok() { taken += units; largest = largest.max(units); }
                let allowed = u128::from(rate) * u128::from(now) / 1_000_000_000 + u128::from(rate / 10 + 1 + largest);
                prop_assert!(u128::from(taken) <= allowed, "{taken} > {allowed}");
            }
        }

        #[test]
        fn what_is_given_back_is_as_if_never_charged(
            rate in 1_u64..1_000_000, charged in 1_u64..10_000_000, kept in 0_u64..10_000_000
        ) {
            let [mut bucket, mut other] = [TokenBucket::new(Some(rate), Time(0)), TokenBucket::new(Some(rate), Time(0))];
            bucket.charge(charged + kept, Time(0));
            bucket.give_back(charged, Time(0));
            other.charge(kept, Time(0));
            prop_assert_eq!(bucket.wait(Time(0)), other.wait(Time(0)));
            bucket.give_back(u64::MAX, Time(0));
            let full = TokenBucket::new(Some(rate), Time(0)).tokens_nanos;
            prop_assert!(bucket.tokens_nanos <= full, "no more than a burst");
        }

        #[test]
        fn waiting_as_told_is_enough(rate in 1_u64..1_000_000, debt in 1_u64..10_000_000) {
            let mut bucket = TokenBucket::new(Some(rate), Time(0));
            bucket.charge(debt, Time(0));
            let wait = bucket.wait(Time(0));
            prop_assert_eq!(bucket.take(1, Time(0).after(wait)), Ok(()));
        }
    }

    proptest! {
        #[test]
        fn a_rate_that_changes_holds_while_it_does(
            steps in prop::collection::vec((prop::option::of(1_u64..1_000_000), 0_u64..2_000_000_000), 1..100)
        ) {
            let (mut bucket, mut now) = (TokenBucket::new(Some(1000), Time(0)), 0_u64);
            for (rate, span) in steps {
                let burst = rate.unwrap_or(0) / 7 + 1;
                bucket.set_rate(rate, burst, Time(now));
                let (end, mut taken) = (now + span, 0_u64);
                // As much as it gives, one unit in a thousandth of the rate each time.
                let unit = rate.unwrap_or(1000) / 1000 + 1;
                while now < end && taken < 100_000 * unit {
                    match bucket.take(unit, Time(now)) {
                        Ok(()) => taken += unit,
                        Err(wait) => now = Time(now).after(wait).0,
                    }
                    if rate.is_none() { break }
                }
                let allowed = rate.map(|rate| u128::from(rate) * u128::from(span) / 1_000_000_000 + u128::from(burst + 2 * unit));
                prop_assert!(allowed.is_none_or(|allowed| u128::from(taken) <= allowed), "{taken} of {allowed:?}");
                now = now.max(end);
            }
        }
    }

    #[test]
    fn unlimited_never_waits() {
        let mut bucket = TokenBucket::new(None, Time(0));
        for _ in 0..1000 {
            assert_eq!(bucket.take(u64::MAX, Time(0)), Ok(()));
        }
        assert_eq!(bucket.wait(Time(0)), Duration::ZERO);
    }

    #[test]
    fn the_meter_follows_a_steady_rate_and_forgets_a_stop() {
        let mut meter = RateMeter::default();
        let ms = |n: u64| Time(n * 1_000_000);
        (0..200).for_each(|i| meter.add(100, ms(i * 100)));
        let rate = meter.per_second(ms(19_950));
        assert!((900..=1100).contains(&rate), "{rate}");
        assert_eq!(meter.per_second(ms(26_000)), 0);
    }
}
