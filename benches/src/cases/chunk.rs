//! A chunk from its stored form to verified bytes: decompression and BLAKE3.

use std::hint::black_box;

use volley_server::snapshot::ChunkEntry;
use volley_server::snapshot::chunk::{EncodedChunk, decode_chunk, encode_chunk};

use super::{Case, Work};
use crate::{compressible, noise};

const CHUNK_BYTES: u32 = 64 << 10;

pub(super) const CASES: [Case; 2] = [
    Case::new("chunk/decode_64k_zstd", (1, "chunk"), || decode(&compressible(1, CHUNK_BYTES as usize))),
    Case::new("chunk/decode_64k_raw", (1, "chunk"), || decode(&noise(1, CHUNK_BYTES as usize))),
];

/// The entry of a chunk that lies at `offset` of the first pack.
///
/// # Panics
/// When it is no chunk but longer.
#[must_use]
pub fn entry_of(chunk: &EncodedChunk, offset: u64) -> ChunkEntry {
    let stored_len = u32::try_from(chunk.stored.len()).expect("a chunk");
    ChunkEntry::Stored { pack: 0, offset, stored_len, encoding: chunk.encoding, digest: chunk.digest }
}

fn decode(raw: &[u8]) -> Box<dyn Work> {
    let encoded = encode_chunk(raw, 3);
    let entry = entry_of(&encoded, 32);
    Box::new(move || drop(black_box(decode_chunk(&entry, black_box(&encoded.stored), CHUNK_BYTES).expect("intact"))))
}
