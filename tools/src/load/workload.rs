//! Closed loops: on each connection, a fixed number of requests of one kind is always in flight.
//!
//! Connections are spread over threads, each with a runtime of its own, and volumes over connections: a volume is
//! attached by one client only, because a second attachment would fence the first. Workers of one volume take disjoint
//! blocks, because the client must not have overlapping writes in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use volley_client::{Client, FetchUntil, Volume};

use super::addresses::{Blocks, Order};
use super::cpu::{self, Meter};
use super::report::{Measured, Report, Series};
use super::{Random, Target, check_threads, on_threads, pattern};

/// What each request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A priority fetch of a block.
    PriorityFetch(FetchUntil),
    /// A read of a block.
    Read,
    /// A write of a block, durable before it is answered if `fua`.
    Write { fua: bool },
    /// Reads and writes of blocks, so many percent of them reads.
    Mixed { read_percent: u8 },
    /// Connect, attach, read a block, detach.
    Churn,
    /// Connect and say HELLO.
    Connect,
}

impl Kind {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::PriorityFetch(_) => "priority-fetch",
            Kind::Read => "read",
            Kind::Write { .. } => "write",
            Kind::Mixed { .. } => "mixed",
            Kind::Churn => "churn",
            Kind::Connect => "connect",
        }
    }

    /// Names of the kinds of request it makes.
    pub(super) fn requests(self) -> &'static [&'static str] {
        match self {
            Kind::PriorityFetch(_) => &["priority-fetch"],
            Kind::Read => &["read"],
            Kind::Write { .. } => &["write"],
            Kind::Mixed { .. } => &["read", "write"],
            Kind::Churn => &["churn"],
            Kind::Connect => &["connect"],
        }
    }

    /// Each request makes what it uses anew, so a volume has one at a time.
    fn is_alone(self) -> bool {
        matches!(self, Kind::Churn | Kind::Connect)
    }
}

/// A load to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub target: Target,
    pub kind: Kind,
    /// Names of the volumes, at least one for each connection.
    pub volumes: Vec<String>,
    pub connections: u32,
    pub threads: u32,
    /// Bytes of each request, a multiple of 512.
    pub block_bytes: u32,
    pub order: Order,
    /// No request starts later than this after the first.
    pub duration: Duration,
    /// No more requests than this.
    pub count: u64,
    /// Chooses the blocks.
    pub seed: u64,
    /// Requests per second of all connections together, whatever the server does; only of the generator of `wire`.
    pub rate: Option<f64>,
    /// Any shard is asked for any volume; only of the generator of `wire`.
    pub any_shard: bool,
    /// Cores of the threads, one each; those beyond run anywhere.
    pub cores: Vec<usize>,
    /// The server's process, whose processor time is told.
    pub server_pid: Option<u32>,
}

/// Runs a plan to its end.
///
/// # Errors
/// A sentence when the load can't start: node away, unknown volume, block larger than a volume.
pub fn run(plan: &Plan) -> Result<Report, String> {
    check(plan)?;
    let budget = Arc::new(AtomicU64::new(plan.count));
    plan.measure(
        async |thread| prepare(plan, thread).await,
        async |(workers, attached)| Ok(run_thread(plan, workers, attached, Arc::clone(&budget)).await),
    )
}

impl Plan {
    /// Runs the plan's threads on their cores, and sums up what they measured and what the server took meanwhile.
    pub(super) fn measure<T>(
        &self,
        prepare: impl AsyncFn(u32) -> Result<T, String> + Sync,
        run: impl AsyncFn(T) -> Result<Measured, String> + Sync,
    ) -> Result<Report, String> {
        let server = Meter::start(self.server_pid)?;
        let pinned = async |thread: u32| {
            cpu::pin(self.cores.get(thread as usize).copied())?;
            prepare(thread).await
        };
        let results = on_threads(self.threads, pinned, run)?;
        let server_ns = server.cpu_ns()?;
        let threads = results.into_iter().collect::<Result<_, _>>()?;
        Ok(Measured::report(threads, self.kind.name(), self.kind.requests(), server_ns))
    }
}

fn check(plan: &Plan) -> Result<(), String> {
    if plan.volumes.len() < plan.connections as usize {
        let (connections, volumes) = (plan.connections, plan.volumes.len());
        return Err(format!(
            "{connections} connections need as many volumes, each attached by one: there are {volumes}"
        ));
    }
    if plan.block_bytes == 0 || !plan.block_bytes.is_multiple_of(512) {
        return Err(format!("--block {} is not a multiple of 512", plan.block_bytes));
    }
    check_threads(plan.threads, plan.connections)
}

/// One worker: always exactly one request in flight.
struct Worker {
    kind: Kind,
    target: Target,
    place: Place,
    blocks: Blocks,
    /// Chooses between reads and writes.
    random: Random,
    block_bytes: u32,
    tag: u64,
}

/// What a worker works on.
enum Place {
    Attached(Volume),
    /// Attached anew for each request.
    Named(String),
}

async fn run_thread(plan: &Plan, workers: Vec<Worker>, attached: Vec<Volume>, budget: Arc<AtomicU64>) -> Measured {
    let (begun, cpu) = (Instant::now(), cpu::thread_ns());
    let end = begun + plan.duration;
    let mut tasks: JoinSet<Vec<Series>> =
        workers.into_iter().map(|worker| worker.run(end, Arc::clone(&budget))).collect();
    let mut measured = Measured::new(plan.kind.requests().len());
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(series) => measured.add(series),
            Err(panic) => measured.series[0].record(Duration::ZERO, 0, Err(panic.to_string())),
        }
    }
    measured.elapsed = begun.elapsed();
    measured.cpu_ns = cpu::thread_ns().saturating_sub(cpu);
    for volume in attached {
        // What counts was measured; a volume that another host took meanwhile is its own affair.
        let _ = volume.detach().await;
    }
    measured
}

/// Connects, attaches, and makes the workers of a thread.
async fn prepare(plan: &Plan, thread: u32) -> Result<(Vec<Worker>, Vec<Volume>), String> {
    let (mut workers, mut attached) = (Vec::new(), Vec::new());
    for connection in (thread..plan.connections).step_by(plan.threads as usize) {
        let client = plan.target.connect().await?;
        let mine = plan.volumes.iter().skip(connection as usize).step_by(plan.connections as usize);
        let mine: Vec<&String> = mine.take(plan.target.depth as usize).collect();
        for (index, name) in mine.iter().enumerate() {
            let sharing = workers_of(plan, mine.len(), index);
            let volume = open(plan, &client, name).await?;
            for share in 0..sharing {
                workers.push(worker(plan, &volume, name, share, sharing, workers.len() as u64));
            }
            if let (Some(volume), _) = volume {
                attached.push(volume);
            }
        }
    }
    Ok((workers, attached))
}

/// Workers of one volume: `depth` is shared out over the volumes of a connection. Attaching fences, so churn has one.
fn workers_of(plan: &Plan, volumes: usize, index: usize) -> u64 {
    let depth = plan.target.depth as usize;
    let share = depth / volumes + usize::from(index < depth % volumes);
    if plan.kind.is_alone() { 1 } else { share as u64 }
}

/// The volume (unless each request attaches it) and its size.
async fn open(plan: &Plan, client: &Client, name: &str) -> Result<(Option<Volume>, u64), String> {
    let failed = |error: volley_client::Error| format!("volume {name}: {error}");
    let (volume, size) = if plan.kind.is_alone() {
        (None, client.lookup(name).await.map_err(failed)?.size_bytes)
    } else {
        let volume = client.attach(name).await.map_err(failed)?;
        let size = volume.size_bytes();
        (Some(volume), size)
    };
    if u64::from(plan.block_bytes) * u64::from(plan.target.depth) > size {
        let block = plan.block_bytes;
        return Err(format!(
            "volume {name} of {size} bytes has too few blocks of {block} bytes for so many requests in flight"
        ));
    }
    Ok((volume, size))
}

fn worker(plan: &Plan, opened: &(Option<Volume>, u64), name: &str, share: u64, sharing: u64, number: u64) -> Worker {
    let (volume, size) = opened;
    let total = size / u64::from(plan.block_bytes);
    let count = (total - share).div_ceil(sharing);
    let random = Random::new(plan.seed.wrapping_add(number));
    Worker {
        kind: plan.kind,
        target: plan.target.clone(),
        place: volume.clone().map_or_else(|| Place::Named(name.to_owned()), Place::Attached),
        blocks: Blocks::new(share, sharing, count, plan.order, random.clone()),
        random,
        block_bytes: plan.block_bytes,
        tag: plan.seed,
    }
}

impl Worker {
    async fn run(mut self, end: Instant, budget: Arc<AtomicU64>) -> Vec<Series> {
        let mut series = vec![Series::default(); self.kind.requests().len()];
        let take = |left: u64| left.checked_sub(1);
        while Instant::now() < end && budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            let offset = self.blocks.next_block() * u64::from(self.block_bytes);
            let (index, kind) = match self.kind {
                Kind::Mixed { read_percent } if self.random.below(100) < u64::from(read_percent) => (0, Kind::Read),
                Kind::Mixed { .. } => (1, Kind::Write { fua: false }),
                kind => (0, kind),
            };
            // Made before the clock starts.
            let data = match kind {
                Kind::Write { .. } => Bytes::from(pattern(offset, self.block_bytes as usize, self.tag)),
                _ => Bytes::new(),
            };
            let begun = Instant::now();
            let outcome = self.request(kind, offset, data).await;
            series[index].record(begun.elapsed(), u64::from(self.block_bytes), outcome);
        }
        series
    }

    async fn request(&self, kind: Kind, offset: u64, data: Bytes) -> Result<(), String> {
        let len = self.block_bytes;
        let done = match (&self.place, kind) {
            (Place::Named(_), Kind::Connect) => return self.target.connect().await.map(drop),
            (Place::Named(name), _) => return self.churn(name, offset).await,
            (Place::Attached(volume), Kind::PriorityFetch(until)) => {
                volume.priority_fetch(offset, u64::from(len), until).await
            }
            (Place::Attached(volume), Kind::Write { fua }) => volume.write(offset, data, fua).await,
            (Place::Attached(volume), _) => volume.read(offset, len as usize).await.map(drop),
        };
        done.map_err(|error| error.to_string())
    }

    async fn churn(&self, name: &str, offset: u64) -> Result<(), String> {
        let failed = |error: volley_client::Error| error.to_string();
        let client = self.target.connect().await?;
        let volume = client.attach(name).await.map_err(failed)?;
        volume.read(offset, self.block_bytes as usize).await.map_err(failed)?;
        volume.detach().await.map_err(failed)
    }
}
