//! `/v1/images/{name}/bootset`: what machines read when they boot from an image; learned from the shards' recordings, kept in
//! the object store beside the image, and handed to the shards before volumes are made.
//!
//! Several nodes may learn about the same image: each writes what it knows, the last one stays. Nothing depends on a set
//! but speed, so a set that can't be read or written is logged and done without.

#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use crate::bootset::{BOOT_SET_PREFIX, BootSet, CHUNKS_MAX, Learned, boot_set_key};
use crate::error::{Error, Result};
use crate::metrics::Metric;
use crate::shard::api::Command;
use crate::snapshot::Manifest;
use crate::types::SnapshotRef;

use super::Control;
use super::extract::{Body, Segment};
use super::problem::{Answer, Problem};

/// Recordings are taken and learned from this often.
const LEARN_PERIOD: Duration = Duration::from_secs(2);
/// Sets that are kept in memory and inherited from; a node with more images does without the others'.
const SETS_MAX: usize = 256;

/// What the node knows.
#[derive(Default)]
pub(super) struct BootSets {
    by_image: BTreeMap<String, BootSet>,
    /// The sets of the object store have been read.
    loaded: bool,
    learned: Learned,
    boots: u64,
}

#[derive(Serialize)]
pub(super) struct Shown {
    image: String,
    /// Boots it was learned from; 0: what the image inherits from others.
    boots: u32,
    chunks: usize,
    /// Bytes of those chunks.
    bytes: u64,
    /// Of the image's data.
    share: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordRequest {
    /// Numbers of chunks in the order a boot touches them.
    chunks: Vec<u32>,
}

pub(super) async fn show(State(control): State<Control>, Segment(name): Segment) -> Answer<Json<Shown>> {
    let manifest = control.manifest_as_it_is(&name).await?;
    let mut sets = control.0.boot_sets.lock().await;
    sets.load(&control).await?;
    Ok(Json(shown(&sets.of(&name), &manifest)))
}

/// A boot as an operator knows it: replaces what was learned.
pub(super) async fn record(
    State(control): State<Control>,
    Segment(name): Segment,
    Body(request): Body<RecordRequest>,
) -> Answer<Json<Shown>> {
    let manifest = control.manifest_as_it_is(&name).await?;
    if request.chunks.is_empty() || request.chunks.len() > CHUNKS_MAX {
        return Err(Problem::invalid(format!("chunks: {} are not 1 to {CHUNKS_MAX}", request.chunks.len())));
    }
    if let Some(beyond) = request.chunks.iter().find(|chunk| **chunk >= manifest.chunk_count()) {
        let count = manifest.chunk_count();
        return Err(Problem::invalid(format!("chunks: the image has {count} chunks, there is no {beyond}")));
    }
    let touched: Vec<_> = request.chunks.iter().filter_map(|chunk| manifest.digest(*chunk)).collect();
    let mut set = BootSet::default();
    set.learn(&touched);
    let mut sets = control.0.boot_sets.lock().await;
    sets.load(&control).await?;
    control.0.shards.put_object(boot_set_key(&name), set.encode()).await?;
    sets.by_image.insert(name, set.clone());
    drop(sets);
    control.hand_out(&set, &manifest, false).await?;
    Ok(Json(shown(&set, &manifest)))
}

pub(super) async fn drop_set(State(control): State<Control>, Segment(name): Segment) -> Answer<Json<Shown>> {
    let manifest = control.manifest_as_it_is(&name).await?;
    let mut sets = control.0.boot_sets.lock().await;
    sets.load(&control).await?;
    control.0.shards.delete_object(boot_set_key(&name)).await?;
    let dropped = sets.by_image.remove(&name).unwrap_or_default();
    drop(sets);
    control.hand_out(&BootSet::default(), &manifest, false).await?;
    Ok(Json(shown(&dropped, &manifest)))
}

fn shown(set: &BootSet, manifest: &Manifest) -> Shown {
    let chunks = set.chunks_of(manifest);
    let bytes = chunks.iter().map(|chunk| u64::from(manifest.chunk_len(*chunk))).sum();
    let data = |chunk: &u32| manifest.digest(*chunk).is_some();
    let all: u64 = (0..manifest.chunk_count()).filter(data).map(|chunk| u64::from(manifest.chunk_len(chunk))).sum();
    let share = if all == 0 { 0.0 } else { bytes as f64 / all as f64 };
    Shown { image: manifest.name.clone(), boots: set.boots(), chunks: chunks.len(), bytes, share }
}

impl BootSets {
    /// Reads the sets of the object store, once.
    async fn load(&mut self, control: &Control) -> Result<()> {
        if self.loaded {
            return Ok(());
        }
        for object in control.0.shards.list_objects(BOOT_SET_PREFIX).await?.into_iter().take(SETS_MAX) {
            let Some(bytes) = control.0.shards.get_object(&object.key).await? else { continue };
            let image = object.key.strip_prefix(BOOT_SET_PREFIX).unwrap_or_default().to_owned();
            match BootSet::decode(&bytes) {
                Ok(set) => drop(self.by_image.entry(image).or_insert(set)),
                Err(error) => tracing::warn!(image, %error, "boot set not used"),
            }
        }
        self.loaded = true;
        Ok(())
    }

    /// The image's own set, or what it inherits.
    fn of(&self, image: &str) -> BootSet {
        self.by_image.get(image).cloned().unwrap_or_else(|| BootSet::inherit(self.by_image.values()))
    }
}

impl Control {
    /// Learns from what the shards recorded, for ever. Errors are logged; what was recorded then is lost.
    pub(super) async fn keep_boot_sets(&self) {
        if let Err(error) = self.hand_out_again().await {
            tracing::warn!(%error, "volumes go on without a boot set");
        }
        loop {
            tokio::time::sleep(LEARN_PERIOD).await;
            if let Err(error) = self.learn_boots().await {
                tracing::warn!(%error, "boot sets not updated");
            }
        }
    }

    /// After a restart: the sets of the images whose volumes are not hydrated.
    async fn hand_out_again(&self) -> Result<()> {
        let stats = self.0.shards.query_all(|reply| Command::Stats { reply }).await?;
        let images: BTreeSet<String> = stats.into_iter().flat_map(|stats| stats.snapshots_needed).collect();
        for image in images {
            let mut sets = self.0.boot_sets.lock().await;
            sets.load(self).await?;
            let set = sets.of(&image);
            drop(sets);
            if let (false, Ok(manifest)) = (set.is_empty(), self.manifest_as_it_is(&image).await) {
                self.hand_out(&set, &manifest, false).await?;
            }
        }
        Ok(())
    }

    async fn learn_boots(&self) -> Result<()> {
        let recorded = self.0.shards.query_all(|reply| Command::TakeBoots { reply }).await?;
        let mut changed = BTreeMap::new();
        let mut sets = self.0.boot_sets.lock().await;
        for boot in recorded.into_iter().flatten() {
            sets.load(self).await?;
            let image = boot.snapshot.name.to_string();
            if !sets.by_image.contains_key(&image) && sets.by_image.len() >= SETS_MAX {
                continue;
            }
            let learned = sets.by_image.entry(image.clone()).or_default().learn(&boot.touched);
            sets.learned.hits += learned.hits;
            sets.learned.wasted += learned.wasted;
            sets.learned.new += learned.new;
            sets.boots += 1;
            changed.insert(image, boot.snapshot);
        }
        let changed: Vec<(SnapshotRef, BootSet)> =
            changed.into_iter().map(|(image, snapshot)| (snapshot, sets.of(&image))).collect();
        drop(sets);
        for (snapshot, set) in changed {
            self.0.shards.put_object(boot_set_key(&snapshot.name), set.encode()).await?;
            let Ok(manifest) = self.manifest_as_it_is(&snapshot.name).await else { continue };
            if manifest.id == snapshot.id {
                tracing::info!(image = &*snapshot.name, boots = set.boots(), chunks = set.len(), "boot set learned");
                self.hand_out(&set, &manifest, false).await?;
            }
        }
        Ok(())
    }

    /// Volumes of the image are about to be made: they hydrate its boot set first, and the node fetches it now; of a `wave` of them,
    /// then the rest of the image.
    pub(super) async fn prepare_boots(&self, manifest: &Manifest, wave: bool) {
        let prepared = async {
            let mut sets = self.0.boot_sets.lock().await;
            sets.load(self).await?;
            let set = sets.of(&manifest.name);
            drop(sets);
            if !set.is_empty() {
                self.hand_out(&set, manifest, true).await?;
            }
            if wave {
                let snapshot = manifest.reference();
                let command = |reply| Command::PrefetchImage { snapshot: snapshot.clone(), reply };
                self.0.shards.query_all(command).await?.into_iter().collect::<Result<()>>()?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = prepared.await {
            tracing::warn!(image = manifest.name, %error, "nothing is fetched ahead for the new volumes");
        }
    }

    async fn hand_out(&self, set: &BootSet, manifest: &Manifest, prefetch: bool) -> Result<()> {
        let chunks: Arc<[u32]> = set.chunks_of(manifest).into();
        let snapshot = manifest.reference();
        let command = |reply| {
            let (snapshot, chunks) = (snapshot.clone(), chunks.clone());
            Command::UseBootSet { snapshot, chunks, prefetch, reply }
        };
        self.0.shards.query_all(command).await?.into_iter().collect()
    }

    /// What boots said about the sets that were there before them.
    pub(super) async fn boot_set_metrics(&self) -> Vec<Metric> {
        let sets = self.0.boot_sets.lock().await;
        let Learned { hits, wasted, new } = sets.learned;
        [
            ("bootset_boots_total", "Boots that boot sets learned from.", sets.boots),
            ("bootset_hit_chunks_total", "Chunks of a boot set that a boot touched.", hits),
            ("bootset_wasted_chunks_total", "Chunks of a boot set that a boot did not touch.", wasted),
            ("bootset_new_chunks_total", "Chunks that a boot touched and its set did not have.", new),
        ]
        .map(|(name, help, value)| (name, "counter", help, value))
        .to_vec()
    }
}
