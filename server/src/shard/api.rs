//! What a shard is asked: by connections (data path), by the control thread, and by other shards.

mod cache;
mod loads;
mod snapshots;
mod stats;

use std::fmt;
use std::future::Future;
use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::cache::ChunkData;
use crate::cache::disk::scrub::Scrubbed;
use crate::error::Result;
use crate::shard::changes::ChunkSet;
use crate::transfer::Digest;
use crate::transfer::ledger::{Origin, Totals};
use crate::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec};

pub use cache::{CacheStatus, Dropped, WarmStatus};
pub use loads::{BatchOnStore, BatchTotals, StoreLoad, StoreSharing};
pub use snapshots::{CheckedChunk, CutVolume, CutWanted, Prepared, VolumeLineage};
pub use stats::{ShardStats, StoreStats};

/// A connection of this process's life: unique over all shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId(pub u64);

impl ConnectionId {
    /// The `n`th connection that `shard` accepted.
    #[must_use]
    pub fn new(shard: usize, n: u64) -> ConnectionId {
        ConnectionId(((shard as u64) << 48) | (n & 0xffff_ffff_ffff))
    }
}

/// When a priority fetch is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchUntil {
    /// Verified in this node's cache (or already in the volume).
    Readable,
    /// In the volume.
    Resident,
    /// In the volume, and the knowledge of it survives a crash.
    Durable,
}

/// A data-path request. Offsets and lengths in bytes, multiples of 512, inside the device.
#[derive(Debug)]
pub enum Request {
    /// Opens the volume for one writer; answers with `Reply::Attached`. A fresh attach (`resume_generation` none) makes
    /// a new generation durable and fences older ones; a resumed one (reconnect) keeps its generation or is refused
    /// with `StaleGeneration`. Either way requests that other connections sent for the volume end before the answer, or
    /// are refused with `NotAttached`: a writer that reconnects is never overtaken by its own past.
    Attach {
        name: String,
        resume_generation: Option<u64>,
    },
    /// Describes the volume (`Reply::Attached` with its present generation) without attaching: fences nobody, so an
    /// agent can list the sizes of volumes that other hosts use. Client: `Client::lookup(name) -> AttachInfo`.
    Lookup {
        name: String,
    },
    /// Ends the generation: later requests of it get `NotAttached`.
    Detach {
        volume: VolumeId,
        generation: u64,
    },
    Read {
        volume: VolumeId,
        generation: u64,
        offset: u64,
        len: u32,
    },
    Write {
        volume: VolumeId,
        generation: u64,
        offset: u64,
        data: Vec<u8>,
        fua: bool,
    },
    Flush {
        volume: VolumeId,
        generation: u64,
    },
    Discard {
        volume: VolumeId,
        generation: u64,
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        volume: VolumeId,
        generation: u64,
        offset: u64,
        len: u64,
        fua: bool,
    },
    /// No generation: any host may warm a volume.
    PriorityFetch {
        volume: VolumeId,
        offset: u64,
        len: u64,
        until: FetchUntil,
    },
    /// Residency of `len` bytes from `offset` (clipped to the device), or of a first part of them.
    Residency {
        volume: VolumeId,
        offset: u64,
        len: u64,
    },
    /// Long poll: answered as soon as the volume's residency version differs from `seen_version`, or after 10 s.
    ResidencyWait {
        volume: VolumeId,
        seen_version: u64,
    },
    Stat {
        volume: VolumeId,
    },
    /// Volume names on this shard in order, at most 1,000, starting after `after` (empty: from the first).
    ListVolumes {
        after: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachInfo {
    pub volume: VolumeId,
    pub generation: u64,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
}

/// A run of bytes in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub len_bytes: u64,
    pub resident: bool,
    /// Resident, and nothing is stored for it (a zero chunk of the snapshot, discarded, or never written in a blank volume):
    /// it reads as zeroes.
    pub hole: bool,
}

#[derive(Debug)]
pub enum Reply {
    Done,
    Attached(AttachInfo),
    /// Bytes of a read, exactly as long as asked.
    Data(ReadData),
    Residency {
        version: u64,
        extents: Vec<Extent>,
    },
    Stat(Box<VolumeStatus>),
    Names(Vec<String>),
}

/// Bytes of a read, wherever they are.
#[derive(Clone)]
pub enum ReadData {
    Own(Vec<u8>),
    /// A part of a verified chunk, which is sent from the cache's memory.
    Chunk {
        data: ChunkData,
        part: Range<usize>,
    },
}

impl Deref for ReadData {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            ReadData::Own(bytes) => bytes,
            ReadData::Chunk { data, part } => &data[part.clone()],
        }
    }
}

impl From<Vec<u8>> for ReadData {
    fn from(bytes: Vec<u8>) -> ReadData {
        ReadData::Own(bytes)
    }
}

impl fmt::Debug for ReadData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// What is known of a volume now; the shape of `GET /v1/volumes/{name}`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct VolumeStatus {
    pub id: String,
    pub name: String,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    pub snapshot: Option<String>,
    pub store: String,
    /// `unlimited`, `none` or bytes per second.
    pub rate: String,
    pub batch: Option<String>,
    pub created_unix_ms: u64,
    pub shard: usize,
    pub generation: u64,
    pub attached: bool,
    pub hydrated: bool,
    /// Bytes of the device whose content is in the volume itself (zero chunks included).
    pub resident_bytes: u64,
    /// Bytes hydration still has to make resident.
    pub remaining_bytes: u64,
    /// Seconds until hydrated at the rate of the last seconds; `None` when unknown, stalled or rate `none`.
    pub eta_seconds: Option<f64>,
    pub hydration_bytes_per_second: u64,
    /// What hydration waits on now: `running`, `rate`, `store_budget`, `object_store`, `store_full`, `paused`, `done`.
    pub hydration_state: String,
    pub last_error: Option<String>,
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub read_misses: u64,
    pub priority_fetches: u64,
}

/// Sender half of a one-shot reply that crosses threads.
pub type ReplyTo<T> = flume::Sender<T>;

/// Control thread to shard. Every reply channel is `flume::bounded(1)`.
pub enum Command {
    /// All or none: on error no volume of the list exists. Files made, journal committed before the reply.
    CreateVolumes {
        specs: Vec<VolumeSpec>,
        reply: ReplyTo<Result<()>>,
    },
    /// Refused with `Conflict` while attached, unless `force`.
    DeleteVolume {
        name: String,
        force: bool,
        reply: ReplyTo<Result<()>>,
    },
    VolumeStatus {
        name: String,
        reply: ReplyTo<Result<VolumeStatus>>,
    },
    ListVolumes {
        reply: ReplyTo<Vec<VolumeStatus>>,
    },
    SetRate {
        name: String,
        rate: HydrationRate,
        reply: ReplyTo<Result<()>>,
    },
    /// Volumes of the batch, those there are and those to come, hydrate before those with a later deadline (ms since 1970,
    /// UTC) within each class; `None`: after all that have one. Not durable: to be said again after a start.
    SetDeadline {
        batch: u64,
        deadline_unix_ms: Option<u64>,
        reply: ReplyTo<()>,
    },
    /// Answered when the volume is hydrated (and that is durable), deleted, or with `DeadlineExceeded` after the timeout.
    WaitHydrated {
        name: String,
        timeout_ms: u64,
        reply: ReplyTo<Result<VolumeStatus>>,
    },
    Stats {
        reply: ReplyTo<ShardStats>,
    },
    /// What placement has to know of the stores; counts volumes of `snapshot` as near to a new one.
    StoreLoads {
        snapshot: Option<u128>,
        reply: ReplyTo<Vec<StoreLoad>>,
    },
    /// How far each batch is.
    BatchTotals {
        reply: ReplyTo<Vec<BatchTotals>>,
    },
    /// The first of these names that a volume has.
    FirstTaken {
        names: Vec<String>,
        reply: ReplyTo<Option<String>>,
    },
    /// What each image and batch caused on this shard.
    Ledger {
        reply: ReplyTo<Vec<(Origin, Totals)>>,
    },
    /// This shard's part of the chunk cache.
    ShowCache {
        reply: ReplyTo<CacheStatus>,
    },
    /// Starts to fetch the chunks of an image that this shard owns into the cache, in the background; with `pin` they
    /// stay in RAM, as far as there is room for pinned chunks. Answered when it has begun.
    WarmCache {
        snapshot: SnapshotRef,
        pin: bool,
        reply: ReplyTo<Result<()>>,
    },
    /// Takes back what warming an image has pinned, and ends its warming; answers how many chunks.
    UnpinCache {
        image: String,
        reply: ReplyTo<u64>,
    },
    /// Drops the chunks of an image from both tiers.
    DropCache {
        snapshot: SnapshotRef,
        reply: ReplyTo<Result<Dropped>>,
    },
    /// Reads chunks of the disk tier from slot `from` on, about so many bytes, and drops what is not what it should be. `None`:
    /// there is no disk tier.
    ScrubCache {
        from: u32,
        bytes_max: u64,
        reply: ReplyTo<Option<Scrubbed>>,
    },
    /// Volumes of the snapshot hydrate these chunks first, in this order; with `prefetch` the shard fetches those that it
    /// owns into the cache now. Answered when it has begun. Empty: there is no set.
    UseBootSet {
        snapshot: SnapshotRef,
        chunks: Arc<[u32]>,
        prefetch: bool,
        reply: ReplyTo<Result<()>>,
    },
    /// Many volumes of the snapshot are about to be read: the shard fetches what it owns of the image into the cache now, if it is
    /// small enough. Answered when it has begun.
    PrefetchImage {
        snapshot: SnapshotRef,
        reply: ReplyTo<Result<()>>,
    },
    /// The snapshot's manifest is read anew when a volume needs it the next time: it may have been rewritten.
    ForgetManifest {
        snapshot: Arc<str>,
        reply: ReplyTo<()>,
    },
    /// What the next snapshot of a volume builds on.
    Lineage {
        name: String,
        reply: ReplyTo<Result<VolumeLineage>>,
    },
    /// First half of a cut: writes to the volumes are held back, and those at the disk have ended. Without the second half they go
    /// on after a second.
    Freeze {
        names: Vec<String>,
        cut: u64,
        reply: ReplyTo<Result<()>>,
    },
    /// Second half: all of these or none.
    Cut {
        wanted: Vec<CutWanted>,
        cut: u64,
        reply: ReplyTo<Result<Vec<CutVolume>>>,
    },
    /// What a chunk held at the cut; once for each.
    Capture {
        volume: VolumeId,
        cut: u64,
        chunk: u32,
        reply: ReplyTo<Result<Vec<u8>>>,
    },
    /// Makes a volume equal to a snapshot: what it changed since its base, and what `differs` between the base and the snapshot, is
    /// absent afterwards. Refused if the base is another one by now, and while the volume is attached, unless `force`, which fences the host.
    RollBack {
        name: String,
        snapshot: SnapshotRef,
        base: Option<SnapshotRef>,
        differs: ChunkSet,
        force: bool,
        reply: ReplyTo<Result<()>>,
    },
    /// Byte ranges of a volume that are not in it, in order: what only the object store has. At most `max`.
    Absent {
        name: String,
        max: usize,
        reply: ReplyTo<Result<Vec<Range<u64>>>>,
    },
    /// What a chunk of a volume holds now, by the digest of its first `len` bytes. Refused if changes count from another `base` by now.
    CheckChunk {
        volume: VolumeId,
        chunk: u32,
        len: u32,
        base: Option<SnapshotRef>,
        /// Answer with what is in the volume, too.
        content: bool,
        reply: ReplyTo<Result<CheckedChunk>>,
    },
    /// Puts what a chunk has in `base` back into it, unless a guest has written to it or changes count from another one by now.
    RepairChunk {
        volume: VolumeId,
        chunk: u32,
        base: Option<SnapshotRef>,
        content: Vec<u8>,
        reply: ReplyTo<Result<bool>>,
    },
    /// Makes a volume that is not attached longer.
    Grow {
        name: String,
        size_bytes: u64,
        reply: ReplyTo<Result<()>>,
    },
    /// Ends a cut; with the snapshot that it became, or without.
    EndCut {
        volume: VolumeId,
        cut: u64,
        snapshot: Option<SnapshotRef>,
        reply: ReplyTo<Result<()>>,
    },
    /// The boots recorded since the last time.
    TakeBoots {
        reply: ReplyTo<Vec<RecordedBoot>>,
    },
    /// Runs an object-store operation on this shard for the control thread.
    Objects {
        op: ObjectOp,
        reply: ReplyTo<std::result::Result<ObjectOpReply, crate::object_store::ObjectError>>,
    },
    /// Stop accepting, finish or park in-flight work, checkpoint, then answer and end the shard.
    Stop {
        reply: ReplyTo<()>,
    },
}

/// What the guest of a volume touched when it booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedBoot {
    pub snapshot: SnapshotRef,
    /// Digests of the chunks in the order of their first touch, zero chunks left out.
    pub touched: Vec<Digest>,
}

pub enum ObjectOp {
    Get { key: String },
    GetRange { key: String, range: std::ops::Range<u64> },
    Put { key: String, data: Vec<u8> },
    PutIfAbsent { key: String, data: Vec<u8> },
    Delete { key: String },
    List { prefix: String },
}

pub enum ObjectOpReply {
    Data(Vec<u8>),
    Listing(Vec<crate::object_store::ObjectMeta>),
    Done,
}

/// Where the data ports of all shards are; handed out by HELLO.
pub type ShardMap = Arc<[String]>;

/// What a connection needs of its shard; implemented by the shard's handle, and by fakes in tests.
/// Requests for volumes of other shards are forwarded behind it.
pub trait Handler: Clone + 'static {
    /// The hot path: answers requests that need no waiting (a priority fetch of what is there, a read of a chunk in memory), else
    /// `None`. `from` as for [`Handler::handle`].
    fn try_now(&self, request: &Request, from: ConnectionId) -> Option<Result<Reply>>;
    /// `from` is the connection that carries the request: only the one that attached a volume last may use it.
    fn handle(&self, request: Request, from: ConnectionId) -> impl Future<Output = Result<Reply>>;
    /// A connection that had attached (or resumed) the volume closed. Its generation stays valid and can be resumed.
    fn connection_lost(&self, volume: VolumeId, from: ConnectionId);
    fn node_id(&self) -> u128;
    /// Random per process, the same on every shard; HELLO carries it. Clients that see another one after a reconnect
    /// send what was acknowledged but not flushed again.
    fn boot_id(&self) -> u64;
    fn shard(&self) -> usize;
    fn shard_map(&self) -> ShardMap;
}
