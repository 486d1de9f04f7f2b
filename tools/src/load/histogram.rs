//! A histogram of durations with logarithmic buckets: constant size, mergeable, at most 1.6 % off.

use std::time::Duration;

/// Buckets of one power of two: bounds the relative error to 1/64.
const SUB_BUCKETS: u64 = 64;
const SUB_BITS: u32 = SUB_BUCKETS.trailing_zeros();
/// Enough powers of two for every `u64` of nanoseconds.
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB_BUCKETS as usize;

/// Counts of durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0, sum_ns: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket_of(ns)] += 1;
        self.total += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds everything another one counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Durations counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The longest, exactly.
    #[must_use]
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns)
    }

    /// The mean, exactly; zero of nothing.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let ns = self.sum_ns / u128::from(self.total.max(1));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// The smallest duration that `fraction` (0 to 1) of all do not exceed, rounded up to its bucket's end.
    #[must_use]
    pub fn quantile(&self, fraction: f64) -> Duration {
        let rank = ((self.total as f64 * fraction).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(last_of(bucket).min(self.max_ns));
            }
        }
        Duration::ZERO
    }
}

/// Values below `SUB_BUCKETS` have their own bucket; above, each power of two is divided into `SUB_BUCKETS`.
fn bucket_of(ns: u64) -> usize {
    if ns < SUB_BUCKETS {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    (u64::from(shift) * SUB_BUCKETS + (ns >> shift)) as usize
}

/// The largest value of a bucket.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < SUB_BUCKETS * 2 {
        return bucket;
    }
    let shift = bucket / SUB_BUCKETS - 1;
    let top = u128::from(bucket % SUB_BUCKETS + SUB_BUCKETS + 1) << shift;
    u64::try_from(top - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{BUCKETS, Histogram, bucket_of, last_of};

    #[test]
    fn quantiles_of_a_known_set() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|us| histogram.record(Duration::from_micros(us)));
        let near = |fraction: f64, us: f64| {
            let got = histogram.quantile(fraction).as_secs_f64() * 1e6;
            assert!(got >= us && got <= us * 1.016, "{fraction}: {got}");
        };
        near(0.5, 500.0);
        near(0.99, 990.0);
        assert_eq!(histogram.quantile(1.0), Duration::from_millis(1));
        assert_eq!(histogram.mean(), Duration::from_nanos(500_500));
        assert_eq!(Histogram::default().quantile(0.5), Duration::ZERO);
    }

    #[test]
    fn the_longest_duration_has_a_bucket() {
        assert!(bucket_of(u64::MAX) < BUCKETS);
        assert_eq!(last_of(bucket_of(u64::MAX)), u64::MAX);
    }

    proptest! {
        #[test]
        fn a_bucket_ends_at_or_just_above_its_values(ns in any::<u64>()) {
            let last = last_of(bucket_of(ns));
            prop_assert!(last >= ns && last - ns <= ns / 64);
            prop_assert!(last == u64::MAX || bucket_of(last + 1) == bucket_of(ns) + 1);
        }

        #[test]
        fn merging_equals_recording_together(
            a in prop::collection::vec(any::<u64>(), 0..30), b in prop::collection::vec(any::<u64>(), 0..30),
        ) {
            let of = |values: &[u64]| {
                let mut histogram = Histogram::default();
                values.iter().for_each(|ns| histogram.record(Duration::from_nanos(*ns)));
                histogram
            };
            let mut merged = of(&a);
            merged.merge(&of(&b));
            let together = of(&[a, b].concat());
            prop_assert_eq!(merged.count(), together.count());
            prop_assert_eq!(merged.mean(), together.mean());
            for fraction in [0.0, 0.5, 0.99, 1.0] {
                prop_assert_eq!(merged.quantile(fraction), together.quantile(fraction));
            }
        }
    }
}
