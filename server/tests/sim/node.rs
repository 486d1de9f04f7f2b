//! A node on the simulator: an image in the object store, and the real journal and shards started as volleyd does.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use volley_server::cache::disk::DiskCacheConfig;
use volley_server::error::{Result, Status};
use volley_server::journal::{Journal, Recovered, commit_epoch, recover};
use volley_server::platform::Platform;
use volley_server::platform::sim::{Sim, SimObjects, SimRng, SimWorld};
use volley_server::shard::api::{Command, ConnectionId, Handler, Reply, ReplyTo, Request, VolumeStatus};
use volley_server::shard::harm::HarmConfig;
use volley_server::shard::mesh::Mesh;
use volley_server::shard::{Shard, ShardConfig, StoreConfig};
use volley_server::snapshot::{
    ChunkEntry, Manifest, PackBuilder, SnapshotInfo, encode_chunk, is_zero, manifest_key, pack_key,
};
use volley_server::transfer::{QueueLimits, RetryPolicy};
use volley_server::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

use crate::model::Image;

pub const CHUNK_BYTES: u32 = 64 << 10;
pub const STORES: [&str; 2] = ["a", "b"];
/// A fetch goes on for this long, whatever the deadline of the guests that wait for it.
const FETCH_DEADLINE: Duration = Duration::from_secs(20);
const JOURNAL: &str = "/node/journal";
const NODE: u128 = 7;
/// As in the names of references.
pub static NODE_ID: LazyLock<String> = LazyLock::new(|| format!("{NODE:032x}"));
pub const CACHE: &str = "/node/cache";

/// A snapshot in the object store and its content.
#[derive(Clone)]
pub struct Snapshot {
    pub reference: SnapshotRef,
    pub image: Rc<Image>,
}

/// Makes a snapshot of a later state of an image: some chunks changed, the others still in the packs of `parent`.
pub fn make_child(objects: &SimObjects, rng: &mut SimRng, name: &str, parent: &Snapshot) -> Snapshot {
    let manifest = objects.peek(&manifest_key(&parent.reference.name)).expect("the parent's manifest");
    let old = Manifest::decode(&manifest).expect("a valid manifest");
    let id = u128::from(rng.next_u64()) << 64 | u128::from(rng.next_u64());
    let mut bytes = parent.image.bytes.clone();
    let mut pack = PackBuilder::new(id, 0);
    let mut entries = Vec::new();
    for (number, raw) in bytes.chunks_mut(CHUNK_BYTES as usize).enumerate() {
        if rng.below(3) > 0 {
            entries.push(match old.chunk(number as u32) {
                ChunkEntry::Stored { pack: 0, offset, stored_len, encoding, digest } => {
                    ChunkEntry::Stored { pack: 1, offset, stored_len, encoding, digest }
                }
                same => same,
            });
            continue;
        }
        rng.fill(raw);
        let chunk = encode_chunk(raw, 1);
        let offset = u64::from(pack.push(&chunk));
        let stored_len = chunk.stored.len() as u32;
        let (encoding, digest) = (chunk.encoding, chunk.digest);
        entries.push(ChunkEntry::Stored { pack: 0, offset, stored_len, encoding, digest });
    }
    let info = SnapshotInfo {
        id,
        name: name.to_owned(),
        size_bytes: bytes.len() as u64,
        chunk_bytes: CHUNK_BYTES,
        parent: Some(parent.reference.name.to_string()),
        created_unix_ms: 0,
    };
    let packs = vec![pack_key(id, 0), old.pack_key(0).to_owned()];
    let manifest = Manifest::new(info, packs, &entries).expect("a valid manifest");
    objects.insert(&pack_key(id, 0), pack.finish());
    objects.insert(&manifest_key(name), manifest.encode());
    Snapshot { reference: SnapshotRef { name: Arc::from(name), id }, image: Rc::new(Image { bytes }) }
}

/// Makes a snapshot of random content: chunks that compress, that do not, that are zero, and doubles.
pub fn make_snapshot(objects: &SimObjects, rng: &mut SimRng, name: &str, size_bytes: u64) -> Snapshot {
    let id = u128::from(rng.next_u64()) << 64 | u128::from(rng.next_u64());
    let mut bytes = vec![0; size_bytes as usize];
    for chunk in 0..size_bytes.div_ceil(u64::from(CHUNK_BYTES)) as usize {
        let start = chunk * CHUNK_BYTES as usize;
        let end = (start + CHUNK_BYTES as usize).min(bytes.len());
        match rng.below(6) {
            0 => {}
            1 if chunk > 0 && end - start == CHUNK_BYTES as usize => {
                bytes.copy_within(start - CHUNK_BYTES as usize..start, start);
            }
            2 => bytes[start..end].fill(0x11 + chunk as u8),
            _ => rng.fill(&mut bytes[start..end]),
        }
    }
    let mut pack = PackBuilder::new(id, 0);
    let mut entries = Vec::new();
    for raw in bytes.chunks(CHUNK_BYTES as usize) {
        if is_zero(raw) {
            entries.push(ChunkEntry::Zero);
            continue;
        }
        let chunk = encode_chunk(raw, 1);
        let offset = u64::from(pack.push(&chunk));
        let stored_len = chunk.stored.len() as u32;
        entries.push(ChunkEntry::Stored {
            pack: 0,
            offset,
            stored_len,
            encoding: chunk.encoding,
            digest: chunk.digest,
        });
    }
    let info = SnapshotInfo {
        id,
        name: name.to_owned(),
        size_bytes,
        chunk_bytes: CHUNK_BYTES,
        parent: None,
        created_unix_ms: 0,
    };
    let manifest = Manifest::new(info, vec![pack_key(id, 0)], &entries).expect("a valid manifest");
    objects.insert(&pack_key(id, 0), pack.finish());
    objects.insert(&manifest_key(name), manifest.encode());
    Snapshot { reference: SnapshotRef { name: Arc::from(name), id }, image: Rc::new(Image { bytes }) }
}

pub fn volume_spec(rng: &mut SimRng, name: &str, size_bytes: u64, snapshot: Option<&Snapshot>) -> VolumeSpec {
    let rate = match rng.below(4) {
        0 => HydrationRate::None,
        1 => HydrationRate::BytesPerSecond(1 << 20),
        _ => HydrationRate::Unlimited,
    };
    VolumeSpec {
        id: VolumeId::new(name, rng.next_u64()),
        name: Arc::from(name),
        size_bytes,
        chunk_bytes: CHUNK_BYTES,
        snapshot: snapshot.map(|s| s.reference.clone()),
        store: Arc::from(STORES[rng.index(STORES.len())]),
        rate,
        batch: None,
        created_unix_ms: 1,
    }
}

/// Where a volume's file is.
pub fn volume_path(spec: &VolumeSpec) -> PathBuf {
    Path::new("/node/stores").join(&*spec.store).join("volumes").join(format!("{}.raw", spec.id))
}

/// Makes the directories that a node's set-up leaves behind, durably.
pub async fn make_directories(sim: &Sim) -> std::io::Result<()> {
    for store in STORES {
        sim.create_dir_all(&Path::new("/node/stores").join(store).join("volumes")).await?;
        sim.sync_dir(&Path::new("/node/stores").join(store)).await?;
    }
    for dir in ["/node/stores", "/node", "/"] {
        sim.sync_dir(Path::new(dir)).await?;
    }
    Ok(())
}

/// Settings of one life of a node.
#[derive(Clone, Copy, Debug)]
pub struct NodeSettings {
    pub shards: usize,
    pub cache_bytes: usize,
    /// `None`: no disk cache.
    pub disk_cache_bytes: Option<u64>,
    pub hydration_bandwidth: Option<u64>,
    pub base_bytes: u64,
    pub deadline: Duration,
    pub hedge_percent: u32,
    pub readahead_bytes_max: u64,
    pub harm: HarmConfig,
}

impl Default for NodeSettings {
    fn default() -> NodeSettings {
        NodeSettings {
            shards: 1,
            cache_bytes: 4 << 20,
            disk_cache_bytes: None,
            hydration_bandwidth: None,
            base_bytes: 0,
            deadline: Duration::from_secs(20),
            hedge_percent: 0,
            readahead_bytes_max: 0,
            harm: HarmConfig::default(),
        }
    }
}

/// A running node.
pub struct Node {
    pub shards: Vec<Shard<Sim, SimObjects>>,
    commands: Vec<flume::Sender<Command>>,
}

impl Node {
    /// Recovers the journals and starts the shards, in the order of a real start.
    pub async fn start(sim: &Sim, objects: &SimObjects, settings: NodeSettings) -> Result<Node> {
        let dir = Path::new(JOURNAL);
        let recovered: Recovered = recover(sim, dir).await?;
        let epoch = recovered.epoch + 1;
        let mut parts: Vec<Vec<VolumeState>> = vec![Vec::new(); settings.shards];
        for state in recovered.volumes {
            parts[state.spec.id.owner(settings.shards)].push(state);
        }
        let mut journals = Vec::new();
        for (shard, part) in parts.iter().enumerate() {
            journals.push(Journal::create(sim, dir, epoch, shard, part.iter().cloned()).await?);
        }
        commit_epoch(sim, dir, epoch, settings.shards).await?;
        let mut node = Node { shards: Vec::new(), commands: Vec::new() };
        for ((part, journal), mesh) in parts.into_iter().zip(journals).zip(Mesh::all(settings.shards)) {
            let (sender, receiver) = flume::bounded(64);
            let config = shard_config(settings, node.shards.len());
            let shard = Shard::start(sim.clone(), objects.clone(), journal, config, part, mesh, receiver).await?;
            node.shards.push(shard);
            node.commands.push(sender);
        }
        Ok(node)
    }

    /// A request at a shard that need not own the volume.
    pub async fn request(&self, shard: usize, from: ConnectionId, request: Request) -> Result<Reply> {
        let shard = &self.shards[shard % self.shards.len()];
        if let Some(reply) = shard.try_now(&request, from) {
            return reply;
        }
        shard.handle(request, from).await
    }

    pub async fn command<T>(&self, name: &str, make: impl FnOnce(ReplyTo<Result<T>>) -> Command) -> Result<T> {
        let owner = VolumeId::new(name, 0).owner(self.shards.len());
        let (reply, answer) = flume::bounded(1);
        let stopping = || volley_server::error::Error::new(Status::ShuttingDown, "the shard is gone");
        self.commands[owner].send_async(make(reply)).await.map_err(|_| stopping())?;
        answer.recv_async().await.map_err(|_| stopping())?
    }

    /// Tells the first shards of a batch's deadline; one that has stopped does not care.
    pub async fn set_deadline(&self, batch: u64, deadline_unix_ms: Option<u64>, shards: usize) {
        for commands in &self.commands[..shards] {
            let (reply, answer) = flume::bounded(1);
            if commands.send_async(Command::SetDeadline { batch, deadline_unix_ms, reply }).await.is_ok() {
                let _ = answer.recv_async().await;
            }
        }
    }

    /// Every volume that is there.
    pub async fn volumes(&self) -> Vec<VolumeStatus> {
        let mut all = Vec::new();
        for commands in &self.commands {
            let (reply, answer) = flume::bounded(1);
            commands.send_async(Command::ListVolumes { reply }).await.expect("the shard is there");
            all.extend(answer.recv_async().await.expect("the shard answers"));
        }
        all
    }

    /// Names of the snapshots that volumes of any shard need.
    pub async fn snapshots_needed(&self) -> Result<BTreeSet<String>> {
        let mut needed = BTreeSet::new();
        for commands in &self.commands {
            let (reply, answer) = flume::bounded(1);
            let stopping = || volley_server::error::Error::new(Status::ShuttingDown, "the shard is gone");
            commands.send_async(Command::Stats { reply }).await.map_err(|_| stopping())?;
            needed.extend(answer.recv_async().await.map_err(|_| stopping())?.snapshots_needed);
        }
        Ok(needed)
    }

    /// Stops every shard in good order.
    pub async fn stop(&self) {
        let mut answers = Vec::new();
        for commands in &self.commands {
            let (reply, answer) = flume::bounded(1);
            commands.send_async(Command::Stop { reply }).await.expect("the shard serves commands");
            answers.push(answer);
        }
        for (answer, shard) in answers.iter().zip(&self.shards) {
            answer.recv_async().await.expect("the shard answers its stop");
            shard.stopped().await;
        }
    }
}

fn shard_config(settings: NodeSettings, shard: usize) -> ShardConfig {
    let store = |label: &str| StoreConfig {
        label: Arc::from(label),
        path: Path::new("/node/stores").join(label),
        hydration_bandwidth: settings.hydration_bandwidth,
        base_bytes: settings.base_bytes,
    };
    ShardConfig {
        shard,
        shards: settings.shards,
        node_id: NODE,
        boot_id: 1,
        shard_map: (0..settings.shards).map(|k| format!("sim:{k}")).collect(),
        stores: STORES.iter().map(|label| store(label)).collect(),
        cache_bytes: settings.cache_bytes,
        pin_waves: Duration::from_secs(2),
        boot_window: Duration::from_secs(1),
        harm: settings.harm,
        disk_cache: settings.disk_cache_bytes.map(|bytes| DiskCacheConfig { dir: PathBuf::from(CACHE), bytes }),
        guest_deadline: settings.deadline,
        retry: RetryPolicy {
            deadline: FETCH_DEADLINE,
            hedge_percent: settings.hedge_percent,
            ..RetryPolicy::default()
        },
        fetch_limits: QueueLimits::default(),
        readahead_bytes_max: settings.readahead_bytes_max,
        trace_slow: None,
        staging_bytes: 1 << 30,
    }
}

/// What the journals of a world say, without starting anything.
pub fn recovered(world: &SimWorld) -> Recovered {
    let sim = world.platform();
    world.block_on(async { recover(&sim, Path::new(JOURNAL)).await.expect("the journals are readable") })
}
