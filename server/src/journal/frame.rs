//! Framing of a segment file: its header block and its batches of records. Pure; layouts in docs/journal.md.
//!
//! A batch is whole 4 KiB blocks: header, records, zeroes. The header carries the random id of its segment and its
//! number in it, so bytes of another file, or of an older life of these blocks, never parse as ours; it has its own
//! checksum, so that a batch whose body is torn is still known to have been begun.

use crate::mutation::{self, Mutation};
use crate::platform::Platform;

/// Unit of direct I/O, and of everything in a segment file.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Largest batch with its header: one system call, and one read of recovery.
pub(super) const BATCH_BYTES_MAX: usize = 1 << 20;
pub(super) const BATCH_HEADER_BYTES: usize = 40;
pub(super) const BATCH_PAYLOAD_MAX: usize = BATCH_BYTES_MAX - BATCH_HEADER_BYTES;

/// Version 1 is the first. A change that an older build would misread takes the next number.
pub(super) const SEGMENT_VERSION: u32 = 1;
const SEGMENT_MAGIC: [u8; 8] = *b"VOLLEYJ\n";
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"VJB1");

const VERSION_AT: usize = 8;
const CRC_AT: usize = VERSION_AT + 4;
const EPOCH_AT: usize = CRC_AT + 4;
const SEQ_AT: usize = EPOCH_AT + 8;
const SEGMENT_ID_AT: usize = SEQ_AT + 8;
const SHARD_AT: usize = SEGMENT_ID_AT + 8;
const HEADER_END: usize = SHARD_AT + 4;

const BATCH_HEADER_CRC_AT: usize = 4;
const BATCH_SEGMENT_ID_AT: usize = BATCH_HEADER_CRC_AT + 4;
const BATCH_NUMBER_AT: usize = BATCH_SEGMENT_ID_AT + 8;
const BATCH_PAYLOAD_LEN_AT: usize = BATCH_NUMBER_AT + 8;
const BATCH_BODY_CRC_AT: usize = BATCH_PAYLOAD_LEN_AT + 4;
const BATCH_RESERVED_AT: usize = BATCH_BODY_CRC_AT + 4;

const _: () = assert!(HEADER_END <= BLOCK_BYTES);
const _: () = assert!(BATCH_RESERVED_AT + 8 == BATCH_HEADER_BYTES);
const _: () = assert!(BATCH_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(BATCH_PAYLOAD_MAX >= super::record::RECORD_BYTES_MAX);

/// Which segment a file is: its name and its header say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SegmentName {
    pub(super) epoch: u64,
    pub(super) shard: u32,
    /// Counts the checkpoints of the shard in this epoch; the highest is the valid one.
    pub(super) seq: u64,
}

impl SegmentName {
    /// Zero-padded, so that names sort as the segments do.
    pub(super) fn file_name(self) -> String {
        format!("{:010}-{:04}-{:010}.vj", self.epoch, self.shard, self.seq)
    }

    pub(super) fn tmp_file_name(self) -> String {
        self.file_name() + TMP_SUFFIX
    }

    /// The segment of a file name; `None` for names that are not exactly ours.
    pub(super) fn parse(file_name: &str) -> Option<SegmentName> {
        let mut parts = file_name.strip_suffix(".vj")?.split('-');
        let (epoch, shard, seq) = (parts.next()?, parts.next()?, parts.next()?);
        let name = SegmentName { epoch: epoch.parse().ok()?, shard: shard.parse().ok()?, seq: seq.parse().ok()? };
        (name.file_name() == file_name).then_some(name)
    }
}

/// Suffix of files that are being made; only a crash leaves one behind.
pub(super) const TMP_SUFFIX: &str = ".tmp";

/// The header block of a segment file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) name: SegmentName,
    /// Random; every batch repeats it.
    pub(super) segment_id: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    #[error("it is not a journal segment (no magic)")]
    Magic,
    #[error("it has format version {0}, this build reads {SEGMENT_VERSION}: start the newer volleyd")]
    Version(u32),
    #[error("its header block fails its checksum")]
    Checksum,
}

impl SegmentHeader {
    pub(super) fn encode(&self, block: &mut [u8]) {
        assert_eq!(block.len(), BLOCK_BYTES);
        block.fill(0);
        block[..8].copy_from_slice(&SEGMENT_MAGIC);
        put(block, VERSION_AT, SEGMENT_VERSION.to_le_bytes());
        put(block, EPOCH_AT, self.name.epoch.to_le_bytes());
        put(block, SEQ_AT, self.name.seq.to_le_bytes());
        put(block, SEGMENT_ID_AT, self.segment_id.to_le_bytes());
        put(block, SHARD_AT, self.name.shard.to_le_bytes());
        seal_block(block, CRC_AT);
    }

    pub(super) fn decode(block: &[u8]) -> Result<SegmentHeader, HeaderError> {
        assert_eq!(block.len(), BLOCK_BYTES);
        if block[..8] != SEGMENT_MAGIC {
            return Err(HeaderError::Magic);
        }
        if !block_is_sealed(block, CRC_AT) {
            return Err(HeaderError::Checksum);
        }
        match u32::from_le_bytes(get(block, VERSION_AT)) {
            SEGMENT_VERSION => {}
            version => return Err(HeaderError::Version(version)),
        }
        let name = SegmentName {
            epoch: u64::from_le_bytes(get(block, EPOCH_AT)),
            shard: u32::from_le_bytes(get(block, SHARD_AT)),
            seq: u64::from_le_bytes(get(block, SEQ_AT)),
        };
        Ok(SegmentHeader { name, segment_id: u64::from_le_bytes(get(block, SEGMENT_ID_AT)) })
    }
}

/// The fixed part of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchHeader {
    pub(super) segment_id: u64,
    /// Consecutive in its segment, from 0.
    pub(super) number: u64,
    pub(super) payload_len: usize,
    body_crc: u32,
}

impl BatchHeader {
    /// The header at the start of `block`, if there is one with a good checksum.
    pub(super) fn decode(block: &[u8]) -> Option<BatchHeader> {
        let header = block.get(..BATCH_HEADER_BYTES)?;
        if u32::from_le_bytes(get(header, 0)) != BATCH_MAGIC
            || u32::from_le_bytes(get(header, BATCH_HEADER_CRC_AT)) != crc32fast::hash(&header[BATCH_SEGMENT_ID_AT..])
        {
            return None;
        }
        let payload_len = u32::from_le_bytes(get(header, BATCH_PAYLOAD_LEN_AT)) as usize;
        (payload_len <= BATCH_PAYLOAD_MAX).then(|| BatchHeader {
            segment_id: u64::from_le_bytes(get(header, BATCH_SEGMENT_ID_AT)),
            number: u64::from_le_bytes(get(header, BATCH_NUMBER_AT)),
            payload_len,
            body_crc: u32::from_le_bytes(get(header, BATCH_BODY_CRC_AT)),
        })
    }

    /// Length of the whole batch, a multiple of the block.
    pub(super) fn batch_bytes(&self) -> usize {
        batch_bytes(self.payload_len)
    }

    /// The records of the batch, if `batch` (all of its blocks) is as it was written.
    pub(super) fn payload<'a>(&self, batch: &'a [u8]) -> Option<&'a [u8]> {
        let body = &batch[BATCH_HEADER_BYTES..self.batch_bytes()];
        let sound = crc32fast::hash(body) == self.body_crc || mutation::on(Mutation::TornBatchAccepted);
        sound.then(|| &body[..self.payload_len])
    }
}

/// Bytes of the batch that holds `payload_len` bytes of records.
pub(super) fn batch_bytes(payload_len: usize) -> usize {
    (BATCH_HEADER_BYTES + payload_len).next_multiple_of(BLOCK_BYTES)
}

/// Builds the batch in `out`, which is exactly `batch_bytes(payload.len())` long.
pub(super) fn encode_batch(segment_id: u64, number: u64, payload: &[u8], out: &mut [u8]) {
    assert!(payload.len() <= BATCH_PAYLOAD_MAX);
    assert_eq!(out.len(), batch_bytes(payload.len()));
    let (header, body) = out.split_at_mut(BATCH_HEADER_BYTES);
    body[..payload.len()].copy_from_slice(payload);
    body[payload.len()..].fill(0);
    header.fill(0);
    put(header, 0, BATCH_MAGIC.to_le_bytes());
    put(header, BATCH_SEGMENT_ID_AT, segment_id.to_le_bytes());
    put(header, BATCH_NUMBER_AT, number.to_le_bytes());
    put(header, BATCH_PAYLOAD_LEN_AT, (payload.len() as u32).to_le_bytes());
    put(header, BATCH_BODY_CRC_AT, crc32fast::hash(body).to_le_bytes());
    let crc = crc32fast::hash(&header[BATCH_SEGMENT_ID_AT..]);
    put(header, BATCH_HEADER_CRC_AT, crc.to_le_bytes());
}

/// Writes the checksum of a whole block (computed with the field as zero) at `crc_at`.
pub(super) fn seal_block(block: &mut [u8], crc_at: usize) {
    put(block, crc_at, [0; 4]);
    let crc = crc32fast::hash(block);
    put(block, crc_at, crc.to_le_bytes());
}

pub(super) fn block_is_sealed(block: &[u8], crc_at: usize) -> bool {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block[..crc_at]);
    hasher.update(&[0; 4]);
    hasher.update(&block[crc_at + 4..]);
    hasher.finalize() == u32::from_le_bytes(get(block, crc_at))
}

pub(super) fn put<const N: usize>(block: &mut [u8], at: usize, field: [u8; N]) {
    block[at..at + N].copy_from_slice(&field);
}

pub(super) fn get<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&block[at..at + N]);
    field
}

/// A zeroed buffer for direct I/O.
pub(super) fn zeroed<P: Platform>(platform: &P, len: usize) -> P::WriteBuf {
    let mut buf = platform.alloc(len);
    assert!(buf.len() == len, "buffer of {} bytes, asked for {len}", buf.len());
    buf.fill(0);
    buf
}
