//! What an operator does with a shard's part of the chunk cache: look at it, warm it with an image, pin, drop.
//!
//! Every shard works on the chunks it owns. Warming fetches in the background, in sector order, a window at a time, and
//! no faster than the disk tier takes it; it never fetches more than the larger tier can hold.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::disk::scrub::Scrubbed;
use crate::cache::disk::{DiskTier, Owner};
use crate::error::{Error, Result, Status};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::api::{CacheStatus, Dropped, ReplyTo, WarmStatus};
use crate::shard::signal::within;
use crate::snapshot::{Encoding, Manifest};
use crate::transfer::ledger::Origin;
use crate::transfer::{ChunkSource, Digest, FetchClass};
use crate::types::SnapshotRef;

/// A start waits so long for the disk tier's index, then it goes on without: 100,000 slots take a tenth of a second.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// Chunks that one image's warming asks for at the same time.
const WARM_WINDOW_CHUNKS: usize = 16;
/// Images whose warming is remembered; the oldest finished one is forgotten first.
const WARMINGS_MAX: usize = 32;

/// An image being warmed, or that was.
pub struct Warming {
    image: Arc<str>,
    pin: bool,
    chunks: u32,
    progress: Rc<Progress>,
}

#[derive(Default)]
struct Progress {
    done: Cell<u32>,
    pinned: RefCell<Vec<Digest>>,
    skipped: Cell<u32>,
    failed: Cell<u32>,
    finished: Cell<bool>,
    cancelled: Cell<bool>,
}

impl Warming {
    fn status(&self) -> WarmStatus {
        let progress = &self.progress;
        WarmStatus {
            image: self.image.to_string(),
            pin: self.pin,
            running: !progress.finished.get(),
            chunks: self.chunks,
            chunks_done: progress.done.get(),
            chunks_pinned: u32::try_from(progress.pinned.borrow().len()).unwrap_or(u32::MAX),
            chunks_skipped: progress.skipped.get(),
            chunks_failed: progress.failed.get(),
        }
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Opens the disk tier, if there is to be one. Where it can't be opened, the shard runs without.
    pub(super) async fn open_disk_cache(&self) {
        let Some(config) = self.0.config.disk_cache.clone() else { return };
        let owner = Owner { node_id: self.0.config.node_id, shard: self.0.config.shard, shards: self.0.config.shards };
        let (sender, opened) = flume::bounded::<()>(1);
        let shard = self.clone();
        // A task of its own: nothing is dropped half done, and a tier that comes late is used from then on.
        self.0.platform.spawn(Queue::Serve, async move {
            let (platform, counters) = (shard.0.platform.clone(), shard.0.counters.clone());
            match DiskTier::open(platform, &config, owner, counters).await {
                Ok(tier) => shard.0.transfer.use_disk(tier),
                Err(why) => shard.cache_event(&format!("{why}; the node runs without the disk cache")),
            }
            drop(sender);
        });
        if within(&self.0.platform, OPEN_MAX, opened.recv_async()).await.is_none() {
            self.cache_event(&format!("disk cache: its index was not read within {OPEN_MAX:?}; it is used once it is"));
        }
    }

    fn cache_event(&self, text: &str) {
        self.0.counters.event(self.0.platform.wall_clock_ms(), text);
    }

    pub(super) fn cache_status(&self) -> CacheStatus {
        let (ram, disk) = self.0.transfer.tiers();
        let warming = self.0.warming.borrow().iter().map(Warming::status).collect();
        CacheStatus { shard: self.0.config.shard, ram, disk, warming }
    }

    /// Reads a part of the disk tier and answers, behind everything else.
    pub(super) fn scrub_cache(&self, from: u32, bytes_max: u64, reply: ReplyTo<Option<Scrubbed>>) {
        let disk = self.0.transfer.disk().filter(|_| !self.0.stopping.get()).cloned();
        self.0.platform.spawn(Queue::Background, async move {
            let scrubbed = match disk {
                Some(disk) => Some(disk.scrub(from, bytes_max).await),
                None => None,
            };
            let _ = reply.send(scrubbed);
        });
    }

    /// Starts to warm; answers when the manifest is there. Warming an image again begins anew.
    pub(super) async fn warm_cache(&self, snapshot: &SnapshotRef, pin: bool) -> Result<()> {
        self.refuse_when_stopping()?;
        let manifest = self.load_manifest(snapshot).await?;
        let sources = self.owned(&manifest, 0..manifest.chunk_count());
        self.unpin_image(&snapshot.name);
        let progress = Rc::new(Progress::default());
        let chunks = u32::try_from(sources.len()).unwrap_or(u32::MAX);
        self.remember(Warming { image: snapshot.name.clone(), pin, chunks, progress: progress.clone() })?;
        let shard = self.clone();
        self.0.platform.spawn(Queue::Background, async move {
            shard.warm(sources, pin, &progress).await;
            progress.finished.set(true);
        });
        Ok(())
    }

    fn remember(&self, warming: Warming) -> Result<()> {
        let mut all = self.0.warming.borrow_mut();
        if all.len() >= WARMINGS_MAX {
            let idle = |w: &Warming| w.progress.finished.get() && w.progress.pinned.borrow().is_empty();
            let Some(oldest) = all.iter().position(idle) else {
                let message = format!("{WARMINGS_MAX} images are being warmed or are pinned: unpin some");
                return Err(Error::new(Status::Busy, message));
            };
            all.remove(oldest);
        }
        all.push(warming);
        Ok(())
    }

    /// Of these chunks of an image those with data that this shard owns, each once, in their order.
    pub(super) fn owned(&self, manifest: &Manifest, chunks: impl Iterator<Item = u32>) -> Vec<ChunkSource> {
        let mut seen = hashbrown::HashSet::with_hasher(ahash::RandomState::with_seeds(49, 50, 51, 52));
        let origin = Arc::new(Origin::image(&manifest.name));
        let all = chunks.filter_map(|chunk| ChunkSource::of(manifest, chunk, &origin));
        let owned = all.filter(|source| source.owner(self.0.config.shards) == self.0.config.shard);
        owned.filter(|source| seen.insert(source.digest)).collect()
    }

    async fn warm(&self, sources: Vec<ChunkSource>, pin: bool, progress: &Progress) {
        let (ram, disk) = self.0.transfer.tiers();
        let mut room = ram.budget_bytes.max(disk.map_or(0, |disk| disk.budget_bytes));
        for window in sources.chunks(WARM_WINDOW_CHUNKS) {
            if progress.cancelled.get() || self.0.stopping.get() {
                return;
            }
            let mut wanted = Vec::new();
            for source in window {
                let len = u64::from(if disk.is_some() { source.stored_len } else { source.chunk_len });
                match room.checked_sub(len) {
                    Some(left) => room = left,
                    None => {
                        progress.skipped.set(progress.skipped.get() + 1);
                        continue;
                    }
                }
                match self.is_warm(source) && !pin {
                    true => progress.done.set(progress.done.get() + 1),
                    false => wanted.push(source.clone()),
                }
            }
            self.warm_window(wanted, pin, progress).await;
        }
    }

    /// Whether the tier that outlives the process has the chunk, or RAM where there is no other.
    fn is_warm(&self, source: &ChunkSource) -> bool {
        let (ram, on_disk) = self.0.transfer.is_cached(&source.digest);
        if self.0.transfer.disk().is_none() {
            return ram;
        }
        on_disk
    }

    async fn warm_window(&self, wanted: Vec<ChunkSource>, pin: bool, progress: &Progress) {
        if let Some(disk) = self.0.transfer.disk() {
            disk.room().await;
        }
        let sources = wanted.clone();
        for (source, answer) in sources.iter().zip(self.request(wanted, FetchClass::Background)) {
            let Ok(data) = answer.chunk().await.map(|fetched| fetched.data) else {
                progress.failed.set(progress.failed.get() + 1);
                continue;
            };
            if let Some(disk) = self.0.transfer.disk() {
                // Nothing to do if it came from there, or goes there in its stored form.
                disk.offer(source, Encoding::Raw, &data);
            }
            if pin && self.0.transfer.pin(&source.digest) {
                progress.pinned.borrow_mut().push(source.digest);
            }
            progress.done.set(progress.done.get() + 1);
        }
    }

    /// Takes back what warming the image has pinned; how many chunks.
    pub(super) fn unpin_image(&self, image: &str) -> u64 {
        let mut unpinned = 0;
        self.0.warming.borrow_mut().retain(|warming| {
            if *warming.image != *image {
                return true;
            }
            warming.progress.cancelled.set(true);
            for digest in warming.progress.pinned.take() {
                self.0.transfer.unpin(&digest);
                unpinned += 1;
            }
            false
        });
        unpinned
    }

    /// Drops the chunks of an image from both tiers, also those that other images have too.
    pub(super) async fn drop_cache(&self, snapshot: &SnapshotRef) -> Result<Dropped> {
        let manifest = self.load_manifest(snapshot).await?;
        self.unpin_image(&snapshot.name);
        let mut dropped = Dropped::default();
        // Not only what it owns: its files may hold what an earlier life owned.
        for chunk in 0..manifest.chunk_count() {
            let Some(digest) = manifest.digest(chunk) else { continue };
            let (ram, disk) = self.0.transfer.drop_cached(&digest);
            dropped.chunks_ram += u64::from(ram);
            dropped.chunks_disk += u64::from(disk);
            self.0.platform.yield_now().await;
        }
        Ok(dropped)
    }
}
