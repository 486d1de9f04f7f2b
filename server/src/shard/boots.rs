//! Boot sets on a shard: what volumes touch in their first seconds is recorded, and what others touched before comes first.
//!
//! A boot is the first attachment of a volume of a snapshot, and what its guest reads or fetches until the window has passed. The
//! control thread takes what was recorded, learns from it, and hands back the set of each image.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::sync::Arc;

use crate::error::Result;
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue, Time};
use crate::shard::Shard;
use crate::shard::api::RecordedBoot;
use crate::shard::datapath::Answer;
use crate::shard::volume::Volume;
use crate::snapshot::Manifest;
use crate::transfer::{ChunkSource, FetchClass};
use crate::types::{SnapshotRef, VolumeId};

/// Boots recorded at the same time; of a wave the first ones are enough.
const RECORDINGS_MAX: usize = 16;
/// Boots kept until the control thread takes them; the oldest is forgotten first.
const RECORDED_MAX: usize = 64;
/// Images whose sets are kept; the one set longest ago is forgotten first.
const SETS_MAX: usize = 64;
/// Chunks of a set that are asked for at the same time: they lie anywhere.
const PREFETCH_WINDOW_CHUNKS: usize = 16;
/// Of a whole image, whose neighbours share GETs.
const IMAGE_WINDOW_CHUNKS: usize = 64;

/// A boot being recorded.
pub struct Recording {
    until: Time,
    seen: HashSet<u32>,
    /// In the order of the first touch.
    order: Vec<u32>,
    /// Kept, because a hydrated volume lets go of its own.
    manifest: Option<Arc<Manifest>>,
}

/// What a shard knows of boots.
#[derive(Default)]
pub struct Boots {
    recording: RefCell<Vec<VolumeId>>,
    recorded: RefCell<Vec<RecordedBoot>>,
    /// By snapshot, the latest last.
    sets: RefCell<Vec<(u128, Rc<[u32]>)>>,
}

impl Boots {
    /// The chunks that a volume of the snapshot wants first, in their order.
    pub(super) fn set_of(&self, snapshot: &SnapshotRef) -> Option<Rc<[u32]>> {
        let sets = self.sets.borrow();
        sets.iter().find(|(id, _)| *id == snapshot.id).map(|(_, chunks)| chunks.clone())
    }

    fn put(&self, snapshot: u128, chunks: Rc<[u32]>) {
        let mut sets = self.sets.borrow_mut();
        sets.retain(|(id, _)| *id != snapshot);
        if chunks.is_empty() {
            return;
        }
        if sets.len() >= SETS_MAX {
            sets.remove(0);
        }
        sets.push((snapshot, chunks));
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// A volume was attached; the first time that is a boot.
    pub(super) fn begin_recording(&self, volume: &Volume<P>) {
        let window = self.0.config.boot_window;
        let mut recording = self.0.boots.recording.borrow_mut();
        let boots = volume.generation.get() == 1 && volume.spec.snapshot.is_some() && !volume.hydrated.get();
        if !boots || window.is_zero() || recording.len() >= RECORDINGS_MAX {
            return;
        }
        recording.push(volume.spec.id);
        *volume.recording.borrow_mut() = Some(Recording {
            until: self.0.platform.now().after(window),
            seen: HashSet::new(),
            order: Vec::new(),
            manifest: volume.manifest(),
        });
    }

    /// A guest read chunks, or asked for them.
    pub(super) fn note_touched(&self, volume: &Volume<P>, chunks: RangeInclusive<u32>) {
        let mut recording = volume.recording.borrow_mut();
        let Some(recording) = recording.as_mut() else { return };
        for chunk in chunks {
            if recording.order.len() < crate::bootset::CHUNKS_MAX && recording.seen.insert(chunk) {
                recording.order.push(chunk);
            }
        }
        if recording.manifest.is_none() {
            recording.manifest = volume.manifest();
        }
    }

    /// Ends the recordings whose window has passed; part of the upkeep.
    pub(super) fn end_recordings(&self) {
        let now = self.0.platform.now();
        self.0.boots.recording.borrow_mut().retain(|id| {
            let Ok(volume) = self.volume(*id) else { return false };
            if volume.recording.borrow().as_ref().is_some_and(|recording| now < recording.until) {
                return true;
            }
            let recording = volume.recording.take();
            if let (Some(recording), Some(snapshot)) = (recording, volume.spec.snapshot.clone()) {
                self.keep_boot(snapshot, &recording);
            }
            false
        });
    }

    fn keep_boot(&self, snapshot: SnapshotRef, recording: &Recording) {
        let Some(manifest) = &recording.manifest else { return };
        let touched: Vec<_> = recording.order.iter().filter_map(|chunk| manifest.digest(*chunk)).collect();
        if touched.is_empty() {
            return;
        }
        self.0.counters.boots_recorded.add(1);
        let mut recorded = self.0.boots.recorded.borrow_mut();
        if recorded.len() >= RECORDED_MAX {
            recorded.remove(0);
        }
        recorded.push(RecordedBoot { snapshot, touched });
    }

    pub(super) fn take_boots(&self) -> Vec<RecordedBoot> {
        self.0.boots.recorded.take()
    }

    /// From now on volumes of the snapshot hydrate these chunks first. With `prefetch` those that this shard owns are
    /// fetched into the cache before anybody asks.
    pub(super) async fn use_boot_set(&self, snapshot: &SnapshotRef, chunks: &[u32], prefetch: bool) -> Result<()> {
        self.0.boots.put(snapshot.id, chunks.into());
        self.rank_volumes_of(snapshot);
        if !prefetch || chunks.is_empty() {
            return Ok(());
        }
        let manifest = self.load_manifest(snapshot).await?;
        let mut absent = self.owned(&manifest, chunks.iter().copied().filter(|chunk| *chunk < manifest.chunk_count()));
        absent.retain(|source| !self.0.transfer.is_cached(&source.digest).0);
        self.spawn_prefetch(absent, PREFETCH_WINDOW_CHUNKS);
        Ok(())
    }

    /// Each of many volumes will read and hydrate the image, so each chunk is wanted anyway, once: it comes while the first machines
    /// start, and not when the first of them asks. Unless it would push out what others use: it takes three quarters of the RAM cache at most.
    pub(super) async fn prefetch_image(&self, snapshot: &SnapshotRef) -> Result<()> {
        let manifest = self.load_manifest(snapshot).await?;
        let mut absent = self.owned(&manifest, 0..manifest.chunk_count());
        let bytes: u64 = absent.iter().map(|source| u64::from(source.chunk_len)).sum();
        if bytes > self.0.transfer.tiers().0.budget_bytes / 4 * 3 {
            return Ok(());
        }
        absent.retain(|source| !self.0.transfer.is_cached(&source.digest).0);
        self.spawn_prefetch(absent, IMAGE_WINDOW_CHUNKS);
        Ok(())
    }

    fn spawn_prefetch(&self, sources: Vec<ChunkSource>, window: usize) {
        let shard = self.clone();
        self.0.platform.spawn(Queue::Serve, async move { shard.prefetch(sources, window).await });
    }

    /// Who wants one of them meanwhile joins, and makes it urgent. What fails is fetched when somebody wants it.
    async fn prefetch(&self, sources: Vec<ChunkSource>, window: usize) {
        for window in sources.chunks(window) {
            if self.0.stopping.get() {
                return;
            }
            let answers = self.request(window.to_vec(), FetchClass::BootSet);
            let fetched = futures::future::join_all(answers.into_iter().map(Answer::chunk)).await;
            self.0.counters.boot_chunks_prefetched.add(fetched.iter().filter(|chunk| chunk.is_ok()).count() as u64);
        }
    }
}
