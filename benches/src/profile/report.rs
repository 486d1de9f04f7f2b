//! What a profile says, for people and as JSON.

use std::fmt::{self, Write};

use serde::Serialize;

use super::counts::Counts;
use super::perf::Counted;
use super::stacks::{Function, Stack, top};
use super::stages::{self, Share};
use super::workload::{Load, Shape};

/// Functions that the report names; the flame graph has all.
const FUNCTIONS: usize = 30;
/// System calls that the text names.
const SYSCALLS: usize = 12;
/// It does not name those that are called less often than this for each request.
const RARE: f64 = 1e-4;
/// Longer names are cut in the text.
const NAME_CHARS: usize = 110;

/// A load, what it cost, and where.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub workload: &'static str,
    pub machine: String,
    pub server_core: usize,
    pub load_core: usize,
    pub shards: u32,
    pub shape: Shape,
    /// Nothing else ran beside it.
    pub load: Load,
    /// Processor time of the node for each request, and how much of its core that was.
    pub cpu_ns_per_request: f64,
    pub core_percent: f64,
    pub sampled: Sampled,
    pub counted: PerRequest,
}

/// What the samples say.
#[derive(Clone, Debug, Serialize)]
pub struct Sampled {
    pub event: &'static str,
    pub frequency: u32,
    pub samples: u64,
    /// Of the load that ran meanwhile.
    pub requests_per_second: f64,
    /// Together 100 %, and together the processor time for each request.
    pub stages: Vec<StageTime>,
    /// By their own time.
    pub functions: Vec<Function>,
}

#[derive(Clone, Debug, Serialize)]
pub struct StageTime {
    pub stage: &'static str,
    pub percent: f64,
    pub ns_per_request: f64,
    pub what: &'static str,
}

/// What was counted, for each request.
#[derive(Clone, Debug, Serialize)]
pub struct PerRequest {
    pub by: &'static str,
    /// Of the load that ran meanwhile.
    pub requests_per_second: f64,
    pub syscalls: f64,
    /// The kernel's trace points of the ring; `None`: it has none.
    pub ring_submissions: Option<f64>,
    pub ring_completions: Option<f64>,
    /// The most frequent first.
    pub by_syscall: Vec<(String, f64)>,
}

impl Sampled {
    #[must_use]
    pub fn new(
        (event, frequency): (&'static str, u32),
        load: &Load,
        stacks: &[Stack<'_>],
        cpu_ns_per_request: f64,
    ) -> Sampled {
        let stage = |share: Share| StageTime {
            stage: share.stage.name,
            percent: share.percent,
            ns_per_request: share.percent / 100.0 * cpu_ns_per_request,
            what: share.stage.what,
        };
        Sampled {
            event,
            frequency,
            samples: stacks.iter().map(|stack| stack.samples).sum(),
            requests_per_second: load.requests_per_second,
            stages: stages::shares(stacks).into_iter().map(stage).collect(),
            functions: top(stacks, FUNCTIONS),
        }
    }
}

impl PerRequest {
    #[must_use]
    pub fn new(load: &Load, counted: &Counted) -> PerRequest {
        let each = |count: u64| count as f64 / load.requests as f64;
        PerRequest {
            by: counted.by,
            requests_per_second: load.requests_per_second,
            syscalls: each(counted.syscalls.values().sum()),
            ring_submissions: counted.submissions.map(each),
            ring_completions: counted.completions.map(each),
            by_syscall: by_count(&counted.syscalls).into_iter().map(|(name, count)| (name, each(count))).collect(),
        }
    }
}

fn by_count(counts: &Counts) -> Vec<(String, u64)> {
    let mut sorted: Vec<(String, u64)> = counts.iter().map(|(name, count)| (name.clone(), *count)).collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sorted
}

impl Report {
    /// # Panics
    /// Never: it is numbers and text.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("numbers and text");
        text.push('\n');
        text
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shape, load, sampled, counted) = (&self.shape, &self.load, &self.sampled, &self.counted);
        writeln!(
            f,
            "{}: {} connections, {} requests in flight on each, {} B each, volumes of {} MiB",
            self.workload, shape.connections, shape.depth, shape.block_bytes, shape.volume_mib
        )?;
        writeln!(f, "{}", self.machine)?;
        let (shards, server, other) = (self.shards, self.server_core, self.load_core);
        writeln!(f, "node: core {server}, {shards} shard(s); load: core {other}")?;
        writeln!(
            f,
            "load: {:.0} requests/s for {:.1} s; latency p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us, max {:.0} us",
            load.requests_per_second, load.seconds, load.p50_us, load.p99_us, load.p999_us, load.max_us
        )?;
        let (ns, percent) = (self.cpu_ns_per_request, self.core_percent);
        writeln!(f, "node: {ns:.0} ns of processor time for each request, {percent:.0} % of its core")?;
        if percent < 80.0 {
            writeln!(f, "      its core was not full: the rate is that of the load generator or the disk")?;
        }
        writeln!(
            f,
            "\nstages: {} samples by {} at {} Hz, at {:.0} requests/s",
            sampled.samples, sampled.event, sampled.frequency, sampled.requests_per_second
        )?;
        writeln!(f, "{:<12} {:>7} {:>12}", "STAGE", "%", "ns/request")?;
        for stage in &sampled.stages {
            writeln!(f, "{:<12} {:>7.2} {:>12.1}  {}", stage.stage, stage.percent, stage.ns_per_request, stage.what)?;
        }
        writeln!(f, "\nfunctions by their own time ([k]: kernel)\n{:>7}  FUNCTION", "%")?;
        for function in &sampled.functions {
            writeln!(f, "{:>7.2}  {}", function.percent, readable(&function.name))?;
        }
        writeln!(f, "\nfor each request, by {} at {:.0} requests/s", counted.by, counted.requests_per_second)?;
        let ring = |count: Option<f64>| {
            count.map_or_else(
                || "not counted: no such trace point of the kernel can be read here".to_owned(),
                |n| format!("{n:.4}"),
            )
        };
        writeln!(f, "{:<24} {:.4}", "system calls", counted.syscalls)?;
        writeln!(f, "{:<24} {}", "io_uring submissions", ring(counted.ring_submissions))?;
        writeln!(f, "{:<24} {}", "io_uring completions", ring(counted.ring_completions))?;
        let mut frequent = counted.by_syscall.iter().filter(|(_, each)| *each >= RARE).take(SYSCALLS);
        frequent.try_for_each(|(name, each)| writeln!(f, "  {name:<22} {each:.4}"))
    }
}

/// A function's name on one line: the kernel's mark as a word, and no more than anybody reads.
fn readable(name: &str) -> String {
    let (name, mark) = name.strip_suffix("_[k]").map_or((name, ""), |name| (name, " [k]"));
    let mut text: String = name.chars().take(NAME_CHARS).collect();
    if text.len() < name.len() {
        text.push('…');
    }
    // Writing to a string does not fail.
    let _ = write!(text, "{mark}");
    text
}
