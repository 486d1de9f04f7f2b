//! A shard: one core's partition of the volumes and of the chunk cache, generic over the platform.
//!
//! A [`Shard`] is a cheap handle; all state has one owner thread. Requests for volumes of other shards are passed on
//! by message. Nothing here knows glommio, std time, files or threads: see [`crate::platform`].

mod ahead;
pub mod api;
mod attach;
mod base;
mod batch_totals;
mod boots;
mod caching;
pub mod changes;
mod commands;
mod cuts;
mod datapath;
mod deadlines;
mod extents;
mod fill_turns;
mod fills;
mod handler;
pub mod harm;
mod hydrate;
pub mod hydration_queue;
mod invariants;
mod latencies;
mod locks;
mod manifests;
pub mod mesh;
mod near;
mod priority;
mod proof;
pub mod readahead;
mod replace;
pub mod residency;
pub(crate) mod signal;
pub mod stats;
mod store_loads;
mod store_stats;
mod tidy;
mod upkeep;
mod volume;
mod zeroing;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::budget::TokenBucket;
use crate::cache::RamLimits;
use crate::cache::disk::DiskCacheConfig;
use crate::connection::Connections;
use crate::error::{Error, Result, Status};
use crate::journal::Journal;
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::snapshot::Manifest;
use crate::transfer::ledger::Origin;
use crate::transfer::{QueueLimits, RetryPolicy, Transfer};
use crate::types::{VolumeId, VolumeState};
use api::{Command, ConnectionId, Reply, Request, ShardMap};
use attach::attach_info;
pub use base::BASE_DIR;
use base::Base;
use datapath::Claim;
use fill_turns::FillTurns;
use harm::HarmConfig;
pub use hydrate::STAGING_DIR;
use hydrate::Store;
use manifests::Manifests;
use mesh::{Mesh, MeshMessage};
use signal::{Signal, within};
use stats::{Counters, StageTimes};
pub(crate) use volume::SET_ASIDE;
use volume::Volume;

/// A long poll for residency changes is answered after this at the latest.
const RESIDENCY_WAIT_MAX: Duration = Duration::from_secs(10);
/// Names in one answer of a listing.
const NAMES_MAX: usize = 1000;
/// Volume files that belong to no volume and are named in the log one by one.
const ORPHANS_NAMED_MAX: usize = 8;

#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub label: Arc<str>,
    pub path: PathBuf,
    /// Fixed hydration share of the whole node, in bytes per second; `None`: unlimited. Divided among the shards.
    pub hydration_bandwidth: Option<u64>,
    /// What the whole node's base may hold, if the filesystem can share extents; 0: none. Divided among the shards.
    pub base_bytes: u64,
}

/// What a shard is told at its start.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    pub shard: usize,
    pub shards: usize,
    pub node_id: u128,
    /// Random per process: tells clients a restart from a lost connection.
    pub boot_id: u64,
    pub shard_map: ShardMap,
    pub stores: Vec<StoreConfig>,
    /// This shard's part of the RAM cache.
    pub cache_bytes: usize,
    /// What guests of a wave ask for stays in it for so long; zero: not at all.
    pub pin_waves: Duration,
    /// The disk cache of the whole node; `None`: there is none.
    pub disk_cache: Option<DiskCacheConfig>,
    /// A guest request that needs the object store is answered with an error after this.
    pub guest_deadline: Duration,
    pub retry: RetryPolicy,
    pub fetch_limits: QueueLimits,
    /// How far ahead of a guest that reads in order absent chunks are fetched; 0: not at all.
    pub readahead_bytes_max: u64,
    /// What hydration may do to guests.
    pub harm: HarmConfig,
    /// What a volume's guest touches within this of its first attachment is its boot; zero: none is recorded.
    pub boot_window: Duration,
    /// Guest reads that take longer are logged with their stages.
    pub trace_slow: Option<Duration>,
    /// What snapshots being taken may put aside in each store: this shard's part.
    pub staging_bytes: u64,
}

struct Inner<P: Platform, O: ObjectStore> {
    platform: P,
    objects: O,
    config: ShardConfig,
    journal: Journal<P>,
    transfer: Transfer<P, O>,
    manifests: Rc<Manifests<P, O>>,
    mesh: Mesh,
    counters: Rc<Counters>,
    stages: Rc<StageTimes>,
    connections: Rc<Connections>,
    stores: Vec<Store>,
    /// One for each store.
    bases: Vec<Base<P>>,
    volumes: RefCell<BTreeMap<VolumeId, Rc<Volume<P>>>>,
    names: RefCell<BTreeMap<Arc<str>, VolumeId>>,
    /// Volumes whose creation is in the journal's buffer: checkpoints must contain them, guests don't see them yet.
    creating: RefCell<Vec<Rc<Volume<P>>>>,
    /// Names of volumes being created.
    reserved: RefCell<std::collections::BTreeSet<Arc<str>>>,
    /// Volumes with something that the next upkeep makes durable.
    dirty: RefCell<hashbrown::HashSet<VolumeId, ahash::RandomState>>,
    miss_fills: Cell<usize>,
    /// Bytes of chunks on their way ahead of their readers.
    ahead_bytes: Cell<u64>,
    boots: boots::Boots,
    /// Until when batches are to be hydrated, in ms since 1970; those without a deadline are not here.
    deadlines: RefCell<BTreeMap<u64, u64>>,
    /// Images being warmed, or that were.
    warming: RefCell<Vec<caching::Warming>>,
    in_flight: Cell<u64>,
    stopping: Cell<bool>,
    stopped: Cell<bool>,
    /// A request ended while stopping, or the stop is complete.
    drained: Signal,
}

/// Cheap clone.
pub struct Shard<P: Platform, O: ObjectStore>(Rc<Inner<P, O>>);

impl<P: Platform, O: ObjectStore> Clone for Shard<P, O> {
    fn clone(&self) -> Self {
        Shard(self.0.clone())
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Takes over `volumes` (all owned by this shard) and starts the shard's tasks.
    ///
    /// # Errors
    /// A store that cannot be used, or residency that does not fit its volume.
    pub async fn start(
        platform: P,
        objects: O,
        journal: Journal<P>,
        config: ShardConfig,
        volumes: Vec<VolumeState>,
        mesh: Mesh,
        commands: flume::Receiver<Command>,
    ) -> Result<Shard<P, O>> {
        let counters = Rc::new(Counters::default());
        let stages = Rc::new(StageTimes::default());
        let transfer = Transfer::new(
            platform.clone(),
            objects.clone(),
            RamLimits { bytes: config.cache_bytes, pin_waves: config.pin_waves },
            config.fetch_limits,
            config.retry,
            counters.clone(),
            stages.clone(),
        );
        let manifests = Rc::new(Manifests::new(platform.clone(), objects.clone(), config.retry.deadline));
        let shares = config.shards as u64;
        let now = platform.now();
        let stores = config.stores.iter().map(|store| {
            let share = store.hydration_bandwidth.map(|bytes| (bytes / shares).max(1));
            let fills = FillTurns::new(config.harm.limits(store.hydration_bandwidth, shares), now);
            Store::new(store.label.clone(), &store.path, TokenBucket::new(share, now), fills)
        });
        let bases = config.stores.iter().map(|store| {
            let bytes = if config.fetch_limits.share { store.base_bytes / shares } else { 0 };
            Base::new(&platform, &store.path, config.shard, bytes)
        });
        let shard = Shard(Rc::new(Inner {
            stores: stores.collect(),
            bases: bases.collect(),
            platform,
            objects,
            config,
            journal,
            transfer,
            manifests,
            mesh,
            counters,
            stages,
            connections: Rc::default(),
            volumes: RefCell::default(),
            names: RefCell::default(),
            creating: RefCell::default(),
            reserved: RefCell::default(),
            dirty: RefCell::new(hashbrown::HashSet::with_hasher(ahash::RandomState::with_seeds(29, 30, 31, 32))),
            miss_fills: Cell::new(0),
            ahead_bytes: Cell::new(0),
            boots: boots::Boots::default(),
            deadlines: RefCell::default(),
            warming: RefCell::default(),
            in_flight: Cell::new(0),
            stopping: Cell::new(false),
            stopped: Cell::new(false),
            drained: Signal::default(),
        }));
        shard.restore(volumes).await?;
        shard.open_bases().await;
        shard.open_disk_cache().await;
        shard.spawn_tasks(commands);
        Ok(shard)
    }

    async fn restore(&self, states: Vec<VolumeState>) -> Result<()> {
        for state in states {
            assert_eq!(state.spec.id.owner(self.0.config.shards), self.0.config.shard, "a volume of another shard");
            let store = self.store_of(&state.spec)?;
            self.adopt(Rc::new(self.open_volume(state, store)?));
        }
        for store in &self.0.stores {
            self.tidy_store(store).await?;
        }
        Ok(())
    }

    fn open_volume(&self, state: VolumeState, store: usize) -> Result<Volume<P>> {
        let path = self.0.stores[store].volumes_dir.join(format!("{}.raw", state.spec.id));
        let snapshot = state.spec.snapshot.as_ref().map_or_else(|| Arc::from(""), |snapshot| snapshot.name.clone());
        let account = self.0.transfer.account(&Origin { snapshot, batch: state.spec.batch });
        Volume::new(&self.0.platform, state, path, store, account)
    }

    fn spawn_tasks(&self, commands: flume::Receiver<Command>) {
        let platform = &self.0.platform;
        platform.spawn(Queue::Serve, self.clone().pump());
        platform.spawn(Queue::Serve, self.clone().serve_commands(commands));
        platform.spawn(Queue::Background, self.clone().upkeep());
        platform.spawn(Queue::Background, self.clone().checkpoints());
        for store in 0..self.0.stores.len() {
            platform.spawn(Queue::Background, self.clone().hydrate_store(store));
        }
    }

    /// Serves what other shards ask.
    async fn pump(self) {
        let inbox = self.0.mesh.inbox.clone();
        while let Ok(message) = inbox.recv_async().await {
            match message {
                MeshMessage::Fetch { wanted, class, wave } => self.0.transfer.fetch(wanted, class, wave),
                MeshMessage::Supply { store, orders, want, class, wave } => {
                    self.supply(store, orders, want, class, wave);
                }
                MeshMessage::Lend { store, digests, reply } => self.lend(store, &digests, &reply),
                MeshMessage::ConnectionLost { volume, from } => self.drop_attachment(volume, from),
                MeshMessage::Request { request, from, reply } => {
                    let shard = self.clone();
                    self.0
                        .platform
                        .spawn(Queue::Serve, async move { drop(reply.send(shard.serve(request, from).await)) });
                }
            }
        }
    }

    /// The connections of this shard's data port: whoever accepts them accounts for them here.
    #[must_use]
    pub fn connections(&self) -> Rc<Connections> {
        self.0.connections.clone()
    }

    /// Waits until a [`Command::Stop`] is carried out.
    pub async fn stopped(&self) {
        self.0.drained.until(|| self.0.stopped.get()).await;
    }

    /// Whether a stop has begun: listeners stop accepting.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.get()
    }

    fn adopt(&self, volume: Rc<Volume<P>>) {
        self.0.names.borrow_mut().insert(volume.spec.name.clone(), volume.spec.id);
        self.0.volumes.borrow_mut().insert(volume.spec.id, volume.clone());
        volume.account.volumes.set(volume.account.volumes.get() + 1);
        if !volume.hydrated.get() {
            if volume.map.borrow().is_full() {
                self.note_dirty(&volume);
            }
            self.wake_hydrator(&volume);
        }
    }

    fn volumes(&self) -> Vec<Rc<Volume<P>>> {
        self.0.volumes.borrow().values().cloned().collect()
    }

    fn volume(&self, id: VolumeId) -> Result<Rc<Volume<P>>> {
        let found = self.0.volumes.borrow().get(&id).cloned();
        found.ok_or_else(|| Error::new(Status::UnknownVolume, format!("no volume with id {id} on this node")))
    }

    fn by_name(&self, name: &str) -> Result<Rc<Volume<P>>> {
        let id = self.0.names.borrow().get(name).copied();
        let unknown = || Error::new(Status::UnknownVolume, format!("no volume named {name:?} on this node"));
        self.volume(id.ok_or_else(unknown)?)
    }

    fn refuse_when_stopping(&self) -> Result<()> {
        match self.0.stopping.get() {
            true => Err(Error::new(Status::ShuttingDown, "the server is stopping")),
            false => Ok(()),
        }
    }

    /// The manifest of a volume's snapshot, loaded at its first need.
    async fn manifest_of(&self, volume: &Rc<Volume<P>>) -> Result<Arc<Manifest>> {
        if let Some(manifest) = volume.manifest() {
            return Ok(manifest);
        }
        let Some(snapshot) = &volume.spec.snapshot else {
            let message = format!("volume {:?} is blank but has absent chunks", &*volume.spec.name);
            return Err(Error::new(Status::Internal, message));
        };
        let manifest = self.load_manifest(snapshot).await?;
        if !volume.hydrated.get() {
            volume.set_manifest(manifest.clone(), false);
        }
        Ok(manifest)
    }

    async fn residency_wait(&self, id: VolumeId, seen: u64) -> Result<Reply> {
        let volume = self.volume(id)?;
        let changed = || volume.map.borrow().version() != seen || volume.deleted.get() || self.0.stopping.get();
        within(&self.0.platform, RESIDENCY_WAIT_MAX, volume.changed.until(changed)).await;
        let version = volume.map.borrow().version();
        Ok(Reply::Residency { version, extents: Vec::new() })
    }

    fn list(&self, after: &str) -> Reply {
        let names = self.0.names.borrow();
        let rest = names.range::<str, _>((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded));
        Reply::Names(rest.take(NAMES_MAX).map(|(name, _)| name.to_string()).collect())
    }

    /// Serves a request for a volume of this shard (listings: of this shard's volumes).
    async fn serve(&self, request: Request, from: ConnectionId) -> Result<Reply> {
        self.refuse_when_stopping()?;
        self.0.in_flight.set(self.0.in_flight.get() + 1);
        let result = self.dispatch(request, from).await;
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        if self.0.stopping.get() {
            self.0.drained.wake_all();
        }
        if result.is_err() {
            self.0.counters.guest_errors.add(1);
        }
        result
    }

    async fn dispatch(&self, request: Request, from: ConnectionId) -> Result<Reply> {
        let claim = |volume, generation| Claim { volume, generation, from };
        match request {
            Request::Attach { name, resume_generation } => self.attach(&name, resume_generation, from).await,
            Request::Lookup { name } => Ok(Reply::Attached(attach_info(&*self.by_name(&name)?))),
            Request::Detach { volume, generation } => self.detach(claim(volume, generation)),
            Request::Read { volume, generation, offset, len } => {
                self.read(claim(volume, generation), offset, len).await
            }
            Request::Write { volume, generation, offset, data, fua } => {
                self.write(claim(volume, generation), offset, &data, fua).await
            }
            Request::Flush { volume, generation } => self.flush(claim(volume, generation)).await,
            Request::Discard { volume, generation, offset, len } => {
                self.zero(claim(volume, generation), (offset, len), false, false).await
            }
            Request::WriteZeroes { volume, generation, offset, len, fua } => {
                self.zero(claim(volume, generation), (offset, len), true, fua).await
            }
            Request::PriorityFetch { volume, offset, len, until } => {
                self.priority_fetch(volume, offset, len, until).await
            }
            Request::Residency { volume, offset, len } => self.residency(volume, offset, len).await,
            Request::ResidencyWait { volume, seen_version } => self.residency_wait(volume, seen_version).await,
            Request::Stat { volume } => Ok(Reply::Stat(Box::new(self.status(&*self.volume(volume)?)))),
            Request::ListVolumes { after } => Ok(self.list(&after)),
        }
    }
}
