//! How far batches are: what their files say, joined with what the shards see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::batch::estimate::Prediction;
use crate::batch::{Record, State};
use crate::shard::api::{BatchOnStore, BatchTotals, Command};
use crate::types::batch_text;

use super::super::Control;
use super::super::create::unix_ms;
use super::super::problem::Answer;
use super::{Entry, lock, unknown};

/// However many ask, the shards are asked this often at most.
const TOTALS_AGE_MAX: Duration = Duration::from_millis(200);
/// Milestones are looked for this often.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// What the shards last said.
#[derive(Default)]
pub(super) struct Totals(Option<(Instant, Arc<BTreeMap<u64, BatchTotals>>)>);

impl Totals {
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

/// A batch as it is told.
#[derive(Clone, Debug, Serialize)]
pub(in crate::control) struct Progress {
    id: String,
    /// `creating`, `stalled`, `created`, `hydrated`, `cancelling`, `cancelled` or `deleted`.
    state: &'static str,
    /// Why it does not go on.
    problem: Option<String>,
    token: Option<String>,
    snapshot: Option<String>,
    name_prefix: Option<String>,
    created_unix_ms: u64,
    /// Volumes it is to have.
    count: u64,
    /// Volumes it has.
    volumes: u64,
    /// Those that a host can attach.
    volumes_attachable: u64,
    volumes_attached: u64,
    /// `null`: the image has no boot set yet.
    volumes_boot_set_resident: Option<u64>,
    volumes_hydrated: u64,
    /// Could not be made, or their store fails.
    volumes_failed: u64,
    size_bytes: u64,
    resident_bytes: u64,
    remaining_bytes: u64,
    hydration_bytes_per_second: u64,
    /// Until the last volume is hydrated; `null` if nothing moves, or not everywhere.
    eta_seconds: Option<f64>,
    deadline_unix_ms: Option<u64>,
    /// `null` until it is known.
    deadline_met: Option<bool>,
    predicted: Option<Prediction>,
    actual: Actual,
    stores: Vec<OnStore>,
    /// Of some volume.
    last_error: Option<String>,
}

/// Seconds from admission until it happened; `null`: not yet.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Actual {
    created_seconds: Option<f64>,
    boot_set_seconds: Option<f64>,
    hydrated_seconds: Option<f64>,
    /// How much longer than predicted it took.
    hydrated_off_percent: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
struct OnStore {
    label: String,
    volumes: u64,
    remaining_bytes: u64,
    hydration_bytes_per_second: u64,
    eta_seconds: Option<f64>,
}

impl Progress {
    /// Nothing more will happen by itself.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, "hydrated" | "cancelled" | "deleted")
    }

    fn of_record(record: &Record, totals: &BatchTotals) -> Progress {
        let milestones = &record.milestones;
        let unmade = if record.state == State::Stalled { record.count().saturating_sub(totals.volumes) } else { 0 };
        let since = |at: Option<u64>| at.map(|at| at.saturating_sub(record.admitted_unix_ms) as f64 / 1e3);
        let hydrated_seconds = since(milestones.hydrated_unix_ms);
        let predicted = record.predicted.as_ref().and_then(|predicted| predicted.hydrated_seconds);
        let off = hydrated_seconds.zip(predicted.filter(|predicted| *predicted > 0.0));
        let met = |deadline| match milestones.hydrated_unix_ms {
            Some(at) => Some(at <= deadline),
            None => (unix_ms() > deadline).then_some(false),
        };
        Progress {
            state: match record.state {
                State::Creating => "creating",
                State::Stalled => "stalled",
                State::Created if milestones.ended_unix_ms.is_some() => "deleted",
                State::Created if milestones.hydrated_unix_ms.is_some() => "hydrated",
                State::Created => "created",
                State::Cancelling => "cancelling",
                State::Cancelled => "cancelled",
            },
            problem: record.problem.clone(),
            token: record.request.token.clone(),
            name_prefix: Some(record.request.name_prefix.clone()),
            snapshot: record.request.snapshot.clone(),
            created_unix_ms: record.admitted_unix_ms,
            count: record.count(),
            volumes_failed: totals.volumes_failed + unmade,
            deadline_unix_ms: record.deadline_unix_ms(),
            deadline_met: record.deadline_unix_ms().and_then(met),
            predicted: record.predicted.clone(),
            actual: Actual {
                created_seconds: since(milestones.created_unix_ms),
                boot_set_seconds: since(milestones.boot_set_unix_ms),
                hydrated_seconds,
                hydrated_off_percent: off.map(|(actual, predicted)| (actual / predicted - 1.0) * 100.0),
            },
            ..Progress::of_totals(record.id_text().to_string(), totals)
        }
    }

    /// Of volumes that one request made at once.
    fn of_totals(id: String, totals: &BatchTotals) -> Progress {
        let hydrated = totals.volumes > 0 && totals.volumes_hydrated == totals.volumes;
        Progress {
            id,
            state: if hydrated { "hydrated" } else { "created" },
            problem: None,
            token: None,
            snapshot: totals.snapshot.as_ref().map(ToString::to_string),
            name_prefix: None,
            created_unix_ms: totals.created_unix_ms,
            count: totals.volumes,
            volumes: totals.volumes,
            volumes_attachable: totals.volumes - totals.volumes_failed,
            volumes_attached: totals.volumes_attached,
            volumes_boot_set_resident: totals.has_boot_set.then_some(totals.volumes_boot_set_resident),
            volumes_hydrated: totals.volumes_hydrated,
            volumes_failed: totals.volumes_failed,
            size_bytes: totals.size_bytes,
            resident_bytes: totals.resident_bytes,
            remaining_bytes: totals.remaining_bytes(),
            hydration_bytes_per_second: totals.hydration_bytes_per_second(),
            eta_seconds: totals.eta_seconds(),
            deadline_unix_ms: None,
            deadline_met: None,
            predicted: None,
            actual: Actual::default(),
            stores: totals.stores.iter().map(OnStore::new).collect(),
            last_error: totals.last_error.clone(),
        }
    }
}

impl OnStore {
    fn new(part: &BatchOnStore) -> OnStore {
        OnStore {
            label: part.label.to_string(),
            volumes: part.volumes,
            remaining_bytes: part.remaining_bytes,
            hydration_bytes_per_second: part.hydration_bytes_per_second,
            eta_seconds: part.eta_seconds(),
        }
    }
}

impl Control {
    /// What the shards know of all batches, at most [`TOTALS_AGE_MAX`] old.
    pub(super) async fn batch_totals(&self) -> Answer<Arc<BTreeMap<u64, BatchTotals>>> {
        let mut last = self.0.batches.totals.lock().await;
        if let Some((at, totals)) = &last.0
            && at.elapsed() < TOTALS_AGE_MAX
        {
            return Ok(totals.clone());
        }
        let asked = Instant::now();
        let answers = self.0.shards.query_all(|reply| Command::BatchTotals { reply }).await?;
        let mut totals: BTreeMap<u64, BatchTotals> = BTreeMap::new();
        for part in answers.iter().flatten() {
            let sum = totals.remove(&part.batch).unwrap_or_default().and(part);
            totals.insert(part.batch, sum);
        }
        let totals = Arc::new(totals);
        last.0 = Some((asked, totals.clone()));
        Ok(totals)
    }

    pub(super) async fn progress_of(&self, entry: &Entry) -> Answer<Progress> {
        // The record first: what it says of volumes is true of the totals then.
        let record = entry.record();
        let totals = self.batch_totals().await?;
        Ok(Progress::of_record(&record, totals.get(&record.id()).unwrap_or(&BatchTotals::default())))
    }

    /// # Errors
    /// Neither a batch nor the volumes of a request have this id.
    pub(super) async fn progress(&self, id: &str) -> Answer<Progress> {
        if let Ok(entry) = self.0.batches.get(id) {
            return self.progress_of(&entry).await;
        }
        let totals = self.batch_totals().await?;
        let of_request = totals.values().find(|totals| batch_text(totals.batch) == id);
        of_request.map(|totals| Progress::of_totals(id.to_string(), totals)).ok_or_else(|| unknown(id))
    }

    /// Oldest first.
    pub(super) async fn all_progress(&self) -> Answer<Vec<Progress>> {
        let entries = self.0.batches.all();
        let totals = self.batch_totals().await?;
        let (none, mut known) = (BatchTotals::default(), BTreeSet::new());
        let mut all: Vec<Progress> = Vec::with_capacity(entries.len());
        for entry in entries {
            let record = lock(&entry.record);
            known.insert(record.id());
            all.push(Progress::of_record(&record, totals.get(&record.id()).unwrap_or(&none)));
        }
        let of_requests = totals.iter().filter(|(id, _)| !known.contains(id));
        all.extend(of_requests.map(|(id, totals)| Progress::of_totals(batch_text(*id), totals)));
        all.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
        Ok(all)
    }

    /// Notes durably when batches reach their milestones, and measures what estimates are made of. For ever.
    pub(in crate::control) async fn keep_batches(&self) {
        self.resume_batches().await;
        loop {
            tokio::time::sleep(WATCH_PERIOD).await;
            if let Err(problem) = self.watch_batches().await {
                tracing::debug!(problem = problem.detail(), "batches not watched: trying again");
            }
        }
    }

    async fn watch_batches(&self) -> Answer<()> {
        // Those that have nothing to wait for are looked at when volumes were deleted.
        let deleted = self.0.batches.deleted.swap(false, Ordering::Relaxed);
        let all = self.0.batches.all();
        let under_way = all.iter().any(|entry| is_under_way(&lock(&entry.record)));
        if !under_way {
            lock(&self.0.batches.speeds).pause();
        }
        if !under_way && !deleted {
            return Ok(());
        }
        let watched = self.note_progress(&all, under_way).await;
        if watched.is_err() && deleted {
            self.0.batches.note_deletion().await;
        }
        watched
    }

    async fn note_progress(&self, all: &[Arc<Entry>], under_way: bool) -> Answer<()> {
        if under_way {
            self.measure_speeds().await?;
        }
        let created: Vec<&Arc<Entry>> = all.iter().filter(|entry| is_created(&lock(&entry.record))).collect();
        let totals = self.batch_totals().await?;
        for entry in created {
            let (id, was_done) = {
                let record = lock(&entry.record);
                (record.id(), record.is_done())
            };
            let now = unix_ms();
            self.0.batches.update(entry, |record| note_milestones(record, totals.get(&id), now)).await?;
            let record = entry.record();
            if record.is_done() && !was_done {
                self.announce(&record).await?;
            }
        }
        self.0.batches.prune();
        Ok(())
    }
}

/// All its volumes were made, and some may be there.
fn is_created(record: &Record) -> bool {
    record.state == State::Created && record.milestones.ended_unix_ms.is_none()
}

/// Something will happen to it by itself.
fn is_under_way(record: &Record) -> bool {
    record.is_open() || (is_created(record) && !record.is_done())
}

/// Of a batch that had all its volumes before the totals were taken.
fn note_milestones(record: &mut Record, totals: Option<&BatchTotals>, now: u64) {
    if record.state != State::Created {
        return;
    }
    let Some(totals) = totals else {
        record.milestones.ended_unix_ms = Some(now);
        return;
    };
    let milestones = &mut record.milestones;
    if totals.has_boot_set && totals.volumes_boot_set_resident == totals.volumes {
        milestones.boot_set_unix_ms = milestones.boot_set_unix_ms.or(Some(now));
    }
    if totals.volumes_hydrated == totals.volumes && milestones.hydrated_unix_ms.is_none() {
        milestones.hydrated_unix_ms = Some(now);
        let seconds = now.saturating_sub(record.admitted_unix_ms) as f64 / 1e3;
        tracing::info!(batch = record.id_text(), volumes = totals.volumes, seconds, "batch: hydrated");
    }
}
