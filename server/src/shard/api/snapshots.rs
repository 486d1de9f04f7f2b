//! What shards and the control thread tell each other about snapshots of volumes.

use std::sync::Arc;
use std::time::Duration;

use crate::mutation::{self, Mutation};
use crate::snapshot::Manifest;
use crate::types::{Changed, Lineage, SnapshotRef, VolumeId};

/// What the next snapshot of a volume builds on.
#[derive(Clone, Debug)]
pub struct VolumeLineage {
    pub id: VolumeId,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    /// What absent chunks come from.
    pub source: Option<SnapshotRef>,
    pub hydrated: bool,
    pub attached: bool,
    pub lineage: Lineage,
}

/// What a chunk of a volume holds on its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedChunk {
    /// Of as many of its first bytes as were asked for; `None`: not all of the chunk is in the volume.
    pub digest: Option<[u8; 32]>,
    /// Behind them are zeroes up to the end of the chunk or of the device.
    pub rest_is_zero: bool,
    /// Whether guests may have changed it since the base; `None`: nobody knows.
    pub changed: Option<bool>,
    /// If it was asked for: what of the chunk is in the volume, each run of sectors with its offset in the device.
    pub content: Vec<(u64, Vec<u8>)>,
}

/// A volume to cut.
#[derive(Clone, Debug)]
pub struct CutWanted {
    pub name: String,
    /// Look at every chunk, whatever is known of changes.
    pub all: bool,
    /// Capture this chunk too.
    pub also: Option<u32>,
}

/// What belongs to a snapshot of one volume.
#[derive(Clone, Debug)]
pub struct CutVolume {
    pub volume: VolumeId,
    pub name: String,
    /// What all other chunks equal: the base, or, where nothing is `known` of changes, the source.
    pub base: Option<SnapshotRef>,
    pub known: bool,
    /// Chunks to capture, each once, in order.
    pub chunks: Vec<u32>,
    /// How long its guest was held back.
    pub stall: Duration,
}

/// What the snapshot of a volume is prepared with, before its cut.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub lineage: VolumeLineage,
    /// What chunks that are not captured equal; `None`: zeroes.
    base: Option<Arc<Manifest>>,
    /// Of a volume that is not hydrated.
    source: Option<Arc<Manifest>>,
    /// The base could not be had or is not known to be right: look at everything.
    all: bool,
}

impl Prepared {
    /// With the base as far as it is still there.
    #[must_use]
    pub fn new(lineage: VolumeLineage, base: Option<Arc<Manifest>>, source: Option<Arc<Manifest>>) -> Prepared {
        let all = lineage.lineage.changed == Changed::Unknown || base.is_none() != lineage.lineage.base.is_none();
        Prepared { lineage, base, source, all }
    }

    #[must_use]
    pub fn wanted(&self, name: &str) -> CutWanted {
        CutWanted { name: name.to_owned(), all: self.all, also: self.grown_chunk() }
    }

    /// The last chunk of what it builds on, if it is longer in the volume.
    fn grown_chunk(&self) -> Option<u32> {
        let builds_on = if self.all { &self.source } else { &self.base };
        let manifest = builds_on.as_ref().filter(|manifest| manifest.size_bytes < self.lineage.size_bytes)?;
        let last = manifest.chunk_count() - 1;
        (manifest.chunk_len(last) < self.lineage.chunk_bytes).then_some(last)
    }

    /// What has the chunks that are not captured.
    #[must_use]
    pub fn builds_on(&self, cut: &CutVolume) -> Option<&Arc<Manifest>> {
        if cut.known { self.base.as_ref() } else { self.source.as_ref() }
    }

    /// Snapshots whose chunks it may be made of.
    pub fn manifests(&self) -> impl Iterator<Item = &Arc<Manifest>> {
        self.base.iter().chain(&self.source)
    }

    /// The snapshot it comes after.
    #[must_use]
    pub fn parent(&self) -> Option<String> {
        self.manifests().next().map(|manifest| manifest.name.clone())
    }
}

impl CutVolume {
    /// Whether nothing that the snapshot was prepared with, `then`, has changed. `now` was asked for after the cut: until
    /// that ends, nobody replaces the volume.
    #[must_use]
    pub fn fits(&self, then: &VolumeLineage, now: &VolumeLineage) -> bool {
        let builds_on_the_same = match self.known {
            true => self.base == then.lineage.base,
            false if mutation::on(Mutation::CutOfAnotherVolume) => true,
            false => now.source == then.source && (now.hydrated || !then.hydrated),
        };
        self.volume == then.id && now.size_bytes == then.size_bytes && builds_on_the_same
    }
}

impl VolumeLineage {
    /// Chunks of the device.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.size_bytes.div_ceil(u64::from(self.chunk_bytes))).expect("checked at creation")
    }
}
