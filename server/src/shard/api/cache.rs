//! What a shard says of its part of the chunk cache.

use crate::cache::TierStatus;

/// A shard's part of the chunk cache.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct CacheStatus {
    pub shard: usize,
    pub ram: TierStatus,
    /// `None`: not configured, or it could not be opened.
    pub disk: Option<TierStatus>,
    pub warming: Vec<WarmStatus>,
}

/// How far the warming of an image is.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct WarmStatus {
    pub image: String,
    pub pin: bool,
    pub running: bool,
    /// Different chunks of the image that are stored.
    pub chunks: u32,
    /// In the cache, or they were there already.
    pub chunks_done: u32,
    pub chunks_pinned: u32,
    /// Not fetched: the image is larger than the cache.
    pub chunks_skipped: u32,
    pub chunks_failed: u32,
}

impl WarmStatus {
    /// Adds the same image's warming on another shard.
    pub fn add(&mut self, other: &WarmStatus) {
        self.pin |= other.pin;
        self.running |= other.running;
        self.chunks += other.chunks;
        self.chunks_done += other.chunks_done;
        self.chunks_pinned += other.chunks_pinned;
        self.chunks_skipped += other.chunks_skipped;
        self.chunks_failed += other.chunks_failed;
    }
}

/// Chunks dropped, by tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Dropped {
    pub chunks_ram: u64,
    pub chunks_disk: u64,
}
