//! Snapshots of volumes being taken: one after the other, on a thread of its own, which may block.
//!
//! First the marker, so that nothing the snapshot builds on is collected; then the cut of all volumes of the group, on all their shards; then
//! each volume's changed chunks are captured, compressed and stored; then the manifests, and only then the shards forget what had
//! changed. Whatever stops it before leaves the volumes as if it had never been begun, and what was stored is found again by
//! the next one of the same name.
#![allow(clippy::disallowed_methods)] // Not on a shard.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::executor::block_on;

use crate::budget::TokenBucket;
use crate::datadir::random_bytes;
use crate::error::{Error, Result, Status};
use crate::import::{Begun, Captured, Device, Found, ImportError, StoredVolume, begin_snapshot};
use crate::object_store::any::StoreChoice;
use crate::platform::Platform;
use crate::platform::blocking::{Blocking, ToolStore, open_store};
use crate::platform::glommio::lower_priority;
use crate::shard::api::{Command, CutVolume, CutWanted, Prepared};
use crate::shard::changes::ChunkSet;
use crate::snapshot::{CatalogError, ChunkEntry, Manifest, catalog, deletion};
use crate::types::SnapshotRef;

use super::shards::{Shards, object_error};

/// Compression shares the cores with the shards: one thread leaves them most of one.
const THREADS: usize = 1;

/// A snapshot to take: names of the volumes, and of the snapshots they become.
pub(super) struct Wanted {
    pub names: Vec<(String, String)>,
    /// Bytes captured per second; `None`: as fast as the stores' guests allow.
    pub bandwidth: Option<u64>,
}

/// What one volume became.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Taken {
    pub volume: String,
    pub snapshot: String,
    /// 32 hex digits.
    pub id: String,
    pub size_bytes: u64,
    /// What it builds on; `null`: every chunk that holds data was read, because nobody could say what had changed.
    pub base: Option<String>,
    pub chunks: u32,
    /// Chunks that were read.
    pub captured_chunks: usize,
    /// Of these, chunks whose content was stored.
    pub stored_chunks: u32,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
    /// How long its guest was held back.
    pub stall_us: u64,
}

/// A volume on its way.
struct Subject {
    volume: String,
    snapshot: String,
    shard: usize,
    prepared: Prepared,
}

/// Takes the snapshots; `progress` is told bytes looked at and in all.
///
/// # Errors
/// Nothing was taken then, and the volumes are as before.
pub(super) fn take(
    shards: &Shards,
    choice: &StoreChoice,
    wanted: &Wanted,
    progress: &(impl Fn(u64, u64) + Sync),
) -> Result<Vec<Taken>> {
    let store = open_store(choice).map_err(|e| object_error(&e))?;
    let subjects = wanted.names.iter().map(|(volume, snapshot)| look_up(shards, &store, volume, snapshot));
    let subjects = subjects.collect::<Result<Vec<_>>>()?;
    let mut begun = Vec::with_capacity(subjects.len());
    for subject in &subjects {
        match begin_snapshot(&store, &subject.snapshot) {
            Ok(one) => begun.push(one),
            Err(error) => {
                abandon(&store, &subjects, &begun);
                return Err(import_error(&error));
            }
        }
    }
    let mut cut = [0; 8];
    random_bytes(&mut cut).map_err(|e| Error::from_io("random number", &e))?;
    let cut = u64::from_le_bytes(cut);
    let cuts = cut_all(shards, &subjects, cut).inspect_err(|_| abandon(&store, &subjects, &begun))?;
    // Writes go on, and nobody waits for the rest.
    lower_priority();
    let stored = store_all(shards, &store, &subjects, &begun, cut, &cuts, wanted.bandwidth, progress)
        .and_then(|stored| commit_all(&store, &begun, &stored).map(|()| stored));
    for (at, (subject, cut_volume)) in subjects.iter().zip(&cuts).enumerate() {
        let snapshot = stored.as_ref().ok().map(|stored| stored[at].manifest.reference());
        let end = |reply| Command::EndCut { volume: cut_volume.volume, cut, snapshot, reply };
        if let Err(error) = shards.ask_now(subject.shard, end).and_then(|ended| ended) {
            // It reads more the next time.
            tracing::warn!(volume = subject.volume, %error, "what changed since the last snapshot is not forgotten");
        }
    }
    let stored = stored?;
    Ok(subjects.iter().zip(&cuts).zip(&stored).map(|((subject, cut), stored)| subject.taken(cut, stored)).collect())
}

impl Subject {
    fn taken(&self, cut: &CutVolume, stored: &StoredVolume) -> Taken {
        Taken {
            volume: self.volume.clone(),
            snapshot: self.snapshot.clone(),
            id: format!("{:032x}", stored.manifest.id),
            size_bytes: stored.manifest.size_bytes,
            base: cut.base.as_ref().filter(|_| cut.known).map(|base| base.name.to_string()),
            chunks: stored.manifest.chunk_count(),
            captured_chunks: cut.chunks.len(),
            stored_chunks: stored.counts.stored_chunks,
            raw_bytes: stored.raw_bytes,
            stored_bytes: stored.stored_bytes,
            stall_us: u64::try_from(cut.stall.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

fn look_up(shards: &Shards, store: &ToolStore, volume: &str, snapshot: &str) -> Result<Subject> {
    let shard = shards.owner_of(volume);
    let lineage = shards.ask_now(shard, |reply| Command::Lineage { name: volume.to_owned(), reply })??;
    let source = match lineage.source.as_ref().filter(|_| !lineage.hydrated) {
        Some(source) => Some(manifest_of(store, source)?.ok_or_else(|| {
            let text = format!("volume {volume:?} is not hydrated, and its snapshot {:?} is gone", &*source.name);
            Error::new(Status::UnknownSnapshot, text)
        })?),
        None => None,
    };
    // A snapshot that was deleted meanwhile tells nothing any more.
    let base = match &lineage.lineage.base {
        Some(base) => manifest_of(store, base)?,
        None => None,
    };
    let prepared = Prepared::new(lineage, base, source);
    Ok(Subject { volume: volume.to_owned(), snapshot: snapshot.to_owned(), shard, prepared })
}

fn manifest_of(store: &ToolStore, snapshot: &SnapshotRef) -> Result<Option<Arc<Manifest>>> {
    match block_on(catalog::load(store, &snapshot.name)) {
        Ok(manifest) => Ok(Some(Arc::new(manifest)).filter(|manifest| manifest.id == snapshot.id)),
        Err(CatalogError::Unknown(_)) => Ok(None),
        Err(e) => Err(Error::new(Status::ObjectStore, e.to_string())),
    }
}

/// All volumes at one moment: every shard has stopped writes before the first lets them go on.
fn cut_all(shards: &Shards, subjects: &[Subject], cut: u64) -> Result<Vec<CutVolume>> {
    let mut by_shard: BTreeMap<usize, Vec<CutWanted>> = BTreeMap::new();
    for subject in subjects {
        by_shard.entry(subject.shard).or_default().push(subject.prepared.wanted(&subject.volume));
    }
    let freeze = |(shard, wanted): (&usize, &Vec<CutWanted>)| {
        let names = wanted.iter().map(|wanted| wanted.name.clone()).collect();
        shards.ask_now(*shard, |reply| Command::Freeze { names, cut, reply }).and_then(|frozen| frozen).err()
    };
    let mut frozen = 0;
    let mut failed = by_shard.iter().inspect(|_| frozen += 1).find_map(freeze);
    // Also of a group that can't be frozen as a whole: a cut, which is ended below, is what lets writes go on.
    frozen -= usize::from(failed.is_some());
    let mut cuts: BTreeMap<String, CutVolume> = BTreeMap::new();
    for (shard, wanted) in by_shard.into_iter().take(frozen) {
        match shards.ask_now(shard, |reply| Command::Cut { wanted, cut, reply }).and_then(|cut| cut) {
            Ok(made) => cuts.extend(made.into_iter().map(|cut| (cut.name.clone(), cut))),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if failed.is_none() {
        let fit = subjects.iter().try_for_each(|subject| check_fit(shards, subject, cuts.get(&subject.volume)));
        failed = fit.err();
    }
    if let Some(error) = failed {
        for subject in subjects {
            let Some(made) = cuts.get(&subject.volume) else { continue };
            let end = |reply| Command::EndCut { volume: made.volume, cut, snapshot: None, reply };
            drop(shards.ask_now(subject.shard, end));
        }
        return Err(error);
    }
    Ok(subjects.iter().filter_map(|subject| cuts.remove(&subject.volume)).collect())
}

/// Refuses a cut of a volume that is not any more what its snapshot was prepared with.
fn check_fit(shards: &Shards, subject: &Subject, cut: Option<&CutVolume>) -> Result<()> {
    let name = &subject.volume;
    let now = shards.ask_now(subject.shard, |reply| Command::Lineage { name: name.clone(), reply })??;
    if cut.is_some_and(|cut| cut.fits(&subject.prepared.lineage, &now)) {
        return Ok(());
    }
    let text = format!("volume {name:?} was changed by another snapshot or a rollback meanwhile: try again");
    Err(Error::new(Status::Conflict, text))
}

#[allow(clippy::too_many_arguments)] // One call, of what `take` has in its hands.
fn store_all(
    shards: &Shards,
    store: &ToolStore,
    subjects: &[Subject],
    begun: &[Begun],
    cut: u64,
    cuts: &[CutVolume],
    bandwidth: Option<u64>,
    progress: &(impl Fn(u64, u64) + Sync),
) -> Result<Vec<StoredVolume>> {
    let total: u64 = subjects.iter().map(|subject| subject.prepared.lineage.size_bytes).sum();
    let pace = Pace::new(bandwidth);
    let mut before = 0;
    let mut stored = Vec::with_capacity(subjects.len());
    for ((subject, begun), cut_volume) in subjects.iter().zip(begun).zip(cuts) {
        let prepared = &subject.prepared;
        let device = VolumeDevice {
            shards,
            subject,
            cut,
            cut_volume,
            pending: cut_volume.chunks.iter().copied().collect(),
            builds_on: prepared.builds_on(cut_volume).map(|manifest| &**manifest),
            pace: &pace,
        };
        let manifests: Vec<&Manifest> = prepared.manifests().map(|manifest| &**manifest).collect();
        let captured = Captured {
            name: subject.snapshot.clone(),
            chunk_bytes: prepared.lineage.chunk_bytes,
            device: &device,
            builds_on: &manifests,
            look_everywhere: !cut_volume.known,
            parent: prepared.parent(),
            threads: THREADS,
        };
        let done = |done: u64, _| progress(before + done, total);
        stored.push(begun.store(store, &captured, &done).map_err(|e| import_error(&e))?);
        before += prepared.lineage.size_bytes;
    }
    Ok(stored)
}

/// All or none: those that exist already are taken back when one can't be made.
fn commit_all(store: &ToolStore, begun: &[Begun], stored: &[StoredVolume]) -> Result<()> {
    for (at, (begun, one)) in begun.iter().zip(stored).enumerate() {
        if let Err(error) = begun.commit(store, &one.manifest) {
            for made in &stored[..at] {
                if let Err(error) = block_on(deletion::delete(store, &Blocking, &made.manifest.name, true)) {
                    tracing::warn!(snapshot = made.manifest.name, %error, "a snapshot of a group that failed stays behind");
                }
            }
            return Err(import_error(&error));
        }
    }
    Ok(())
}

fn abandon(store: &ToolStore, subjects: &[Subject], begun: &[Begun]) {
    begun.iter().zip(subjects).for_each(|(begun, subject)| begun.abandon(store, &subject.snapshot));
}

/// A volume at its cut.
struct VolumeDevice<'a> {
    shards: &'a Shards,
    subject: &'a Subject,
    cut: u64,
    cut_volume: &'a CutVolume,
    pending: ChunkSet,
    builds_on: Option<&'a Manifest>,
    pace: &'a Pace,
}

impl Device for VolumeDevice<'_> {
    fn device_bytes(&self) -> u64 {
        self.subject.prepared.lineage.size_bytes
    }

    fn chunk(&self, index: u32, _offset: u64, len: u32) -> io::Result<Found> {
        if self.pending.contains(index) {
            self.pace.wait(u64::from(len));
            let capture =
                |reply| Command::Capture { volume: self.cut_volume.volume, cut: self.cut, chunk: index, reply };
            let captured = self.shards.ask_now(self.subject.shard, capture).and_then(|captured| captured);
            return captured.map(Found::Bytes).map_err(|e| io::Error::other(e.message));
        }
        let Some(manifest) = self.builds_on.filter(|manifest| index < manifest.chunk_count()) else {
            return Ok(Found::Zero);
        };
        Ok(match manifest.chunk(index) {
            ChunkEntry::Zero => Found::Zero,
            ChunkEntry::Stored { digest, .. } => Found::Stored(digest),
        })
    }
}

/// No more bytes are read each second than the operator allows.
struct Pace(Option<Mutex<TokenBucket>>);

impl Pace {
    fn new(bandwidth: Option<u64>) -> Pace {
        Pace(bandwidth.map(|bytes| Mutex::new(TokenBucket::new(Some(bytes), Blocking.now()))))
    }

    fn wait(&self, bytes: u64) {
        let Some(bucket) = &self.0 else { return };
        let wait = {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            let wait = bucket.wait(Blocking.now());
            bucket.charge(bytes, Blocking.now());
            wait
        };
        std::thread::sleep(wait);
    }
}

fn import_error(error: &ImportError) -> Error {
    let status = match error {
        ImportError::Invalid(_) => Status::Invalid,
        ImportError::NameTaken(_) => Status::NameTaken,
        ImportError::Interfered(_) | ImportError::Marker(_) | ImportError::Volume { .. } => Status::Conflict,
        ImportError::Image { .. } => Status::Io,
        ImportError::Catalog(_) | ImportError::Store(_) => Status::ObjectStore,
        ImportError::Manifest(_) => Status::Corrupt,
    };
    Error::new(status, error.to_string())
}

/// How far a group of snapshots is.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Task {
    pub name: String,
    pub volumes: Vec<String>,
    /// `queued`, `running`, `done` or `failed`.
    pub state: &'static str,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub seconds: f64,
    /// Code and sentence.
    pub error: Option<(String, String)>,
    pub snapshots: Vec<Taken>,
    #[serde(skip)]
    pub begun: Option<Instant>,
}
