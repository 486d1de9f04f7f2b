//! A node of real shards on the simulated platform, and snapshots for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use volley_server::cache::disk::DiskCacheConfig;
use volley_server::error::{Result, Status};
use volley_server::journal::{self, Journal};
use volley_server::platform::Platform;
use volley_server::platform::sim::{Sim, SimObjects, SimRng, SimWorld};
use volley_server::shard::api::{AttachInfo, Command, ConnectionId, FetchUntil, Handler, Reply, Request};
use volley_server::shard::harm::HarmConfig;
use volley_server::shard::mesh::Mesh;
use volley_server::shard::{Shard, ShardConfig, StoreConfig};
use volley_server::snapshot::{
    ChunkEntry, Manifest, PackBuilder, SnapshotInfo, encode_chunk, is_zero, manifest_key, pack_key,
};
use volley_server::transfer::ledger::Totals;
use volley_server::transfer::{QueueLimits, RetryPolicy};
use volley_server::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec};

pub const CHUNK: u32 = 64 << 10;

/// A snapshot in the object store and what it contains.
#[derive(Clone)]
pub struct Image {
    pub snapshot: SnapshotRef,
    pub content: Vec<u8>,
}

/// A simulated machine with an object store and a snapshot, for tests that add what they do with it.
pub struct Lab {
    pub world: SimWorld,
    pub objects: SimObjects,
    pub image: Image,
}

impl Lab {
    /// As [`world`].
    pub fn of(chunks: u32, short_by: usize, zero_every: u32, seed: u64) -> Lab {
        let (world, objects, image) = world("debian", chunks, short_by, zero_every, seed);
        Lab { world, objects, image }
    }

    pub async fn node(&self, options: &Options) -> Node {
        Node::start(self.world.platform(), &self.objects, options).await.expect("started")
    }
}

/// A simulated machine with an object store, and in it a snapshot made by [`image`].
pub fn world(name: &str, chunks: u32, short_by: usize, zero_every: u32, seed: u64) -> (SimWorld, SimObjects, Image) {
    let world = SimWorld::new(seed);
    let objects = SimObjects::new(&world);
    let image = image(&objects, name, chunks, short_by, zero_every, seed);
    (world, objects, image)
}

/// GETs of chunks so far.
pub fn pack_gets(objects: &SimObjects) -> u64 {
    objects.stats().ranges.iter().filter(|((key, ..), _)| key.starts_with("packs/")).map(|(_, n)| n).sum()
}

/// A priority fetch of a part of a volume.
pub fn prefetch(volume: &AttachInfo, offset: u64, len: u64, until: FetchUntil) -> Request {
    Request::PriorityFetch { volume: volume.volume, offset, len, until }
}

/// Makes a snapshot of `chunks` chunks less `short_by` bytes (a multiple of 512); every `zero_every`th chunk is zero
/// (0: none). Half of the chunks compress.
pub fn image(objects: &SimObjects, name: &str, chunks: u32, short_by: usize, zero_every: u32, seed: u64) -> Image {
    let mut rng = SimRng::new(seed);
    let mut content = vec![0_u8; (chunks * CHUNK) as usize - short_by];
    for (i, chunk) in content.chunks_mut(CHUNK as usize).enumerate() {
        if zero_every > 0 && (i as u32).is_multiple_of(zero_every) {
            continue;
        }
        match rng.coin() {
            true => rng.fill(chunk),
            false => chunk.fill(rng.next_u64() as u8 | 1),
        }
        chunk[..8].copy_from_slice(&(i as u64 + 1).to_le_bytes());
    }
    image_of(objects, name, &content, u128::from(seed) + 1)
}

/// Makes a snapshot of this content.
pub fn image_of(objects: &SimObjects, name: &str, content: &[u8], id: u128) -> Image {
    let mut pack = PackBuilder::new(id, 0);
    let mut entries = Vec::new();
    for chunk in content.chunks(CHUNK as usize) {
        if is_zero(chunk) {
            entries.push(ChunkEntry::Zero);
            continue;
        }
        let encoded = encode_chunk(chunk, 1);
        let offset = u64::from(pack.push(&encoded));
        let (stored_len, encoding, digest) = (encoded.stored.len() as u32, encoded.encoding, encoded.digest);
        entries.push(ChunkEntry::Stored { pack: 0, offset, stored_len, encoding, digest });
    }
    let info = SnapshotInfo {
        id,
        name: name.into(),
        size_bytes: content.len() as u64,
        chunk_bytes: CHUNK,
        parent: None,
        created_unix_ms: 0,
    };
    let manifest = Manifest::new(info, vec![pack_key(id, 0)], &entries).expect("a valid manifest");
    objects.insert(&pack_key(id, 0), pack.finish());
    objects.insert(&manifest_key(name), manifest.encode());
    Image { snapshot: SnapshotRef { name: name.into(), id }, content: content.to_vec() }
}

#[derive(Clone)]
pub struct Options {
    pub shards: usize,
    pub cache_bytes: usize,
    pub pin_waves: Duration,
    pub boot_window: Duration,
    pub harm: HarmConfig,
    pub disk_cache: Option<DiskCacheConfig>,
    pub guest_deadline: Duration,
    pub hydration_bandwidth: Option<u64>,
    pub base_bytes: u64,
    pub retry: RetryPolicy,
    pub fetch_limits: QueueLimits,
    pub readahead_bytes_max: u64,
    pub staging_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        let guest_deadline = Duration::from_secs(30);
        Options {
            shards: 1,
            cache_bytes: 4 << 20,
            pin_waves: Duration::ZERO,
            boot_window: Duration::ZERO,
            harm: HarmConfig::default(),
            disk_cache: None,
            guest_deadline,
            hydration_bandwidth: None,
            base_bytes: 0,
            retry: RetryPolicy::default(),
            fetch_limits: QueueLimits::default(),
            readahead_bytes_max: 0,
            staging_bytes: 1 << 30,
        }
    }
}

pub const JOURNAL: &str = "/node/journal";
pub const STORE: &str = "/node/store";

/// The running shards of one life.
pub struct Node {
    pub platform: Sim,
    pub shards: Vec<Shard<Sim, SimObjects>>,
    pub commands: Vec<flume::Sender<Command>>,
    unique: std::cell::Cell<u64>,
}

impl Node {
    /// Recovers the journals of the last life and starts the shards, as the node does.
    pub async fn start(platform: Sim, objects: &SimObjects, options: &Options) -> Result<Node> {
        let io = |e: std::io::Error| volley_server::error::Error::from_io("start", &e);
        platform.create_dir_all(Path::new(JOURNAL)).await.map_err(io)?;
        platform.create_dir_all(&PathBuf::from(STORE).join("volumes")).await.map_err(io)?;
        for made in [STORE, "/node", "/"] {
            platform.sync_dir(Path::new(made)).await.map_err(io)?;
        }
        let recovered = journal::recover(&platform, Path::new(JOURNAL)).await?;
        let epoch = recovered.epoch + 1;
        let config = ShardConfig {
            shard: 0,
            shards: options.shards,
            node_id: 7,
            boot_id: platform.random_u64(),
            shard_map: Arc::from(vec![String::new(); options.shards]),
            stores: vec![StoreConfig {
                label: "default".into(),
                path: STORE.into(),
                hydration_bandwidth: options.hydration_bandwidth,
                base_bytes: options.base_bytes,
            }],
            cache_bytes: options.cache_bytes,
            pin_waves: options.pin_waves,
            boot_window: options.boot_window,
            harm: options.harm,
            disk_cache: options.disk_cache.clone(),
            guest_deadline: options.guest_deadline,
            retry: options.retry,
            fetch_limits: options.fetch_limits,
            readahead_bytes_max: options.readahead_bytes_max,
            trace_slow: None,
            staging_bytes: options.staging_bytes / options.shards as u64,
        };
        let mut journals = Vec::new();
        let mut parts = Vec::new();
        for shard in 0..options.shards {
            let owned = |v: &&volley_server::types::VolumeState| v.spec.id.owner(options.shards) == shard;
            let part: Vec<_> = recovered.volumes.iter().filter(owned).cloned().collect();
            let dir = Path::new(JOURNAL);
            journals.push(Journal::create(&platform, dir, epoch, shard, part.iter().cloned()).await?);
            parts.push(part);
        }
        journal::commit_epoch(&platform, Path::new(JOURNAL), epoch, options.shards).await?;
        let (mut shards, mut commands) = (Vec::new(), Vec::new());
        let starts = journals.into_iter().zip(parts).zip(Mesh::all(options.shards)).enumerate();
        for (shard, ((journal, part), mesh)) in starts {
            let (sender, receiver) = flume::unbounded();
            let config = ShardConfig { shard, ..config.clone() };
            let (platform, objects) = (platform.clone(), objects.clone());
            shards.push(Shard::start(platform, objects, journal, config, part, mesh, receiver).await?);
            commands.push(sender);
        }
        let unique = std::cell::Cell::new(platform.random_u64());
        Ok(Node { platform, shards, commands, unique })
    }

    pub fn spec(&self, name: &str, image: &Image, rate: HydrationRate) -> VolumeSpec {
        self.unique.set(self.unique.get().wrapping_add(1));
        VolumeSpec {
            id: VolumeId::new(name, self.unique.get()),
            name: name.into(),
            size_bytes: image.content.len() as u64,
            chunk_bytes: CHUNK,
            snapshot: Some(image.snapshot.clone()),
            store: "default".into(),
            rate,
            batch: None,
            created_unix_ms: self.platform.wall_clock_ms(),
        }
    }

    pub async fn create(&self, spec: VolumeSpec) -> Result<()> {
        let owner = spec.id.owner(self.shards.len());
        self.command(owner, |reply| Command::CreateVolumes { specs: vec![spec], reply }).await
    }

    /// Sends a command to a shard and awaits its answer.
    pub async fn command<T>(&self, shard: usize, make: impl FnOnce(flume::Sender<T>) -> Command) -> T {
        let (reply, answer) = flume::bounded(1);
        self.commands[shard].send(make(reply)).expect("the shard runs");
        answer.recv_async().await.expect("the shard answers")
    }

    pub fn owner(&self, name: &str) -> usize {
        VolumeId::new(name, 0).owner(self.shards.len())
    }

    /// Any shard will do: it forwards.
    pub async fn request(&self, shard: usize, request: Request) -> Result<Reply> {
        let from = ConnectionId::new(0, 0);
        match self.shards[shard].try_now(&request, from) {
            Some(answer) => answer,
            None => self.shards[shard].handle(request, from).await,
        }
    }

    pub async fn attach(&self, name: &str) -> Result<AttachInfo> {
        let request = Request::Attach { name: name.into(), resume_generation: None };
        match self.request(0, request).await? {
            Reply::Attached(info) => Ok(info),
            other => panic!("attach answered {other:?}"),
        }
    }

    pub async fn read(&self, volume: &AttachInfo, offset: u64, len: u32) -> Result<Vec<u8>> {
        let request = Request::Read { volume: volume.volume, generation: volume.generation, offset, len };
        match self.request(volume.volume.owner(self.shards.len()), request).await? {
            Reply::Data(data) => Ok(data.to_vec()),
            other => panic!("read answered {other:?}"),
        }
    }

    pub async fn write(&self, volume: &AttachInfo, offset: u64, data: Vec<u8>, fua: bool) -> Result<()> {
        let request = Request::Write { volume: volume.volume, generation: volume.generation, offset, data, fua };
        self.request(volume.volume.owner(self.shards.len()), request).await.map(|_| ())
    }

    pub async fn flush(&self, volume: &AttachInfo) -> Result<()> {
        let request = Request::Flush { volume: volume.volume, generation: volume.generation };
        self.request(0, request).await.map(|_| ())
    }

    pub async fn wait_hydrated(&self, name: &str) -> Result<volley_server::shard::api::VolumeStatus> {
        let name = name.to_owned();
        let owner = self.owner(&name);
        self.command(owner, |reply| Command::WaitHydrated { name, timeout_ms: 3_600_000, reply }).await
    }

    pub async fn status(&self, name: &str) -> Result<volley_server::shard::api::VolumeStatus> {
        let (owner, name) = (self.owner(name), name.to_owned());
        self.command(owner, |reply| Command::VolumeStatus { name, reply }).await
    }

    /// A counter of one shard, by its metric name.
    pub async fn counter(&self, shard: usize, name: &str) -> u64 {
        let stats = self.command(shard, |reply| Command::Stats { reply }).await;
        stats.counters.iter().find(|(n, ..)| *n == name).unwrap_or_else(|| panic!("no counter {name}")).2
    }

    /// A gauge of one shard, by its metric name.
    pub async fn gauge(&self, shard: usize, name: &str) -> u64 {
        let stats = self.command(shard, |reply| Command::Stats { reply }).await;
        stats.gauges.iter().find(|(n, ..)| *n == name).unwrap_or_else(|| panic!("no gauge {name}")).2
    }

    /// A counter or gauge of the first volume store of a shard, by its metric name with labels.
    pub async fn of_store(&self, shard: usize, name: &str) -> u64 {
        let stats = self.command(shard, |reply| Command::Stats { reply }).await;
        let mut values = stats.stores[0].counters.iter().chain(&stats.stores[0].gauges);
        values.find(|(n, ..)| *n == name).unwrap_or_else(|| panic!("no {name}")).2
    }

    /// What the accounts of one image and batch add up to over all shards.
    pub async fn ledger(&self, snapshot: &str, batch: Option<u64>) -> Totals {
        let mut sum = Totals::default();
        for shard in 0..self.shards.len() {
            let accounts = self.command(shard, |reply| Command::Ledger { reply }).await;
            let wanted = accounts.iter().filter(|(origin, _)| &*origin.snapshot == snapshot && origin.batch == batch);
            wanted.for_each(|(_, totals)| sum += *totals);
        }
        sum
    }

    pub async fn events(&self, shard: usize) -> Vec<String> {
        self.command(shard, |reply| Command::Stats { reply }).await.events
    }

    pub async fn stop(self) {
        for shard in 0..self.shards.len() {
            self.command(shard, |reply| Command::Stop { reply }).await;
            self.shards[shard].stopped().await;
        }
    }
}

pub fn status_of<T: std::fmt::Debug>(result: Result<T>) -> Status {
    result.expect_err("an error").status
}
