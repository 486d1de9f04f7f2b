//! The manifest: which bytes of which pack are which chunk of a snapshot. Flat, whatever the history of the snapshot.
//!
//! On disk: a fixed header (magic, version, length and BLAKE3 of the body) and an rkyv body, documented in
//! `docs/snapshot.md`. In memory: 44 bytes per chunk, so that the manifest of a 1 TiB image takes 88 MiB.
//! Nothing of the file is believed before syntax, bounds and meaning have been checked, in this order.

use rkyv::rancor;
use thiserror::Error;
use volley_protocol::name::check_name;

use super::chunk::Encoding;
use super::pack::{HEADER_BYTES as PACK_HEADER_BYTES, PACK_BYTES_MAX};
use super::parse_pack_key;
use crate::types::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, LOGICAL_BLOCK_BYTES, SnapshotRef};

pub const MAGIC: [u8; 8] = *b"VLYMANIF";
/// 1: the first.
pub const VERSION: u32 = 1;
pub const HEADER_BYTES: usize = 64;
const VERSION_AT: usize = 8;
const RESERVED_AT: usize = 12;
const BODY_LEN_AT: usize = 16;
const RESERVED2_AT: usize = 24;
const BODY_DIGEST_AT: usize = 32;

/// rkyv's 32-bit relative pointers end at 2 GiB: 44 bytes × 2²⁵ leaves room for the pack list. 16 TiB of default chunks.
pub const CHUNKS_MAX: u32 = 1 << 25;
/// With keys of 46 bytes this bounds the pack list to 250 MB; 256 TiB of full packs.
pub const PACKS_MAX: usize = 1 << 22;

/// What is known of a snapshot besides its chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique for all time; also the id under which its own packs were written.
    pub id: u128,
    pub name: String,
    /// Device size: a positive multiple of 512.
    pub size_bytes: u64,
    /// Power of two, 64 KiB to 4 MiB.
    pub chunk_bytes: u32,
    pub parent: Option<String>,
    pub created_unix_ms: u64,
}

/// Where one chunk's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkEntry {
    /// All zeroes; stored nowhere.
    Zero,
    /// `stored_len` bytes at `offset` of pack number `pack` (see [`Manifest::pack_key`]).
    Stored { pack: u32, offset: u64, stored_len: u32, encoding: Encoding, digest: [u8; 32] },
}

/// A checked manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub id: u128,
    pub name: String,
    /// Device size: a positive multiple of 512.
    pub size_bytes: u64,
    /// Power of two, 64 KiB to 4 MiB.
    pub chunk_bytes: u32,
    pub parent: Option<String>,
    pub created_unix_ms: u64,
    packs: Vec<String>,
    chunks: Vec<Slot>,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ManifestError {
    #[error("not a snapshot manifest (wrong magic)")]
    Magic,
    #[error("manifest has format version {0}; this program reads version {VERSION}: upgrade it")]
    FutureVersion(u32),
    #[error("manifest is truncated or has trailing bytes: {found} bytes, expected {expected}")]
    Length { expected: u64, found: u64 },
    #[error("manifest fails its checksum")]
    Checksum,
    #[error("manifest is malformed: {0}")]
    Malformed(String),
    #[error("manifest is invalid: {0}")]
    Invalid(String),
}

/// The body as it is archived; field order is the format.
#[derive(rkyv::Archive, rkyv::Serialize)]
struct Body {
    id: [u8; 16],
    name: String,
    size_bytes: u64,
    chunk_bytes: u32,
    parent: Option<String>,
    created_unix_ms: u64,
    packs: Vec<String>,
    chunks: Vec<Slot>,
}

/// One chunk, in memory and archived alike. A zero chunk is all zero bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, rkyv::Archive, rkyv::Serialize)]
struct Slot {
    pack: u32,
    offset: u32,
    /// Stored length in the low 31 bits; the top bit says zstd.
    len_and_encoding: u32,
    digest: [u8; 32],
}

const ZSTD_BIT: u32 = 1 << 31;
// Alignment 1: the body is read at any address.
const _: () = assert!(align_of::<ArchivedBody>() == 1);
const _: () = assert!(size_of::<Slot>() == 44 && size_of::<ArchivedSlot>() == 44);
const _: () = assert!(PACK_BYTES_MAX <= u32::MAX as u64 && CHUNK_BYTES_MAX < ZSTD_BIT);

impl Slot {
    const ZERO: Slot = Slot { pack: 0, offset: 0, len_and_encoding: 0, digest: [0; 32] };

    fn from_entry(entry: ChunkEntry) -> Result<Slot, ManifestError> {
        let ChunkEntry::Stored { pack, offset, stored_len, encoding, digest } = entry else { return Ok(Slot::ZERO) };
        let offset = u32::try_from(offset).map_err(|_| invalid(format!("offset {offset} is outside any pack")))?;
        if stored_len == 0 || stored_len >= ZSTD_BIT {
            return Err(invalid(format!("a stored length of {stored_len} is impossible")));
        }
        let bit = if encoding == Encoding::Zstd { ZSTD_BIT } else { 0 };
        Ok(Slot { pack, offset, len_and_encoding: stored_len | bit, digest })
    }

    fn entry(self) -> ChunkEntry {
        if self.len_and_encoding == 0 {
            return ChunkEntry::Zero;
        }
        ChunkEntry::Stored {
            pack: self.pack,
            offset: u64::from(self.offset),
            stored_len: self.len_and_encoding & !ZSTD_BIT,
            encoding: if self.len_and_encoding & ZSTD_BIT != 0 { Encoding::Zstd } else { Encoding::Raw },
            digest: self.digest,
        }
    }
}

impl Manifest {
    /// Builds a manifest from one entry per chunk, in order.
    ///
    /// # Errors
    /// `Invalid` when the parts contradict each other or exceed the limits of the format.
    pub fn new(info: SnapshotInfo, packs: Vec<String>, chunks: &[ChunkEntry]) -> Result<Manifest, ManifestError> {
        let chunks = chunks.iter().map(|entry| Slot::from_entry(*entry)).collect::<Result<_, _>>()?;
        Manifest::assemble(info, packs, chunks)
    }

    /// The name and id of its snapshot.
    #[must_use]
    pub fn reference(&self) -> SnapshotRef {
        SnapshotRef { name: self.name.as_str().into(), id: self.id }
    }

    /// Reads a manifest, checking magic, version, checksum, bounds and meaning.
    ///
    /// # Errors
    /// Says which of these failed.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let body = check_header(bytes)?;
        let body = rkyv::access::<ArchivedBody, rancor::Error>(body)
            .map_err(|e| ManifestError::Malformed(e.to_string().lines().next().unwrap_or_default().to_owned()))?;
        if body.chunks.len() > CHUNKS_MAX as usize || body.packs.len() > PACKS_MAX {
            return Err(invalid("it lists more chunks or packs than the format allows"));
        }
        let info = SnapshotInfo {
            id: u128::from_le_bytes(body.id),
            name: body.name.as_str().to_owned(),
            size_bytes: body.size_bytes.to_native(),
            chunk_bytes: body.chunk_bytes.to_native(),
            parent: body.parent.as_ref().map(|p| p.as_str().to_owned()),
            created_unix_ms: body.created_unix_ms.to_native(),
        };
        let packs = body.packs.iter().map(|key| key.as_str().to_owned()).collect();
        let chunks = body.chunks.iter().map(|slot| Slot {
            pack: slot.pack.to_native(),
            offset: slot.offset.to_native(),
            len_and_encoding: slot.len_and_encoding.to_native(),
            digest: slot.digest,
        });
        Manifest::assemble(info, packs, chunks.collect())
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = Body {
            id: self.id.to_le_bytes(),
            name: self.name.clone(),
            size_bytes: self.size_bytes,
            chunk_bytes: self.chunk_bytes,
            parent: self.parent.clone(),
            created_unix_ms: self.created_unix_ms,
            packs: self.packs.clone(),
            chunks: self.chunks.clone(),
        };
        let body = rkyv::to_bytes::<rancor::Error>(&body).expect("a checked manifest is below rkyv's size limit");
        let mut out = vec![0; HEADER_BYTES];
        out[..VERSION_AT].copy_from_slice(&MAGIC);
        out[VERSION_AT..RESERVED_AT].copy_from_slice(&VERSION.to_le_bytes());
        out[BODY_LEN_AT..RESERVED2_AT].copy_from_slice(&(body.len() as u64).to_le_bytes());
        out[BODY_DIGEST_AT..].copy_from_slice(blake3::hash(&body).as_bytes());
        out.extend_from_slice(&body);
        out
    }

    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        u32::try_from(self.chunks.len()).expect("checked against CHUNKS_MAX")
    }

    /// Entry of the chunk `index`. Panics past the last chunk.
    #[must_use]
    pub fn chunk(&self, index: u32) -> ChunkEntry {
        self.chunks[index as usize].entry()
    }

    /// Digest of the chunk `index`; `None` for a zero chunk and past the last one.
    #[must_use]
    pub fn digest(&self, index: u32) -> Option<[u8; 32]> {
        match self.chunks.get(index as usize)?.entry() {
            ChunkEntry::Stored { digest, .. } => Some(digest),
            ChunkEntry::Zero => None,
        }
    }

    /// Raw length of the chunk `index`: only the last one may be shorter than `chunk_bytes`. Panics past the last chunk.
    #[must_use]
    pub fn chunk_len(&self, index: u32) -> u32 {
        assert!((index as usize) < self.chunks.len(), "chunk {index} of {}", self.chunks.len());
        chunk_len(self.size_bytes, self.chunk_bytes, index)
    }

    /// Object key of pack number `pack`, as found in a [`ChunkEntry`].
    #[must_use]
    pub fn pack_key(&self, pack: u32) -> &str {
        &self.packs[pack as usize]
    }

    #[must_use]
    pub fn pack_keys(&self) -> &[String] {
        &self.packs
    }

    fn assemble(info: SnapshotInfo, packs: Vec<String>, chunks: Vec<Slot>) -> Result<Manifest, ManifestError> {
        let SnapshotInfo { id, name, size_bytes, chunk_bytes, parent, created_unix_ms } = info;
        let manifest = Manifest { id, name, size_bytes, chunk_bytes, parent, created_unix_ms, packs, chunks };
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        check_name(&self.name).map_err(invalid)?;
        if let Some(parent) = &self.parent {
            check_name(parent).map_err(|e| invalid(format!("parent {e}")))?;
        }
        check_geometry(self.size_bytes, self.chunk_bytes).map_err(invalid)?;
        let chunk_count = self.size_bytes.div_ceil(u64::from(self.chunk_bytes));
        if self.chunks.len() as u64 != chunk_count {
            let found = self.chunks.len();
            return Err(invalid(format!("it lists {found} chunks, a device of this size has {chunk_count}")));
        }
        if self.packs.len() > PACKS_MAX {
            return Err(invalid(format!("{} packs are more than {PACKS_MAX}", self.packs.len())));
        }
        if let Some(bad) = self.packs.iter().find(|key| parse_pack_key(key).is_none()) {
            return Err(invalid(format!("{bad:?} is not the key of a pack")));
        }
        for (index, slot) in self.chunks.iter().enumerate() {
            self.check_slot(slot, chunk_len(self.size_bytes, self.chunk_bytes, index as u32))
                .map_err(|e| invalid(format!("chunk {index}: {e}")))?;
        }
        Ok(())
    }

    fn check_slot(&self, slot: &Slot, chunk_len: u32) -> Result<(), String> {
        let ChunkEntry::Stored { pack, offset, stored_len, encoding, .. } = slot.entry() else {
            return if *slot == Slot::ZERO { Ok(()) } else { Err("a zero chunk has a location".to_owned()) };
        };
        if pack as usize >= self.packs.len() {
            return Err(format!("pack number {pack} of {}", self.packs.len()));
        }
        if offset < PACK_HEADER_BYTES as u64 || offset + u64::from(stored_len) > PACK_BYTES_MAX {
            return Err(format!("{stored_len} bytes at {offset} lie outside any pack"));
        }
        let fits = match encoding {
            Encoding::Raw => stored_len == chunk_len,
            Encoding::Zstd => stored_len > 0 && stored_len < chunk_len,
        };
        if fits {
            Ok(())
        } else {
            Err(format!("{stored_len} bytes stored as {encoding:?} cannot be {chunk_len} bytes"))
        }
    }
}

/// Checks that a device of this size can be cut into chunks of this size.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_geometry(size_bytes: u64, chunk_bytes: u32) -> Result<(), String> {
    if !chunk_bytes.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
        return Err(format!("chunk size {chunk_bytes} is not a power of two from 64 KiB to 4 MiB"));
    }
    if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(LOGICAL_BLOCK_BYTES)) {
        return Err(format!("device size {size_bytes} is not a positive multiple of {LOGICAL_BLOCK_BYTES}"));
    }
    let chunks = size_bytes.div_ceil(u64::from(chunk_bytes));
    if chunks > u64::from(CHUNKS_MAX) {
        return Err(format!("{chunks} chunks are more than {CHUNKS_MAX}: use a larger chunk size"));
    }
    Ok(())
}

fn chunk_len(size_bytes: u64, chunk_bytes: u32, index: u32) -> u32 {
    let rest = size_bytes - u64::from(index) * u64::from(chunk_bytes);
    u32::try_from(rest).map_or(chunk_bytes, |rest| rest.min(chunk_bytes))
}

/// Magic, version, length and checksum; returns the body.
fn check_header(bytes: &[u8]) -> Result<&[u8], ManifestError> {
    if bytes.len() < HEADER_BYTES {
        let prefix = bytes.len().min(MAGIC.len());
        if bytes[..prefix] != MAGIC[..prefix] {
            return Err(ManifestError::Magic);
        }
        return Err(ManifestError::Length { expected: HEADER_BYTES as u64, found: bytes.len() as u64 });
    }
    let (header, body) = bytes.split_at(HEADER_BYTES);
    if header[..VERSION_AT] != MAGIC {
        return Err(ManifestError::Magic);
    }
    let version = u32::from_le_bytes(header[VERSION_AT..RESERVED_AT].try_into().expect("4 bytes"));
    if version != VERSION {
        return Err(ManifestError::FutureVersion(version));
    }
    if header[RESERVED_AT..BODY_LEN_AT] != [0; 4] || header[RESERVED2_AT..BODY_DIGEST_AT] != [0; 8] {
        return Err(ManifestError::Malformed("reserved header bytes are set".to_owned()));
    }
    let body_len = u64::from_le_bytes(header[BODY_LEN_AT..RESERVED2_AT].try_into().expect("8 bytes"));
    if body_len != body.len() as u64 {
        let expected = body_len.saturating_add(HEADER_BYTES as u64);
        return Err(ManifestError::Length { expected, found: bytes.len() as u64 });
    }
    if header[BODY_DIGEST_AT..] != *blake3::hash(body).as_bytes() {
        return Err(ManifestError::Checksum);
    }
    Ok(body)
}

fn invalid(why: impl Into<String>) -> ManifestError {
    ManifestError::Invalid(why.into())
}

#[cfg(test)]
mod tests;
