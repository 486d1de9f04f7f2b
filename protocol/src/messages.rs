//! The bodies of all messages: rkyv-archived, little-endian, alignment 1, so they are read in place at any offset of
//! a receive buffer. Names end in `Reply` for replies; an operation without one here has an empty reply body.
//!
//! These are wire types, not domain types: callers convert at their edge. The layout of each is in `docs/wire.md`.

use rkyv::{Archive, Deserialize, Serialize};

use crate::op::Op;

/// A body that has a wire form: says which operation it belongs to and how long it is if its length never varies.
pub trait Body: Archive {
    /// The operation that carries it.
    const OP: Op;
    /// `Some(bytes)` when every body of this type has the same length.
    const FIXED_BYTES: Option<usize>;
}

macro_rules! bodies {
    (fixed: $($fixed:ident => $fixed_op:ident = $len:literal),* ; sized: $($sized:ident => $sized_op:ident),* $(;)?) => {
        $(
            impl Body for $fixed {
                const OP: Op = Op::$fixed_op;
                const FIXED_BYTES: Option<usize> = Some($len);
            }
            const _: () = assert!(size_of::<rkyv::Archived<$fixed>>() == $len);
            const _: () = assert!(align_of::<rkyv::Archived<$fixed>>() == 1);
        )*
        $(
            impl Body for $sized {
                const OP: Op = Op::$sized_op;
                const FIXED_BYTES: Option<usize> = None;
            }
            const _: () = assert!(align_of::<rkyv::Archived<$sized>>() == 1);
        )*
    };
}

bodies! {
    fixed:
        AttachReply => Attach = 28,
        Detach => Detach = 16,
        Read => Read = 28,
        Write => Write = 24,
        Flush => Flush = 16,
        Discard => Discard = 32,
        WriteZeroes => WriteZeroes = 32,
        PriorityFetch => PriorityFetch = 25,
        Residency => Residency = 24,
        ResidencyWait => ResidencyWait = 16,
        Stat => Stat = 8;
    sized:
        Hello => Hello,
        HelloReply => Hello,
        Attach => Attach,
        ResidencyReply => Residency,
        StatReply => Stat,
        List => List,
        ListReply => List,
        Lookup => Lookup;
}

/// Request HELLO: the first frame of a connection.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version the client speaks.
    pub version_min: u16,
    /// Newest version the client speaks.
    pub version_max: u16,
    /// Optional features the client offers; none are defined yet.
    pub features: u64,
    /// Who is calling, for logs; at most 128 bytes.
    pub client: String,
}

/// Reply to HELLO.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct HelloReply {
    /// The version both will speak: the newest common one.
    pub version: u16,
    /// The features both have.
    pub features: u64,
    /// Identity of the node, kept across restarts.
    pub node_id: u128,
    /// Random per server process. The same as before: only the connection was lost. Another one: the server restarted,
    /// and what was acknowledged but not flushed may be gone.
    pub boot_id: u64,
    /// Index of the shard that answers.
    pub shard: u32,
    /// Where each shard listens, by index: see [`crate::address::resolve`].
    pub shards: Vec<String>,
    /// Largest payload the server takes and sends, in bytes.
    pub payload_bytes_max: u32,
    /// Requests the server reads before it waits for its own replies.
    pub in_flight_max: u32,
}

/// Request ATTACH.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Name of the volume.
    pub name: String,
    /// `None`: a new generation that fences all older ones. `Some`: go on with this one, or `StaleGeneration`.
    pub resume_generation: Option<u64>,
}

/// Request LOOKUP: describes a volume without attaching it, so it fences nobody.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Name of the volume.
    pub name: String,
}

/// Reply to ATTACH, and to LOOKUP (with the present generation).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachReply {
    /// Id of the volume on its node.
    pub volume: u64,
    /// Generation that later requests name.
    pub generation: u64,
    /// Size of the device.
    pub size_bytes: u64,
    /// Size of a chunk: the unit of hydration.
    pub chunk_bytes: u32,
}

/// Request DETACH.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detach {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
}

/// Request READ. The reply's payload is exactly `len` bytes.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
    /// First byte, a multiple of 512.
    pub offset: u64,
    /// Bytes to read: a positive multiple of 512, at most the payload limit.
    pub len: u32,
}

/// Request WRITE. The data are the payload.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
    /// First byte, a multiple of 512.
    pub offset: u64,
}

/// Request FLUSH.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
}

/// Request DISCARD.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
    /// First byte, a multiple of 512.
    pub offset: u64,
    /// Bytes, a positive multiple of 512; not bound by the payload limit.
    pub len: u64,
}

/// Request WRITE_ZEROES.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroes {
    /// Id of the volume.
    pub volume: u64,
    /// Generation of the attachment.
    pub generation: u64,
    /// First byte, a multiple of 512.
    pub offset: u64,
    /// Bytes, a positive multiple of 512; not bound by the payload limit.
    pub len: u64,
}

/// When a PRIORITY_FETCH is answered.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rkyv(derive(Clone, Copy, Debug))]
#[repr(u8)]
pub enum FetchUntil {
    /// Verified in the node's cache, or already in the volume.
    Readable,
    /// In the volume.
    Resident,
    /// In the volume, and the knowledge of it survives a crash.
    Durable,
}

impl From<ArchivedFetchUntil> for FetchUntil {
    fn from(until: ArchivedFetchUntil) -> FetchUntil {
        match until {
            ArchivedFetchUntil::Readable => FetchUntil::Readable,
            ArchivedFetchUntil::Resident => FetchUntil::Resident,
            ArchivedFetchUntil::Durable => FetchUntil::Durable,
        }
    }
}

/// Request PRIORITY_FETCH, the hot one. No generation: any host may warm a volume.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct PriorityFetch {
    /// Id of the volume.
    pub volume: u64,
    /// First byte, a multiple of 512.
    pub offset: u64,
    /// Bytes, a positive multiple of 512; not bound by the payload limit.
    pub len: u64,
    /// When to answer.
    pub until: FetchUntil,
}

/// Request RESIDENCY.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Id of the volume.
    pub volume: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; clipped to the device.
    pub len: u64,
}

/// Request RESIDENCY_WAIT: answered when the version differs from `seen_version`, or after 10 s. Its reply is a
/// [`ResidencyReply`], usually without extents.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidencyWait {
    /// Id of the volume.
    pub volume: u64,
    /// The version the client knows.
    pub seen_version: u64,
}

/// A run of bytes that are all resident, or all not.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length of the run.
    pub len_bytes: u64,
    /// The content is in the volume itself.
    pub resident: bool,
    /// Resident, and zero by nature: it needs no storage.
    pub hole: bool,
}

/// Reply to RESIDENCY and RESIDENCY_WAIT. The extents follow each other from the asked offset and cover the range, or,
/// past [`crate::limits::EXTENTS_MAX`] of them, a first part of it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ResidencyReply {
    /// Changes whenever the volume's residency does.
    pub version: u64,
    /// Runs in order.
    pub extents: Vec<Extent>,
}

/// Request STAT.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Id of the volume.
    pub volume: u64,
}

/// Reply to STAT: what is known of a volume now.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct StatReply {
    /// Id as 16 hexadecimal digits.
    pub id: String,
    /// Name of the volume.
    pub name: String,
    /// Size of the device.
    pub size_bytes: u64,
    /// Size of a chunk.
    pub chunk_bytes: u32,
    /// The snapshot it was created from, if any.
    pub snapshot: Option<String>,
    /// Label of its volume store.
    pub store: String,
    /// `unlimited`, `none` or bytes per second.
    pub rate: String,
    /// The batch it was created in, if any.
    pub batch: Option<String>,
    /// Time of creation, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Shard that owns it.
    pub shard: u32,
    /// Newest generation.
    pub generation: u64,
    /// Whether that generation is attached.
    pub attached: bool,
    /// Every chunk is resident.
    pub hydrated: bool,
    /// Bytes whose content is in the volume itself.
    pub resident_bytes: u64,
    /// Bytes hydration still has to bring.
    pub remaining_bytes: u64,
    /// Seconds until hydrated, when known.
    pub eta_seconds: Option<f64>,
    /// Bytes per second hydrated lately.
    pub hydration_bytes_per_second: u64,
    /// What hydration waits on now.
    pub hydration_state: String,
    /// The last failure, if any.
    pub last_error: Option<String>,
    /// Guest reads.
    pub reads: u64,
    /// Bytes of guest reads.
    pub read_bytes: u64,
    /// Guest writes.
    pub writes: u64,
    /// Bytes of guest writes.
    pub written_bytes: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// Reads that found something not resident.
    pub read_misses: u64,
    /// Priority fetches.
    pub priority_fetches: u64,
}

/// Request LIST: names of the volumes of the shard that is asked.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// Start after this name; empty: from the first.
    pub after: String,
}

/// Reply to LIST, in order, at most [`crate::limits::LIST_NAMES_MAX`]. An empty page is the end.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ListReply {
    /// Names in byte order.
    pub names: Vec<String>,
}
