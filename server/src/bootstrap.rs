//! Starting and stopping the shards of a node: recovery, executors on their cores, listeners, and the wires between
//! them. Wires and waits only; whatever decides is elsewhere.
//!
//! A start is all or nothing, in stages that every shard must pass before any goes on: bind, recover, new journals,
//! commit of the new epoch, shards, accept. A failure at any stage ends every shard and is reported as one line; before
//! the commit the old epoch stays valid, after it the new one does, so another start finds a whole node either way.
#![allow(clippy::disallowed_methods)] // Outside of the shards: threads and executors are made here.

mod executor;
mod listen;
mod reserve;
mod shard_thread;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::disk::DiskCacheConfig;
use crate::config::{Config, ListenAddr};
use crate::datadir::DataDir;
use crate::error::{Error, Result, Status};
use crate::journal::{self, FileReport, Recovered};
use crate::limits::COMMANDS_DEPTH;
use crate::metrics::space_of;
use crate::object_store::ObjectStoreUrl;
use crate::object_store::any::StoreChoice;
use crate::object_store::s3::Environment;
use crate::platform::glommio::{Resolver, kernel_random_u64};
use crate::shard::api::{Command, ShardMap};
use crate::shard::harm::HarmConfig;
use crate::shard::mesh::Mesh;
use crate::shard::{ShardConfig, StoreConfig};
use crate::transfer::{GateLimits, QueueLimits, RetryPolicy};
use crate::types::VolumeState;
use executor::on_temporary_executor;
pub use reserve::RESERVE;
use shard_thread::{ShardSeed, ShardThread};

/// The journals' directory in the data directory.
pub const JOURNAL_DIR: &str = "journal";

/// Everything the shards of a node are made from.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub node_id: u128,
    /// Directory of the journals; made at the first start.
    pub journal_dir: PathBuf,
    /// The journals were made before: a start refuses to make them anew.
    pub journal_exists: bool,
    pub stores: Vec<StoreConfig>,
    pub object_store: StoreChoice,
    /// How the object store's name becomes addresses.
    pub resolver: Resolver,
    /// Data port of shard 0; shard k takes port + k, or `path.k`.
    pub listen: ListenAddr,
    /// Number of shards; 0: one for each core the process may run on.
    pub cores: usize,
    /// A shard without work looks for some this long before it sleeps.
    pub idle_poll: Duration,
    /// RAM cache of the whole node.
    pub cache_bytes: u64,
    pub pin_waves: Duration,
    pub boot_window: Duration,
    pub harm: HarmConfig,
    /// Disk cache of the whole node.
    pub disk_cache: Option<DiskCacheConfig>,
    pub guest_deadline: Duration,
    pub retry: RetryPolicy,
    /// Rates are the whole node's.
    pub fetch_limits: QueueLimits,
    pub readahead_bytes_max: u64,
    pub trace_slow: Option<Duration>,
    /// What snapshots being taken may put aside in each store, over all shards.
    pub staging_bytes: u64,
}

impl NodeConfig {
    /// Puts together what the configuration, the data directory and, for a bucket, the environment say.
    ///
    /// # Errors
    /// `Invalid` when the object store's URL is missing or not understood, or its settings contradict each other.
    pub fn new(config: &Config, data: &DataDir) -> Result<NodeConfig> {
        let missing = || {
            "no object store: give --object-store file:DIR or s3://BUCKET/PREFIX, or set VOLLEY_OBJECT_STORE".to_owned()
        };
        let url = config.object_store.as_ref().ok_or_else(missing);
        let choose = |url: ObjectStoreUrl| StoreChoice::new(&url, &config.s3, &Environment::of_process());
        let object_store = url.and_then(|url| url.parse()).and_then(choose);
        let object_store = object_store.map_err(|why| Error::new(Status::Invalid, why))?;
        let stores = data.stores.iter().map(|store| StoreConfig {
            label: store.label.clone(),
            path: store.path.clone(),
            hydration_bandwidth: store.hydration_bandwidth,
            // Where the filesystem can't be asked now, volumes get copies in this life.
            base_bytes: space_of(&store.path).map_or(0, |space| space.total_bytes / 100)
                * u64::from(store.base_percent),
        });
        Ok(NodeConfig {
            node_id: data.node_id,
            journal_dir: data.path.join(JOURNAL_DIR),
            journal_exists: data.has_journal(),
            stores: stores.collect(),
            object_store,
            resolver: Resolver::default(),
            listen: config.listen.clone(),
            cores: config.cores,
            idle_poll: config.idle_poll.0,
            cache_bytes: config.cache.ram_bytes.0,
            pin_waves: config.cache.pin_waves.0,
            boot_window: config.hydration.boot_window.0,
            harm: HarmConfig { bound_percent: config.hydration.guest_p99_bound.0, floor: config.hydration.floor.0 },
            disk_cache: config.disk_cache(),
            guest_deadline: config.deadlines.guest_read.0,
            retry: RetryPolicy {
                deadline: config.retries.deadline.0,
                backoff_min: config.retries.backoff_min.0,
                backoff_max: config.retries.backoff_max.0,
                corrupt_attempts: config.retries.corrupt_attempts,
                hedge_percent: config.transfer.hedge_percent,
            },
            fetch_limits: QueueLimits {
                gate: GateLimits {
                    gets_max: config.hydration.reads_max,
                    gets_background_max: config.hydration.background_reads_max,
                    bytes_per_second: config.transfer.bandwidth.0,
                    gets_per_second: Some(config.transfer.gets_per_second).filter(|gets| *gets > 0),
                },
                get_bytes_max: config.hydration.read_bytes_max.0,
                share: config.transfer.share,
            },
            // Without sharing the reader would not find what was fetched ahead of it.
            readahead_bytes_max: if config.transfer.share { config.transfer.readahead_bytes_max.0 } else { 0 },
            trace_slow: Some(config.trace_slow.0).filter(|slow| !slow.is_zero()),
            staging_bytes: config.snapshots.staging_bytes.0,
        })
    }
}

/// What a start found.
#[derive(Clone, Debug)]
pub struct RecoveryReport {
    /// A first start: there was no journal.
    pub fresh: bool,
    /// Epoch that the node runs in now.
    pub epoch: u64,
    pub volumes: usize,
    /// How each journal of the epoch before read.
    pub files: Vec<FileReport>,
}

/// A running node. Dropping it leaves the shards running until the process ends: stop them with
/// [`Command::Stop`] or [`Node::stop`], then [`Node::join`].
pub struct Node {
    /// Command channel of each shard.
    pub commands: Vec<flume::Sender<Command>>,
    pub shard_map: ShardMap,
    /// Addresses as an operator writes them (`127.0.0.1:7400`, `unix:/path`), by shard.
    pub addresses: Vec<String>,
    pub recovered: RecoveryReport,
    threads: Vec<ShardThread>,
}

impl Node {
    /// Asks every shard to stop and waits until all have answered or ended. Each bounds its own stop.
    pub fn stop(&self) {
        let answers: Vec<_> = self.commands.iter().filter_map(ask_to_stop).collect();
        for answer in answers {
            // A shard that ended without an answer has stopped too; `join` says how.
            let _ = answer.recv();
        }
    }

    /// Waits until every shard has ended.
    ///
    /// # Errors
    /// The first shard that did not end in good order.
    pub fn join(self) -> Result<()> {
        let outcomes: Vec<_> = self.threads.into_iter().map(ShardThread::join).collect();
        outcomes.into_iter().collect()
    }
}

/// Lets this process have as many files open as it may: every volume in use and every connection is one, and shells start
/// programs with a soft limit of 1,024 and let them raise it. Returns how many that are; a refusal leaves the limit as it was.
pub fn raise_open_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that outlives the calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return 0;
        }
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 { raised.rlim_cur } else { limit.rlim_cur }
    }
}

/// Recovers the node and starts its shards; they accept connections when it returns. On a full disk it uses the space
/// that an earlier start held back.
///
/// # Errors
/// One line that names what failed and what to do. Nothing runs then.
pub fn start(config: NodeConfig) -> Result<Node> {
    let journal_dir = config.journal_dir.clone();
    let started = match start_once(config.clone()) {
        Err(error) if error.status == Status::NoSpace && reserve::release(&journal_dir) => start_once(config),
        started => started,
    };
    match started {
        Ok(node) => {
            reserve::hold(&journal_dir);
            Ok(node)
        }
        Err(error) if error.status == Status::NoSpace => {
            let dir = journal_dir.display();
            let text = format!("{}; free some space on the filesystem of {dir} and start again", error.message);
            Err(Error::new(error.status, text))
        }
        Err(error) => Err(error),
    }
}

fn start_once(config: NodeConfig) -> Result<Node> {
    let cpus = executor::allowed_cpus()?;
    let shards = if config.cores == 0 { cpus.len() } else { config.cores };
    if shards > cpus.len() {
        tracing::warn!(shards, cores = cpus.len(), "more shards than cores: some share a core");
    }
    let bound = listen::bind(&config.listen, shards)?;
    let (journal_dir, journal_exists) = (config.journal_dir.clone(), config.journal_exists);
    let recovered = on_temporary_executor(async move |platform| match journal_exists {
        true => journal::recover_existing(&platform, &journal_dir).await,
        false => journal::recover(&platform, &journal_dir).await,
    })?;
    let Recovered { epoch, fresh, volumes, files, .. } = recovered;
    let report = RecoveryReport { fresh, epoch: epoch + 1, volumes: volumes.len(), files };
    let shard_map: ShardMap = bound.iter().map(listen::Bound::map_entry).collect();
    let addresses = bound.iter().map(listen::Bound::address).collect();
    let boot_id = kernel_random_u64().map_err(|e| Error::from_io("random number for the boot id", &e))?;

    let mut commands = Vec::with_capacity(shards);
    let mut threads = Vec::with_capacity(shards);
    let parts = bound.into_iter().zip(partition(volumes, shards)).zip(Mesh::all(shards));
    for (shard, ((listener, volumes), mesh)) in parts.enumerate() {
        let (sender, receiver) = flume::bounded(COMMANDS_DEPTH);
        commands.push(sender);
        threads.push(ShardThread::spawn(ShardSeed {
            cpu: cpus[shard % cpus.len()],
            // A shard that polls on another one's core would keep it from its work.
            idle_poll: if shards > cpus.len() { Duration::ZERO } else { config.idle_poll },
            journal_dir: config.journal_dir.clone(),
            epoch: report.epoch,
            object_store: config.object_store.clone(),
            resolver: config.resolver.clone(),
            has_volumes: report.volumes > 0,
            config: shard_config(&config, shard, shards, boot_id, &shard_map),
            volumes,
            mesh,
            commands: receiver,
            listener,
        })?);
    }
    let journal_dir = config.journal_dir;
    let threads = bring_up(threads, &commands, || {
        let epoch = report.epoch;
        on_temporary_executor(async move |platform| journal::commit_epoch(&platform, &journal_dir, epoch, shards).await)
    })?;
    Ok(Node { commands, shard_map, addresses, recovered: report, threads })
}

/// Leads all shards through the stages together; on a failure ends them all and says what failed.
fn bring_up(
    mut threads: Vec<ShardThread>,
    commands: &[flume::Sender<Command>],
    commit: impl FnOnce() -> Result<()>,
) -> Result<Vec<ShardThread>> {
    let stages = |threads: &[ShardThread]| {
        // Journals are made: nothing counts yet.
        all_report(threads)?;
        commit()?;
        threads.iter().for_each(ShardThread::proceed);
        // Shards are built: nobody is served yet.
        all_report(threads)?;
        threads.iter().for_each(ShardThread::proceed);
        Ok(())
    };
    let Err(error) = stages(&threads) else { return Ok(threads) };
    let stopping: Vec<_> = commands.iter().filter_map(ask_to_stop).collect();
    let mut first: Result<()> = Err(error);
    for thread in threads.drain(..) {
        // A thread that never ran its shard says why itself, and more precisely than its silence.
        let ended = thread.abandon();
        if matches!(&first, Err(error) if error.status == shard_thread::SILENT) && ended.is_err() {
            first = ended;
        }
    }
    drop(stopping);
    first.map(|()| Vec::new())
}

fn all_report(threads: &[ShardThread]) -> Result<()> {
    // All are heard, so that the error is the same whoever was slower.
    let reports: Vec<_> = threads.iter().map(ShardThread::report).collect();
    reports.into_iter().collect()
}

fn ask_to_stop(commands: &flume::Sender<Command>) -> Option<flume::Receiver<()>> {
    let (reply, answer) = flume::bounded(1);
    commands.send(Command::Stop { reply }).ok().map(|()| answer)
}

fn partition(volumes: Vec<VolumeState>, shards: usize) -> Vec<Vec<VolumeState>> {
    let mut parts: Vec<Vec<VolumeState>> = (0..shards).map(|_| Vec::new()).collect();
    for volume in volumes {
        parts[volume.spec.id.owner(shards)].push(volume);
    }
    parts
}

fn shard_config(
    config: &NodeConfig,
    shard: usize,
    shards: usize,
    boot_id: u64,
    shard_map: &Arc<[String]>,
) -> ShardConfig {
    ShardConfig {
        shard,
        shards,
        node_id: config.node_id,
        boot_id,
        shard_map: shard_map.clone(),
        stores: config.stores.clone(),
        cache_bytes: usize::try_from(config.cache_bytes).unwrap_or(usize::MAX) / shards,
        pin_waves: config.pin_waves,
        boot_window: config.boot_window,
        harm: config.harm,
        disk_cache: config.disk_cache.clone(),
        guest_deadline: config.guest_deadline,
        retry: config.retry,
        fetch_limits: config.fetch_limits.share(shards),
        readahead_bytes_max: config.readahead_bytes_max,
        trace_slow: config.trace_slow,
        staging_bytes: config.staging_bytes / shards as u64,
    }
}
