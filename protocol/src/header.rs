//! The fixed frame header: 40 bytes, little-endian, with its own checksum so that no length is trusted before it is
//! known to be what the sender wrote.
//!
//! Three checksums chain: `header_crc` covers the header with `body_crc` and `payload_crc` in it, those cover body and
//! payload. So header and body and payload are all protected, and a flipped length is found at once, not after waiting
//! for bytes that never come.

use crate::limits::{BODY_BYTES_MAX, PAYLOAD_BYTES_MAX, VERSION_MAX, VERSION_MIN};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"VLLY";
/// Length of the header.
pub const HEADER_BYTES: usize = 40;

/// The frame is a reply.
pub const FLAG_REPLY: u8 = 1;
/// Force unit access: the reply to this WRITE or WRITE_ZEROES means durable.
pub const FLAG_FUA: u8 = 2;
const FLAGS_KNOWN: u8 = FLAG_REPLY | FLAG_FUA;

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 4;
/// Where the operation stands in a header: for those who look into one that is damaged, or do not check it.
pub const OP_AT: usize = VERSION_AT + 2;
const FLAGS_AT: usize = OP_AT + 1;
const STATUS_AT: usize = FLAGS_AT + 1;
const RESERVED_AT: usize = STATUS_AT + 2;
/// Where the length of the body stands in a header.
pub const BODY_LEN_AT: usize = RESERVED_AT + 2;
/// Where the request id stands in a header.
pub const REQUEST_ID_AT: usize = BODY_LEN_AT + 4;
/// Where the length of the payload stands in a header.
pub const PAYLOAD_LEN_AT: usize = REQUEST_ID_AT + 8;
const BODY_CRC_AT: usize = PAYLOAD_LEN_AT + 4;
const PAYLOAD_CRC_AT: usize = BODY_CRC_AT + 4;
const HEADER_CRC_AT: usize = PAYLOAD_CRC_AT + 4;
const _: () = assert!(HEADER_CRC_AT + 4 == HEADER_BYTES);
const _: () = assert!(REQUEST_ID_AT.is_multiple_of(8));

/// A checked header. `op` and `status` stay numbers: an unknown one costs the sender its request, not its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Protocol version of the frame.
    pub version: u16,
    /// Number of the operation, see [`crate::Op`].
    pub op: u8,
    /// [`FLAG_REPLY`], [`FLAG_FUA`].
    pub flags: u8,
    /// Number of the outcome, see [`crate::Status`]; 0 in requests.
    pub status: u16,
    /// Chosen by the requester, repeated in the reply; unique among the unanswered requests of a connection.
    pub request_id: u64,
    /// Length of the body in bytes.
    pub body_len: u32,
    /// Length of the payload in bytes.
    pub payload_len: u32,
    /// crc32 (IEEE) of the body; 0 if it is empty.
    pub body_crc: u32,
    /// crc32 (IEEE) of the payload; 0 if it is empty.
    pub payload_crc: u32,
}

/// Why a byte stream is not a sequence of frames. The connection can't be used any more: frame borders are lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes are not Volley's, or the stream is out of step.
    #[error("bad frame magic {got:02x?}: not the Volley data port protocol (expected \"VLLY\")")]
    Magic {
        /// What stands where the magic should.
        got: [u8; 4],
    },
    /// Header damaged on the way.
    #[error("frame header checksum is {got:#010x}, should be {want:#010x}: damaged in transit")]
    HeaderCrc {
        /// Checksum in the header.
        got: u32,
        /// Checksum of the header's bytes.
        want: u32,
    },
    /// Sound header of a version not spoken here.
    #[error("frame of protocol version {got}, this side speaks {VERSION_MIN} to {VERSION_MAX}: upgrade the older side")]
    Version {
        /// Version in the header.
        got: u16,
    },
    /// A flag or reserved bit that this version does not define.
    #[error("frame header has undefined bits set: flags {flags:#04x}, reserved {reserved:#06x}")]
    Reserved {
        /// Flags in the header.
        flags: u8,
        /// Reserved field in the header.
        reserved: u16,
    },
    /// Body longer than the limit.
    #[error("frame body of {got} bytes exceeds the limit of {max}")]
    BodyTooLong {
        /// Length in the header.
        got: u32,
        /// Largest allowed.
        max: u32,
    },
    /// Payload longer than the limit.
    #[error("frame payload of {got} bytes exceeds the limit of {max}")]
    PayloadTooLong {
        /// Length in the header.
        got: u32,
        /// Largest allowed.
        max: u32,
    },
    /// Body damaged on the way.
    #[error("frame body checksum is {got:#010x}, should be {want:#010x}: damaged in transit (request {request_id})")]
    BodyCrc {
        /// Checksum in the header.
        got: u32,
        /// Checksum of the body's bytes.
        want: u32,
        /// The request the frame belongs to.
        request_id: u64,
    },
    /// Payload damaged on the way.
    #[error("frame payload checksum is {got:#010x}, should be {want:#010x}: damaged in transit (request {request_id})")]
    PayloadCrc {
        /// Checksum in the header.
        got: u32,
        /// Checksum of the payload's bytes.
        want: u32,
        /// The request the frame belongs to.
        request_id: u64,
    },
}

impl FrameHeader {
    /// Whether the frame answers a request.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    /// Whether a write must be durable before its reply.
    #[must_use]
    pub const fn is_fua(&self) -> bool {
        self.flags & FLAG_FUA != 0
    }

    /// Length of the whole frame in bytes.
    #[must_use]
    pub const fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_len as usize + self.payload_len as usize
    }

    /// The header's bytes, checksum included.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[MAGIC_AT..VERSION_AT].copy_from_slice(&MAGIC);
        bytes[VERSION_AT..OP_AT].copy_from_slice(&self.version.to_le_bytes());
        bytes[OP_AT] = self.op;
        bytes[FLAGS_AT] = self.flags;
        bytes[STATUS_AT..RESERVED_AT].copy_from_slice(&self.status.to_le_bytes());
        bytes[BODY_LEN_AT..REQUEST_ID_AT].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[REQUEST_ID_AT..PAYLOAD_LEN_AT].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[PAYLOAD_LEN_AT..BODY_CRC_AT].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[BODY_CRC_AT..PAYLOAD_CRC_AT].copy_from_slice(&self.body_crc.to_le_bytes());
        bytes[PAYLOAD_CRC_AT..HEADER_CRC_AT].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..HEADER_CRC_AT]);
        bytes[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks a header: magic, checksum, version, undefined bits, lengths, in this order.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
        let magic = array(bytes, MAGIC_AT);
        if magic != MAGIC {
            return Err(FrameError::Magic { got: magic });
        }
        let want = crc32fast::hash(&bytes[..HEADER_CRC_AT]);
        let got = u32::from_le_bytes(array(bytes, HEADER_CRC_AT));
        if got != want {
            return Err(FrameError::HeaderCrc { got, want });
        }
        let header = FrameHeader {
            version: u16::from_le_bytes(array(bytes, VERSION_AT)),
            op: bytes[OP_AT],
            flags: bytes[FLAGS_AT],
            status: u16::from_le_bytes(array(bytes, STATUS_AT)),
            request_id: u64::from_le_bytes(array(bytes, REQUEST_ID_AT)),
            body_len: u32::from_le_bytes(array(bytes, BODY_LEN_AT)),
            payload_len: u32::from_le_bytes(array(bytes, PAYLOAD_LEN_AT)),
            body_crc: u32::from_le_bytes(array(bytes, BODY_CRC_AT)),
            payload_crc: u32::from_le_bytes(array(bytes, PAYLOAD_CRC_AT)),
        };
        header.check(u16::from_le_bytes(array(bytes, RESERVED_AT)))?;
        Ok(header)
    }

    fn check(&self, reserved: u16) -> Result<(), FrameError> {
        if !(VERSION_MIN..=VERSION_MAX).contains(&self.version) {
            return Err(FrameError::Version { got: self.version });
        }
        if self.flags & !FLAGS_KNOWN != 0 || reserved != 0 {
            return Err(FrameError::Reserved { flags: self.flags, reserved });
        }
        if self.body_len > BODY_BYTES_MAX {
            return Err(FrameError::BodyTooLong { got: self.body_len, max: BODY_BYTES_MAX });
        }
        if self.payload_len > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadTooLong { got: self.payload_len, max: PAYLOAD_BYTES_MAX });
        }
        Ok(())
    }
}

/// crc32 (IEEE). Most frames have no payload: of nothing it is 0, without asking.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    if bytes.is_empty() { 0 } else { crc32fast::hash(bytes) }
}

/// `N` bytes from `at`; offsets are constants inside the header.
fn array<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}
