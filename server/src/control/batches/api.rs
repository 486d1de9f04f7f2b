//! `/v1/batches`: admission, listing, progress, cancellation and retry.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::stream::{self, Stream};
use serde::{Deserialize, Serialize};

use crate::batch::{Common, Record, Request, State, TOKEN_BYTES_MAX};
use crate::error::Status;
use crate::placement;
use crate::shard::api::Command;

use super::super::Control;
use super::super::create::{Admitted, CreateRequest, batch_of, random_numbers, unix_ms};
use super::super::extract::{Body, Params, Segment};
use super::super::problem::{Answer, Problem};
use super::progress::Progress;
use super::{Entry, lock};

const INTERVAL_MS_DEFAULT: u64 = 500;
const INTERVAL_MS_MIN: u64 = 100;
const INTERVAL_MS_MAX: u64 = 60_000;

#[derive(Serialize)]
pub(in crate::control) struct Listed {
    batches: Vec<Progress>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::control) struct CancelParams {
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::control) struct EventParams {
    interval_ms: Option<u64>,
}

pub(in crate::control) async fn create(
    Shared(control): Shared<Control>,
    Body(request): Body<Request>,
) -> Answer<(StatusCode, Json<Progress>)> {
    let admitting = control.clone();
    // A task of its own: a client that goes away must not stop an admission half-way.
    let admitted = tokio::spawn(async move { admitting.admit_batch(request).await }).await;
    let (status, entry) = admitted.map_err(|e| Problem::new(Status::Internal, format!("admission failed: {e}")))??;
    Ok((status, Json(control.progress_of(&entry).await?)))
}

pub(in crate::control) async fn list(Shared(control): Shared<Control>) -> Answer<Json<Listed>> {
    Ok(Json(Listed { batches: control.all_progress().await? }))
}

pub(in crate::control) async fn show(Shared(control): Shared<Control>, Segment(id): Segment) -> Answer<Json<Progress>> {
    control.progress(&id).await.map(Json)
}

/// Server-sent events: `progress` as often as asked, until the batch is done.
pub(in crate::control) async fn events(
    Shared(control): Shared<Control>,
    Segment(id): Segment,
    Params(EventParams { interval_ms }): Params<EventParams>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let interval = interval_ms.unwrap_or(INTERVAL_MS_DEFAULT);
    if !(INTERVAL_MS_MIN..=INTERVAL_MS_MAX).contains(&interval) {
        let range = format!("{INTERVAL_MS_MIN} and {INTERVAL_MS_MAX}");
        return Err(Problem::invalid(format!("interval_ms: {interval} is not between {range}")));
    }
    let first = control.progress(&id).await?;
    let told = stream::unfold(Some((control, id, Some(first))), move |state| async move {
        let (control, id, now) = state?;
        let progress = match now {
            Some(progress) => Ok(progress),
            None => {
                tokio::time::sleep(Duration::from_millis(interval)).await;
                control.progress(&id).await
            }
        };
        let problem = |detail: &str| Event::default().event("problem").data(detail);
        Some(match progress {
            Ok(progress) => {
                let event = Event::default().event("progress").json_data(&progress);
                let event = event.unwrap_or_else(|error| problem(&error.to_string()));
                (Ok(event), (!progress.is_over()).then_some((control, id, None)))
            }
            Err(error) => (Ok(problem(error.detail())), None),
        })
    });
    Ok(Sse::new(told).keep_alive(KeepAlive::default()))
}

/// Deletes the batch's volumes, those that exist and those that would. Refused while some are attached, unless `force`.
pub(in crate::control) async fn cancel(
    Shared(control): Shared<Control>,
    Segment(id): Segment,
    Params(CancelParams { force }): Params<CancelParams>,
) -> Answer<(StatusCode, Json<Progress>)> {
    let entry = control.0.batches.get(&id)?;
    if !force {
        let attached = control.volumes_of(&id).await?.iter().filter(|(_, attached)| *attached).count();
        if attached > 0 {
            let detail = format!("{attached} volumes of batch {id} are attached: detach them, or force it");
            return Err(Problem::new(Status::Conflict, detail));
        }
    }
    let cancelling = |record: &mut Record| {
        if record.state != State::Cancelled {
            record.state = State::Cancelling;
            record.force |= force;
            record.problem = None;
        }
    };
    control.0.batches.update(&entry, cancelling).await?;
    control.start_work(&entry, None);
    Ok((StatusCode::ACCEPTED, Json(control.progress_of(&entry).await?)))
}

/// Makes what a stalled batch could not, where there is room now.
pub(in crate::control) async fn retry(
    Shared(control): Shared<Control>,
    Segment(id): Segment,
) -> Answer<(StatusCode, Json<Progress>)> {
    let entry = control.0.batches.get(&id)?;
    let mut stalled = false;
    let again = |record: &mut Record| {
        stalled = record.state == State::Stalled;
        if stalled {
            record.state = State::Creating;
            record.problem = None;
        }
    };
    control.0.batches.update(&entry, again).await?;
    if !stalled {
        let detail = format!("batch {id} is not stalled: there is nothing to try again");
        return Err(Problem::new(Status::Conflict, detail));
    }
    control.start_work(&entry, None);
    Ok((StatusCode::ACCEPTED, Json(control.progress_of(&entry).await?)))
}

impl Control {
    /// `CREATED` for a batch that is new, `OK` for one that its token has named before.
    async fn admit_batch(&self, request: Request) -> Answer<(StatusCode, Arc<Entry>)> {
        if request.token.as_ref().is_some_and(|token| token.is_empty() || token.len() > TOKEN_BYTES_MAX) {
            return Err(Problem::invalid(format!("token: not 1 to {TOKEN_BYTES_MAX} bytes")));
        }
        if request.require_deadline && request.deadline_seconds.is_none() {
            return Err(Problem::invalid("require_deadline goes with deadline_seconds"));
        }
        let mut references = self.0.references.lock().await;
        if let Some(entry) = request.token.as_deref().and_then(|token| self.0.batches.of_token(token)) {
            if lock(&entry.record).request == request {
                return Ok((StatusCode::OK, entry));
            }
            let detail = format!("the token was used for another request, batch {}", entry.id);
            return Err(Problem::new(Status::Conflict, detail));
        }
        let admitted = self.admit(&create_request(&request), &mut references).await?;
        self.check_free(&admitted.names).await?;
        let record = self.admitted(request, &admitted).await?;
        self.0.batches.write(&record).await?;
        if let Ok(mut reasons) = self.0.reasons.lock() {
            reasons.remember(record.id_text().to_string(), &admitted.plan, &admitted.batch);
        }
        let snapshot = record.request.snapshot.as_deref().unwrap_or("none");
        tracing::info!(batch = record.id_text(), volumes = record.count(), snapshot, "batch: admitted");
        self.announce(&record).await?;
        let volumes = record.volumes().collect();
        let entry = self.0.batches.insert(record);
        self.start_work(&entry, Some(volumes));
        Ok((StatusCode::CREATED, entry))
    }

    async fn check_free(&self, names: &[String]) -> Answer<()> {
        let shards = &self.0.shards;
        let mut parts: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for name in names {
            parts.entry(shards.owner_of(name)).or_default().push(name.clone());
        }
        for (shard, names) in parts {
            if let Some(taken) = shards.query(shard, |reply| Command::FirstTaken { names, reply }).await? {
                return Err(Problem::new(Status::NameTaken, format!("volume {taken:?} exists")));
            }
        }
        Ok(())
    }

    async fn admitted(&self, request: Request, admitted: &Admitted) -> Answer<Record> {
        let random = random_numbers(2)?;
        let stores = self.0.settings.stores.iter().map(|store| store.label.to_string()).collect();
        let placed = admitted.plan.outcome.clone().unwrap_or_default();
        let mut record = Record::new(request, &admitted.common, stores, placed, [random[0], random[1]], unix_ms());
        let predicted = self.predict(&record).await?;
        let late = record.request.deadline_seconds.zip(predicted.hydrated_seconds);
        if let Some((deadline, seconds)) = late.filter(|(deadline, seconds)| *seconds > *deadline as f64) {
            let detail = format!(
                "the batch would be hydrated after about {seconds:.0} s and not within {deadline} s, because of {}: give \
                 it longer, or more stores, or do not require the deadline",
                predicted.limited_by
            );
            if record.request.require_deadline {
                return Err(Problem::new(Status::Conflict, detail));
            }
            tracing::warn!(batch = record.id_text(), detail, "batch: the deadline will be missed");
        }
        record.predicted = Some(predicted);
        Ok(record)
    }
}

fn create_request(request: &Request) -> CreateRequest {
    CreateRequest {
        snapshot: request.snapshot.clone(),
        size_bytes: request.size_bytes,
        name: None,
        name_prefix: Some(request.name_prefix.clone()),
        count: Some(request.count),
        start: Some(request.start),
        rate: request.rate,
        store: request.store.clone(),
        spread: request.spread,
        overcommit: request.overcommit,
        chunk_bytes: request.chunk_bytes,
    }
}

/// What a batch asks of placement.
pub(super) fn placement_of(record: &Record) -> placement::Batch {
    let common = Common {
        snapshot: record.snapshot(),
        size_bytes: record.size_bytes,
        chunk_bytes: record.chunk_bytes,
        data_bytes: record.data_bytes,
        rate: record.rate,
    };
    batch_of(&create_request(&record.request), record.count(), &common)
}
