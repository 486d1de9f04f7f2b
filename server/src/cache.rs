//! The chunk cache of a shard: verified chunks in RAM ([`ChunkCache`]) and, if configured, on a disk ([`disk`]).
//!
//! Both tiers are keyed by digest and evict by [`s3fifo`]. The RAM tier is a plain synchronous core: nothing in it is
//! dirty, so eviction waits for nothing.

pub mod disk;
pub mod reads;
pub mod record;
pub mod s3fifo;
pub mod slots;

use std::sync::Arc;
use std::time::Duration;

use crate::platform::AlignedBytes;
use crate::transfer::Digest;
pub use s3fifo::Rank;
use s3fifo::S3Fifo;

/// A verified chunk, shared between shards by reference count.
pub type ChunkData = Arc<AlignedBytes>;

/// What a tier holds and what it did since the shard started; part of `GET /v1/cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TierStatus {
    pub budget_bytes: u64,
    pub used_bytes: u64,
    pub chunks: u64,
    /// Bytes that eviction leaves alone.
    pub pinned_bytes: u64,
    /// Of those, what guests of a wave asked for.
    pub wave_pinned_bytes: u64,
    pub hits: u64,
    pub hit_bytes: u64,
    pub misses: u64,
    pub inserted: u64,
    pub evicted: u64,
    /// Chunks that failed verification when they were read back.
    pub corrupt: u64,
    /// Chunks whose place held another chunk by the time they were wanted.
    pub stale: u64,
    /// Chunks not kept: the disk was busy, failing or full.
    pub skipped: u64,
    /// Reads and writes that failed.
    pub errors: u64,
}

impl TierStatus {
    /// Adds the same tier of another shard.
    pub fn add(&mut self, other: &TierStatus) {
        self.budget_bytes += other.budget_bytes;
        self.used_bytes += other.used_bytes;
        self.chunks += other.chunks;
        self.pinned_bytes += other.pinned_bytes;
        self.wave_pinned_bytes += other.wave_pinned_bytes;
        self.hits += other.hits;
        self.hit_bytes += other.hit_bytes;
        self.misses += other.misses;
        self.inserted += other.inserted;
        self.evicted += other.evicted;
        self.corrupt += other.corrupt;
        self.stale += other.stale;
        self.skipped += other.skipped;
        self.errors += other.errors;
    }
}

/// Name, help text and value of a metric.
type Sample = (&'static str, &'static str, u64);

/// One sample for each tier, under one name with the label `tier`.
macro_rules! by_tier {
    ($ram:expr, $disk:expr, $($name:literal, $help:literal, $field:ident;)*) => {{
        let mut samples = Vec::new();
        $(
            samples.push((concat!($name, "{tier=\"ram\"}"), $help, $ram.$field));
            samples.extend($disk.map(|disk| (concat!($name, "{tier=\"disk\"}"), $help, disk.$field)));
        )*
        samples
    }};
}

/// What the tiers counted since the shard started.
#[must_use]
pub fn tier_counters(ram: &TierStatus, disk: Option<&TierStatus>) -> Vec<Sample> {
    by_tier! { ram, disk,
        "cache_hits_total", "Chunks found in the tier.", hits;
        "cache_hit_bytes_total", "Bytes of chunks found in the tier.", hit_bytes;
        "cache_misses_total", "Chunks looked for in the tier and not found there.", misses;
        "cache_insertions_total", "Chunks put into the tier.", inserted;
        "cache_evictions_total", "Chunks evicted to make room for others.", evicted;
        "cache_corrupt_chunks_total", "Chunks of the tier that failed their checks and were dropped.", corrupt;
        "cache_stale_chunks_total", "Chunks whose place held another one when they were read.", stale;
        "cache_skipped_chunks_total", "Chunks not kept because the tier was busy, failing or too small.", skipped;
        "cache_errors_total", "Reads and writes of the tier that failed.", errors;
    }
}

/// What the tiers hold.
#[must_use]
pub fn tier_gauges(ram: &TierStatus, disk: Option<&TierStatus>) -> Vec<Sample> {
    by_tier! { ram, disk,
        "cache_budget_bytes", "Bytes that the tier may hold.", budget_bytes;
        "cache_used_bytes", "Bytes that chunks take in the tier.", used_bytes;
        "cache_pinned_bytes", "Bytes of chunks that eviction leaves alone.", pinned_bytes;
        "cache_chunks", "Chunks in the tier.", chunks;
    }
}

/// What the RAM tier of one shard may do.
#[derive(Clone, Copy, Debug)]
pub struct RamLimits {
    pub bytes: usize,
    /// What guests of a wave asked for is kept for so long; zero: not at all.
    pub pin_waves: Duration,
}

/// The RAM tier of one shard.
pub struct ChunkCache {
    chunks: S3Fifo<ChunkData>,
    tally: TierStatus,
}

impl ChunkCache {
    #[must_use]
    pub fn new(budget_bytes: usize) -> ChunkCache {
        ChunkCache { chunks: S3Fifo::new(budget_bytes), tally: TierStatus::default() }
    }

    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.chunks.used()
    }

    /// Whether the chunk is there; no request for it.
    #[must_use]
    pub fn holds(&self, digest: &Digest) -> bool {
        self.chunks.peek(digest).is_some()
    }

    pub fn get(&mut self, digest: &Digest, rank: Rank) -> Option<ChunkData> {
        let found = self.chunks.get(digest, rank).cloned();
        match &found {
            Some(data) => {
                self.tally.hits += 1;
                self.tally.hit_bytes += data.len() as u64;
            }
            None => self.tally.misses += 1,
        }
        found
    }

    /// Inserts a chunk; evicts until it fits. A chunk larger than the budget is not kept.
    pub fn insert(&mut self, digest: Digest, data: ChunkData, rank: Rank) {
        let cost = data.len();
        if self.holds(&digest) || !self.chunks.fits(cost) {
            return;
        }
        self.tally.evicted += self.chunks.make_room(cost).len() as u64;
        self.tally.inserted += 1;
        self.chunks.insert(digest, data, cost, rank);
    }

    /// Whether so much more may be pinned.
    #[must_use]
    pub fn can_pin(&self, cost: usize) -> bool {
        self.chunks.can_pin(cost)
    }

    /// See [`S3Fifo::pin`].
    pub fn pin(&mut self, digest: &Digest) -> bool {
        self.chunks.pin(digest)
    }

    pub fn unpin(&mut self, digest: &Digest) {
        self.chunks.unpin(digest);
    }

    /// Drops the chunk, pinned or not; whether it was there.
    pub fn remove(&mut self, digest: &Digest) -> bool {
        self.chunks.remove(digest).is_some()
    }

    #[must_use]
    pub fn status(&self) -> TierStatus {
        TierStatus {
            budget_bytes: self.chunks.budget() as u64,
            used_bytes: self.chunks.used() as u64,
            chunks: self.chunks.len() as u64,
            pinned_bytes: self.chunks.pinned() as u64,
            ..self.tally
        }
    }

    /// Checks the cache against itself and its budget.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.chunks.check()
    }
}

#[cfg(test)]
mod tests {
    use super::{ChunkCache, ChunkData, Rank};

    fn chunk(bytes: &[u8]) -> ChunkData {
        ChunkData::new(bytes.into())
    }

    #[test]
    fn stays_in_budget_and_returns_what_was_put() {
        let mut cache = ChunkCache::new(1000);
        for key in 0..100_u8 {
            let data = chunk(&vec![key; 40 + usize::from(key)]);
            cache.insert([key; 32], data.clone(), Rank::Normal);
            assert_eq!(cache.get(&[key; 32], Rank::Low), Some(data), "the newest is there");
            assert_eq!(cache.check(), Ok(()));
        }
        let status = cache.status();
        assert!(status.used_bytes <= 1000 && status.evicted + status.chunks == 100, "{status:?}");
        assert_eq!((status.hits, status.misses, status.inserted), (100, 0, 100));
    }

    #[test]
    fn larger_than_the_budget_is_not_kept_and_what_is_dropped_is_gone() {
        let mut cache = ChunkCache::new(10);
        cache.insert([1; 32], chunk(&[0; 11]), Rank::Normal);
        assert_eq!(cache.used_bytes(), 0);
        cache.insert([2; 32], chunk(&[0; 5]), Rank::Low);
        assert!(cache.pin(&[2; 32]) && cache.remove(&[2; 32]) && !cache.remove(&[2; 32]));
        assert_eq!((cache.status().pinned_bytes, cache.get(&[2; 32], Rank::Low)), (0, None));
    }
}
