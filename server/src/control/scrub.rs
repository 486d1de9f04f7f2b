//! Scrub: volumes and the disk cache are read in the background, chunk by chunk, and held against what they should hold. What rotted in a
//! volume is put back from the object store; of the cache it is dropped. Guests come first: each read of a volume waits for its turn as
//! hydration does, and the cache is read one chunk at a time.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::Result;
use crate::metrics::Metric;
use crate::shard::api::Command;

use super::Control;
use super::problem::Answer;
use super::restoring::VerifyParams;

/// Chunks looked at before the pace is looked at: each step asks the object store whether the snapshot is still the same.
const STEP_CHUNKS: u32 = 16;
/// Bytes of the disk cache read before the pace is looked at.
const CACHE_STEP_BYTES: u64 = 4 << 20;
/// Between two rounds over everything, and before the first.
const ROUND_PAUSE: Duration = Duration::from_secs(60);

/// What scrubbing found since the start.
#[derive(Default)]
pub(super) struct Scrubbed {
    chunks: AtomicU64,
    damaged: AtomicU64,
    repaired: AtomicU64,
    cache_chunks: AtomicU64,
    cache_dropped: AtomicU64,
    rounds: AtomicU64,
}

impl Control {
    /// Scrubs for ever, if the configuration says so.
    pub(super) async fn keep_scrubbing(&self) {
        let Some(bandwidth) = self.0.settings.scrub_bandwidth else { return std::future::pending().await };
        loop {
            tokio::time::sleep(self.0.settings.scrub_pause.unwrap_or(ROUND_PAUSE)).await;
            let Ok(volumes) = self.all_volumes().await else { continue };
            for volume in volumes {
                if let Err(problem) = self.scrub(&volume.name, bandwidth).await {
                    tracing::debug!(volume = volume.name, why = problem.detail(), "not scrubbed");
                }
            }
            for shard in 0..self.0.shards.count() {
                if let Err(error) = self.scrub_cache(shard, bandwidth).await {
                    tracing::debug!(shard, %error, "disk cache not scrubbed");
                }
            }
            self.0.scrubbed.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn scrub(&self, name: &str, bandwidth: u64) -> Answer<()> {
        let mut from = 0;
        loop {
            let params = VerifyParams { from, chunks: Some(STEP_CHUNKS), repair: true, sectors: false };
            let found = self.verify(name, &params).await?;
            let looked_at = u64::from(found.equal + found.changed + found.unexplained + found.damaged);
            let scrubbed = &self.0.scrubbed;
            scrubbed.chunks.fetch_add(looked_at, Ordering::Relaxed);
            scrubbed.damaged.fetch_add(found.damaged.into(), Ordering::Relaxed);
            scrubbed.repaired.fetch_add(found.repaired.into(), Ordering::Relaxed);
            pause(looked_at * u64::from(found.chunk_bytes), bandwidth).await;
            match found.next {
                Some(next) => from = next,
                None => return Ok(()),
            }
        }
    }

    async fn scrub_cache(&self, shard: usize, bandwidth: u64) -> Result<()> {
        let mut next = Some(0);
        while let Some(from) = next {
            let part = |reply| Command::ScrubCache { from, bytes_max: CACHE_STEP_BYTES, reply };
            let Some(part) = self.0.shards.ask(shard, part).await? else { return Ok(()) };
            self.0.scrubbed.cache_chunks.fetch_add(part.chunks, Ordering::Relaxed);
            self.0.scrubbed.cache_dropped.fetch_add(part.dropped, Ordering::Relaxed);
            pause(part.bytes, bandwidth).await;
            next = part.next;
        }
        Ok(())
    }

    pub(super) fn scrub_metrics(&self) -> Vec<Metric> {
        let Scrubbed { chunks, damaged, repaired, cache_chunks, cache_dropped, rounds } = &self.0.scrubbed;
        [
            ("scrub_chunks_total", "Chunks of volumes read from their disks by the scrub.", chunks),
            (
                "scrub_damaged_chunks_total",
                "Of these, chunks that held something else than was written there.",
                damaged,
            ),
            ("scrub_repaired_chunks_total", "Of these, chunks put back from the object store.", repaired),
            ("scrub_cache_chunks_total", "Chunks of the disk cache read by the scrub.", cache_chunks),
            (
                "scrub_cache_dropped_chunks_total",
                "Of these, chunks dropped because they were not what they should be.",
                cache_dropped,
            ),
            ("scrub_rounds_total", "Rounds over all volumes and the disk cache.", rounds),
        ]
        .map(|(name, help, value)| (name, "counter", help, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

/// As long as so many bytes take.
async fn pause(bytes: u64, bandwidth: u64) {
    tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64)).await;
}
