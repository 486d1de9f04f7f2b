//! Domain types shared by shards, control thread and journal.

use std::fmt;
use std::sync::Arc;

/// Identifies a volume on its node. The top 16 bits are the tag of its name, so id and name lead to the same shard.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(pub u64);

impl VolumeId {
    /// A fresh id for `name`; `unique` gives the low 48 bits.
    #[must_use]
    pub fn new(name: &str, unique: u64) -> VolumeId {
        VolumeId((u64::from(volley_protocol::name_tag(name)) << 48) | (unique & 0xffff_ffff_ffff))
    }

    /// The shard that owns the volume on a node with `shards` shards.
    #[must_use]
    pub fn owner(self, shards: usize) -> usize {
        (self.0 >> 48) as usize % shards
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vol-{self}")
    }
}

/// Which snapshot a volume was created from. `id` guards against another snapshot under the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRef {
    pub name: Arc<str>,
    pub id: u128,
}

/// What a volume holds, told by a snapshot: its next snapshot stores no more than the difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// The snapshot that a chunk equals unless it is `changed`; `None`: zeroes.
    pub base: Option<SnapshotRef>,
    pub changed: Changed,
}

/// Chunks that guests may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Any of those that hold data: the node crashed since, or an older version kept no account.
    Unknown,
    /// Runs of chunks, first and count, ascending and apart.
    Runs(Vec<(u32, u32)>),
}

impl Lineage {
    /// Of a volume that nobody has written to.
    #[must_use]
    pub fn new(snapshot: Option<SnapshotRef>) -> Lineage {
        Lineage { base: snapshot, changed: Changed::Runs(Vec::new()) }
    }

    /// Of which nothing is known.
    #[must_use]
    pub fn unknown() -> Lineage {
        Lineage { base: None, changed: Changed::Unknown }
    }
}

/// Background hydration of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HydrationRate {
    /// As fast as the store's budget allows.
    Unlimited,
    /// No background hydration: chunks arrive only when they are touched.
    None,
    /// At most this many bytes per second.
    BytesPerSecond(u64),
}

/// Everything durable about a volume except its residency and its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    pub id: VolumeId,
    pub name: Arc<str>,
    /// Device size: a positive multiple of 512.
    pub size_bytes: u64,
    /// Power of two, 64 KiB to 4 MiB. A blank volume has the default.
    pub chunk_bytes: u32,
    /// `None`: a blank volume, all zeroes.
    pub snapshot: Option<SnapshotRef>,
    /// Label of the volume store, as configured.
    pub store: Arc<str>,
    pub rate: HydrationRate,
    /// Groups the volumes created by one request.
    pub batch: Option<u64>,
    pub created_unix_ms: u64,
}

impl VolumeSpec {
    #[must_use]
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.size_bytes.div_ceil(u64::from(self.chunk_bytes))).expect("checked at creation")
    }
}

/// Granularity of residency inside a chunk, and of every I/O to a volume file.
pub const SECTOR_BYTES: u32 = 4096;
/// The same, as offsets count.
pub const SECTOR: u64 = SECTOR_BYTES as u64;
/// Smallest unit of a guest request.
pub const LOGICAL_BLOCK_BYTES: u32 = 512;
pub const CHUNK_BYTES_MIN: u32 = 64 << 10;
pub const CHUNK_BYTES_MAX: u32 = 4 << 20;
pub const CHUNK_BYTES_DEFAULT: u32 = 512 << 10;

/// Residency of one chunk: which of its 4 KiB sectors are in the volume itself.
/// Sectors past the end of the device in a short last chunk count as resident once all real ones are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkResidency {
    Absent,
    /// Bit `i` of word `i / 64` is sector `i`. Neither empty nor full.
    Partial(Box<[u64]>),
    Resident,
}

/// What the journal knows of a volume: durable facts only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeState {
    pub spec: VolumeSpec,
    pub generation: u64,
    /// Chunks not listed are absent. Sorted by chunk index. Empty when `hydrated`.
    pub residency: Vec<(u32, ChunkResidency)>,
    /// Every chunk is resident: the snapshot is no longer needed.
    pub hydrated: bool,
    pub lineage: Lineage,
}

/// The text form of a batch id in the HTTP API and in listings.
#[must_use]
pub fn batch_text(batch: u64) -> String {
    format!("{batch:016x}")
}
