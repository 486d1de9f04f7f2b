//! Latencies of guest I/O, fine enough to compare percentiles: sixteen buckets for each doubling. Plain synchronous core.

use std::time::Duration;

/// Buckets for each doubling: a percentile is at most 1/16 too large.
const FINE: u64 = 16;
/// Longer ones count as half a minute.
const MICROS_MAX: u64 = (1 << 25) - 1;
const BUCKETS: usize = bucket(MICROS_MAX) + 1;

const fn bucket(us: u64) -> usize {
    if us < FINE {
        return us as usize;
    }
    let shift = us.ilog2() - FINE.ilog2();
    (shift as u64 * FINE + (us >> shift)) as usize
}

/// The longest duration of a bucket.
const fn bucket_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * FINE {
        return bucket;
    }
    let shift = bucket / FINE - 1;
    ((bucket % FINE + FINE + 1) << shift) - 1
}

#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Counts of durations.
#[derive(Clone, Default)]
pub struct Latencies {
    /// Empty before the first one.
    counts: Vec<u32>,
    total: u64,
}

impl Latencies {
    pub fn add(&mut self, us: u64) {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        self.counts[bucket(us.min(MICROS_MAX))] += 1;
        self.total += 1;
    }

    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// What 99 of 100 of both together took at most, in µs; 0 when there are none. Of few the longest one is left out all
    /// the same.
    #[must_use]
    pub fn p99_with(&self, other: &Latencies) -> u64 {
        let total = self.total + other.total;
        let rank = (total - total.div_ceil(100)).max(1);
        let mut seen = 0;
        let count = |of: &Latencies, bucket: usize| u64::from(of.counts.get(bucket).copied().unwrap_or(0));
        let found = (0..BUCKETS).find(|bucket| {
            seen += count(self, *bucket) + count(other, *bucket);
            seen >= rank
        });
        if total == 0 { 0 } else { bucket_end(found.unwrap_or(BUCKETS - 1)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{BUCKETS, Latencies, MICROS_MAX, bucket, bucket_end};

    #[test]
    fn buckets_follow_each_other() {
        for at in 0..BUCKETS {
            assert_eq!(bucket(bucket_end(at)), at);
            assert_eq!(bucket(bucket_end(at) + 1), at + 1);
        }
        assert_eq!(bucket_end(BUCKETS - 1), MICROS_MAX);
    }

    proptest! {
        #[test]
        fn the_percentile_is_that_of_the_sorted_list_or_a_little_more(
            mut list in prop::collection::vec(0_u64..200_000, 1..400), cut in 0_usize..400
        ) {
            let (mut one, mut other) = (Latencies::default(), Latencies::default());
            for (i, us) in list.iter().enumerate() {
                if i < cut { one.add(*us) } else { other.add(*us) }
            }
            list.sort_unstable();
            let exact = list[(list.len() - list.len().div_ceil(100)).max(1) - 1];
            let found = one.p99_with(&other);
            prop_assert!(found >= exact && found <= exact + exact / 16 + 1, "{found} for {exact}");
        }
    }
}
