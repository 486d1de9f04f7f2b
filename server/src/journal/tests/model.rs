//! The straightforward model of a shard's durable facts, and sequences of changes to it.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::Record;
use crate::types::{Changed, ChunkResidency, HydrationRate, Lineage, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

/// Volume `index` of a test: 64 KiB chunks (16 sectors) or 4 MiB ones, a device that ends inside a chunk and a sector.
pub(super) fn spec(index: u64) -> VolumeSpec {
    let chunk_bytes = if index.is_multiple_of(2) { 64 << 10 } else { 4 << 20 };
    VolumeSpec {
        id: VolumeId(index),
        name: format!("web-{index}").into(),
        size_bytes: 3 * u64::from(chunk_bytes) + 9 * 4096 + 512,
        chunk_bytes,
        snapshot: (!index.is_multiple_of(3)).then(|| SnapshotRef { name: "debian-12".into(), id: u128::MAX - 7 }),
        store: "main".into(),
        rate: HydrationRate::BytesPerSecond(200 << 20),
        batch: index.is_multiple_of(2).then_some(index * 1000),
        created_unix_ms: 1_700_000_000_000,
    }
}

/// A volume of which nothing is resident, attached so often.
pub(super) fn state(index: u64, generation: u64) -> VolumeState {
    VolumeState { spec: spec(index), generation, residency: Vec::new(), hydrated: false, lineage: Lineage::new(None) }
}

/// Sectors of a chunk that exist.
fn sectors_of(spec: &VolumeSpec, chunk: u32) -> u32 {
    let left = spec.size_bytes - u64::from(chunk) * u64::from(spec.chunk_bytes);
    left.min(u64::from(spec.chunk_bytes)).div_ceil(4096) as u32
}

pub(super) fn partial(spec: &VolumeSpec, sectors: impl IntoIterator<Item = u32>) -> ChunkResidency {
    let mut words = vec![0u64; (spec.chunk_bytes as usize / 4096).div_ceil(64)];
    sectors.into_iter().for_each(|sector| words[sector as usize / 64] |= 1 << (sector % 64));
    ChunkResidency::Partial(words.into())
}

#[derive(Clone, Debug)]
struct Volume {
    spec: VolumeSpec,
    generation: u64,
    hydrated: bool,
    sectors: BTreeSet<(u32, u32)>,
    lineage: Lineage,
}

/// What a shard does, without a journal.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    volumes: BTreeMap<u64, Volume>,
}

/// A change that a shard may make at any time; a volume that does not exist is created first.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Create(u64),
    Delete(u64),
    Attach(u64),
    Rate(u64, u64),
    Chunks(u64, u32, u32),
    Sectors(u64, u32, u32, u32),
    Hydrated(u64),
    /// A snapshot with this number was taken; after it these chunks were changed.
    Snapshot(u64, u64, BTreeSet<u32>),
    /// These chunks may change.
    Changing(u64, u32, u32),
    /// Rolled back to a snapshot with this number; of the chunks this one stays.
    Replace(u64, u64, u32),
}

pub(super) fn change() -> impl Strategy<Value = Change> {
    let id = 0..6u64;
    prop_oneof![
        id.clone().prop_map(Change::Create),
        id.clone().prop_map(Change::Delete),
        id.clone().prop_map(Change::Attach),
        (id.clone(), 1..1000u64).prop_map(|(id, rate)| Change::Rate(id, rate)),
        (id.clone(), 0..4u32, 1..5u32).prop_map(|(id, chunk, len)| Change::Chunks(id, chunk, len)),
        (id.clone(), 0..4u32, 0..16u32, 1..16u32).prop_map(|(id, c, sector, n)| Change::Sectors(id, c, sector, n)),
        (id.clone(), 0..4u32, 0..16u32, 1..16u32).prop_map(|(id, c, sector, n)| Change::Sectors(id, c, sector, n)),
        id.clone().prop_map(Change::Hydrated),
        (id.clone(), 0..9u64, proptest::collection::btree_set(0..4u32, 0..4))
            .prop_map(|(id, number, chunks)| Change::Snapshot(id, number, chunks)),
        (id.clone(), 0..4u32, 1..5u32).prop_map(|(id, chunk, len)| Change::Changing(id, chunk, len)),
        (id, 0..9u64, 0..4u32).prop_map(|(id, number, chunk)| Change::Replace(id, number, chunk)),
    ]
}

impl Model {
    /// Makes the change and returns the record of it, if it is one.
    pub(super) fn change(&mut self, change: &Change) -> Option<Record> {
        match *change {
            Change::Create(id) => {
                let hydrated = spec(id).snapshot.is_none();
                let lineage = Lineage::new(spec(id).snapshot);
                let fresh = Volume { spec: spec(id), generation: 0, hydrated, sectors: BTreeSet::new(), lineage };
                self.volumes.entry(id).or_insert(fresh);
                Some(Record::Created(spec(id)))
            }
            Change::Delete(id) => {
                self.volumes.remove(&id);
                Some(Record::Deleted(VolumeId(id)))
            }
            Change::Attach(id) => self.on(id, |v| {
                v.generation += 1;
                Record::Generation { volume: v.spec.id, generation: v.generation }
            }),
            Change::Rate(id, rate) => self.on(id, |v| {
                v.spec.rate = HydrationRate::BytesPerSecond(rate);
                Record::Rate { volume: v.spec.id, rate: v.spec.rate }
            }),
            Change::Chunks(id, chunk, len) => self.on(id, |v| {
                let chunks: Vec<u32> = (chunk..(chunk + len).min(v.spec.chunks())).collect();
                chunks.iter().for_each(|chunk| v.add(*chunk, 0..sectors_of(&v.spec.clone(), *chunk)));
                let chunks = chunks.into_iter().map(|chunk| (chunk, ChunkResidency::Resident)).collect();
                Record::Residency { volume: v.spec.id, chunks }
            }),
            Change::Sectors(id, chunk, sector, n) => self.on(id, |v| {
                let sectors = sector..(sector + n).min(sectors_of(&v.spec, chunk));
                v.add(chunk, sectors.clone());
                let chunks = vec![(chunk, partial(&v.spec, sectors))];
                Record::Residency { volume: v.spec.id, chunks }
            }),
            Change::Hydrated(id) => self.on(id, |v| {
                v.hydrated = true;
                Record::Hydrated { volume: v.spec.id }
            }),
            Change::Snapshot(id, number, ref changed) => self.on(id, |v| {
                let base = (number > 0).then(|| SnapshotRef { name: format!("s{number}").into(), id: number.into() });
                let runs = changed.iter().map(|chunk| (*chunk, 1)).collect::<Vec<_>>();
                v.lineage = Lineage { base, changed: Changed::Runs(joined(runs)) };
                Record::Lineage { volume: v.spec.id, lineage: v.lineage.clone() }
            }),
            Change::Changing(id, chunk, len) => self.on(id, |v| {
                let end = (chunk + len).min(v.spec.chunks());
                let start = chunk.min(end - 1);
                let Changed::Runs(runs) = &v.lineage.changed else { unreachable!("the model knows") };
                let mut changed: BTreeSet<u32> = runs.iter().flat_map(|(at, len)| *at..at + len).collect();
                changed.extend(start..end);
                v.lineage.changed = Changed::Runs(joined(changed.into_iter().map(|chunk| (chunk, 1)).collect()));
                Record::Changing { volume: v.spec.id, run: (start, end - start) }
            }),
            Change::Replace(id, number, chunk) => self.on(id, |v| {
                let snapshot = SnapshotRef { name: format!("s{number}").into(), id: number.into() };
                v.spec.snapshot = Some(snapshot.clone());
                v.lineage = Lineage::new(Some(snapshot));
                v.hydrated = false;
                v.sectors.retain(|(c, _)| *c == chunk);
                Record::Replaced(v.state())
            }),
        }
    }

    /// A model that has what was recovered.
    pub(super) fn from_states(states: &[VolumeState]) -> Model {
        let volumes = states.iter().map(|state| (state.spec.id.0, Volume::from_state(state)));
        Model { volumes: volumes.collect() }
    }

    fn on(&mut self, id: u64, act: impl FnOnce(&mut Volume) -> Record) -> Option<Record> {
        self.volumes.get_mut(&id).map(act)
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.volumes.keys().copied().collect()
    }

    pub(super) fn state(&self, id: u64) -> Option<VolumeState> {
        self.volumes.get(&id).map(Volume::state)
    }

    pub(super) fn states(&self) -> Vec<VolumeState> {
        self.volumes.values().map(Volume::state).collect()
    }
}

/// Runs that touch are one.
fn joined(runs: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    let mut all: Vec<(u32, u32)> = Vec::new();
    for (start, len) in runs {
        match all.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => all.push((start, len)),
        }
    }
    all
}

impl Volume {
    fn add(&mut self, chunk: u32, sectors: impl IntoIterator<Item = u32>) {
        self.sectors.extend(sectors.into_iter().map(|sector| (chunk, sector)));
    }

    fn from_state(state: &VolumeState) -> Volume {
        let VolumeState { spec, generation, hydrated, residency, lineage } = state.clone();
        let mut volume = Volume { spec, generation, hydrated, sectors: BTreeSet::new(), lineage };
        for (chunk, residency) in residency {
            let real = 0..sectors_of(&volume.spec, chunk);
            let sectors = real.filter(|sector| match &residency {
                ChunkResidency::Absent => false,
                ChunkResidency::Resident => true,
                ChunkResidency::Partial(words) => words[*sector as usize / 64] & (1 << (sector % 64)) != 0,
            });
            volume.add(chunk, sectors);
        }
        volume
    }

    fn state(&self) -> VolumeState {
        let chunks = if self.hydrated { 0 } else { self.spec.chunks() };
        let residency = (0..chunks).filter_map(|chunk| {
            let have: Vec<u32> = self.sectors.iter().filter(|(c, _)| *c == chunk).map(|(_, s)| *s).collect();
            match have.len() as u32 {
                0 => None,
                n if n == sectors_of(&self.spec, chunk) => Some((chunk, ChunkResidency::Resident)),
                _ => Some((chunk, partial(&self.spec, have))),
            }
        });
        VolumeState {
            spec: self.spec.clone(),
            generation: self.generation,
            residency: residency.collect(),
            hydrated: self.hydrated,
            lineage: self.lineage.clone(),
        }
    }
}
