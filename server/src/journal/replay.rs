//! Replay: from a sequence of entries to the state of the volumes. Pure and synchronous.
//!
//! The order in a segment is the order of time: a `State` says everything about its volume at that moment, and what
//! comes later changes it. While a checkpoint is being written, facts about volumes it has not reached yet (or that are
//! gone) are skipped: the volume's `State`, written later, includes them.

use std::collections::BTreeMap;

use super::record::Entry;
use crate::types::{Changed, ChunkResidency, Lineage, SECTOR_BYTES, VolumeId, VolumeSpec, VolumeState};

/// Volumes as far as they have been replayed.
#[derive(Default)]
pub(super) struct Replay {
    volumes: BTreeMap<VolumeId, Volume>,
    states: u64,
    /// Seen `CheckpointComplete`.
    pub(super) complete: bool,
    /// Seen `Closed`.
    pub(super) closed: bool,
    /// Entries applied or skipped.
    pub(super) records: u64,
}

struct Volume {
    spec: VolumeSpec,
    generation: u64,
    hydrated: bool,
    chunks: BTreeMap<u32, ChunkResidency>,
    lineage: Lineage,
}

/// A record that says what cannot be: written by a bug, or not by this journal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReplayError {
    #[error("a record of volume {volume} names chunk {chunk}, but it has only {chunks}")]
    ChunkOutOfRange { volume: VolumeId, chunk: u64, chunks: u32 },
    #[error("a record of volume {volume} holds a bitmap for chunk {chunk} that does not fit its chunk size")]
    Bitmap { volume: VolumeId, chunk: u32 },
    #[error("a record of volume {0} goes on with a lineage that was not begun")]
    Lineage(VolumeId),
    #[error("the checkpoint says it has {said} volumes, but holds {found}")]
    VolumeCount { said: u64, found: u64 },
    #[error("there is a second end of the checkpoint")]
    SecondComplete,
}

impl Replay {
    pub(super) fn apply(&mut self, entry: Entry) -> Result<(), ReplayError> {
        self.records += 1;
        match entry {
            Entry::State { spec, generation, hydrated } => {
                self.states += 1;
                self.volumes.insert(spec.id, Volume::whole(spec, generation, hydrated));
            }
            Entry::Replaced { spec, generation, hydrated } => {
                // A checkpoint that has not reached the volume may never do so: it may know only what was replaced.
                self.volumes.insert(spec.id, Volume::whole(spec, generation, hydrated));
            }
            Entry::Created(spec) => {
                // Without a snapshot nothing is to be fetched: all of it is resident, as zeroes. A `Hydrated` that
                // follows may be in the next batch, which a crash may have taken.
                let hydrated = spec.snapshot.is_none();
                let fresh = |spec: VolumeSpec| Volume {
                    lineage: Lineage::new(spec.snapshot.clone()),
                    ..Volume::whole(spec, 0, hydrated)
                };
                self.volumes.entry(spec.id).or_insert_with(|| fresh(spec));
            }
            Entry::Deleted(volume) => drop(self.volumes.remove(&volume)),
            Entry::Generation { volume, generation } => {
                self.on(volume, |v| v.generation = v.generation.max(generation));
            }
            Entry::Rate { volume, rate } => self.on(volume, |v| v.spec.rate = rate),
            Entry::Residency { volume, runs, partials } => {
                if let Some(volume) = self.volumes.get_mut(&volume) {
                    volume.add_residency(&runs, partials)?;
                }
            }
            Entry::Hydrated(volume) => self.on(volume, |v| {
                v.hydrated = true;
                v.chunks.clear();
            }),
            Entry::Lineage { volume, lineage, continued } => {
                if let Some(volume) = self.volumes.get_mut(&volume) {
                    volume.set_lineage(lineage, continued)?;
                }
            }
            Entry::Changing { volume, run } => {
                if let Some(volume) = self.volumes.get_mut(&volume) {
                    volume.add_changing(run)?;
                }
            }
            Entry::CheckpointComplete { .. } if self.complete => return Err(ReplayError::SecondComplete),
            Entry::CheckpointComplete { volumes } if volumes != self.states => {
                return Err(ReplayError::VolumeCount { said: volumes, found: self.states });
            }
            Entry::CheckpointComplete { .. } => self.complete = true,
            Entry::Closed => self.closed = true,
        }
        Ok(())
    }

    /// The volumes, sorted by id.
    pub(super) fn finish(self) -> Vec<VolumeState> {
        self.volumes.into_values().map(Volume::into_state).collect()
    }

    fn on(&mut self, volume: VolumeId, change: impl FnOnce(&mut Volume)) {
        if let Some(volume) = self.volumes.get_mut(&volume) {
            change(volume);
        }
    }
}

impl Volume {
    /// What a `State` says; nothing is known of its lineage until the record of it.
    fn whole(spec: VolumeSpec, generation: u64, hydrated: bool) -> Volume {
        Volume { spec, generation, hydrated, chunks: BTreeMap::new(), lineage: Lineage::unknown() }
    }

    fn set_lineage(&mut self, lineage: Lineage, continued: bool) -> Result<(), ReplayError> {
        let (volume, chunks) = (self.spec.id, self.spec.chunks());
        if let Changed::Runs(runs) = &lineage.changed
            && let Some((start, len)) = runs.last()
            && start + len > chunks
        {
            return Err(ReplayError::ChunkOutOfRange { volume, chunk: u64::from(start + len) - 1, chunks });
        }
        if !continued {
            self.lineage = lineage;
            return Ok(());
        }
        match (&mut self.lineage, lineage) {
            (Lineage { base, changed: Changed::Runs(runs) }, Lineage { base: same, changed: Changed::Runs(more) })
                if *base == same && runs.last().zip(more.first()).is_some_and(|(a, b)| a.0 + a.1 < b.0) =>
            {
                runs.extend(more);
                Ok(())
            }
            _ => Err(ReplayError::Lineage(volume)),
        }
    }

    fn add_changing(&mut self, (start, len): (u32, u32)) -> Result<(), ReplayError> {
        let (volume, chunks) = (self.spec.id, self.spec.chunks());
        if start + len > chunks {
            return Err(ReplayError::ChunkOutOfRange { volume, chunk: u64::from(start + len) - 1, chunks });
        }
        if let Changed::Runs(runs) = &mut self.lineage.changed {
            join(runs, start, start + len);
        }
        Ok(())
    }

    /// Everything is checked before anything changes.
    fn add_residency(&mut self, runs: &[(u32, u32)], partials: Vec<(u32, Box<[u64]>)>) -> Result<(), ReplayError> {
        let (volume, chunks) = (self.spec.id, self.spec.chunks());
        let run_ends = runs.iter().map(|(start, len)| u64::from(*start) + u64::from(*len));
        let partial_ends = partials.iter().map(|(chunk, _)| u64::from(*chunk) + 1);
        if let Some(end) = run_ends.chain(partial_ends).find(|end| *end > u64::from(chunks)) {
            return Err(ReplayError::ChunkOutOfRange { volume, chunk: end - 1, chunks });
        }
        let sectors = (self.spec.chunk_bytes / SECTOR_BYTES) as usize;
        if let Some((chunk, _)) = partials.iter().find(|(_, words)| !bitmap_fits(words, sectors)) {
            return Err(ReplayError::Bitmap { volume, chunk: *chunk });
        }
        if self.hydrated {
            return Ok(());
        }
        for (start, len) in runs {
            self.chunks.extend((*start..*start + *len).map(|chunk| (chunk, ChunkResidency::Resident)));
        }
        partials.into_iter().for_each(|(chunk, words)| self.add_sectors(chunk, words));
        Ok(())
    }

    fn add_sectors(&mut self, chunk: u32, mut words: Box<[u64]>) {
        match self.chunks.get(&chunk) {
            Some(ChunkResidency::Resident) => return,
            Some(ChunkResidency::Partial(known)) => words.iter_mut().zip(known).for_each(|(word, old)| *word |= old),
            Some(ChunkResidency::Absent) | None => {}
        }
        let sectors = sectors_of_chunk(&self.spec, chunk);
        if (0..sectors).all(|sector| words[sector / 64] & (1 << (sector % 64)) != 0) {
            self.chunks.insert(chunk, ChunkResidency::Resident);
        } else if words.iter().any(|word| *word != 0) {
            self.chunks.insert(chunk, ChunkResidency::Partial(words));
        }
    }

    fn into_state(self) -> VolumeState {
        let Volume { spec, generation, hydrated, chunks, lineage } = self;
        VolumeState { spec, generation, residency: chunks.into_iter().collect(), hydrated, lineage }
    }
}

/// Sectors of a chunk that lie in the device: fewer in a short last chunk.
fn sectors_of_chunk(spec: &VolumeSpec, chunk: u32) -> usize {
    let start = u64::from(chunk) * u64::from(spec.chunk_bytes);
    let bytes = (spec.size_bytes - start).min(u64::from(spec.chunk_bytes));
    bytes.div_ceil(u64::from(SECTOR_BYTES)) as usize
}

/// As many words as the chunk size asks for, and no bit past its last sector.
fn bitmap_fits(words: &[u64], sectors: usize) -> bool {
    let spare = words.len() * 64 - sectors.min(words.len() * 64);
    words.len() == sectors.div_ceil(64) && words.last().is_some_and(|last| spare == 0 || last >> (64 - spare) == 0)
}

/// Adds `start..end` to runs that are in order and do not touch.
fn join(runs: &mut Vec<(u32, u32)>, start: u32, end: u32) {
    let from = runs.partition_point(|(first, len)| first + len < start);
    let to = runs.partition_point(|(first, _)| *first <= end);
    let (mut start, mut end) = (start, end);
    if from < to {
        let (last, len) = runs[to - 1];
        (start, end) = (start.min(runs[from].0), end.max(last + len));
    }
    runs.splice(from..to, [(start, end - start)]);
}
