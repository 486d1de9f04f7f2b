//! The loads that are profiled, and what they found out about themselves.

use serde::Serialize;
use serde_json::Value;

use super::Args;
use crate::CHUNK_BYTES;
use crate::process::{Result, Server, on_core, run, sibling};

/// What is asked of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// Priority fetches of random 4 KiB that are resident.
    PriorityFetch,
    /// Reads of random 4 KiB that are resident.
    Read,
    /// Writes of random 4 KiB.
    Write,
    /// Priority fetches of whole chunks that are only in the object store, a local directory.
    Hydrate,
}

/// The size of a load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    pub connections: u32,
    pub depth: u32,
    pub volume_mib: u32,
    /// Bytes of each request.
    pub block_bytes: u64,
    /// No more requests than this.
    pub count: Option<u64>,
    pub seconds: u32,
}

impl Workload {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Workload::PriorityFetch => "priority-fetch",
            Workload::Read => "read",
            Workload::Write => "write",
            Workload::Hydrate => "hydrate",
        }
    }

    /// The volumes are used up by a load: each takes new ones, on a new node.
    #[must_use]
    pub fn is_cold(self) -> bool {
        self == Workload::Hydrate
    }

    #[must_use]
    pub fn shape(self, args: &Args) -> Shape {
        let (connections, depth, volume_mib) = if self.is_cold() { (4, 8, 256) } else { (8, 64, 32) };
        let connections = args.connections.unwrap_or(connections);
        let volume_mib = args.volume_mib.unwrap_or(volume_mib);
        let block_bytes = if self.is_cold() { CHUNK_BYTES } else { 4096 };
        let chunks = (u64::from(volume_mib) << 20) / CHUNK_BYTES * u64::from(connections);
        Shape {
            connections,
            depth: args.depth.unwrap_or(depth),
            volume_mib,
            block_bytes,
            // Each chunk is asked for once.
            count: self.is_cold().then_some(chunks),
            seconds: args.seconds,
        }
    }

    /// Runs the load on volumes that are called `v…`.
    ///
    /// # Errors
    /// When it fails, or one of its requests.
    pub fn load(self, server: &Server, shape: &Shape, core: usize) -> Result<Load> {
        let mut command = on_core(Some(core), sibling("volley-load")?);
        command.args(["--server", &server.ready_word("data")?, "--prefix", "v", "--json"]);
        command.args(["--connections", &shape.connections.to_string(), "--depth", &shape.depth.to_string()]);
        command.args(["--block", &shape.block_bytes.to_string(), "--duration", &format!("{}s", shape.seconds)]);
        if self != Workload::Hydrate {
            // The one that costs little: the server is what is looked at.
            command.args(["--generator", "wire"]);
        }
        if let Some(count) = shape.count {
            command.args(["--count", &count.to_string()]);
        }
        match self {
            Workload::PriorityFetch => command.arg("priority-fetch"),
            Workload::Read => command.arg("read"),
            Workload::Write => command.arg("write"),
            Workload::Hydrate => command.args(["priority-fetch", "--addresses", "sequential"]),
        };
        Load::parse(&run(&mut command)?)
    }
}

/// What a load measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Load {
    pub requests: u64,
    pub seconds: f64,
    pub requests_per_second: f64,
    pub mean_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
}

impl Load {
    /// Understands what `volley-load --json` prints of a load of one kind.
    ///
    /// # Errors
    /// When it is something else, or no request succeeded.
    pub fn parse(text: &str) -> Result<Load> {
        let report: Value = serde_json::from_str(text).map_err(|e| format!("output of volley-load: {e}"))?;
        let series = report["series"].as_object().and_then(|series| series.values().next()).unwrap_or(&Value::Null);
        let number = |value: &Value, key: &str| {
            value[key].as_f64().ok_or_else(|| format!("volley-load prints no {key}: {}", report))
        };
        let requests = series["requests"].as_u64().unwrap_or_default();
        if requests == 0 {
            return Err(format!("no request of volley-load succeeded: {report}"));
        }
        let latency = &series["latency_us"];
        Ok(Load {
            requests,
            seconds: number(&report, "seconds")?,
            requests_per_second: number(series, "requests_per_second")?,
            mean_us: number(latency, "mean")?,
            p50_us: number(latency, "p50")?,
            p99_us: number(latency, "p99")?,
            p999_us: number(latency, "p999")?,
            max_us: number(latency, "max")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn a_cold_load_asks_for_each_chunk_once() {
        let args = Args::parse_from(["tools/profile", "hydrate", "--connections", "2", "--volume-mib", "3"]);
        let shape = args.workload.shape(&args);
        assert_eq!((shape.count, shape.block_bytes), (Some(12), 512 << 10));
        let args = Args::parse_from(["tools/profile", "priority-fetch"]);
        let shape = args.workload.shape(&args);
        assert_eq!((shape.connections, shape.depth, shape.count, shape.block_bytes), (8, 64, None, 4096));
    }

    #[test]
    fn the_output_of_the_load_is_understood() {
        let text = include_str!("samples/load.json");
        let load = Load::parse(text).expect("a report");
        assert_eq!((load.requests, load.p50_us, load.p999_us), (1_561_104, 111.615, 8519.679));
        assert!((load.requests_per_second - load.requests as f64 / load.seconds).abs() < 1.0);
        assert!(Load::parse(r#"{"error": 1}"#).expect_err("no report").contains("no request"));
        assert!(Load::parse("").is_err());
    }
}
