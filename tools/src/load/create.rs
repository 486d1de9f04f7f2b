//! Volumes made by single requests to a node's HTTP API, a fixed number of them always under way, and deleted afterwards.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cpu::{self, Meter};
use super::report::{Measured, Report, Series};
use crate::cli::api::Api;

/// Volumes to make.
#[derive(Clone, Debug)]
pub struct Plan {
    /// HTTP address of the node.
    pub http: String,
    /// Content; without one they are blank, of `size_bytes`.
    pub snapshot: Option<String>,
    pub size_bytes: u64,
    /// Names begin so, and no volume has such a name yet.
    pub prefix: String,
    /// Requests under way.
    pub depth: u32,
    pub duration: Duration,
    pub count: u64,
    /// Do not delete them.
    pub keep: bool,
    pub server_pid: Option<u32>,
}

/// Runs a plan to its end.
///
/// # Errors
/// A sentence when the node can't be reached, or a volume that was made can't be deleted.
pub fn run(plan: &Plan) -> Result<Report, String> {
    // Better one error now than the same one again and again.
    api(plan)?.get("/v1/node").map_err(|error| error.to_string())?;
    let (next, made) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let server = Meter::start(plan.server_pid)?;
    let begun = Instant::now();
    let creator = || {
        let api = api(plan)?;
        let (mut measured, cpu) = (Measured::new(1), cpu::thread_ns());
        while begun.elapsed() < plan.duration {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= plan.count {
                break;
            }
            let name = format!("{}{number}", plan.prefix);
            let asked = Instant::now();
            let outcome = api.post("/v1/volumes", &request(plan, &name)).map(drop).map_err(|error| error.to_string());
            if outcome.is_ok() {
                made.lock().expect("nobody panics with it").push(name);
            }
            measured.series[0].record(asked.elapsed(), 0, outcome);
        }
        measured.elapsed = begun.elapsed();
        measured.cpu_ns = cpu::thread_ns().saturating_sub(cpu);
        Ok::<_, String>(measured)
    };
    let threads: Vec<Measured> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..plan.depth).map(|_| scope.spawn(creator)).collect();
        let panicked = |_| Err("a load thread panicked".to_owned());
        running.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect::<Result<_, _>>()
    })?;
    let server_ns = server.cpu_ns()?;
    let mut report = Measured::report(threads, "create", &["create"], server_ns);
    if !plan.keep {
        let mut deletions = Series::default();
        let api = api(plan)?;
        for name in made.into_inner().expect("nobody panicked with it") {
            let asked = Instant::now();
            let outcome = api.delete(&format!("/v1/volumes/{name}")).map(drop).map_err(|error| error.to_string());
            deletions.record(asked.elapsed(), 0, outcome);
        }
        report.series.push(("delete", deletions));
    }
    Ok(report)
}

fn api(plan: &Plan) -> Result<Api, String> {
    Api::new(&plan.http).map_err(|error| error.to_string())
}

fn request(plan: &Plan, name: &str) -> Value {
    // Nothing is fetched for them: what counts is how fast they are there.
    match &plan.snapshot {
        Some(snapshot) => json!({ "name": name, "snapshot": snapshot, "rate": "none", "overcommit": "unlimited" }),
        None => json!({ "name": name, "size_bytes": plan.size_bytes, "overcommit": "unlimited" }),
    }
}
