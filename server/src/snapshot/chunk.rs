//! One chunk between its raw and its stored form: digest, compression, verification.

use std::cell::RefCell;

use thiserror::Error;

use super::ChunkEntry;
use crate::mutation::{self, Mutation};
use crate::platform::AlignedBytes;

/// How the bytes of a chunk are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    Raw,
    Zstd,
}

/// A chunk as it goes into a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedChunk {
    /// BLAKE3 of the raw bytes.
    pub digest: [u8; 32],
    pub encoding: Encoding,
    pub stored: Vec<u8>,
    /// Length of the raw bytes.
    pub raw_len: u32,
}

/// The stored bytes are not the chunk: damaged, truncated, or another chunk's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CorruptChunk {
    #[error("a zero chunk has no stored bytes")]
    Zero,
    #[error("stored chunk has {found} bytes, its manifest says {expected}")]
    StoredLength { expected: u32, found: usize },
    #[error("stored chunk does not decompress: {0}")]
    Decompress(String),
    #[error("chunk has {found} bytes, expected {expected}")]
    RawLength { expected: u32, found: usize },
    #[error("chunk fails its BLAKE3 digest")]
    Digest,
}

/// Turns stored bytes into the raw chunk of exactly `chunk_len` bytes and verifies its digest. Memory is bounded by
/// `chunk_len`, whatever the stored bytes claim.
///
/// # Errors
/// [`CorruptChunk`] when anything about the bytes contradicts `entry`.
pub fn decode_chunk(entry: &ChunkEntry, stored: &[u8], chunk_len: u32) -> Result<AlignedBytes, CorruptChunk> {
    let ChunkEntry::Stored { stored_len, encoding, digest, .. } = entry else { return Err(CorruptChunk::Zero) };
    if stored.len() != *stored_len as usize {
        return Err(CorruptChunk::StoredLength { expected: *stored_len, found: stored.len() });
    }
    let raw = match encoding {
        Encoding::Raw => stored.into(),
        Encoding::Zstd => decompress(stored, chunk_len as usize)?,
    };
    if raw.len() != chunk_len as usize {
        return Err(CorruptChunk::RawLength { expected: chunk_len, found: raw.len() });
    }
    if blake3::hash(&raw).as_bytes() != digest && !mutation::on(Mutation::DigestNotChecked) {
        return Err(CorruptChunk::Digest);
    }
    Ok(raw)
}

/// Digests and compresses a chunk; what zstd does not shrink is stored raw.
#[must_use]
pub fn encode_chunk(raw: &[u8], zstd_level: i32) -> EncodedChunk {
    encode_with_digest(raw, *blake3::hash(raw).as_bytes(), zstd_level)
}

/// [`encode_chunk`] for a caller that knows the digest already.
#[must_use]
pub fn encode_with_digest(raw: &[u8], digest: [u8; 32], zstd_level: i32) -> EncodedChunk {
    let raw_len = u32::try_from(raw.len()).expect("a chunk has at most 4 MiB");
    match zstd::bulk::compress(raw, zstd_level) {
        Ok(stored) if stored.len() < raw.len() => EncodedChunk { digest, encoding: Encoding::Zstd, stored, raw_len },
        _ => EncodedChunk { digest, encoding: Encoding::Raw, stored: raw.to_vec(), raw_len },
    }
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    // Words of 16 bytes compile to wide compares.
    let (words, rest) = data.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

thread_local! {
    // A decompression context is ~160 KiB: one per thread, not one per chunk.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn decompress(stored: &[u8], raw_len_max: usize) -> Result<AlignedBytes, CorruptChunk> {
    let mut raw = AlignedBytes::with_capacity(raw_len_max);
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(d) => d,
            None => slot.insert(zstd::bulk::Decompressor::new().map_err(|e| CorruptChunk::Decompress(e.to_string()))?),
        };
        let done = decompressor.decompress_to_buffer(stored, &mut raw);
        done.map_err(|e| CorruptChunk::Decompress(e.to_string()))
    })?;
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(encoded: &EncodedChunk) -> ChunkEntry {
        ChunkEntry::Stored {
            pack: 0,
            offset: 32,
            stored_len: u32::try_from(encoded.stored.len()).unwrap(),
            encoding: encoded.encoding,
            digest: encoded.digest,
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn round_trips_and_stores_raw_what_does_not_shrink() {
        for (raw, encoding) in
            [(vec![7u8; 65536], Encoding::Zstd), (noise(65536), Encoding::Raw), (noise(512), Encoding::Raw)]
        {
            let encoded = encode_chunk(&raw, 3);
            assert_eq!(encoded.encoding, encoding);
            let len = u32::try_from(raw.len()).unwrap();
            assert_eq!(decode_chunk(&entry(&encoded), &encoded.stored, len).unwrap()[..], raw);
            assert!(decode_chunk(&entry(&encoded), &encoded.stored, len - 512).is_err(), "longer than it may be");
            assert!(decode_chunk(&entry(&encoded), &encoded.stored, len + 512).is_err(), "shorter than it must be");
        }
        assert_eq!(decode_chunk(&ChunkEntry::Zero, &[], 512), Err(CorruptChunk::Zero));
    }

    #[test]
    fn every_flipped_byte_is_found() {
        for raw in [[b"some text ".repeat(60), vec![0; 424]].concat(), noise(1024)] {
            let encoded = encode_chunk(&raw, 3);
            for at in 0..encoded.stored.len() {
                let mut bad = encoded.stored.clone();
                bad[at] ^= 0x10;
                // A flip in zstd's own header may leave the content intact: then it's the right content.
                if let Ok(content) = decode_chunk(&entry(&encoded), &bad, 1024) {
                    assert_eq!(content[..], raw);
                }
                assert!(decode_chunk(&entry(&encoded), &encoded.stored[..at], 1024).is_err());
            }
        }
    }

    #[test]
    fn a_decompression_bomb_is_bounded() {
        let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 3).unwrap();
        let lie = EncodedChunk { digest: [0; 32], encoding: Encoding::Zstd, stored: bomb, raw_len: 65536 };
        assert!(matches!(decode_chunk(&entry(&lie), &lie.stored, 65536), Err(CorruptChunk::Decompress(_))));
    }

    #[test]
    fn zero_is_told_from_almost_zero() {
        for len in [0, 1, 15, 16, 17, 512, 4097] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut data = vec![0; len];
                data[at] = 1;
                assert!(!is_zero(&data));
            }
        }
    }
}
