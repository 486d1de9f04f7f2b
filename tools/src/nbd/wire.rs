//! Every number of the NBD protocol that the agent uses, with its meaning. All integers on the wire are big-endian.
//!
//! Source: the NBD project's `doc/proto.md`. Names follow it without the `NBD_` prefix.

/// First eight bytes of a server: "NBDMAGIC".
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": second eight bytes of a newstyle server, and the start of every option of a client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply: errno, cookie, then data only after a successful read.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of an option's head: magic, option number, length of its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request's head: magic, flags, command, cookie, offset, length.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Zeroes that close the answer to EXPORT_NAME unless NO_ZEROES was agreed.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// Longest string of the protocol (export name, description, context name).
pub const STRING_BYTES_MAX: usize = 4096;
/// Largest option accepted: a longest name and a few dozen context queries. Larger ones are skipped and refused.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Most block-size or context items in one option: what fits in `OPTION_BYTES_MAX` anyway, said again as a count.
pub const OPTION_ITEMS_MAX: u32 = 8192;

/// Smallest unit of I/O advertised: the logical block of a volume. (Smaller requests work all the same, slower.)
pub const BLOCK_BYTES_MIN: u32 = 512;
/// Preferred unit of I/O: a sector of residency, so no write ever splits one.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Largest payload of a read or write: the customary limit of NBD clients (QEMU's own is the same).
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Flags of the handshake, 16 bits from the server, 32 from the client.
pub mod handshake_flag {
    /// Options can be refused without ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The answer to EXPORT_NAME ends without its padding.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options a client may send before transmission.
pub mod option {
    /// Chooses an export and starts transmission; cannot be refused other than by closing.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the connection in order.
    pub const ABORT: u32 = 2;
    /// Names of all exports.
    pub const LIST: u32 = 3;
    /// TLS, which the agent does not offer.
    pub const STARTTLS: u32 = 5;
    /// Describes an export.
    pub const INFO: u32 = 6;
    /// Describes an export and starts transmission.
    pub const GO: u32 = 7;
    /// Replies to reads come in chunks with types and error texts.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts for BLOCK_STATUS.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options; those with the top bit set are errors.
pub mod option_reply {
    /// Done; ends the list of replies to an option.
    pub const ACK: u32 = 1;
    /// One export of a LIST: name length, name.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export: type, data.
    pub const INFO: u32 = 3;
    /// One metadata context: id, name.
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    /// Option not known or not offered.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Option forbidden by this server's configuration.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// Option malformed or out of place.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is stopping, or cannot reach what it serves.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// Option data too large.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// Types of information in INFO replies.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export: what a client may ask of it.
pub mod transmission_flag {
    /// Flags are valid.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// FLUSH works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF works: a read answered in one chunk. Only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// FLUSH on one connection covers writes answered on all connections of this export.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE works.
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// Commands of the transmission phase.
pub mod command {
    /// Data of a range.
    pub const READ: u16 = 0;
    /// Writes the payload that follows the header.
    pub const WRITE: u16 = 1;
    /// Ends the connection after the requests before it; has no reply.
    pub const DISC: u16 = 2;
    /// Makes all answered writes durable.
    pub const FLUSH: u16 = 3;
    /// The range is no longer needed.
    pub const TRIM: u16 = 4;
    /// The range will be read soon: a priority fetch.
    pub const CACHE: u16 = 5;
    /// The range becomes zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Metadata of a range in the chosen contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod command_flag {
    /// The write is durable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave storage allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS answers with one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail unless it is faster than writing; not advertised.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of the chunks of a structured reply; the top bit marks errors.
pub mod chunk {
    /// Flag (not a type): the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No content: success of anything but a read.
    pub const NONE: u16 = 0;
    /// Offset, then data.
    pub const OFFSET_DATA: u16 = 1;
    /// Context id, then pairs of length and flags.
    pub const BLOCK_STATUS: u16 = 5;
    /// Errno, text length, text.
    pub const ERROR: u16 = (1 << 15) | 1;
}

/// Metadata contexts offered.
pub mod context {
    /// Allocation and zeroes, defined by the protocol.
    pub const BASE_ALLOCATION: &str = "base:allocation";
    /// Volley's own: which ranges are in the volume itself.
    pub const VOLLEY_RESIDENT: &str = "volley:resident";
    /// Id of `BASE_ALLOCATION` on the wire (ours to choose).
    pub const BASE_ALLOCATION_ID: u32 = 1;
    /// Id of `VOLLEY_RESIDENT` on the wire.
    pub const VOLLEY_RESIDENT_ID: u32 = 2;
    /// `base:allocation`: nothing is allocated here.
    pub const STATE_HOLE: u32 = 1 << 0;
    /// `base:allocation`: reads as zeroes.
    pub const STATE_ZERO: u32 = 1 << 1;
    /// `volley:resident`: reads are served from the volume itself, without the object store.
    pub const STATE_RESIDENT: u32 = 1 << 0;
}

/// Error numbers of replies (Linux' numbers, fixed by the protocol).
pub mod errno {
    /// Operation not permitted.
    pub const EPERM: u32 = 1;
    /// Input/output error: nothing more precise is true.
    pub const EIO: u32 = 5;
    /// Malformed request, or outside the device.
    pub const EINVAL: u32 = 22;
    /// Full, or a write past the end of the device.
    pub const ENOSPC: u32 = 28;
    /// Not supported (FAST_ZERO).
    pub const ENOTSUP: u32 = 95;
    /// The export is going away: fenced by another host, deleted, or the agent stops.
    pub const ESHUTDOWN: u32 = 108;
}

const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(BLOCK_BYTES_PREFERRED));
const _: () = assert!(BLOCK_BYTES_PREFERRED.is_multiple_of(BLOCK_BYTES_MIN));
