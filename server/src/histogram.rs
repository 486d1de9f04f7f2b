//! Durations in buckets that double, from a microsecond to half a minute: where time went, for `/metrics`. Pure.

use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Bucket `i` counts durations of at most 2^i µs; the last one counts all others too.
pub const BUCKETS: usize = 26;

/// Counts of one shard; cheap to add to, one thread owns it.
#[derive(Default)]
pub struct Histogram {
    counts: RefCell<[u64; BUCKETS]>,
    sum_us: Cell<u64>,
}

/// What a histogram held when it was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct HistogramCounts {
    pub counts: [u64; BUCKETS],
    pub sum_us: u64,
}

impl Histogram {
    pub fn add(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = us.max(1).next_power_of_two().trailing_zeros() as usize;
        self.counts.borrow_mut()[bucket.min(BUCKETS - 1)] += 1;
        self.sum_us.set(self.sum_us.get().saturating_add(us));
    }

    #[must_use]
    pub fn snapshot(&self) -> HistogramCounts {
        HistogramCounts { counts: *self.counts.borrow(), sum_us: self.sum_us.get() }
    }
}

impl HistogramCounts {
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Upper bound of bucket `i` in seconds; `None`: everything longer.
    #[must_use]
    pub fn bound_seconds(i: usize) -> Option<f64> {
        (i + 1 < BUCKETS).then(|| (1_u64 << i) as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BUCKETS, Histogram, HistogramCounts};

    #[test]
    fn a_duration_is_in_the_first_bucket_that_is_not_shorter() {
        for (us, bucket) in
            [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (1000, 10), (1024, 10), (1025, 11), (u64::MAX / 2000, BUCKETS - 1)]
        {
            let histogram = Histogram::default();
            histogram.add(Duration::from_micros(us));
            let found = histogram.snapshot();
            assert_eq!(found.counts.iter().position(|count| *count == 1), Some(bucket), "{us} µs");
            assert_eq!((found.count(), found.sum_us), (1, us));
        }
        assert_eq!(HistogramCounts::bound_seconds(10), Some(0.001_024));
        assert_eq!(HistogramCounts::bound_seconds(BUCKETS - 1), None);
    }
}
