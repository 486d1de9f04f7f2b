//! The pack: many stored chunks in one object of at most 64 MiB, and an index that makes it describe itself.
//!
//! Layout (`docs/snapshot.md`): header, chunks back to back, index, trailer. A reader with a manifest never needs the
//! index; an interrupted import reads it to find what it has already stored.

use std::ops::Range;

use thiserror::Error;

use super::chunk::{EncodedChunk, Encoding};
use crate::types::CHUNK_BYTES_MAX;

/// Largest pack, index included: large enough for multi-MiB ranged reads, small enough to build in memory.
pub const PACK_BYTES_MAX: u64 = 64 << 20;
pub const MAGIC: [u8; 8] = *b"VLYPACK\0";
pub const TRAILER_MAGIC: [u8; 8] = *b"VLYPKEND";
/// 1: the first.
pub const VERSION: u32 = 1;
pub const HEADER_BYTES: usize = 32;
const VERSION_AT: usize = 8;
const NUMBER_AT: usize = 12;
const ID_AT: usize = 16;
pub const TRAILER_BYTES: usize = 16;
const CRC_AT: usize = 4;
const TRAILER_MAGIC_AT: usize = 8;
pub const INDEX_ENTRY_BYTES: usize = 48;
const OFFSET_AT: usize = 32;
const STORED_LEN_AT: usize = 36;
const RAW_LEN_AT: usize = 40;
const ENCODING_AT: usize = 44;

const _: () = assert!(ID_AT + 16 == HEADER_BYTES && TRAILER_MAGIC_AT + 8 == TRAILER_BYTES);
const _: () = assert!(ENCODING_AT + 4 == INDEX_ENTRY_BYTES);

/// One line of a pack's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedChunk {
    pub digest: [u8; 32],
    /// From the start of the pack.
    pub offset: u32,
    pub stored_len: u32,
    pub raw_len: u32,
    pub encoding: Encoding,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PackError {
    #[error("not a pack (wrong magic)")]
    Magic,
    #[error("pack has format version {0}; this program reads version {VERSION}: upgrade it")]
    FutureVersion(u32),
    #[error("pack is of import {found}, expected {expected}")]
    Misplaced { expected: String, found: String },
    #[error("pack is truncated: {0}")]
    Truncated(String),
    #[error("pack index fails its checksum")]
    Checksum,
    #[error("pack index is invalid: {0}")]
    Invalid(String),
}

/// Collects chunks into the bytes of one pack.
pub struct PackBuilder {
    bytes: Vec<u8>,
    index: Vec<PackedChunk>,
}

impl PackBuilder {
    /// An empty pack: the `number`th of the import `id`.
    #[must_use]
    pub fn new(id: u128, number: u32) -> PackBuilder {
        PackBuilder { bytes: header(id, number).to_vec(), index: Vec::new() }
    }

    /// Whether another chunk of `stored_len` bytes keeps the pack within [`PACK_BYTES_MAX`].
    #[must_use]
    pub fn has_room(&self, stored_len: usize) -> bool {
        let index_bytes = (self.index.len() + 1) * INDEX_ENTRY_BYTES;
        (self.bytes.len() + stored_len + index_bytes + TRAILER_BYTES) as u64 <= PACK_BYTES_MAX
    }

    /// Appends a chunk and returns its offset in the pack. Panics if there is no room: ask [`PackBuilder::has_room`].
    pub fn push(&mut self, chunk: &EncodedChunk) -> u32 {
        assert!(self.has_room(chunk.stored.len()));
        let offset = u32::try_from(self.bytes.len()).expect("bounded by PACK_BYTES_MAX");
        let stored_len = u32::try_from(chunk.stored.len()).expect("bounded by PACK_BYTES_MAX");
        self.bytes.extend_from_slice(&chunk.stored);
        let EncodedChunk { digest, encoding, raw_len, .. } = *chunk;
        self.index.push(PackedChunk { digest, offset, stored_len, raw_len, encoding });
        offset
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Appends index and trailer.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        let index_at = self.bytes.len();
        for chunk in &self.index {
            self.bytes.extend_from_slice(&chunk.digest);
            let encoding = match chunk.encoding {
                Encoding::Raw => 0u32,
                Encoding::Zstd => 1,
            };
            for field in [chunk.offset, chunk.stored_len, chunk.raw_len, encoding] {
                self.bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        let count = u32::try_from(self.index.len()).expect("bounded by PACK_BYTES_MAX");
        let crc = crc(&self.bytes[..HEADER_BYTES], &self.bytes[index_at..], count);
        self.bytes.extend_from_slice(&count.to_le_bytes());
        self.bytes.extend_from_slice(&crc.to_le_bytes());
        self.bytes.extend_from_slice(&TRAILER_MAGIC);
        self.bytes
    }
}

/// Where the index of a pack is, learnt from its trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackIndex {
    count: u32,
    crc: u32,
    pack_len: u64,
}

impl PackIndex {
    /// The byte range of the trailer of a pack of `pack_len` bytes.
    ///
    /// # Errors
    /// `Truncated` or `Invalid` when no pack has this length.
    pub fn trailer_range(pack_len: u64) -> Result<Range<u64>, PackError> {
        if pack_len < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(PackError::Truncated(format!("{pack_len} bytes are too few")));
        }
        if pack_len > PACK_BYTES_MAX {
            return Err(PackError::Invalid(format!("{pack_len} bytes are more than a pack may have")));
        }
        Ok(pack_len - TRAILER_BYTES as u64..pack_len)
    }

    /// Reads the trailer of a pack of `pack_len` bytes.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse_trailer(pack_len: u64, trailer: &[u8]) -> Result<PackIndex, PackError> {
        PackIndex::trailer_range(pack_len)?;
        if trailer.len() != TRAILER_BYTES || trailer[TRAILER_MAGIC_AT..] != TRAILER_MAGIC {
            return Err(PackError::Truncated("it does not end in the magic of a pack".to_owned()));
        }
        let index = PackIndex { count: u32_at(trailer, 0), crc: u32_at(trailer, CRC_AT), pack_len };
        let chunks_end = (pack_len - TRAILER_BYTES as u64).checked_sub(index.bytes());
        if chunks_end.is_none_or(|end| end < HEADER_BYTES as u64) {
            return Err(PackError::Invalid(format!("{} entries do not fit a pack of {pack_len} bytes", index.count)));
        }
        Ok(index)
    }

    /// The byte range of the index itself.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        let end = self.pack_len - TRAILER_BYTES as u64;
        end - self.bytes()..end
    }

    /// Checks header and index of a pack and returns its chunks. `expect` is the identity its key claims.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(&self, header: &[u8], index: &[u8], expect: (u128, u32)) -> Result<Vec<PackedChunk>, PackError> {
        check_header(header, expect)?;
        if index.len() as u64 != self.bytes() {
            return Err(PackError::Truncated(format!("the index has {} bytes of {}", index.len(), self.bytes())));
        }
        if crc(&header[..HEADER_BYTES], index, self.count) != self.crc {
            return Err(PackError::Checksum);
        }
        // Chunks lie back to back in index order, so each bound follows from the one before.
        let mut next = HEADER_BYTES as u64;
        let mut chunks = Vec::with_capacity(self.count as usize);
        for (number, entry) in index.chunks_exact(INDEX_ENTRY_BYTES).enumerate() {
            let chunk = parse_entry(entry, next).map_err(|e| PackError::Invalid(format!("entry {number}: {e}")))?;
            next += u64::from(chunk.stored_len);
            chunks.push(chunk);
        }
        if next != self.range().start {
            return Err(PackError::Invalid("the chunks do not end where the index begins".to_owned()));
        }
        Ok(chunks)
    }

    /// Reads the index of a whole pack in memory.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn of_pack(pack: &[u8], expect: (u128, u32)) -> Result<Vec<PackedChunk>, PackError> {
        let len = pack.len() as u64;
        let slice = |range: Range<u64>| &pack[range.start as usize..range.end as usize];
        let index = PackIndex::parse_trailer(len, slice(PackIndex::trailer_range(len)?))?;
        index.parse(&pack[..HEADER_BYTES], slice(index.range()), expect)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.count) * INDEX_ENTRY_BYTES as u64
    }
}

fn header(id: u128, number: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..VERSION_AT].copy_from_slice(&MAGIC);
    header[VERSION_AT..NUMBER_AT].copy_from_slice(&VERSION.to_le_bytes());
    header[NUMBER_AT..ID_AT].copy_from_slice(&number.to_le_bytes());
    header[ID_AT..].copy_from_slice(&id.to_le_bytes());
    header
}

fn check_header(found: &[u8], (id, number): (u128, u32)) -> Result<(), PackError> {
    if found.len() < HEADER_BYTES {
        return Err(PackError::Truncated("the header is not whole".to_owned()));
    }
    if found[..VERSION_AT] != MAGIC {
        return Err(PackError::Magic);
    }
    let version = u32_at(found, VERSION_AT);
    if version != VERSION {
        return Err(PackError::FutureVersion(version));
    }
    if found[..HEADER_BYTES] != header(id, number) {
        let found_id = u128::from_le_bytes(found[ID_AT..HEADER_BYTES].try_into().expect("16 bytes"));
        return Err(PackError::Misplaced {
            expected: format!("{id:032x} number {number}"),
            found: format!("{found_id:032x} number {}", u32_at(found, NUMBER_AT)),
        });
    }
    Ok(())
}

fn parse_entry(entry: &[u8], offset_expected: u64) -> Result<PackedChunk, String> {
    let chunk = PackedChunk {
        digest: entry[..OFFSET_AT].try_into().expect("32 bytes"),
        offset: u32_at(entry, OFFSET_AT),
        stored_len: u32_at(entry, STORED_LEN_AT),
        raw_len: u32_at(entry, RAW_LEN_AT),
        encoding: match u32_at(entry, ENCODING_AT) {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            other => return Err(format!("unknown encoding {other}")),
        },
    };
    if u64::from(chunk.offset) != offset_expected {
        return Err(format!("offset {} instead of {offset_expected}", chunk.offset));
    }
    let fits = match chunk.encoding {
        Encoding::Raw => chunk.stored_len == chunk.raw_len,
        Encoding::Zstd => chunk.stored_len < chunk.raw_len,
    };
    if chunk.stored_len == 0 || chunk.raw_len > CHUNK_BYTES_MAX || !fits {
        return Err(format!("{} bytes stored for {} raw", chunk.stored_len, chunk.raw_len));
    }
    Ok(chunk)
}

fn crc(header: &[u8], index: &[u8], count: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(index);
    hasher.update(&count.to_le_bytes());
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::encode_chunk;

    fn pack() -> (Vec<u8>, Vec<EncodedChunk>) {
        let chunks: Vec<_> = (1..5u8).map(|n| encode_chunk(&vec![n; 1024 * usize::from(n)], 3)).collect();
        let mut builder = PackBuilder::new(9, 3);
        for chunk in &chunks {
            builder.push(chunk);
        }
        (builder.finish(), chunks)
    }

    #[test]
    fn a_pack_describes_itself() {
        let (pack, chunks) = pack();
        let index = PackIndex::of_pack(&pack, (9, 3)).unwrap();
        assert_eq!(index.len(), chunks.len());
        for (line, chunk) in index.iter().zip(&chunks) {
            let at = line.offset as usize;
            assert_eq!(pack[at..at + line.stored_len as usize], chunk.stored);
            assert_eq!((line.digest, line.raw_len, line.encoding), (chunk.digest, chunk.raw_len, chunk.encoding));
        }
        assert!(matches!(PackIndex::of_pack(&pack, (9, 4)), Err(PackError::Misplaced { .. })));
        assert!(PackIndex::of_pack(&PackBuilder::new(1, 0).finish(), (1, 0)).unwrap().is_empty());
    }

    #[test]
    fn damage_outside_the_chunks_and_truncation_are_refused() {
        let (pack, _) = pack();
        let index_at = pack.len() - TRAILER_BYTES - 4 * INDEX_ENTRY_BYTES;
        for at in (0..HEADER_BYTES).chain(index_at..pack.len()) {
            let mut bad = pack.clone();
            bad[at] ^= 0x40;
            assert!(PackIndex::of_pack(&bad, (9, 3)).is_err(), "byte {at}");
        }
        for len in 0..pack.len() {
            assert!(PackIndex::of_pack(&pack[..len], (9, 3)).is_err(), "length {len}");
        }
        let mut future = pack;
        future[VERSION_AT] = 2;
        assert_eq!(PackIndex::of_pack(&future, (9, 3)), Err(PackError::FutureVersion(2)));
    }

    #[test]
    fn a_pack_never_exceeds_its_limit() {
        let chunk =
            EncodedChunk { digest: [1; 32], encoding: Encoding::Raw, stored: vec![5; 4 << 20], raw_len: 4 << 20 };
        let mut builder = PackBuilder::new(1, 0);
        while builder.has_room(chunk.stored.len()) {
            builder.push(&chunk);
        }
        let pack = builder.finish();
        assert!(pack.len() as u64 <= PACK_BYTES_MAX);
        assert_eq!(PackIndex::of_pack(&pack, (1, 0)).unwrap().len(), 15);
    }
}
