//! The bytes of the disk tier: slots, their records, and the head of an index file. docs/cache.md is the other half.
//!
//! A slot begins with a record that says of which chunk it holds which part; the index file repeats the records of all
//! slots, packed. A record proves only itself (crc32): the content is proved by the chunk's digest.

use crate::snapshot::Encoding;
use crate::transfer::Digest;
use crate::types::CHUNK_BYTES_MAX;

/// A stored chunk takes as many slots as it needs, so half of one is lost on average: small enough beside the usual
/// 200 KiB, large enough that a read is no worse than the disk's best and the index takes a thousandth.
pub const SLOT_BYTES: usize = 64 << 10;
pub const RECORD_BYTES: usize = 64;
/// Bytes of a stored chunk in one slot.
pub const PART_BYTES: usize = SLOT_BYTES - RECORD_BYTES;
/// Unit of direct I/O on the index.
pub const PAGE_BYTES: usize = 4096;
pub const RECORDS_PER_PAGE: u32 = (PAGE_BYTES / RECORD_BYTES) as u32;

const DIGEST_AT: usize = 0;
const SEQUENCE_AT: usize = DIGEST_AT + 32;
const PLACEMENT_AT: usize = SEQUENCE_AT + 8;
const STORED_LEN_AT: usize = PLACEMENT_AT + 8;
const CHUNK_LEN_AT: usize = STORED_LEN_AT + 4;
const PART_AT: usize = CHUNK_LEN_AT + 4;
const ENCODING_AT: usize = PART_AT + 1;
const RESERVED_AT: usize = ENCODING_AT + 1;
const CRC_AT: usize = RESERVED_AT + 2;

const _: () = assert!(CRC_AT + 4 == RECORD_BYTES);
const _: () = assert!(SLOT_BYTES.is_multiple_of(PAGE_BYTES));
// A chunk is stored raw if it does not shrink, so it is never longer than the largest chunk.
const _: () = assert!((CHUNK_BYTES_MAX as usize).div_ceil(PART_BYTES) <= u8::MAX as usize);

/// Which part of which chunk a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub digest: Digest,
    /// Counts the writes of a shard: tells copies of a chunk apart, and gives their age.
    pub sequence: u64,
    /// [`crate::transfer::ChunkSource::placement`]: to which shard the chunk belongs, whatever their number.
    pub placement: u64,
    pub stored_len: u32,
    pub chunk_len: u32,
    pub encoding: Encoding,
    pub part: u8,
}

/// What a record reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordRead {
    /// Never written, or given free.
    Free,
    Valid(Record),
    /// Torn or rotten.
    Unreadable,
}

impl Record {
    /// Slots that the chunk takes.
    #[must_use]
    pub fn parts(&self) -> usize {
        parts_of(self.stored_len as usize)
    }

    /// Bytes of the chunk in its part `part`.
    #[must_use]
    pub fn part_range(&self, part: usize) -> std::ops::Range<usize> {
        part * PART_BYTES..((part + 1) * PART_BYTES).min(self.stored_len as usize)
    }

    /// The record of another part of the same chunk.
    #[must_use]
    pub fn with_part(&self, part: usize) -> Record {
        Record { part: u8::try_from(part).expect("a chunk has at most 255 parts"), ..*self }
    }

    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[DIGEST_AT..SEQUENCE_AT].copy_from_slice(&self.digest);
        bytes[SEQUENCE_AT..PLACEMENT_AT].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[PLACEMENT_AT..STORED_LEN_AT].copy_from_slice(&self.placement.to_le_bytes());
        bytes[STORED_LEN_AT..CHUNK_LEN_AT].copy_from_slice(&self.stored_len.to_le_bytes());
        bytes[CHUNK_LEN_AT..PART_AT].copy_from_slice(&self.chunk_len.to_le_bytes());
        bytes[PART_AT] = self.part;
        bytes[ENCODING_AT] = match self.encoding {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
        };
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the record at the beginning of `bytes`.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> RecordRead {
        let Some(bytes) = bytes.first_chunk::<RECORD_BYTES>() else { return RecordRead::Unreadable };
        if bytes.iter().all(|byte| *byte == 0) {
            return RecordRead::Free;
        }
        Record::decode_written(bytes).map_or(RecordRead::Unreadable, RecordRead::Valid)
    }

    fn decode_written(bytes: &[u8; RECORD_BYTES]) -> Option<Record> {
        if crc32fast::hash(&bytes[..CRC_AT]) != u32_at(bytes, CRC_AT) || bytes[RESERVED_AT..CRC_AT] != [0, 0] {
            return None;
        }
        let encoding = match bytes[ENCODING_AT] {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            _ => return None,
        };
        let record = Record {
            digest: bytes[DIGEST_AT..SEQUENCE_AT].try_into().ok()?,
            sequence: u64_at(bytes, SEQUENCE_AT),
            placement: u64_at(bytes, PLACEMENT_AT),
            stored_len: u32_at(bytes, STORED_LEN_AT),
            chunk_len: u32_at(bytes, CHUNK_LEN_AT),
            encoding,
            part: bytes[PART_AT],
        };
        let sound = record.stored_len > 0 && record.stored_len <= record.chunk_len;
        (sound && record.chunk_len <= CHUNK_BYTES_MAX && usize::from(record.part) < record.parts()).then_some(record)
    }
}

/// Slots that so many stored bytes take.
#[must_use]
pub fn parts_of(stored_len: usize) -> usize {
    stored_len.div_ceil(PART_BYTES)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

const MAGIC: &[u8; 8] = b"VOLLEYCI";
const VERSION: u32 = 1;

const HEAD_VERSION_AT: usize = 8;
const HEAD_SLOT_BYTES_AT: usize = HEAD_VERSION_AT + 4;
const HEAD_NODE_AT: usize = HEAD_SLOT_BYTES_AT + 4;
const HEAD_CRC_AT: usize = HEAD_NODE_AT + 16;
const HEAD_BYTES: usize = HEAD_CRC_AT + 4;

/// What the head of an index file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadRead {
    /// Of this version and this node.
    Own,
    /// Torn, rotten or never written: the index says nothing.
    Unreadable,
    /// Valid, but of another node or version: not ours to write.
    Foreign,
}

/// The first page of an index file.
#[must_use]
pub fn encode_head(node_id: u128) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    page[..HEAD_VERSION_AT].copy_from_slice(MAGIC);
    page[HEAD_VERSION_AT..HEAD_SLOT_BYTES_AT].copy_from_slice(&VERSION.to_le_bytes());
    page[HEAD_SLOT_BYTES_AT..HEAD_NODE_AT].copy_from_slice(&(SLOT_BYTES as u32).to_le_bytes());
    page[HEAD_NODE_AT..HEAD_CRC_AT].copy_from_slice(&node_id.to_le_bytes());
    let crc = crc32fast::hash(&page[..HEAD_CRC_AT]);
    page[HEAD_CRC_AT..HEAD_BYTES].copy_from_slice(&crc.to_le_bytes());
    page
}

/// Reads a head; `node_id` `None` accepts every node.
#[must_use]
pub fn decode_head(page: &[u8], node_id: Option<u128>) -> HeadRead {
    let Some(head) = page.get(..HEAD_BYTES) else { return HeadRead::Unreadable };
    if &head[..HEAD_VERSION_AT] != MAGIC || crc32fast::hash(&head[..HEAD_CRC_AT]) != u32_at(head, HEAD_CRC_AT) {
        return HeadRead::Unreadable;
    }
    let known = u32_at(head, HEAD_VERSION_AT) == VERSION && u32_at(head, HEAD_SLOT_BYTES_AT) == SLOT_BYTES as u32;
    let own = node_id.is_none_or(|id| head[HEAD_NODE_AT..HEAD_CRC_AT] == id.to_le_bytes());
    if known && own { HeadRead::Own } else { HeadRead::Foreign }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            digest: std::array::from_fn(|i| i as u8),
            sequence: 0x0102_0304_0506_0708,
            placement: 77,
            stored_len: 70_000,
            chunk_len: 524_288,
            encoding: Encoding::Zstd,
            part: 1,
        }
    }

    #[test]
    fn records_round_trip_and_every_flipped_bit_is_found() {
        let bytes = record().encode();
        assert_eq!(Record::decode(&bytes), RecordRead::Valid(record()));
        assert_eq!(Record::decode(&[0; RECORD_BYTES]), RecordRead::Free);
        assert_eq!(Record::decode(&bytes[..60]), RecordRead::Unreadable);
        for bit in 0..RECORD_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bad), RecordRead::Unreadable, "bit {bit}");
        }
    }

    #[test]
    fn the_layout_is_the_one_in_the_document() {
        let bytes = record().encode();
        assert_eq!(bytes[32..40], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!((bytes[40], bytes[48..52].to_vec(), bytes[56], bytes[57]), (77, vec![0x70, 0x11, 1, 0], 1, 1));
    }

    #[test]
    fn sizes_that_cannot_be_are_unreadable() {
        for bad in [
            Record { stored_len: 0, ..record() },
            Record { stored_len: 524_289, ..record() },
            Record { chunk_len: CHUNK_BYTES_MAX + 1, ..record() },
            Record { part: 2, ..record() },
        ] {
            assert_eq!(Record::decode(&bad.encode()), RecordRead::Unreadable, "{bad:?}");
        }
    }

    #[test]
    fn parts_cover_the_chunk_once() {
        for len in [1, PART_BYTES, PART_BYTES + 1, CHUNK_BYTES_MAX as usize] {
            let record = Record { stored_len: len as u32, chunk_len: CHUNK_BYTES_MAX, ..record() };
            let mut at = 0;
            for part in 0..record.parts() {
                let range = record.part_range(part);
                assert!(range.start == at && !range.is_empty() && range.len() <= PART_BYTES);
                at = range.end;
            }
            assert_eq!(at, len);
        }
    }

    #[test]
    fn heads_tell_nodes_apart() {
        let mut page = encode_head(7);
        assert_eq!((decode_head(&page, Some(7)), decode_head(&page, None)), (HeadRead::Own, HeadRead::Own));
        assert_eq!(decode_head(&page, Some(8)), HeadRead::Foreign);
        page[20] ^= 1;
        assert_eq!((decode_head(&page, Some(7)), decode_head(&[], None)), (HeadRead::Unreadable, HeadRead::Unreadable));
    }
}
