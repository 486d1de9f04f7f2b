//! Where a node's processor time goes under a load: what `tools/profile` runs (docs/profiling.md).
//!
//! The same load runs three times: untouched, for rate, latency and processor time; under `perf record`, for the flame
//! graph and the stages; under `perf stat`, for system calls and the ring. So nothing is measured with another's burden.

pub mod counts;
pub mod inlined;
pub mod node;
pub mod perf;
pub mod report;
pub mod stacks;
pub mod stages;
pub mod workload;

use std::path::PathBuf;

use workload::Workload;

/// Profiles a node pinned to one core under a load pinned to another.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "tools/profile")]
pub struct Args {
    /// What is asked of the node.
    pub workload: Workload,
    /// Seconds of each of the three loads; hydration ends sooner once everything is there.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// Leave the results in DIR [default: target/profile/WORKLOAD].
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Print the report as JSON instead of text; both are in the output directory.
    #[arg(long)]
    pub json: bool,
    /// Connections, each with a volume of its own [default: 8; hydrate: 4].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub connections: Option<u32>,
    /// Requests in flight on each connection [default: 64; hydrate: 8].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub depth: Option<u32>,
    /// Size of each volume in MiB [default: 32; hydrate: 256].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub volume_mib: Option<u32>,
    /// Shards of the node, all on its one core.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub shards: u32,
    /// Samples of each second of processor time.
    #[arg(long, default_value_t = 9999, value_parser = clap::value_parser!(u32).range(10..=50000))]
    pub frequency: u32,
    /// Core of the node [default: the first allowed].
    #[arg(long, value_name = "CORE")]
    pub server_core: Option<usize>,
    /// Core of the load [default: the second allowed].
    #[arg(long, value_name = "CORE")]
    pub load_core: Option<usize>,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/profile", value_name = "DIR")]
    pub dir: PathBuf,
}
