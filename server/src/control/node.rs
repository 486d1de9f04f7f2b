//! `/v1/node`, `/v1/stores`, `/healthz` and `/metrics`: the node itself.

use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde::Serialize;

use crate::datadir::Store;
use crate::metrics::{self, StoreGauges};
use crate::placement::Overcommit;
use crate::shard::api::{Command, ShardStats, StoreSharing};

use super::Control;
use super::extract::Segment;
use super::place::Measured;
use super::problem::{Answer, Problem};

#[derive(Serialize)]
pub(super) struct Node {
    node_id: String,
    version: &'static str,
    data: String,
    object_store: String,
    started_unix_ms: u64,
    volumes: u64,
    volumes_hydrated: u64,
    volumes_attached: u64,
    connections: u64,
    shards: Vec<Shard>,
    /// Recent events that name causes, oldest first.
    events: Vec<String>,
}

#[derive(Serialize)]
struct Shard {
    shard: usize,
    address: Option<String>,
    volumes: u64,
    volumes_hydrated: u64,
    volumes_attached: u64,
    connections: u64,
}

#[derive(Serialize)]
pub(super) struct Stores {
    stores: Vec<StoreStatus>,
}

#[derive(Serialize)]
pub(super) struct StoreStatus {
    label: String,
    id: String,
    path: String,
    domain: String,
    overcommit: Overcommit,
    volumes: u64,
    /// Of the filesystem the store is on.
    capacity_bytes: u64,
    free_bytes: u64,
    /// Sum of the device sizes of its volumes; may exceed the capacity.
    volume_bytes: u64,
    /// Promised and not yet written: device sizes without what their files occupy.
    committed_bytes: u64,
    /// `null` is unlimited.
    hydration_bytes_per_second_max: Option<u64>,
    /// Over the last seconds.
    hydration_bytes_per_second: u64,
    /// Rates of volumes that are not hydrated.
    hydration_promised_bytes_per_second: u64,
    /// What background hydration still has to bring.
    remaining_bytes: u64,
    guest_written_bytes_per_second: u64,
    /// Why it takes no volumes.
    failure: Option<String>,
    /// Whether the filesystem can share extents and is used so; what the volumes of this process's life share.
    #[serde(flatten)]
    sharing: StoreSharing,
}

pub(super) async fn health(State(control): State<Control>) -> Answer<&'static str> {
    control.stats().await?;
    Ok("ok\n")
}

pub(super) async fn show(State(control): State<Control>) -> Answer<Json<Node>> {
    let stats = control.stats().await?;
    let sum = |field: fn(&ShardStats) -> u64| stats.iter().map(field).sum();
    let inner = &control.0;
    Ok(Json(Node {
        node_id: control.node_id_text(),
        version: env!("CARGO_PKG_VERSION"),
        data: inner.settings.data.display().to_string(),
        object_store: inner.settings.object_store.clone(),
        started_unix_ms: control.started_unix_ms(),
        volumes: sum(|stats| stats.volumes),
        volumes_hydrated: sum(|stats| stats.volumes_hydrated),
        volumes_attached: sum(|stats| stats.volumes_attached),
        connections: sum(|stats| stats.connections),
        shards: stats
            .iter()
            .map(|stats| Shard::new(stats, inner.settings.addresses.get(stats.shard).cloned()))
            .collect(),
        events: stats.iter().flat_map(|stats| stats.events.iter().cloned()).collect(),
    }))
}

pub(super) async fn list_stores(State(control): State<Control>) -> Answer<Json<Stores>> {
    let stores = control.store_status().await?;
    Ok(Json(Stores { stores }))
}

pub(super) async fn show_store(State(control): State<Control>, Segment(label): Segment) -> Answer<Json<StoreStatus>> {
    let found = control.store_status().await?.into_iter().find(|store| store.label == label);
    found.map(Json).ok_or_else(|| Problem::not_found(format!("no volume store {label:?} on this node")))
}

pub(super) async fn metrics(State(control): State<Control>) -> Answer<impl IntoResponse> {
    let stats = control.stats().await?;
    let sharing = sharing(&stats, control.0.settings.stores.len());
    let stores = control.0.settings.stores.iter().zip(sharing);
    let stores: Vec<StoreGauges> = stores.filter_map(|(store, sharing)| StoreGauges::of(store, sharing)).collect();
    let of_process = [
        control.0.http.metrics().to_vec(),
        control.ledger_metrics().await?,
        control.boot_set_metrics().await,
        control.scrub_metrics(),
        control.gc_metrics(),
        control.0.block_tally.metrics(),
        control.0.uploads.metrics().to_vec(),
        control.0.batches.metrics(),
    ]
    .concat();
    let text = metrics::encode(&stats, &stores, &of_process, control.started_unix_ms());
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

impl Control {
    async fn stats(&self) -> Answer<Vec<ShardStats>> {
        Ok(self.0.shards.query_all(|reply| Command::Stats { reply }).await?)
    }

    fn started_unix_ms(&self) -> u64 {
        let since = self.0.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    async fn store_status(&self) -> Answer<Vec<StoreStatus>> {
        let measured = self.measured(None).await?;
        let sharing = sharing(&self.stats().await?, self.0.settings.stores.len());
        let stores = self.0.settings.stores.iter().zip(measured).zip(sharing);
        Ok(stores.map(|((store, measured), sharing)| self.one_store(store, &measured, sharing)).collect())
    }

    fn one_store(&self, store: &Store, measured: &Measured, sharing: StoreSharing) -> StoreStatus {
        let space = measured.space.as_ref().ok();
        let load = &measured.load;
        StoreStatus {
            label: store.label.to_string(),
            id: format!("{:032x}", store.id),
            path: store.path.display().to_string(),
            domain: store.domain.to_string(),
            overcommit: store.overcommit.unwrap_or(self.0.settings.overcommit),
            volumes: load.volumes,
            capacity_bytes: space.map_or(0, |space| space.capacity_bytes),
            free_bytes: space.map_or(0, |space| space.free_bytes),
            volume_bytes: load.volume_bytes,
            // Files that share extents seem to occupy more than there is.
            committed_bytes: load.volume_bytes.saturating_sub(
                space.map_or(0, |space| {
                    space.allocated_bytes.min(space.capacity_bytes.saturating_sub(space.free_bytes))
                }),
            ),
            hydration_bytes_per_second_max: store.hydration_bandwidth,
            hydration_bytes_per_second: load.hydrated_bytes_per_second,
            hydration_promised_bytes_per_second: load.promised_bytes_per_second,
            remaining_bytes: load.backlog_bytes,
            guest_written_bytes_per_second: load.guest_written_bytes_per_second,
            failure: measured.failure(),
            sharing,
        }
    }
}

/// What all shards together share in each store.
fn sharing(stats: &[ShardStats], stores: usize) -> Vec<StoreSharing> {
    let mut sums = vec![StoreSharing::default(); stores];
    for shard in stats {
        sums.iter_mut().zip(&shard.sharing).for_each(|(sum, part)| *sum += *part);
    }
    sums
}

impl Shard {
    fn new(stats: &ShardStats, address: Option<String>) -> Shard {
        Shard {
            shard: stats.shard,
            address,
            volumes: stats.volumes,
            volumes_hydrated: stats.volumes_hydrated,
            volumes_attached: stats.volumes_attached,
            connections: stats.connections,
        }
    }
}
