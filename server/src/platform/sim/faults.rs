//! What goes wrong on the simulated disk, and how long things take: rules by path prefix.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::random::SimRng;

/// Usual device times in nanoseconds, and how often and how far one is out of the ordinary.
const READ_NANOS: Range<u64> = 40_000..250_000;
const WRITE_NANOS: Range<u64> = 20_000..400_000;
const SYNC_NANOS: Range<u64> = 100_000..2_000_000;
const DIRECTORY_NANOS: Range<u64> = 5_000..80_000;
const OUTLIER_PPM: u32 = 10_000;
const OUTLIER_FACTOR: u64 = 50;

/// A class of disk operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    Read,
    /// Writes, holes and length changes.
    Write,
    /// Datasyncs and directory syncs.
    Sync,
    /// Open, rename, link, remove, list.
    Directory,
}

enum When {
    /// With this probability in a million.
    Chance(u32),
    /// Once, when this many more have passed.
    Countdown(u64),
}

struct Rule {
    prefix: String,
    op: DiskOp,
    when: When,
}

struct Slow {
    prefix: String,
    op: DiskOp,
    nanos: Range<u64>,
}

#[derive(Default)]
pub(super) struct Faults {
    rules: Vec<Rule>,
    slow: Vec<Slow>,
}

impl Faults {
    pub(super) fn clear(&mut self) {
        *self = Faults::default();
    }

    pub(super) fn fail(&mut self, prefix: &str, op: DiskOp, ppm: u32) {
        self.rules.push(Rule { prefix: prefix.to_owned(), op, when: When::Chance(ppm) });
    }

    pub(super) fn fail_nth(&mut self, prefix: &str, op: DiskOp, nth: u64) {
        self.rules.push(Rule { prefix: prefix.to_owned(), op, when: When::Countdown(nth.max(1)) });
    }

    pub(super) fn slow(&mut self, prefix: &str, op: DiskOp, latency: Range<Duration>) {
        self.slow.push(Slow { prefix: prefix.to_owned(), op, nanos: nanos(latency.start)..nanos(latency.end) });
    }

    /// Whether this operation fails with an I/O error.
    pub(super) fn strikes(&mut self, path: &Path, op: DiskOp, rng: &mut SimRng) -> bool {
        let path = path.to_string_lossy();
        let mut struck = false;
        for rule in self.rules.iter_mut().filter(|r| r.op == op && path.starts_with(&r.prefix)) {
            struck |= match &mut rule.when {
                When::Chance(ppm) => rng.chance(*ppm),
                When::Countdown(left) => {
                    *left = left.saturating_sub(1);
                    *left == 0
                }
            };
        }
        self.rules.retain(|r| !matches!(r.when, When::Countdown(0)));
        struck
    }

    pub(super) fn latency(&self, path: &Path, op: DiskOp, rng: &mut SimRng) -> Duration {
        let path = path.to_string_lossy();
        let slow = self.slow.iter().rev().find(|s| s.op == op && path.starts_with(&s.prefix));
        let mut nanos = rng.within(slow.map_or_else(|| usual(op), |s| s.nanos.clone()));
        if rng.chance(OUTLIER_PPM) {
            nanos *= OUTLIER_FACTOR;
        }
        Duration::from_nanos(nanos)
    }
}

fn usual(op: DiskOp) -> Range<u64> {
    match op {
        DiskOp::Read => READ_NANOS,
        DiskOp::Write => WRITE_NANOS,
        DiskOp::Sync => SYNC_NANOS,
        DiskOp::Directory => DIRECTORY_NANOS,
    }
}

pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
