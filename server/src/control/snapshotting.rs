//! `POST /v1/snapshots` and `/v1/snapshot-tasks`: snapshots of volumes, one group after the other, and how far each is.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use volley_protocol::name::check_name;

use crate::error::{Error, Status};

use super::Control;
use super::extract::{Body, Params, Segment};
use super::on_own_thread;
use super::problem::{Answer, Problem};
use super::taking::{self, Task, Wanted};

/// Volumes of one group: they are held back together.
const VOLUMES_MAX: usize = 64;
/// Groups that wait or run.
const TASKS_MAX: usize = 256;
/// Tasks that are remembered after their end.
const FINISHED_MAX: usize = 1000;
const WAIT_SECONDS_MAX: u64 = 300;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TakeRequest {
    /// Of the snapshot; of a group of volumes what its snapshots' names begin with: `NAME-VOLUME`.
    pub(super) name: String,
    pub(super) volumes: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitParams {
    /// Answer when the task has ended, or after so many seconds.
    wait_s: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct Listing {
    tasks: Vec<Task>,
}

/// Snapshots being taken, and those that were.
#[derive(Default)]
pub(super) struct Snapshotting {
    tasks: Mutex<BTreeMap<String, Task>>,
    finished: Mutex<VecDeque<String>>,
    /// One at a time: each reads as much of its volumes' disks as guests leave, and compresses.
    turn: tokio::sync::Mutex<()>,
    changed: tokio::sync::Notify,
}

impl Snapshotting {
    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &str, volumes: &[String]) -> Answer<()> {
        let mut tasks = self.tasks();
        if tasks.get(name).is_some_and(Task::runs) {
            let detail = format!("a snapshot named {name:?} is being taken: wait until it is done");
            return Err(Problem::new(Status::NameTaken, detail));
        }
        if tasks.values().filter(|task| task.runs()).count() >= TASKS_MAX {
            return Err(Problem::new(Status::Busy, format!("{TASKS_MAX} snapshots wait to be taken: try again later")));
        }
        let busy = |volume: &&String| tasks.values().any(|task| task.runs() && task.volumes.contains(*volume));
        if let Some(volume) = volumes.iter().find(busy) {
            let detail = format!("a snapshot of volume {volume:?} is being taken: wait until it is done");
            return Err(Problem::new(Status::Conflict, detail));
        }
        tasks.insert(name.to_owned(), Task::new(name, volumes));
        Ok(())
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Task)) {
        if let Some(task) = self.tasks().get_mut(name) {
            change(task);
        }
        self.changed.notify_waiters();
    }

    fn end(&self, name: &str) {
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        finished.push_back(name.to_owned());
        while finished.len() > FINISHED_MAX {
            let Some(oldest) = finished.pop_front() else { break };
            let mut tasks = self.tasks();
            if tasks.get(&oldest).is_some_and(|task| !task.runs()) {
                tasks.remove(&oldest);
            }
        }
    }
}

impl Task {
    fn new(name: &str, volumes: &[String]) -> Task {
        Task {
            name: name.to_owned(),
            volumes: volumes.to_vec(),
            state: "queued",
            bytes_done: 0,
            bytes_total: 0,
            seconds: 0.0,
            error: None,
            snapshots: Vec::new(),
            begun: None,
        }
    }

    fn runs(&self) -> bool {
        matches!(self.state, "queued" | "running")
    }

    fn now(&self) -> Task {
        let running = self.begun.filter(|_| self.runs()).map(|begun| begun.elapsed().as_secs_f64());
        Task { seconds: running.unwrap_or(self.seconds), ..self.clone() }
    }
}

pub(super) async fn take(
    State(control): State<Control>,
    Body(request): Body<TakeRequest>,
) -> Answer<(StatusCode, Json<Task>)> {
    let name = request.name.clone();
    control.start_taking(request).await?;
    Ok((StatusCode::ACCEPTED, Json(control.task(&name)?)))
}

pub(super) async fn list(State(control): State<Control>) -> Json<Listing> {
    Json(Listing { tasks: control.0.snapshotting.tasks().values().map(Task::now).collect() })
}

pub(super) async fn show(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(params): Params<WaitParams>,
) -> Answer<Json<Task>> {
    let limit = Duration::from_secs(params.wait_s.unwrap_or(0).min(WAIT_SECONDS_MAX));
    control.wait_for_task(&name, limit).await.map(Json)
}

impl Control {
    /// Sees to it that the snapshots are taken; a task of the request's name tells how far that is.
    pub(super) async fn start_taking(&self, request: TakeRequest) -> Answer<()> {
        let wanted = names(&request)?;
        for (volume, snapshot) in &wanted {
            self.volume(volume.clone()).await?;
            if self.manifest_as_it_is(snapshot).await.is_ok() {
                let detail = format!("snapshot {snapshot:?} exists already: choose another name or delete it first");
                return Err(Problem::new(Status::NameTaken, detail));
            }
        }
        self.0.snapshotting.add(&request.name, &request.volumes)?;
        let control = self.clone();
        // A client that goes away does not end it.
        tokio::spawn(async move { control.run_taking(request.name, wanted).await });
        Ok(())
    }

    /// The task when it has ended, or after `limit`.
    pub(super) async fn wait_for_task(&self, name: &str, limit: Duration) -> Answer<Task> {
        let ended = async {
            loop {
                let changed = self.0.snapshotting.changed.notified();
                if !self.task(name)?.runs() {
                    return Ok::<(), Problem>(());
                }
                changed.await;
            }
        };
        if let Ok(ended) = tokio::time::timeout(limit, ended).await {
            ended?;
        }
        self.task(name)
    }

    fn task(&self, name: &str) -> Answer<Task> {
        let task = self.0.snapshotting.tasks().get(name).map(Task::now);
        task.ok_or_else(|| Problem::not_found(format!("no snapshot {name:?} was asked for since the start")))
    }

    async fn run_taking(&self, name: String, names: Vec<(String, String)>) {
        let state = &self.0.snapshotting;
        let _turn = state.turn.lock().await;
        state.change(&name, |task| (task.state, task.begun) = ("running", Some(Instant::now())));
        let (control, task) = (self.clone(), name.clone());
        let take = move || {
            let settings = &control.0.settings;
            let Some(choice) = &settings.object_store_choice else {
                return Err(Error::new(Status::Invalid, "the node has no object store"));
            };
            let wanted = Wanted { names, bandwidth: settings.snapshot_bandwidth };
            let progress = |done, total| {
                control.0.snapshotting.change(&task, |task| (task.bytes_done, task.bytes_total) = (done, total));
            };
            taking::take(&control.0.shards, choice, &wanted, &progress)
        };
        let taken = on_own_thread("snapshot", take).await.and_then(|taken| taken);
        match &taken {
            Ok(taken) => {
                for one in taken {
                    tracing::info!(
                        volume = one.volume,
                        snapshot = one.snapshot,
                        captured_chunks = one.captured_chunks,
                        stored_bytes = one.stored_bytes,
                        stall_us = one.stall_us,
                        "snapshot taken"
                    );
                }
            }
            Err(error) => tracing::warn!(snapshot = name, %error, "snapshot not taken"),
        }
        state.change(&name, |task| {
            task.seconds = task.begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
            match taken {
                Ok(taken) => (task.state, task.snapshots, task.bytes_done) = ("done", taken, task.bytes_total),
                Err(error) => {
                    (task.state, task.error) = ("failed", Some((error.status.as_str().to_owned(), error.message)));
                }
            }
        });
        state.end(&name);
    }
}

/// The volumes, and the names of their snapshots.
fn names(request: &TakeRequest) -> Answer<Vec<(String, String)>> {
    let TakeRequest { name, volumes } = request;
    check_name(name).map_err(Problem::invalid)?;
    if volumes.is_empty() || volumes.len() > VOLUMES_MAX {
        return Err(Problem::invalid(format!("volumes: name 1 to {VOLUMES_MAX}, not {}", volumes.len())));
    }
    let mut sorted = volumes.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Problem::invalid(format!("volumes: {:?} is named twice", twice[0])));
    }
    let one = volumes.len() == 1;
    let named = volumes.iter().map(|volume| {
        let snapshot = if one { name.clone() } else { format!("{name}-{volume}") };
        check_name(&snapshot).map_err(Problem::invalid).map(|()| (volume.clone(), snapshot))
    });
    named.collect()
}
