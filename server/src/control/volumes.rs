//! `/v1/volumes` and `/v1/batches`: what exists, how far its hydration is, deletion, and waiting.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::shard::api::{Command, VolumeStatus};
use crate::types::HydrationRate;

use super::Control;
use super::extract::{Body, Params, Segment};
use super::problem::{Answer, Problem};

const PAGE_DEFAULT: usize = 1_000;
const PAGE_MAX: usize = 100_000;
/// Longest long poll; clients that want to wait longer ask again.
const WAIT_SECONDS_MAX: u64 = 300;
const WAIT_SECONDS_DEFAULT: u64 = 30;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    prefix: Option<String>,
    snapshot: Option<String>,
    batch: Option<String>,
    store: Option<String>,
    hydrated: Option<bool>,
    /// Names up to and including this one are skipped.
    after: Option<String>,
    limit: Option<usize>,
}

#[derive(Serialize)]
pub(super) struct Page {
    volumes: Vec<VolumeStatus>,
    /// `after` of the next page; `null` on the last one.
    next: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteParams {
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitParams {
    timeout_s: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Change {
    rate: HydrationRate,
}

/// Progress of the volumes made by one request that still exist.
#[derive(Serialize)]
pub(super) struct Batch {
    id: String,
    snapshot: Option<String>,
    created_unix_ms: u64,
    volumes: u64,
    volumes_hydrated: u64,
    volumes_attached: u64,
    size_bytes: u64,
    resident_bytes: u64,
    remaining_bytes: u64,
    hydration_bytes_per_second: u64,
    /// Until the last volume is hydrated; `null` if that is unknown for any of them.
    eta_seconds: Option<f64>,
}

/// A volume, and why it is in its store.
#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    status: VolumeStatus,
    placement: String,
}

#[derive(Serialize)]
pub(super) struct Batches {
    batches: Vec<Batch>,
}

pub(super) async fn list(State(control): State<Control>, Params(params): Params<ListParams>) -> Answer<Json<Page>> {
    let limit = params.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Problem::invalid(format!("limit: {limit} is not between 1 and {PAGE_MAX}")));
    }
    let mut volumes = control.all_volumes().await?;
    volumes.retain(|volume| params.selects(volume));
    let more = volumes.len() > limit;
    volumes.truncate(limit);
    let next = volumes.last().filter(|_| more).map(|volume| volume.name.clone());
    Ok(Json(Page { volumes, next }))
}

pub(super) async fn show(State(control): State<Control>, Segment(name): Segment) -> Answer<Json<Shown>> {
    let status = control.volume(name).await?;
    let reasons = control.0.reasons.lock();
    let placement = reasons.map(|reasons| reasons.of(status.batch.as_deref(), &status.store)).unwrap_or_default();
    Ok(Json(Shown { status, placement }))
}

pub(super) async fn delete(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(DeleteParams { force }): Params<DeleteParams>,
) -> Answer<StatusCode> {
    let shards = &control.0.shards;
    let owner = shards.owner_of(&name);
    let logged = name.clone();
    shards.ask(owner, |reply| Command::DeleteVolume { name, force, reply }).await??;
    tracing::info!(volume = logged, force, "deleted");
    control.0.upkeep_due.notify_one();
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn set_rate(
    State(control): State<Control>,
    Segment(name): Segment,
    Body(Change { rate }): Body<Change>,
) -> Answer<Json<VolumeStatus>> {
    let shards = &control.0.shards;
    let owner = shards.owner_of(&name);
    let of = name.clone();
    shards.ask(owner, |reply| Command::SetRate { name: of, rate, reply }).await??;
    control.volume(name).await.map(Json)
}

pub(super) async fn wait(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(WaitParams { timeout_s }): Params<WaitParams>,
) -> Answer<Json<VolumeStatus>> {
    let seconds = timeout_s.unwrap_or(WAIT_SECONDS_DEFAULT);
    if seconds > WAIT_SECONDS_MAX {
        return Err(Problem::invalid(format!(
            "timeout_s: {seconds} is more than {WAIT_SECONDS_MAX}: ask again instead"
        )));
    }
    let shards = &control.0.shards;
    let owner = shards.owner_of(&name);
    let timeout_ms = seconds * 1000;
    let status = shards.ask(owner, |reply| Command::WaitHydrated { name, timeout_ms, reply }).await??;
    Ok(Json(status))
}

pub(super) async fn list_batches(State(control): State<Control>) -> Answer<Json<Batches>> {
    let mut batches = batches(&control.all_volumes().await?);
    batches.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
    Ok(Json(Batches { batches }))
}

pub(super) async fn show_batch(State(control): State<Control>, Segment(id): Segment) -> Answer<Json<Batch>> {
    let mut volumes = control.all_volumes().await?;
    volumes.retain(|volume| volume.batch.as_deref() == Some(&id));
    let batch = batches(&volumes).pop();
    batch.map(Json).ok_or_else(|| Problem::not_found(format!("no volume of a batch {id:?} exists")))
}

impl Control {
    /// Every volume of the node by name.
    pub(super) async fn all_volumes(&self) -> Answer<Vec<VolumeStatus>> {
        let answers = self.0.shards.query_all(|reply| Command::ListVolumes { reply }).await?;
        let mut volumes: Vec<VolumeStatus> = answers.into_iter().flatten().collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    async fn volume(&self, name: String) -> Answer<VolumeStatus> {
        let shards = &self.0.shards;
        let owner = shards.owner_of(&name);
        Ok(shards.query(owner, |reply| Command::VolumeStatus { name, reply }).await??)
    }
}

impl ListParams {
    fn selects(&self, volume: &VolumeStatus) -> bool {
        let same = |wanted: &Option<String>, have: Option<&str>| wanted.is_none() || wanted.as_deref() == have;
        self.prefix.as_ref().is_none_or(|prefix| volume.name.starts_with(prefix))
            && same(&self.snapshot, volume.snapshot.as_deref())
            && same(&self.batch, volume.batch.as_deref())
            && same(&self.store, Some(&volume.store))
            && self.hydrated.is_none_or(|hydrated| hydrated == volume.hydrated)
            && self.after.as_ref().is_none_or(|after| volume.name > *after)
    }
}

fn batches(volumes: &[VolumeStatus]) -> Vec<Batch> {
    let mut batches: BTreeMap<&str, Batch> = BTreeMap::new();
    for volume in volumes {
        if let Some(id) = &volume.batch {
            batches.entry(id).or_insert_with(|| Batch::new(id, volume)).add(volume);
        }
    }
    batches.into_values().collect()
}

impl Batch {
    fn new(id: &str, volume: &VolumeStatus) -> Batch {
        Batch {
            id: id.to_string(),
            snapshot: volume.snapshot.clone(),
            created_unix_ms: volume.created_unix_ms,
            volumes: 0,
            volumes_hydrated: 0,
            volumes_attached: 0,
            size_bytes: 0,
            resident_bytes: 0,
            remaining_bytes: 0,
            hydration_bytes_per_second: 0,
            eta_seconds: Some(0.0),
        }
    }

    fn add(&mut self, volume: &VolumeStatus) {
        self.volumes += 1;
        self.volumes_hydrated += u64::from(volume.hydrated);
        self.volumes_attached += u64::from(volume.attached);
        self.size_bytes += volume.size_bytes;
        self.resident_bytes += volume.resident_bytes;
        self.remaining_bytes += volume.remaining_bytes;
        self.hydration_bytes_per_second += volume.hydration_bytes_per_second;
        if !volume.hydrated {
            self.eta_seconds = self.eta_seconds.zip(volume.eta_seconds).map(|(a, b)| a.max(b));
        }
    }
}
