//! Every bound of the wire protocol, with its reason. Both sides enforce them before they allocate.

/// Oldest protocol version this crate speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version this crate speaks, and the version it writes into frame headers.
pub const VERSION_MAX: u16 = 1;

/// Largest payload of a frame. Matches the largest single direct I/O a shard issues (1 MiB); longer guest requests are
/// split by the client.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;

/// Largest body of a frame. A full LIST page (1,000 names of 128 bytes) takes 136 KB, a full RESIDENCY reply 82 KB.
pub const BODY_BYTES_MAX: u32 = 256 << 10;

/// Largest whole frame: what a receive buffer must be able to hold.
pub const FRAME_BYTES_MAX: usize = crate::header::HEADER_BYTES + (BODY_BYTES_MAX + PAYLOAD_BYTES_MAX) as usize;

/// Requests one connection may have unanswered; the server stops reading past it. It covers the deepest queue that
/// still adds throughput (1,024) and bounds what a misbehaving client can pin.
pub const IN_FLIGHT_MAX: u32 = 1024;

/// Most extents of one RESIDENCY reply; the client asks again from where they end.
pub const EXTENTS_MAX: usize = 8192;

/// Most names of one LIST reply; the client asks again from the last one.
pub const LIST_NAMES_MAX: usize = 1000;

/// Longest error sentence of a reply; longer ones are cut at a character boundary.
pub const ERROR_BYTES_MAX: usize = 1024;

/// Longest client name in HELLO (it goes to logs).
pub const CLIENT_NAME_BYTES_MAX: usize = 128;

/// Offsets and lengths of guest requests are multiples of this.
pub const LOGICAL_BLOCK_BYTES: u32 = 512;

const _: () = assert!(VERSION_MIN <= VERSION_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(LOGICAL_BLOCK_BYTES));
const _: () = assert!(LIST_NAMES_MAX * (crate::name::NAME_BYTES_MAX + 8) + 64 <= BODY_BYTES_MAX as usize);
const _: () = assert!(EXTENTS_MAX * size_of::<crate::messages::ArchivedExtent>() + 64 <= BODY_BYTES_MAX as usize);
const _: () = assert!(ERROR_BYTES_MAX <= BODY_BYTES_MAX as usize);
