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
    "scatter",
    "take over",
    "set deadline",
    "left early",
    "clean stop",
    "snapshot",
    "incremental snapshot",
    "group of volumes",
    "snapshot given up",
    "failed snapshot",
    "volume of a snapshot",
    "rollback",
    "deletion",
    "collection",
    "collection cut short",
    "pack condemned",
    "pack removed",
    "power cut",
    "kill",
    "slow disk",
    "bad cache disk",
    "RAM cache eviction",
    "disk cache hit",
    "disk cache eviction",
    "disk cache failure",
    "corrupt slot",
    "stale slot",
    "clone of the base",
    "base eviction",
    "base failure",
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

    fn crash_points(&self) -> u64 {
        self.count("power cut") + self.count("kill")
    }

    pub fn headline(&self) -> String {
        let Report { seeds, steps, syncs, .. } = self;
        format!("{seeds} seeds, {steps} steps, {} crash points, {syncs} durable points", self.crash_points())
    }

    /// One line for people, or one JSON object with `VOLLEY_SIM_JSON`.
    pub fn print(&self, what: &str) {
        if std::env::var_os("VOLLEY_SIM_JSON").is_none() {
            return println!("simulation, {what}: {self}");
        }
        let Report { seeds, steps, syncs, happened } = self;
        let object = serde_json::json!({
            "what": what,
            "seeds": seeds,
            "steps": steps,
            "crash_points": self.crash_points(),
            "durable_points": syncs,
            "happened": happened,
        });
        println!("{object}");
    }

    pub fn assert_everything_happened(&self) {
        let missing: Vec<_> = MUST_HAPPEN.iter().filter(|what| self.count(what) == 0).collect();
        assert!(missing.is_empty(), "never happened in {self}: {missing:?}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};", self.headline())?;
        self.happened.iter().try_for_each(|(what, count)| write!(f, " {what} {count};"))
    }
}
