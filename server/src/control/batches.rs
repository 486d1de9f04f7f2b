//! Batches: many volumes asked for at once. Admitted as a whole and durably, made step by step, and gone on with after a
//! restart.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

mod api;
mod measure;
mod progress;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) use api::{cancel, create, events, list, retry, show};
use measure::Speeds;
use progress::Totals;

use crate::batch::{self, Record, State, Stored};
use crate::error::Status;
use crate::metrics::Metric;
use crate::shard::api::StoreLoad;
use crate::types::HydrationRate;

use super::problem::{Answer, Problem};

/// Batches that have ended are remembered until there are so many of them.
const ENDED_MAX: usize = 1_000;

/// A batch, shared by requests and by whoever works on it.
pub(super) struct Entry {
    id: String,
    record: Mutex<Record>,
    /// Volumes not made yet, by the label of their store.
    pending: Mutex<BTreeMap<String, u64>>,
    /// Serialises changes of the record with the writing of its file.
    writing: tokio::sync::Mutex<()>,
    /// Held by the one task that makes or deletes volumes.
    working: tokio::sync::Mutex<()>,
}

/// All batches of the node.
pub(super) struct Batches {
    data: PathBuf,
    entries: Mutex<BTreeMap<u64, Arc<Entry>>>,
    totals: tokio::sync::Mutex<Totals>,
    speeds: Mutex<Speeds>,
    /// Volumes were deleted since batches that have nothing to wait for were looked at last.
    deleted: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    fn new(record: Record) -> Arc<Entry> {
        Arc::new(Entry {
            id: record.id_text().to_string(),
            record: Mutex::new(record),
            pending: Mutex::default(),
            writing: Default::default(),
            working: Default::default(),
        })
    }

    pub(super) fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    fn state(&self) -> State {
        lock(&self.record).state
    }

    /// The volumes that are still to be made.
    fn set_pending(&self, volumes: &[u32]) {
        let mut pending = BTreeMap::new();
        let record = lock(&self.record);
        for volume in volumes {
            *pending.entry(record.store_of(*volume).to_string()).or_default() += 1;
        }
        drop(record);
        *lock(&self.pending) = pending;
    }
}

impl Batches {
    /// Those that the data directory remembers.
    pub(super) fn load(data: &Path) -> Batches {
        let Stored { records, faults } = batch::read_all(data).unwrap_or_else(|error| {
            tracing::error!(%error, "batches can't be read: their volumes are not affected");
            Default::default()
        });
        for (path, fault) in faults {
            tracing::error!(file = %path.display(), fault, "not a batch: its volumes, if any, are not affected");
        }
        let entries = records.into_iter().map(|record| (record.id(), Entry::new(record)));
        Batches {
            data: data.to_path_buf(),
            entries: Mutex::new(entries.collect()),
            totals: Default::default(),
            speeds: Mutex::default(),
            deleted: AtomicBool::new(true),
        }
    }

    fn all(&self) -> Vec<Arc<Entry>> {
        lock(&self.entries).values().cloned().collect()
    }

    fn get(&self, id: &str) -> Answer<Arc<Entry>> {
        let found = u64::from_str_radix(id, 16).ok().and_then(|id| lock(&self.entries).get(&id).cloned());
        found.filter(|entry| entry.id == id).ok_or_else(|| unknown(id))
    }

    fn deadline_of(&self, id: u64) -> Option<u64> {
        let entry = lock(&self.entries).get(&id).cloned()?;
        lock(&entry.record).deadline_unix_ms()
    }

    /// The batch that was admitted with this token.
    fn of_token(&self, token: &str) -> Option<Arc<Entry>> {
        self.all().into_iter().find(|entry| lock(&entry.record).request.token.as_deref() == Some(token))
    }

    /// Adds a batch whose file was written.
    fn insert(&self, record: Record) -> Arc<Entry> {
        let id = record.id();
        let entry = Entry::new(record);
        lock(&self.entries).insert(id, entry.clone());
        entry
    }

    /// Changes a batch durably. Nothing has changed if its file can't be written.
    async fn update(&self, entry: &Entry, change: impl FnOnce(&mut Record)) -> Answer<()> {
        let _turn = entry.writing.lock().await;
        let mut record = entry.record();
        change(&mut record);
        if record == *lock(&entry.record) {
            return Ok(());
        }
        self.write(&record).await?;
        *lock(&entry.record) = record;
        // What was counted before says nothing of the state it is in now.
        self.totals.lock().await.forget();
        Ok(())
    }

    async fn write(&self, record: &Record) -> Answer<()> {
        let (data, record) = (self.data.clone(), record.clone());
        let written = tokio::task::spawn_blocking(move || batch::write(&data, &record)).await;
        let written = written.map_err(|e| Problem::new(Status::Internal, format!("writing a batch: {e}")))?;
        written.map_err(|error| {
            let full = matches!(&error, crate::datadir::DataDirError::Io { error, .. } if is_full(error));
            Problem::new(if full { Status::NoSpace } else { Status::Io }, error.to_string())
        })
    }

    /// Forgets the oldest of the batches that have ended.
    fn prune(&self) {
        let mut entries = lock(&self.entries);
        let ended = |entry: &Arc<Entry>| lock(&entry.record).milestones.ended_unix_ms;
        let mut old: Vec<(u64, u64)> =
            entries.iter().filter_map(|(id, entry)| ended(entry).map(|ended| (ended, *id))).collect();
        old.sort_unstable();
        for (_, id) in &old[..old.len().saturating_sub(ENDED_MAX)] {
            if let Err(error) = batch::remove(&self.data, &crate::types::batch_text(*id)) {
                tracing::warn!(%error, "the file of a batch that has ended was not removed");
                return;
            }
            entries.remove(id);
        }
    }

    /// No name may be that of a volume which a batch is about to make.
    pub(super) fn check_names(&self, names: &[String]) -> Answer<()> {
        for entry in self.all() {
            let record = lock(&entry.record);
            if !record.is_open() {
                continue;
            }
            if let Some(taken) = names.iter().find(|name| record.index_of(name).is_some()) {
                let detail = format!("volume {taken:?} belongs to batch {}", entry.id);
                return Err(Problem::new(Status::NameTaken, detail));
            }
        }
        Ok(())
    }

    /// A batch that still makes volumes would make one again that is deleted behind its back.
    pub(super) fn check_deletion(&self, name: &str) -> Answer<()> {
        let of = self.all().into_iter().find(|entry| {
            let record = lock(&entry.record);
            record.is_open() && record.index_of(name).is_some()
        });
        let Some(Entry { id, .. }) = of.as_deref() else { return Ok(()) };
        let detail = format!("volume {name:?} belongs to batch {id}, which is not complete: cancel the batch");
        Err(Problem::new(Status::Conflict, detail))
    }

    /// A volume is gone: perhaps the last one of its batch.
    pub(super) async fn note_deletion(&self) {
        // First of all: whoever looks because of it must not be told what was before.
        self.totals.lock().await.forget();
        self.deleted.store(true, Ordering::Relaxed);
    }

    /// Adds what is about to come to a store.
    pub(super) fn add_pending(&self, store: &str, load: &mut StoreLoad) {
        for entry in self.all() {
            let Some(volumes) = lock(&entry.pending).get(store).copied() else { continue };
            let record = lock(&entry.record);
            load.volumes += volumes;
            load.volume_bytes = load.volume_bytes.saturating_add(volumes.saturating_mul(record.size_bytes));
            if record.rate != HydrationRate::None {
                load.backlog_bytes = load.backlog_bytes.saturating_add(volumes.saturating_mul(record.data_bytes));
            }
            if let HydrationRate::BytesPerSecond(rate) = record.rate {
                let promised = &mut load.promised_bytes_per_second;
                *promised = promised.saturating_add(volumes.saturating_mul(rate));
            }
        }
    }

    /// Metric name, kind, help text and value of each.
    pub(super) fn metrics(&self) -> Vec<Metric> {
        let states: Vec<State> = self.all().iter().map(|entry| entry.state()).collect();
        let count = |state: State| states.iter().filter(|of| **of == state).count() as u64;
        vec![
            ("batches_creating", "gauge", "Batches whose volumes are being made.", count(State::Creating)),
            ("batches_cancelling", "gauge", "Batches whose volumes are being deleted.", count(State::Cancelling)),
            ("batches_stalled", "gauge", "Batches that wait for an operator: retry or cancel.", count(State::Stalled)),
        ]
    }

    /// Images of batches that are not complete.
    pub(super) fn snapshots_needed(&self) -> BTreeSet<String> {
        let open = |entry: &Arc<Entry>| {
            let record = lock(&entry.record);
            record.request.snapshot.clone().filter(|_| record.is_open())
        };
        self.all().iter().filter_map(open).collect()
    }
}

fn unknown(id: &str) -> Problem {
    Problem::not_found(format!("no batch {id:?} on this node"))
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
