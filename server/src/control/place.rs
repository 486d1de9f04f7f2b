//! Placement with the stores as they are: measuring them, `POST /v1/place`, and remembering why volumes are where they are.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use crate::datadir::{Store, VOLUMES_DIR};
use crate::error::Status;
use crate::metrics;
use crate::placement::{self, Batch, Filesystem, Load, Overcommit, Plan, Refusal, Skip, Spread, StoreState};
use crate::shard::api::{Command, StoreLoad};
use crate::types::{HydrationRate, SnapshotRef};

use super::Control;
use super::create::CreateRequest;
use super::extract::Body;
use super::problem::{Answer, Problem};

/// Batches whose reasons are remembered.
const BATCHES_REMEMBERED: usize = 1_000;

/// What a store's filesystem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Tells filesystems from each other.
    pub device: u64,
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub read_only: bool,
    /// What the files of volumes occupy.
    pub allocated_bytes: u64,
}

/// Measures a store; tests have their own.
pub type Measure = Arc<dyn Fn(&Store) -> io::Result<Space> + Send + Sync>;

/// Asks the filesystem of a store, and every file of a volume how much it occupies.
///
/// # Errors
/// Of `statvfs` and of reading the directory.
pub fn measure(store: &Store) -> io::Result<Space> {
    let dir = store.path.join(VOLUMES_DIR);
    let space = metrics::space_of(&dir)?;
    let mut allocated_bytes = 0;
    for entry in std::fs::read_dir(&dir)? {
        // Whatever vanishes meanwhile occupies nothing.
        allocated_bytes += entry?.metadata().map_or(0, |file| file.blocks() * 512);
    }
    Ok(Space {
        device: std::fs::metadata(&dir)?.dev(),
        capacity_bytes: space.total_bytes,
        free_bytes: space.free_bytes,
        read_only: metrics::is_read_only(&dir)?,
        allocated_bytes,
    })
}

/// A store with everything that is known of it now.
pub(super) struct Measured {
    pub(super) load: StoreLoad,
    pub(super) space: Result<Space, String>,
}

impl Measured {
    /// Why the store takes no volumes.
    pub(super) fn failure(&self) -> Option<String> {
        match &self.space {
            Err(error) => Some(error.clone()),
            Ok(space) if space.read_only => Some("its filesystem is mounted read-only".to_string()),
            Ok(_) => self.load.failure.clone(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlaceRequest {
    snapshot: Option<String>,
    size_bytes: Option<u64>,
    #[serde(default = "one")]
    count: u64,
    rate: Option<HydrationRate>,
    store: Option<String>,
    #[serde(default)]
    spread: Spread,
    overcommit: Option<Overcommit>,
}

fn one() -> u64 {
    1
}

#[derive(Serialize)]
pub(super) struct Placed {
    fits: bool,
    count: u64,
    size_bytes: u64,
    data_bytes: u64,
    spread: Spread,
    stores: Vec<PlacedStore>,
    /// Why it is refused as a whole.
    refusal: Option<String>,
}

#[derive(Serialize)]
struct PlacedStore {
    label: String,
    domain: String,
    volumes: u64,
    skipped: Option<String>,
    overcommit: Overcommit,
    /// Such volumes that it could take alone; `null`: any number.
    room_before: Option<u64>,
    room_after: Option<u64>,
    before: Load,
    after: Load,
    bandwidth_exceeded: bool,
}

pub(super) async fn place(State(control): State<Control>, Body(request): Body<PlaceRequest>) -> Answer<Json<Placed>> {
    let PlaceRequest { snapshot, size_bytes, count, rate, store, spread, overcommit } = request;
    let like = CreateRequest {
        snapshot,
        size_bytes,
        name_prefix: Some("v".to_string()),
        count: Some(count),
        rate,
        store,
        spread,
        overcommit,
        ..CreateRequest::default()
    };
    let (batch, snapshot) = control.batch(&like).await?;
    let plan = control.plan(&batch, snapshot.as_ref(), &BTreeMap::new()).await?;
    let limit = |room: u64| (room != u64::MAX).then_some(room);
    let stores = plan.verdicts.iter().map(|verdict| PlacedStore {
        label: verdict.label.to_string(),
        domain: verdict.domain.to_string(),
        volumes: if plan.outcome.is_ok() { verdict.volumes } else { 0 },
        skipped: verdict.skipped.as_ref().map(Skip::to_string),
        overcommit: verdict.overcommit,
        room_before: limit(verdict.room_before),
        room_after: limit(if plan.outcome.is_ok() { verdict.room_after } else { verdict.room_before }),
        before: verdict.before,
        after: if plan.outcome.is_ok() { verdict.after } else { verdict.before },
        bandwidth_exceeded: verdict.bandwidth_exceeded,
    });
    Ok(Json(Placed {
        fits: plan.outcome.is_ok(),
        count,
        size_bytes: batch.volume_bytes,
        data_bytes: batch.data_bytes,
        spread,
        stores: stores.collect(),
        refusal: plan.refusal(&batch),
    }))
}

/// Why the volumes of recent batches are where they are. Lost at a restart.
#[derive(Default)]
pub(super) struct Reasons(VecDeque<(String, Vec<(String, String)>)>);

impl Reasons {
    pub(super) fn remember(&mut self, batch: String, plan: &Plan, of: &Batch) {
        let chosen = plan.verdicts.iter().enumerate().filter(|(_, verdict)| verdict.volumes > 0);
        let reasons = chosen.map(|(index, verdict)| (verdict.label.to_string(), plan.reason(index, of))).collect();
        self.0.push_back((batch, reasons));
        if self.0.len() > BATCHES_REMEMBERED {
            self.0.pop_front();
        }
    }

    pub(super) fn of(&self, batch: Option<&str>, store: &str) -> String {
        let found = self.0.iter().find(|(id, _)| Some(id.as_str()) == batch);
        let reason = found.and_then(|(_, reasons)| reasons.iter().find(|(label, _)| label == store));
        reason.map_or_else(|| "placed before the last restart, or long ago".to_string(), |(_, reason)| reason.clone())
    }
}

impl Control {
    /// The stores as they are now, in the order of the configuration.
    pub(super) async fn measured(&self, snapshot: Option<u128>) -> Answer<Vec<Measured>> {
        let shards = self.0.shards.query_all(|reply| Command::StoreLoads { snapshot, reply }).await?;
        let (measure, stores) = (self.0.settings.measure.clone(), self.0.settings.stores.clone());
        let spaces = tokio::task::spawn_blocking(move || {
            stores.iter().map(|store| measure(store).map_err(|e| e.to_string())).collect::<Vec<_>>()
        });
        let spaces = spaces.await.map_err(|e| Problem::new(Status::Internal, format!("measuring stores: {e}")))?;
        let sum = |index: usize| {
            shards.iter().filter_map(|loads| loads.get(index)).fold(StoreLoad::default(), |sum, load| sum.and(load))
        };
        Ok(spaces.into_iter().enumerate().map(|(index, space)| Measured { load: sum(index), space }).collect())
    }

    /// Decides; creates nothing. Volumes of batches that are still being made count as made; stores that `failed` get
    /// none.
    pub(super) async fn plan(
        &self,
        batch: &Batch,
        snapshot: Option<&SnapshotRef>,
        failed: &BTreeMap<String, String>,
    ) -> Answer<Plan> {
        let mut measured = self.measured(snapshot.map(|snapshot| snapshot.id)).await?;
        for (store, measured) in self.0.settings.stores.iter().zip(&mut measured) {
            self.0.batches.add_pending(&store.label, &mut measured.load);
            measured.load.failure = measured.load.failure.take().or_else(|| failed.get(&*store.label).cloned());
        }
        let mut devices: Vec<u64> = Vec::new();
        let mut filesystems = Vec::new();
        let mut states = Vec::with_capacity(measured.len());
        for (store, measured) in self.0.settings.stores.iter().zip(&measured) {
            let failed =
                Space { device: u64::MAX, capacity_bytes: 0, free_bytes: 0, read_only: true, allocated_bytes: 0 };
            let space = *measured.space.as_ref().unwrap_or(&failed);
            let filesystem = devices.iter().position(|device| *device == space.device).unwrap_or_else(|| {
                devices.push(space.device);
                filesystems.push(Filesystem { capacity_bytes: space.capacity_bytes, free_bytes: space.free_bytes });
                devices.len() - 1
            });
            states.push(self.state(store, measured, filesystem, space.allocated_bytes));
        }
        let batch = batch.clone();
        // 100,000 volumes over 100 stores take a tenth of a second, in which others are answered.
        let plan = tokio::task::spawn_blocking(move || placement::place(&states, &filesystems, &batch)).await;
        plan.map_err(|e| Problem::new(Status::Internal, format!("placement failed: {e}")))
    }

    fn state(&self, store: &Store, measured: &Measured, filesystem: usize, allocated_bytes: u64) -> StoreState {
        let load = &measured.load;
        StoreState {
            label: store.label.clone(),
            domain: store.domain.clone(),
            filesystem,
            overcommit: store.overcommit.unwrap_or(self.0.settings.overcommit),
            volumes: load.volumes,
            volume_bytes: load.volume_bytes,
            allocated_bytes,
            hydration_bandwidth: store.hydration_bandwidth,
            promised_bandwidth: load.promised_bytes_per_second,
            backlog_bytes: load.backlog_bytes,
            guest_write_bandwidth: load.guest_written_bytes_per_second,
            shares_extents: load.shares_extents,
            image_bytes: load.image_bytes,
            failure: measured.failure(),
        }
    }
}

/// The error of a plan that refuses.
pub(super) fn refused(plan: &Plan, batch: &Batch) -> Option<Problem> {
    let status = match plan.outcome.as_ref().err()? {
        Refusal::NoStore => Status::Conflict,
        Refusal::NoSpace { .. } => Status::NoSpace,
    };
    Some(Problem::new(status, plan.refusal(batch)?))
}
