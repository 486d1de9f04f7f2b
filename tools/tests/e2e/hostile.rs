//! Hostile peers on the live ports: of the data port, the HTTP API and the agent's NBD socket.
//!
//! While they are attacked, guests of the same node write and read under the judge of [`crate::torture`]: an error, or
//! a wrong byte, fails the test. The attacker loses its connection at most, the servers' memory stays within their
//! bounds, and every refusal is counted by its reason.

mod api;
mod frames;
mod nbd;
mod peer;
mod pressure;

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::faults::eventually;
use crate::harness::{Agent, Node, NodeOptions};
use crate::torture::workers::Workers;
use crate::torture::{Arena, all_well, seed};

/// How long the guests are left alone before an attack: what their latency is compared with.
const QUIET: Duration = Duration::from_secs(1);
/// The shard under attack may hold this for its peers (`docs/operations.md`), beside all else that may grow.
const MEMORY_GROWTH_MAX: u64 = (1024 + 128) << 20;

/// A node with guests, under attack.
struct Siege {
    arena: Arena,
    node: Node,
    agent: Agent,
    guests: Vec<Workers>,
    memory_before: u64,
}

impl Siege {
    fn lay() -> Siege {
        need_open_files();
        let mut arena = Arena::new(None, "6MiB/s", seed());
        arena.options = NodeOptions { listen: Some("127.0.0.1:0".to_owned()), ..arena.options };
        let node = arena.site.start(&arena.options);
        let agent = arena.site.agent_of(&node.data, "agent", &[]);
        let guests = arena.populate(&node, &agent, "web-", 2);
        let memory_before = metric(&node, "volley_process_resident_memory_bytes", "");
        Siege { arena, node, agent, guests, memory_before }
    }

    /// More volumes, attached by nobody: `prefix0`, `prefix1`, …
    fn volumes(&self, prefix: &str, count: usize) {
        let (site, count) = (&self.arena.site, count.to_string());
        let args = ["--snapshot", "debian-12", "--count", &count, "--name-prefix", prefix, "--rate", "none"];
        self.node.volley(site, &[&["volume", "create"], &args[..]].concat()).success();
    }

    /// Runs an attack and prints how the guests fared meanwhile. They must go on, during and after.
    fn attack<T>(&mut self, what: &str, attack: impl FnOnce(&Siege) -> T) -> T {
        self.take_latencies();
        std::thread::sleep(QUIET);
        let quiet = self.take_latencies();
        let outcome = attack(self);
        let during = self.take_latencies();
        println!("hostile: {what}: guests' latency before: {}; meanwhile: {}", told(quiet), told(during));
        let before = self.arena.answered.load(Ordering::SeqCst);
        eventually("the guests go on", || self.arena.answered.load(Ordering::SeqCst) > before + 50);
        all_well(&mut self.guests);
        let memory = metric(&self.node, "volley_process_resident_memory_bytes", "");
        let growth = memory.saturating_sub(self.memory_before);
        println!("hostile: {what}: memory grew by {} MiB", growth >> 20);
        assert!(growth < MEMORY_GROWTH_MAX, "{what}: memory grew by {growth} bytes");
        outcome
    }

    fn take_latencies(&self) -> Vec<Duration> {
        std::mem::take(&mut *self.arena.latencies.lock().expect("nobody panics with it"))
    }

    /// Sum over the shards of a metric, of the lines that have `label`.
    fn metric(&self, name: &str, label: &str) -> u64 {
        metric(&self.node, name, label)
    }

    fn frames_refused(&self, reason: &str) -> u64 {
        self.metric("volley_frames_refused_total", &format!("reason=\"{reason}\""))
    }

    fn connections_refused(&self, reason: &str) -> u64 {
        self.metric("volley_connections_refused_total", &format!("reason=\"{reason}\""))
    }

    fn requests_failed(&self, status: &str) -> u64 {
        self.metric("volley_requests_failed_total", &format!("status=\"{status}\""))
    }

    /// Judges every sector of the guests.
    fn lift(self) {
        assert!(!self.node.process().log().contains("panicked"), "the server panicked");
        assert!(!self.agent.process().log().contains("panicked"), "the agent panicked");
        self.arena.judge(self.node, self.guests);
    }
}

fn metric(node: &Node, name: &str, label: &str) -> u64 {
    let text = node.get("/metrics");
    let lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name) && line.contains(label));
    let values: Vec<f64> =
        lines.map(|line| line.rsplit(' ').next().expect("a value").parse().expect("a number")).collect();
    assert!(!values.is_empty(), "no metric {name} with {label:?}");
    values.iter().sum::<f64>() as u64
}

fn told(mut latencies: Vec<Duration>) -> String {
    latencies.sort_unstable();
    let Some(last) = latencies.len().checked_sub(1) else { return "nothing answered".to_owned() };
    let at = |percent: usize| latencies[last * percent / 100];
    format!("{} answers, median {:?}, p99 {:?}, slowest {:?}", latencies.len(), at(50), at(99), latencies[last])
}

/// Attackers hold thousands of sockets.
fn need_open_files() {
    let files = volley_server::bootstrap::raise_open_files();
    assert!(files >= 20_000, "{files} open files are too few for this test: raise ulimit -Hn");
}
