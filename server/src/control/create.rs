//! `POST /v1/volumes`: one volume, or a batch of them, from a snapshot or blank. All of them are made, or none.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use volley_protocol::name::check_name;

use crate::batch::Common;
use crate::datadir::random_bytes;
use crate::error::{Result, Status};
use crate::placement::{Batch, Overcommit, Plan, Spread};
use crate::shard::api::Command;
use crate::snapshot::{ChunkEntry, Manifest};
use crate::types::{
    CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, HydrationRate, LOGICAL_BLOCK_BYTES, SnapshotRef, VolumeId,
    VolumeSpec, batch_text,
};
use crate::units::ByteSize;

use super::Control;
use super::extract::Body;
use super::place::refused;
use super::problem::{Answer, Problem};
use super::references::References;

/// Volumes of one request that are a wave: a node that hydrates as many will want all of their image soon.
const WAVE_VOLUMES_MIN: usize = 8;
/// More volumes in one request would only make an answer nobody can handle.
const COUNT_MAX: u64 = 100_000;
/// The largest file of ext4 with 4 KiB blocks is one block short of 16 TiB.
const VOLUME_BYTES_MAX: u64 = (16 << 40) - (1 << 20);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateRequest {
    pub(super) snapshot: Option<String>,
    pub(super) size_bytes: Option<u64>,
    pub(super) name: Option<String>,
    pub(super) name_prefix: Option<String>,
    pub(super) count: Option<u64>,
    /// Number of the first volume of a batch.
    pub(super) start: Option<u64>,
    pub(super) rate: Option<HydrationRate>,
    pub(super) store: Option<String>,
    #[serde(default)]
    pub(super) spread: Spread,
    /// In place of the stores' own ratios.
    pub(super) overcommit: Option<Overcommit>,
    pub(super) chunk_bytes: Option<u32>,
}

#[derive(Serialize)]
pub(super) struct Created {
    batch: String,
    snapshot: Option<String>,
    size_bytes: u64,
    volumes: Vec<CreatedVolume>,
}

#[derive(Serialize)]
struct CreatedVolume {
    id: String,
    name: String,
    store: String,
}

/// A request that fits. None of its volumes exists yet.
pub(super) struct Admitted {
    pub(super) names: Vec<String>,
    pub(super) common: Common,
    pub(super) batch: Batch,
    pub(super) plan: Plan,
}

pub(super) async fn create(
    State(control): State<Control>,
    Body(request): Body<CreateRequest>,
) -> Answer<(StatusCode, Json<Created>)> {
    // A task of its own: a client that goes away must not stop a creation half-way.
    let created = tokio::spawn(async move { control.create(request).await }).await;
    let created = created.map_err(|e| Problem::new(Status::Internal, format!("creation failed: {e}")))??;
    Ok((StatusCode::CREATED, Json(created)))
}

impl Control {
    async fn create(&self, request: CreateRequest) -> Answer<Created> {
        // Until the shards know the volumes, upkeep must not drop the reference.
        let mut references = self.0.references.lock().await;
        let Admitted { names, common, batch, plan } = self.admit(&request, &mut references).await?;
        let stores = plan.outcome.as_deref().unwrap_or_default();
        let specs = self.specs(names, stores, &common)?;
        let created = Created {
            batch: specs.first().and_then(|spec| spec.batch).map(batch_text).unwrap_or_default(),
            snapshot: request.snapshot.clone(),
            size_bytes: common.size_bytes,
            volumes: specs.iter().map(CreatedVolume::new).collect(),
        };
        self.send(specs).await?;
        drop(references);
        if let Ok(mut reasons) = self.0.reasons.lock() {
            reasons.remember(created.batch.clone(), &plan, &batch);
        }
        let snapshot = request.snapshot.as_deref().unwrap_or("none");
        tracing::info!(batch = created.batch, volumes = created.volumes.len(), snapshot, "created");
        Ok(created)
    }

    /// Admits a request as a whole, or says why not. The snapshot is referenced when it is; as long as the caller keeps
    /// `references`, nothing that was decided changes.
    pub(super) async fn admit(&self, request: &CreateRequest, references: &mut References) -> Answer<Admitted> {
        let names = names(request)?;
        self.check(request)?;
        self.0.batches.check_names(&names)?;
        let manifest = self.manifest_of(request).await?;
        let common = self.common(request, manifest.as_ref())?;
        if let Some(manifest) = &manifest
            && !references.holds(&manifest.name)
        {
            references.hold(self, &manifest.name).await?;
            self.check_still_there(&manifest.name, manifest.id).await?;
        }
        let batch = batch_of(request, names.len() as u64, &common);
        let plan = self.plan(&batch, common.snapshot.as_ref(), &BTreeMap::new()).await?;
        match refused(&plan, &batch) {
            Some(problem) => Err(problem),
            None => {
                if let Some(manifest) = &manifest {
                    let wave = names.len() >= WAVE_VOLUMES_MIN && common.rate != HydrationRate::None;
                    self.prepare_boots(manifest, wave).await;
                }
                Ok(Admitted { names, common, batch, plan })
            }
        }
    }

    async fn manifest_of(&self, request: &CreateRequest) -> Answer<Option<Manifest>> {
        match &request.snapshot {
            None => Ok(None),
            Some(name) => self.manifest(name).await.map(Some),
        }
    }

    fn common(&self, request: &CreateRequest, manifest: Option<&Manifest>) -> Answer<Common> {
        let rate = request.rate.unwrap_or(self.0.settings.default_rate);
        match manifest {
            None => blank(request, rate),
            Some(manifest) => from_snapshot(request, manifest, rate),
        }
    }

    /// After the reference was written: either this sees a deletion, or the deletion sees the reference.
    async fn check_still_there(&self, name: &str, id: u128) -> Answer<()> {
        match self.manifest(name).await {
            Ok(manifest) if manifest.id == id => Ok(()),
            Ok(_) => Err(Problem::new(
                Status::UnknownSnapshot,
                format!("snapshot {name:?} was replaced meanwhile: try again"),
            )),
            Err(problem) => Err(problem),
        }
    }

    fn specs(&self, names: Vec<String>, stores: &[u32], common: &Common) -> Answer<Vec<VolumeSpec>> {
        let mut random = random_numbers(names.len() + 1)?.into_iter();
        let mut unique = || random.next().expect("one more than there are names");
        let batch = unique();
        let created_unix_ms = unix_ms();
        let spec = |(name, store): (String, &u32)| VolumeSpec {
            id: VolumeId::new(&name, unique()),
            name: Arc::from(name),
            size_bytes: common.size_bytes,
            chunk_bytes: common.chunk_bytes,
            snapshot: common.snapshot.clone(),
            store: self.0.settings.stores[*store as usize].label.clone(),
            rate: common.rate,
            batch: Some(batch),
            created_unix_ms,
        };
        Ok(names.into_iter().zip(stores).map(spec).collect())
    }

    /// What a request like this one asks of placement, without creating anything.
    pub(super) async fn batch(&self, request: &CreateRequest) -> Answer<(Batch, Option<SnapshotRef>)> {
        let count = names(request)?.len() as u64;
        self.check(request)?;
        let common = self.common(request, self.manifest_of(request).await?.as_ref())?;
        Ok((batch_of(request, count, &common), common.snapshot))
    }

    /// Everything that can be said without the snapshot.
    fn check(&self, request: &CreateRequest) -> Answer<()> {
        check_shape(request)?;
        request.store.as_ref().map_or(Ok(()), |label| self.check_store(label))
    }

    fn check_store(&self, label: &str) -> Answer<()> {
        if self.0.settings.stores.iter().any(|store| *store.label == *label) {
            return Ok(());
        }
        let labels: Vec<&str> = self.0.settings.stores.iter().map(|store| &*store.label).collect();
        Err(Problem::invalid(format!("store: no volume store {label:?} on this node, only {}", labels.join(", "))))
    }

    /// Gives every shard its volumes; when one refuses, the others' are removed again.
    async fn send(&self, specs: Vec<VolumeSpec>) -> Answer<()> {
        let shards = &self.0.shards;
        let mut parts: Vec<Vec<VolumeSpec>> = vec![Vec::new(); shards.count()];
        for spec in specs {
            parts[spec.id.owner(shards.count())].push(spec);
        }
        let parts: Vec<(usize, Vec<VolumeSpec>)> =
            parts.into_iter().enumerate().filter(|(_, specs)| !specs.is_empty()).collect();
        let asked = parts.iter().map(|(shard, specs)| async {
            let specs = specs.clone();
            shards.ask(*shard, |reply| Command::CreateVolumes { specs, reply }).await.flatten()
        });
        let answers: Vec<Result<()>> = join_all(asked).await;
        let Some(refused) = answers.iter().find_map(|answer| answer.as_ref().err()) else {
            return Ok(());
        };
        let problem = Problem::from(refused.clone());
        let made = parts.iter().zip(&answers).filter(|(_, answer)| answer.is_ok());
        let names = made.flat_map(|((_, specs), _)| specs).map(|spec| spec.name.to_string()).collect();
        match self.delete_all(names).await {
            0 => Err(problem),
            left => Err(problem.and(&format!("; {left} volumes of the request could not be removed again"))),
        }
    }

    /// Deletes volumes; returns how many could not be.
    async fn delete_all(&self, names: Vec<String>) -> usize {
        let shards = &self.0.shards;
        let deleted = join_all(names.into_iter().map(|name| async move {
            let owner = shards.owner_of(&name);
            shards.ask(owner, |reply| Command::DeleteVolume { name, force: true, reply }).await.flatten()
        }));
        let errors = deleted.await.into_iter().filter_map(Result::err);
        errors.inspect(|error| tracing::error!(%error, "volume of a failed creation not removed")).count()
    }
}

/// What a request asks of placement.
pub(super) fn batch_of(request: &CreateRequest, count: u64, common: &Common) -> Batch {
    Batch {
        count,
        volume_bytes: common.size_bytes,
        data_bytes: if common.rate == HydrationRate::None { 0 } else { common.data_bytes },
        bandwidth: match common.rate {
            HydrationRate::BytesPerSecond(bytes) if common.snapshot.is_some() => bytes,
            _ => 0,
        },
        spread: request.spread,
        store: request.store.as_deref().map(Arc::from),
        overcommit: request.overcommit,
    }
}

/// For ids.
pub(super) fn random_numbers(count: usize) -> Answer<Vec<u64>> {
    let mut random = vec![0; count * 8];
    random_bytes(&mut random).map_err(|e| Problem::new(Status::Internal, format!("no random numbers for ids: {e}")))?;
    Ok(random.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect())
}

/// The names of all volumes of the request, checked.
fn names(request: &CreateRequest) -> Answer<Vec<String>> {
    let names = match (&request.name, &request.name_prefix) {
        (Some(_), Some(_)) => return Err(Problem::invalid("name and name_prefix exclude each other")),
        (None, None) => return Err(Problem::invalid("name or name_prefix must be given")),
        (Some(_), None) if request.count.is_some() || request.start.is_some() => {
            return Err(Problem::invalid("count and start go with name_prefix, not with name"));
        }
        (Some(name), None) => vec![name.clone()],
        (None, Some(prefix)) => {
            let count = request.count.unwrap_or(1);
            if !(1..=COUNT_MAX).contains(&count) {
                return Err(Problem::invalid(format!("count: {count} is not between 1 and {COUNT_MAX}")));
            }
            let start = request.start.unwrap_or(0);
            let end = start.checked_add(count).ok_or_else(|| Problem::invalid("start: too large"))?;
            (start..end).map(|number| format!("{prefix}{number}")).collect()
        }
    };
    names.iter().try_for_each(|name| check_name(name).map_err(Problem::invalid))?;
    Ok(names)
}

/// Whether a volume may have this size.
pub(super) fn check_size(size: u64) -> Answer<()> {
    if size == 0 || size > VOLUME_BYTES_MAX || !size.is_multiple_of(u64::from(LOGICAL_BLOCK_BYTES)) {
        return Err(Problem::invalid(format!(
            "size_bytes: {size} is not a multiple of {LOGICAL_BLOCK_BYTES} between {LOGICAL_BLOCK_BYTES} and {}",
            ByteSize(VOLUME_BYTES_MAX)
        )));
    }
    Ok(())
}

/// Everything that can be said about sizes without the snapshot.
fn check_shape(request: &CreateRequest) -> Answer<()> {
    request.size_bytes.map_or(Ok(()), check_size)?;
    if let Some(chunk) = request.chunk_bytes
        && (!chunk.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk))
    {
        return Err(Problem::invalid(format!(
            "chunk_bytes: {chunk} is not a power of two between {CHUNK_BYTES_MIN} and {CHUNK_BYTES_MAX}"
        )));
    }
    Ok(())
}

fn blank(request: &CreateRequest, rate: HydrationRate) -> Answer<Common> {
    let size_bytes = request.size_bytes.ok_or_else(|| Problem::invalid("snapshot or size_bytes must be given"))?;
    let chunk_bytes = request.chunk_bytes.unwrap_or(CHUNK_BYTES_DEFAULT);
    Ok(Common { snapshot: None, size_bytes, chunk_bytes, data_bytes: 0, rate })
}

fn from_snapshot(request: &CreateRequest, manifest: &Manifest, rate: HydrationRate) -> Answer<Common> {
    let (image_bytes, chunk_bytes) = (manifest.size_bytes, manifest.chunk_bytes);
    let size_bytes = request.size_bytes.unwrap_or(image_bytes);
    if size_bytes < image_bytes {
        return Err(Problem::invalid(format!(
            "size {size_bytes} is smaller than the image ({image_bytes} bytes): give at least that, or no size"
        )));
    }
    if request.chunk_bytes.is_some_and(|wanted| wanted != chunk_bytes) {
        return Err(Problem::invalid(format!("chunk_bytes: the image has chunks of {chunk_bytes} bytes")));
    }
    let stored = (0..manifest.chunk_count()).filter(|chunk| manifest.chunk(*chunk) != ChunkEntry::Zero);
    let data_bytes = stored.map(|chunk| u64::from(manifest.chunk_len(chunk))).sum();
    let snapshot = manifest.reference();
    Ok(Common { snapshot: Some(snapshot), size_bytes, chunk_bytes, data_bytes, rate })
}

impl CreatedVolume {
    fn new(spec: &VolumeSpec) -> CreatedVolume {
        CreatedVolume { id: spec.id.to_string(), name: spec.name.to_string(), store: spec.store.to_string() }
    }
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
