//! The tasks that make the volumes of a batch, and delete them again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;

use crate::batch::{Record, State};
use crate::error::{Error, Status};
use crate::placement::Batch;
use crate::shard::api::Command;
use crate::types::VolumeSpec;

use super::super::Control;
use super::super::create::unix_ms;
use super::super::problem::Problem;
use super::{Entry, lock};

/// Volumes made between two looks at whether to go on: others' requests wait so long at most.
const STEP: usize = 256;
/// A deletion, or a write of the batch's file, that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// What could not be made.
#[derive(Default)]
struct Failures {
    volumes: Vec<u32>,
    /// The first error of each store.
    by_store: BTreeMap<String, Error>,
}

impl Control {
    /// Tells the shards when the batch is due, before they know a volume of it; that it is due no more when it is done.
    pub(super) async fn announce(&self, record: &Record) -> Result<(), Error> {
        if record.deadline_unix_ms().is_none() {
            return Ok(());
        }
        let (batch, deadline_unix_ms) = (record.id(), record.deadline_unix_ms().filter(|_| !record.is_done()));
        let told = self.0.shards.query_all(|reply| Command::SetDeadline { batch, deadline_unix_ms, reply });
        told.await.map(drop)
    }

    /// Goes on with every batch that a restart interrupted.
    pub(super) async fn resume_batches(&self) {
        for entry in self.0.batches.all() {
            let record = entry.record();
            if !record.is_done()
                && let Err(error) = self.announce(&record).await
            {
                tracing::warn!(batch = record.id_text(), %error, "batch: its deadline is not known to all shards");
            }
            if record.is_working() {
                tracing::info!(batch = entry.id, state = ?entry.state(), "batch: going on");
                self.start_work(&entry, None);
            }
        }
    }

    /// Works on the batch until it is complete, cancelled or stalled. `missing`: what is known not to exist.
    pub(super) fn start_work(&self, entry: &Arc<Entry>, missing: Option<Vec<u32>>) {
        if let Some(missing) = &missing {
            entry.set_pending(missing);
        }
        let (control, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move { control.work(&entry, missing).await });
    }

    async fn work(&self, entry: &Entry, mut missing: Option<Vec<u32>>) {
        let _alone = entry.working.lock().await;
        loop {
            let outcome = match entry.state() {
                State::Creating => self.make(entry, missing.take()).await,
                State::Cancelling => self.unmake(entry).await,
                _ => return,
            };
            match outcome {
                Ok(()) => {}
                // What is left is done after the restart.
                Err(problem) if problem.is(Status::ShuttingDown) => return,
                Err(problem) => {
                    tracing::warn!(batch = entry.id, problem = problem.detail(), "batch: waiting");
                    lock(&entry.record).problem = Some(problem.detail().to_string());
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Makes what does not exist yet. Volumes that their store refuses go to others, as long as there is one.
    async fn make(&self, entry: &Entry, missing: Option<Vec<u32>>) -> Result<(), Problem> {
        let mut missing = match missing {
            Some(missing) => missing,
            None => self.missing(entry).await?,
        };
        entry.set_pending(&missing);
        let (begun, made) = (Instant::now(), missing.len());
        let mut failed: BTreeMap<String, String> = BTreeMap::new();
        while !missing.is_empty() {
            let Some(failures) = self.make_all(entry, &missing).await? else { return Ok(()) };
            missing = failures.volumes;
            if missing.is_empty() {
                break;
            }
            let before = failed.len();
            for (store, error) in failures.by_store {
                tracing::warn!(batch = entry.id, store, %error, "batch: volumes not made");
                failed.entry(store).or_insert_with(|| error.to_string());
            }
            let again = match failed.len() > before {
                true => self.place_again(entry, &missing, &failed).await,
                false => Err(None),
            };
            if let Err(refused) = again {
                return self.stall(entry, &missing, &failed, refused).await;
            }
        }
        let now = unix_ms();
        let done = |record: &mut Record| {
            if record.state == State::Creating {
                record.state = State::Created;
                record.problem = None;
                record.milestones.created_unix_ms = record.milestones.created_unix_ms.or(Some(now));
            }
        };
        self.0.batches.update(entry, done).await?;
        if made > 0 {
            lock(&self.0.batches.speeds).note_created(made as u64, begun.elapsed());
        }
        let record = lock(&entry.record);
        let seconds = now.saturating_sub(record.admitted_unix_ms) as f64 / 1e3;
        tracing::info!(batch = entry.id, volumes = record.count(), seconds, "batch: created");
        Ok(())
    }

    /// `None` when it was cancelled meanwhile.
    async fn make_all(&self, entry: &Entry, missing: &[u32]) -> Result<Option<Failures>, Problem> {
        let mut failures = Failures::default();
        for (number, step) in missing.chunks(STEP).enumerate() {
            // As every creation: a stop waits for the step, and upkeep keeps the snapshot's reference.
            let _creation = self.0.references.lock().await;
            let record = entry.record();
            if record.state != State::Creating {
                entry.set_pending(&[]);
                return Ok(None);
            }
            self.make_step(&record, step, &mut failures).await?;
            let rest = &missing[((number + 1) * STEP).min(missing.len())..];
            entry.set_pending(&[rest, &failures.volumes].concat());
        }
        Ok(Some(failures))
    }

    /// One request per shard and store, so that a store that fails takes none of another's volumes with it.
    async fn make_step(&self, record: &Record, step: &[u32], failures: &mut Failures) -> Result<(), Problem> {
        let shards = &self.0.shards;
        let mut parts: BTreeMap<(usize, &str), Vec<(u32, VolumeSpec)>> = BTreeMap::new();
        for volume in step {
            let spec = record.spec(*volume);
            let part = (spec.id.owner(shards.count()), record.store_of(*volume));
            parts.entry(part).or_default().push((*volume, spec));
        }
        let asked = parts.iter().map(|((shard, _), volumes)| async {
            let specs = volumes.iter().map(|(_, spec)| spec.clone()).collect();
            shards.ask(*shard, |reply| Command::CreateVolumes { specs, reply }).await.flatten()
        });
        let answers = join_all(asked).await;
        for (((_, store), volumes), answer) in parts.iter().zip(answers) {
            match answer {
                Ok(()) => {}
                Err(error) if error.status == Status::ShuttingDown => return Err(error.into()),
                Err(error) => {
                    failures.volumes.extend(volumes.iter().map(|(volume, _)| *volume));
                    failures.by_store.entry((*store).to_string()).or_insert(error);
                }
            }
        }
        Ok(())
    }

    /// Volumes of the batch that do not exist.
    async fn missing(&self, entry: &Entry) -> Result<Vec<u32>, Problem> {
        let record = entry.record();
        let there = self.volumes_of(&entry.id).await?;
        let there: BTreeSet<String> = there.into_iter().map(|(name, _)| name).collect();
        Ok(record.volumes().filter(|volume| !there.contains(&record.name(*volume))).collect())
    }

    /// Names of the batch's volumes, and whether they are attached.
    pub(super) async fn volumes_of(&self, batch: &str) -> Result<Vec<(String, bool)>, Problem> {
        let mut volumes = self.all_volumes().await?;
        volumes.retain(|volume| volume.batch.as_deref() == Some(batch));
        Ok(volumes.into_iter().map(|volume| (volume.name, volume.attached)).collect())
    }

    /// Finds other stores for volumes whose stores failed. The error is why there are none, if placement said it.
    async fn place_again(
        &self,
        entry: &Entry,
        missing: &[u32],
        failed: &BTreeMap<String, String>,
    ) -> Result<(), Option<Problem>> {
        let _creation = self.0.references.lock().await;
        let record = entry.record();
        let batch = Batch { count: missing.len() as u64, ..super::api::placement_of(&record) };
        // They are what is being placed.
        entry.set_pending(&[]);
        let plan = self.plan(&batch, record.snapshot().as_ref(), failed).await.map_err(Some)?;
        let Ok(stores) = &plan.outcome else {
            return Err(plan.refusal(&batch).map(|refusal| Problem::new(Status::NoSpace, refusal)));
        };
        let labels: Vec<&str> = stores.iter().map(|store| &*self.0.settings.stores[*store as usize].label).collect();
        let moved = |record: &mut Record| {
            for (volume, label) in missing.iter().zip(labels) {
                record.place(*volume, label);
            }
        };
        self.0.batches.update(entry, moved).await.map_err(Some)?;
        entry.set_pending(missing);
        Ok(())
    }

    /// Says durably what is missing and why; an operator decides.
    async fn stall(
        &self,
        entry: &Entry,
        missing: &[u32],
        failed: &BTreeMap<String, String>,
        refused: Option<Problem>,
    ) -> Result<(), Problem> {
        let stores: Vec<String> = failed.iter().map(|(store, error)| format!("store {store:?}: {error}")).collect();
        let elsewhere = refused.map(|problem| format!("; elsewhere: {}", problem.detail())).unwrap_or_default();
        let (of, reasons) = (lock(&entry.record).count(), stores.join("; "));
        let problem = format!("{} of {of} volumes could not be made: {reasons}{elsewhere}", missing.len());
        tracing::error!(batch = entry.id, problem, "batch: stalled");
        entry.set_pending(missing);
        let stalled = |record: &mut Record| {
            if record.state == State::Creating {
                record.state = State::Stalled;
                record.problem = Some(problem);
            }
        };
        self.0.batches.update(entry, stalled).await
    }

    /// Deletes what exists of the batch.
    async fn unmake(&self, entry: &Entry) -> Result<(), Problem> {
        let volumes = self.volumes_of(&entry.id).await?;
        let (shards, force) = (&self.0.shards, lock(&entry.record).force);
        for step in volumes.chunks(STEP) {
            let deleted = join_all(step.iter().map(|(name, _)| async move {
                let owner = shards.owner_of(name);
                let name = name.clone();
                shards.ask(owner, |reply| Command::DeleteVolume { name, force, reply }).await.flatten()
            }));
            for error in deleted.await.into_iter().filter_map(Result::err) {
                if error.status != Status::UnknownVolume {
                    return Err(error.into());
                }
            }
        }
        entry.set_pending(&[]);
        let ended = |record: &mut Record| {
            record.state = State::Cancelled;
            record.problem = None;
            record.milestones.ended_unix_ms = Some(unix_ms());
        };
        self.0.batches.update(entry, ended).await?;
        self.announce(&entry.record()).await?;
        tracing::info!(batch = entry.id, volumes = volumes.len(), "batch: cancelled");
        self.0.upkeep_due.notify_one();
        Ok(())
    }
}
