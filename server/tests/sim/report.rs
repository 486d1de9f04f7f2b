//! What runs did, added up: printed for people, and checked so that nothing silently stops happening.

use std::collections::BTreeMap;
use std::fmt;

#[derive(Default)]
pub struct Report {
    pub seeds: u64,
    pub steps: u64,
    /// Durable points passed: datasyncs and directory syncs.
    pub syncs: u64,
    /// Answers by kind, errors by status, faults and crashes.
    pub happened: BTreeMap<String, u64>,
}

/// What every fixed set of seeds must reach, or its proof has a hole.
const MUST_HAPPEN: &[&str] = &[
    "attach",
    "resume",
    "detach",
    "read",
    "write",
    "write of parts of sectors",
    "write with FUA",
    "flush",
    "discard",
    "write zeroes",
    "fetch until readable",
    "fetch until resident",
    "fetch until durable",
    "create",
    "create blank",
    "delete",
    "checkpoint",
    "clean stop",
    "power cut",
    "kill",
    "slow disk",
    "failed answer",
    "corrupt answer",
    "StaleGeneration",
    "NotAttached",
    "OutOfRange",
    "Misaligned",
    "DeadlineExceeded",
    "NoSpace",
    "Io",
];

impl Report {
    pub fn add(&mut self, other: &Report) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.syncs += other.syncs;
        for (what, count) in &other.happened {
            *self.happened.entry(what.clone()).or_default() += count;
        }
    }

    fn count(&self, what: &str) -> u64 {
        self.happened.get(what).copied().unwrap_or_default()
    }

    pub fn assert_everything_happened(&self) {
        let missing: Vec<_> = MUST_HAPPEN.iter().filter(|what| self.count(what) == 0).collect();
        assert!(missing.is_empty(), "never happened in {self}: {missing:?}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { seeds, steps, syncs, happened } = self;
        let crashes = self.count("power cut") + self.count("kill");
        write!(f, "{seeds} seeds, {steps} steps, {crashes} crash points, {syncs} durable points;")?;
        happened.iter().try_for_each(|(what, count)| write!(f, " {what} {count};"))
    }
}
