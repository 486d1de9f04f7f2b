//! When a priority GET that is slow is sent a second time. Plain synchronous core.
//!
//! A GET is slow when it takes longer than 95 of 100 lately. Second attempts are a bounded share of all priority GETs, so a
//! store that is slow as a whole gets no more than that share on top.

use std::time::Duration;

/// Latencies remembered.
const RECENT: usize = 128;
/// Fewer say nothing about a 95th percentile.
const RECENT_MIN: usize = 20;
/// A second attempt sooner than this would race with ordinary jitter.
const AFTER_MIN: Duration = Duration::from_millis(2);
/// Second attempts saved up at most: a burst of stragglers after a long calm.
const CREDIT_MAX: f64 = 8.0;

pub struct Hedge {
    /// Second attempts for each priority GET; 0: none.
    share: f64,
    credit: f64,
    recent: [Duration; RECENT],
    noted: usize,
}

impl Hedge {
    /// `percent` of the priority GETs may be sent twice.
    #[must_use]
    pub fn new(percent: u32) -> Hedge {
        Hedge { share: f64::from(percent) / 100.0, credit: 0.0, recent: [Duration::ZERO; RECENT], noted: 0 }
    }

    /// A priority GET starts: after how long it counts as slow, if that is known.
    pub fn begin(&mut self) -> Option<Duration> {
        self.credit = (self.credit + self.share).min(CREDIT_MAX);
        if self.share == 0.0 || self.noted < RECENT_MIN {
            return None;
        }
        let mut sorted = self.recent;
        let sorted = &mut sorted[..self.noted.min(RECENT)];
        sorted.sort_unstable();
        Some(sorted[sorted.len() * 95 / 100].max(AFTER_MIN))
    }

    /// Whether a slow GET may be sent again now; takes the credit for it.
    pub fn take(&mut self) -> bool {
        let may = self.credit >= 1.0;
        if may {
            self.credit -= 1.0;
        }
        may
    }

    /// A priority GET was answered after so long.
    pub fn note(&mut self, latency: Duration) {
        self.recent[self.noted % RECENT] = latency;
        self.noted += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Hedge;

    #[test]
    fn slow_is_what_took_longer_than_95_of_100() {
        let mut hedge = Hedge::new(5);
        for ms in 0..100 {
            assert_eq!(hedge.begin().is_some(), ms >= 20, "too few are known before");
            hedge.note(Duration::from_millis(ms));
        }
        assert_eq!(hedge.begin(), Some(Duration::from_millis(95)));
        (0..128).for_each(|_| hedge.note(Duration::ZERO));
        assert_eq!(hedge.begin(), Some(super::AFTER_MIN), "old latencies are forgotten");
    }

    #[test]
    fn second_attempts_are_a_share_of_the_first_ones() {
        let mut hedge = Hedge::new(5);
        let taken = (0..10_000).filter(|_| {
            hedge.begin();
            hedge.take()
        });
        assert!((495..=500).contains(&taken.count()));
        (0..10_000).for_each(|_| assert_eq!(hedge.begin(), None));
        assert_eq!((0..100).filter(|_| hedge.take()).count(), 8, "a burst is bounded");
        let mut off = Hedge::new(0);
        (0..1000).for_each(|_| off.note(Duration::from_millis(1)));
        assert!((0..1000).all(|_| off.begin().is_none() && !off.take()));
    }
}
