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

use super::report::{Report, Series};
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
    /// Connect, attach, read a block, detach.
    Churn,
}

impl Kind {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::PriorityFetch(_) => "priority-fetch",
            Kind::Read => "read",
            Kind::Write { .. } => "write",
            Kind::Churn => "churn",
        }
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
    /// Blocks are taken in order instead of at random.
    pub sequential: bool,
    /// No request starts later than this after the first.
    pub duration: Duration,
    /// No more requests than this.
    pub count: u64,
    /// Chooses the blocks.
    pub seed: u64,
}

/// Runs a plan to its end.
///
/// # Errors
/// A sentence when the load can't start: node away, unknown volume, block larger than a volume.
pub fn run(plan: &Plan) -> Result<Report, String> {
    check(plan)?;
    let budget = Arc::new(AtomicU64::new(plan.count));
    let mut whole = Series::default();
    let mut elapsed = Duration::ZERO;
    let results = on_threads(
        plan.threads,
        async |thread| prepare(plan, thread).await,
        async |(workers, attached)| run_thread(plan, workers, attached, Arc::clone(&budget)).await,
    )?;
    for (series, ran) in results {
        whole.merge(series);
        elapsed = elapsed.max(ran);
    }
    Ok(Report { workload: plan.kind.name(), elapsed, series: vec![(plan.kind.name(), whole)], facts: Vec::new() })
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
    block_bytes: u32,
    tag: u64,
}

/// What a worker works on.
enum Place {
    Attached(Volume),
    /// Attached anew for each request.
    Named(String),
}

async fn run_thread(
    plan: &Plan,
    workers: Vec<Worker>,
    attached: Vec<Volume>,
    budget: Arc<AtomicU64>,
) -> (Series, Duration) {
    let begun = Instant::now();
    let series = drive(workers, begun + plan.duration, budget).await;
    let elapsed = begun.elapsed();
    for volume in attached {
        // What counts was measured; a volume that another host took meanwhile is its own affair.
        let _ = volume.detach().await;
    }
    (series, elapsed)
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
    if plan.kind == Kind::Churn { 1 } else { share as u64 }
}

/// The volume (unless each request attaches it) and its size.
async fn open(plan: &Plan, client: &Client, name: &str) -> Result<(Option<Volume>, u64), String> {
    let failed = |error: volley_client::Error| format!("volume {name}: {error}");
    let (volume, size) = if plan.kind == Kind::Churn {
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
        blocks: Blocks { first: share, step: sharing, count, next: 0, random, sequential: plan.sequential },
        block_bytes: plan.block_bytes,
        tag: plan.seed,
    }
}

async fn drive(workers: Vec<Worker>, end: Instant, budget: Arc<AtomicU64>) -> Series {
    let mut tasks: JoinSet<Series> = workers.into_iter().map(|worker| worker.run(end, Arc::clone(&budget))).collect();
    let mut whole = Series::default();
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(series) => whole.merge(series),
            Err(panic) => whole.record(Duration::ZERO, 0, Err(panic.to_string())),
        }
    }
    whole
}

impl Worker {
    async fn run(mut self, end: Instant, budget: Arc<AtomicU64>) -> Series {
        let mut series = Series::default();
        let take = |left: u64| left.checked_sub(1);
        while Instant::now() < end && budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            let offset = self.blocks.next() * u64::from(self.block_bytes);
            // Made before the clock starts.
            let data = match self.kind {
                Kind::Write { .. } => Bytes::from(pattern(offset, self.block_bytes as usize, self.tag)),
                _ => Bytes::new(),
            };
            let begun = Instant::now();
            let outcome = self.request(offset, data).await;
            series.record(begun.elapsed(), u64::from(self.block_bytes), outcome);
        }
        series
    }

    async fn request(&self, offset: u64, data: Bytes) -> Result<(), String> {
        let len = self.block_bytes;
        let done = match (&self.place, self.kind) {
            (Place::Named(name), _) => return self.churn(name, offset).await,
            (Place::Attached(volume), Kind::PriorityFetch(until)) => {
                volume.priority_fetch(offset, u64::from(len), until).await
            }
            (Place::Attached(volume), Kind::Write { fua }) => volume.write(offset, data, fua).await,
            (Place::Attached(volume), Kind::Read | Kind::Churn) => volume.read(offset, len as usize).await.map(drop),
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

/// The blocks of one worker: every `step`th from `first`, `count` of them.
struct Blocks {
    first: u64,
    step: u64,
    count: u64,
    next: u64,
    random: Random,
    sequential: bool,
}

impl Blocks {
    fn next(&mut self) -> u64 {
        let index = if self.sequential { self.next } else { self.random.below(self.count) };
        self.next = (self.next + 1) % self.count;
        self.first + index * self.step
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::Blocks;
    use crate::load::Random;

    fn blocks(first: u64, step: u64, count: u64, sequential: bool) -> Blocks {
        Blocks { first, step, count, next: 0, random: Random::new(7), sequential }
    }

    #[test]
    fn workers_take_disjoint_blocks_and_together_all() {
        let mut seen = HashSet::new();
        for share in 0..3 {
            let count = (10_u64 - share).div_ceil(3);
            let mut mine = blocks(share, 3, count, true);
            assert!((0..count).all(|_| seen.insert(mine.next())));
            assert_eq!(mine.next(), share, "starts again");
        }
        assert_eq!(seen, (0..10).collect::<HashSet<u64>>());
    }

    #[test]
    fn random_blocks_stay_inside() {
        let mut mine = blocks(1, 4, 5, false);
        let seen: HashSet<u64> = (0..200).map(|_| mine.next()).collect();
        assert_eq!(seen, HashSet::from([1, 5, 9, 13, 17]));
    }
}
