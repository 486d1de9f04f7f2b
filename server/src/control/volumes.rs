//! `/v1/volumes`: what exists, how far its hydration is, deletion, and waiting.

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
    rate: Option<HydrationRate>,
    size_bytes: Option<u64>,
}

/// A volume, and why it is in its store.
#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    status: VolumeStatus,
    placement: String,
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
    control.0.batches.check_deletion(&name)?;
    let shards = &control.0.shards;
    let owner = shards.owner_of(&name);
    let logged = name.clone();
    shards.ask(owner, |reply| Command::DeleteVolume { name, force, reply }).await??;
    tracing::info!(volume = logged, force, "deleted");
    control.0.batches.note_deletion().await;
    control.0.upkeep_due.notify_one();
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn change(
    State(control): State<Control>,
    Segment(name): Segment,
    Body(Change { rate, size_bytes }): Body<Change>,
) -> Answer<Json<VolumeStatus>> {
    if rate.is_none() && size_bytes.is_none() {
        return Err(Problem::invalid("nothing to change: give rate or size_bytes"));
    }
    let shards = &control.0.shards;
    let owner = shards.owner_of(&name);
    if let Some(size_bytes) = size_bytes {
        super::create::check_size(size_bytes)?;
        let of = name.clone();
        shards.ask(owner, |reply| Command::Grow { name: of, size_bytes, reply }).await??;
    }
    if let Some(rate) = rate {
        let of = name.clone();
        shards.ask(owner, |reply| Command::SetRate { name: of, rate, reply }).await??;
    }
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

impl Control {
    /// Every volume of the node by name.
    pub(super) async fn all_volumes(&self) -> Answer<Vec<VolumeStatus>> {
        let answers = self.0.shards.query_all(|reply| Command::ListVolumes { reply }).await?;
        let mut volumes: Vec<VolumeStatus> = answers.into_iter().flatten().collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    pub(super) async fn volume(&self, name: String) -> Answer<VolumeStatus> {
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
