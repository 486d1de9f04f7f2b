//! Uploads: snapshots that come from outside, block by block.
//!
//! An upload follows the protocol of an import (`docs/snapshot.md`): marker, packs, manifest by one conditional put, marker
//! gone. It lives in memory: after a restart of the node it is unknown, and what its file says is used to remove the
//! marker. `api` has the handlers, `commit` the end of an upload, good or bad.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use crate::metrics::Metric;
use crate::snapshot::draft::Draft;
use crate::upload::{self, Record};

use super::Control;
use super::problem::{Answer, Problem};

pub(super) use api::{abandon, complete, list, put, show, start};

mod api;
mod commit;

/// Open uploads of a node, at most: each has up to three packs of 8 MiB in memory.
const UPLOADS_MAX: usize = 8;
/// Blocks of one upload, at most: about 100 bytes each until the end.
const BLOCKS_MAX: u32 = 4 << 20;
/// An upload that nobody has sent anything to for this long is over.
const IDLE_MAX: Duration = Duration::from_secs(3600);
/// How often idle uploads and what ended ones left are looked after.
const UPKEEP_PERIOD: Duration = Duration::from_secs(15);
/// Ended uploads that are remembered, so that a late request hears what became of its upload.
const ENDED_MAX: usize = 1000;

/// One open upload.
pub(super) struct Upload {
    id: u128,
    snapshot: String,
    parent: Option<String>,
    size_bytes: u64,
    chunk_bytes: u32,
    started_unix_ms: u64,
    last_used: Mutex<Instant>,
    blocks: AtomicU32,
    /// No request may change it any more.
    over: AtomicBool,
    /// The manifest may have been put, though no answer said so: its packs stay.
    committing: AtomicBool,
    /// Its requests take turns.
    draft: tokio::sync::Mutex<Draft>,
    /// Its place among the open ones.
    _place: OwnedSemaphorePermit,
}

/// How an upload ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ended {
    Completed { snapshot: String },
    Abandoned,
    Expired,
}

/// The uploads of a node.
pub(super) struct Uploads {
    open: Mutex<BTreeMap<u128, Arc<Upload>>>,
    places: Arc<tokio::sync::Semaphore>,
    ended: Mutex<VecDeque<(u128, Ended)>>,
    /// Over, with a marker in the object store; `true`: nobody can need the packs.
    left: Mutex<Vec<(Record, bool)>>,
    cleaning: tokio::sync::Mutex<()>,
    tally: Tally,
}

/// Counts since the start.
#[derive(Default)]
struct Tally {
    started: AtomicU64,
    completed: AtomicU64,
    abandoned: AtomicU64,
    expired: AtomicU64,
}

impl Uploads {
    /// None is open. Those that an earlier run left are removed from the object store in time.
    pub(super) fn load(data: &Path) -> Uploads {
        let upload::Left { records, faults } = upload::read_all(data).unwrap_or_else(|error| {
            tracing::error!(%error, "uploads of an earlier run can't be read: their markers stay");
            Default::default()
        });
        for (path, fault) in faults {
            tracing::error!(file = %path.display(), fault, "not an upload: its marker, if any, stays");
        }
        Uploads {
            open: Mutex::default(),
            places: Arc::new(tokio::sync::Semaphore::new(UPLOADS_MAX)),
            ended: Mutex::default(),
            left: Mutex::new(records.into_iter().map(|record| (record, false)).collect()),
            cleaning: tokio::sync::Mutex::default(),
            tally: Tally::default(),
        }
    }

    /// The open upload of this id, which is now in use.
    fn get(&self, text: &str) -> Answer<Arc<Upload>> {
        let id = parse_id(text).ok_or_else(|| unknown(text))?;
        let Some(upload) = lock(&self.open).get(&id).cloned() else { return Err(self.gone(id)) };
        *lock(&upload.last_used) = Instant::now();
        Ok(upload)
    }

    /// Why there is no such upload.
    fn gone(&self, id: u128) -> Problem {
        let text = super::blocks::id_text(id);
        let why = match self.end_of(id) {
            None => return unknown(&text),
            Some(Ended::Completed { snapshot }) => format!("is complete: it is snapshot {snapshot:?}"),
            Some(Ended::Abandoned) => "was abandoned".to_owned(),
            Some(Ended::Expired) => {
                format!("expired: nothing was sent to it for {} minutes; start again", IDLE_MAX.as_secs() / 60)
            }
        };
        Problem::not_found(format!("upload {text} {why}"))
    }

    fn end_of(&self, id: u128) -> Option<Ended> {
        lock(&self.ended).iter().find(|(ended, _)| *ended == id).map(|(_, end)| end.clone())
    }

    /// Takes an upload out of the open ones; `false`: it was not among them.
    fn end(&self, upload: &Upload, end: Ended) -> bool {
        if lock(&self.open).remove(&upload.id).is_none() {
            return false;
        }
        upload.over.store(true, Ordering::Relaxed);
        let counter = match &end {
            Ended::Completed { .. } => &self.tally.completed,
            Ended::Abandoned => &self.tally.abandoned,
            Ended::Expired => &self.tally.expired,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut ended = lock(&self.ended);
        if ended.len() >= ENDED_MAX {
            ended.pop_front();
        }
        ended.push_back((upload.id, end));
        true
    }

    pub(super) fn metrics(&self) -> [Metric; 5] {
        let Tally { started, completed, abandoned, expired } = &self.tally;
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let open = lock(&self.open).len() as u64;
        [
            ("uploads_open", "gauge", "Open uploads of snapshots.", open),
            ("uploads_started_total", "counter", "Uploads that were started.", value(started)),
            ("uploads_completed_total", "counter", "Uploads that became snapshots.", value(completed)),
            ("uploads_abandoned_total", "counter", "Uploads that their clients gave up.", value(abandoned)),
            (
                "uploads_expired_total",
                "counter",
                "Uploads that ended because nothing was sent to them.",
                value(expired),
            ),
        ]
    }

    /// Ends the uploads that were not used for [`IDLE_MAX`] before `now`, and returns them.
    fn expire(&self, now: Instant) -> Vec<Arc<Upload>> {
        let idle = |upload: &Arc<Upload>| now.saturating_duration_since(*lock(&upload.last_used)) >= IDLE_MAX;
        let idle: Vec<_> = lock(&self.open).values().filter(|upload| idle(upload)).cloned().collect();
        idle.into_iter().filter(|upload| self.end(upload, Ended::Expired)).collect()
    }
}

impl Upload {
    /// Refuses an upload that ended while the request waited for its turn.
    fn check_open(&self, uploads: &Uploads) -> Answer<()> {
        if self.over.load(Ordering::Relaxed) { Err(uploads.gone(self.id)) } else { Ok(()) }
    }

    fn record(&self) -> Record {
        Record { id: self.id, snapshot: self.snapshot.clone() }
    }
}

impl Control {
    /// Ends idle uploads and removes what ended ones left in the object store, for ever.
    pub(super) async fn keep_uploads(&self) {
        loop {
            for upload in self.0.uploads.expire(Instant::now()) {
                let id = super::blocks::id_text(upload.id);
                tracing::warn!(upload = id, snapshot = upload.snapshot, "upload expired: nothing was sent to it");
                self.leave(&upload).await;
            }
            self.clean().await;
            tokio::time::sleep(UPKEEP_PERIOD).await;
        }
    }
}

fn parse_id(text: &str) -> Option<u128> {
    let id = u128::from_str_radix(text, 16).ok()?;
    (super::blocks::id_text(id) == text).then_some(id)
}

fn unknown(id: &str) -> Problem {
    Problem::not_found(format!("no upload {id:?} on this node: uploads end with a restart of the node; start again"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SnapshotInfo;

    fn upload(uploads: &Uploads, id: u128) -> Arc<Upload> {
        let info = SnapshotInfo {
            id,
            name: "a".to_owned(),
            size_bytes: 1 << 20,
            chunk_bytes: 1 << 16,
            parent: None,
            created_unix_ms: 0,
        };
        let upload = Arc::new(Upload {
            id,
            snapshot: "a".to_owned(),
            parent: None,
            size_bytes: info.size_bytes,
            chunk_bytes: info.chunk_bytes,
            started_unix_ms: 0,
            last_used: Mutex::new(Instant::now()),
            blocks: AtomicU32::new(0),
            over: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            draft: tokio::sync::Mutex::new(Draft::new(info, None)),
            _place: uploads.places.clone().try_acquire_owned().unwrap(),
        });
        lock(&uploads.open).insert(id, upload.clone());
        upload
    }

    #[test]
    fn an_idle_upload_expires_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let uploads = Uploads::load(dir.path());
        let (idle, used) = (upload(&uploads, 1), upload(&uploads, 2));
        let later = Instant::now() + IDLE_MAX;
        *lock(&used.last_used) = later;
        let expired: Vec<u128> = uploads.expire(later).iter().map(|upload| upload.id).collect();
        assert_eq!(expired, [1]);
        let said = |id| uploads.get(&super::super::blocks::id_text(id)).map(|_| ()).map_err(|e| e.detail().to_owned());
        assert!(said(1).unwrap_err().contains("expired: nothing was sent to it for 60 minutes"));
        assert!(said(3).unwrap_err().contains("restart"));
        assert_eq!(said(2), Ok(()));
        assert!(idle.check_open(&uploads).is_err() && used.check_open(&uploads).is_ok());
    }

    #[test]
    fn the_last_ends_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let uploads = Uploads::load(dir.path());
        for id in 0..=ENDED_MAX as u128 {
            let ended = upload(&uploads, id);
            assert!(uploads.end(&ended, Ended::Abandoned) && !uploads.end(&ended, Ended::Expired));
        }
        assert_eq!((uploads.end_of(0), uploads.end_of(1)), (None, Some(Ended::Abandoned)));
    }
}
