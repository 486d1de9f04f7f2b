//! The chunk cache in memory: a hit, and what every miss costs it once it is full.

use std::hint::black_box;

use volley_server::cache::{ChunkCache, ChunkData, Rank};

use super::{Case, Work};
use crate::noise;

const BATCH: u32 = 1024;
/// Chunks that fit. The bytes are shared by all of them: only digests are looked at here.
const CHUNKS: usize = 512;
const CHUNK_BYTES: usize = 4096;
/// Digests that are put in by turns: enough that each has left, and its ghost too, before it comes again.
const DIGESTS: usize = 4 * CHUNKS;

pub(super) const CASES: [Case; 3] = [
    Case::new("cache/hit", (BATCH, "look-up"), hit),
    Case::new("cache/miss", (BATCH, "look-up"), miss),
    Case::new("cache/insert_evict", (BATCH, "chunk"), insert_evict),
];

fn digests() -> Vec<[u8; 32]> {
    noise(1, DIGESTS * 32).as_chunks().0.to_vec()
}

/// Full of the first [`CHUNKS`].
fn full(digests: &[[u8; 32]], data: &ChunkData) -> ChunkCache {
    let mut cache = ChunkCache::new(CHUNKS * CHUNK_BYTES);
    digests[..CHUNKS].iter().for_each(|digest| cache.insert(*digest, data.clone(), Rank::Normal));
    cache
}

fn data() -> ChunkData {
    ChunkData::new(noise(2, CHUNK_BYTES)[..].into())
}

fn hit() -> Box<dyn Work> {
    let digests = digests();
    let mut cache = full(&digests, &data());
    Box::new(move || {
        for digest in digests[..CHUNKS].iter().cycle().take(BATCH as usize) {
            black_box(cache.get(digest, Rank::Normal).expect("in the cache"));
        }
    })
}

fn miss() -> Box<dyn Work> {
    let digests = digests();
    let mut cache = full(&digests, &data());
    Box::new(move || {
        for digest in digests[CHUNKS..].iter().cycle().take(BATCH as usize) {
            assert!(cache.get(digest, Rank::Normal).is_none());
        }
    })
}

fn insert_evict() -> Box<dyn Work> {
    let (digests, data) = (digests(), data());
    let mut cache = full(&digests, &data);
    let mut at = CHUNKS;
    Box::new(move || {
        for _ in 0..BATCH {
            cache.insert(digests[at], data.clone(), Rank::Normal);
            at = (at + 1) % DIGESTS;
        }
    })
}
