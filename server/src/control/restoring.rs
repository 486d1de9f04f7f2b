//! `/v1/volumes/{name}/rollback`, `/verify` and growing: a volume made equal to a snapshot, and what it holds proved.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use crate::error::Status;
use crate::platform::blocking::open_store;
use crate::shard::api::{CheckedChunk, Command, VolumeLineage};
use crate::shard::changes::ChunkSet;
use crate::snapshot::{ChunkEntry, Manifest, read};

use super::Control;
use super::extract::{Body, Params, Segment};
use super::problem::{Answer, Problem};
use super::snapshotting::TakeRequest;

/// Chunks of one step of a verification.
const STEP_CHUNKS_MAX: u32 = 4096;
const STEP_CHUNKS_DEFAULT: u32 = 256;
/// Ranges that one answer names.
const RANGES_MAX: usize = 10_000;
/// Damaged chunks that one answer names.
const NAMED_MAX: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RollbackRequest {
    /// Name of the snapshot.
    to: String,
    /// Also while a host has it attached, which is fenced.
    #[serde(default)]
    force: bool,
    /// Do not keep what the volume holds now.
    #[serde(default)]
    discard: bool,
    /// Name of the snapshot that keeps what the volume holds now.
    keep_as: Option<String>,
}

#[derive(Serialize)]
pub(super) struct RolledBack {
    volume: String,
    to: String,
    /// The snapshot with what the volume held before; `null`: discarded.
    kept_as: Option<String>,
    /// What hydration has to bring.
    remaining_bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VerifyParams {
    #[serde(default)]
    pub(super) from: u32,
    pub(super) chunks: Option<u32>,
    /// Put back what is damaged, from the object store.
    #[serde(default)]
    pub(super) repair: bool,
}

/// What a part of a volume holds, held against the snapshot that it builds on.
#[derive(Serialize)]
pub(super) struct Verified {
    volume: String,
    snapshot: Option<String>,
    snapshot_id: Option<String>,
    size_bytes: u64,
    pub(super) chunk_bytes: u32,
    chunks: u32,
    /// First chunk of the next step; `null`: that was the last.
    pub(super) next: Option<u32>,
    /// Equal to the snapshot's, read from the disk.
    pub(super) equal: u32,
    /// Guests wrote to them, as far as is known.
    pub(super) changed: u32,
    /// Not wholly in the volume: the object store has them.
    absent: u32,
    /// Differ, and nobody knows whether guests wrote to them: the node crashed since the last snapshot.
    pub(super) unexplained: u32,
    /// Differ though no guest wrote to them.
    pub(super) damaged: u32,
    pub(super) repaired: u32,
    damaged_chunks: Vec<u32>,
}

pub(super) async fn roll_back(
    State(control): State<Control>,
    Segment(name): Segment,
    Body(request): Body<RollbackRequest>,
) -> Answer<Json<RolledBack>> {
    // A client that goes away leaves nothing half done.
    let rolled = tokio::spawn(async move { control.roll_back(&name, &request).await });
    rolled.await.map_err(|e| Problem::new(Status::Internal, format!("rollback ended early: {e}")))?.map(Json)
}

/// What would be lost with the object store.
#[derive(Serialize)]
pub(super) struct AtRisk {
    volume: String,
    snapshot: Option<String>,
    bytes: u64,
    ranges: Vec<AbsentRange>,
    /// There are more ranges than are listed.
    more: bool,
}

#[derive(Serialize)]
struct AbsentRange {
    offset: u64,
    bytes: u64,
}

pub(super) async fn at_risk(State(control): State<Control>, Segment(name): Segment) -> Answer<Json<AtRisk>> {
    let status = control.volume(name.clone()).await?;
    let (shard, of) = (control.0.shards.owner_of(&name), name.clone());
    let absent = |reply| Command::Absent { name: of, max: RANGES_MAX + 1, reply };
    let mut ranges = control.0.shards.query(shard, absent).await??;
    let more = ranges.len() > RANGES_MAX;
    ranges.truncate(RANGES_MAX);
    let ranges = ranges.into_iter().map(|range| AbsentRange { offset: range.start, bytes: range.end - range.start });
    Ok(Json(AtRisk {
        volume: name,
        snapshot: status.snapshot,
        bytes: status.remaining_bytes,
        ranges: ranges.collect(),
        more,
    }))
}

pub(super) async fn verify(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(params): Params<VerifyParams>,
) -> Answer<Json<Verified>> {
    control.verify(&name, &params).await.map(Json)
}

impl Control {
    async fn roll_back(&self, name: &str, request: &RollbackRequest) -> Answer<RolledBack> {
        let status = self.volume(name.to_owned()).await?;
        if status.attached && !request.force {
            let detail = format!("volume {name:?} is attached: detach it first, or use --force to fence its host");
            return Err(Problem::new(Status::Conflict, detail));
        }
        let target = self.manifest(&request.to).await?;
        if target.chunk_bytes != status.chunk_bytes || target.size_bytes > status.size_bytes {
            let detail = format!(
                "snapshot {:?} ({} bytes in chunks of {}) does not fit volume {name:?} ({} bytes in chunks of {})",
                request.to, target.size_bytes, target.chunk_bytes, status.size_bytes, status.chunk_bytes
            );
            return Err(Problem::invalid(detail));
        }
        let kept_as = match request.discard {
            true => None,
            false => Some(self.keep(name, request).await?),
        };
        let shard = self.0.shards.owner_of(name);
        let mut references = self.0.references.lock().await;
        if !references.holds(&target.name) {
            references.hold(self, &target.name).await?;
        }
        if self.manifest(&request.to).await?.id != target.id {
            let detail = format!("snapshot {:?} was replaced meanwhile: try again", request.to);
            return Err(Problem::new(Status::UnknownSnapshot, detail));
        }
        let lineage = self.lineage(name).await?;
        let base = self.base_of(&lineage).await?;
        let (differs, base_ref) = match &base {
            Some(base) => (differing(base, &target, chunks_of(&lineage)), lineage.lineage.base.clone()),
            None if lineage.lineage.base.is_none() => (with_data(&target, chunks_of(&lineage)), None),
            None => ((0..chunks_of(&lineage)).collect(), lineage.lineage.base.clone()),
        };
        let command = |reply| Command::RollBack {
            name: name.to_owned(),
            snapshot: target.reference(),
            base: base_ref,
            differs,
            force: request.force,
            reply,
        };
        self.0.shards.ask(shard, command).await??;
        drop(references);
        let remaining_bytes = self.volume(name.to_owned()).await?.remaining_bytes;
        tracing::info!(volume = name, snapshot = request.to, remaining_bytes, "rolled back");
        Ok(RolledBack { volume: name.to_owned(), to: request.to.clone(), kept_as, remaining_bytes })
    }

    /// Takes a snapshot of what the volume holds now.
    async fn keep(&self, name: &str, request: &RollbackRequest) -> Answer<String> {
        let unique = format!("{name}-before-{}-{}", request.to, super::create::unix_ms() / 1000);
        let kept = request.keep_as.clone().unwrap_or(unique);
        self.start_taking(TakeRequest { name: kept.clone(), volumes: vec![name.to_owned()] }).await?;
        loop {
            let task = self.wait_for_task(&kept, Duration::from_secs(60)).await?;
            match task.error {
                Some((_, message)) => {
                    return Err(Problem::new(
                        Status::Conflict,
                        format!("not rolled back, what it holds could not be kept: {message}"),
                    ));
                }
                None if task.state == "done" => return Ok(kept),
                None => {}
            }
        }
    }

    async fn lineage(&self, name: &str) -> Answer<VolumeLineage> {
        let shard = self.0.shards.owner_of(name);
        Ok(self.0.shards.query(shard, |reply| Command::Lineage { name: name.to_owned(), reply }).await??)
    }

    /// The manifest of what the volume's changes count from, if it is still there.
    async fn base_of(&self, lineage: &VolumeLineage) -> Answer<Option<Manifest>> {
        let Some(base) = &lineage.lineage.base else { return Ok(None) };
        match self.manifest_as_it_is(&base.name).await {
            Ok(manifest) => Ok(Some(manifest).filter(|manifest| manifest.id == base.id)),
            Err(problem) if problem.is(Status::UnknownSnapshot) => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// Puts back what a chunk should hold.
    async fn repair(&self, lineage: &VolumeLineage, base: Option<&Manifest>, chunk: u32) -> Answer<bool> {
        let content = match base.filter(|base| entry(base, chunk).is_some()) {
            None => Vec::new(),
            Some(base) => self.chunk_of(base.clone(), chunk).await?,
        };
        let shard = (lineage.id.0 >> 48) as usize % self.0.shards.count();
        let repair = |reply| Command::RepairChunk { volume: lineage.id, chunk, content, reply };
        Ok(self.0.shards.ask(shard, repair).await??)
    }

    /// A chunk from the object store, verified.
    async fn chunk_of(&self, manifest: Manifest, chunk: u32) -> Answer<Vec<u8>> {
        let choice = self.0.settings.object_store_choice.clone();
        let read = tokio::task::spawn_blocking(move || {
            let store = open_store(&choice.ok_or_else(|| "the node has no object store".to_owned())?);
            let store = store.map_err(|e| e.to_string())?;
            read::chunk(&store, &manifest, chunk)
        });
        let read = read.await.map_err(|e| Problem::new(Status::Internal, e.to_string()))?;
        read.map_err(|why| Problem::new(Status::ObjectStore, why))
    }

    pub(super) async fn verify(&self, name: &str, params: &VerifyParams) -> Answer<Verified> {
        let count = params.chunks.unwrap_or(STEP_CHUNKS_DEFAULT);
        if !(1..=STEP_CHUNKS_MAX).contains(&count) {
            return Err(Problem::invalid(format!("chunks: {count} is not between 1 and {STEP_CHUNKS_MAX}")));
        }
        let lineage = self.lineage(name).await?;
        let base = self.base_of(&lineage).await?;
        if let (None, Some(gone)) = (&base, &lineage.lineage.base) {
            let detail =
                format!("volume {name:?} builds on snapshot {:?}, which was deleted: take a new one", &*gone.name);
            return Err(Problem::new(Status::UnknownSnapshot, detail));
        }
        let chunks = chunks_of(&lineage);
        let end = params.from.saturating_add(count).min(chunks);
        let mut found = Verified {
            volume: name.to_owned(),
            snapshot: base.as_ref().map(|base| base.name.clone()),
            snapshot_id: base.as_ref().map(|base| format!("{:032x}", base.id)),
            size_bytes: lineage.size_bytes,
            chunk_bytes: lineage.chunk_bytes,
            chunks,
            next: (end < chunks).then_some(end),
            equal: 0,
            changed: 0,
            absent: 0,
            unexplained: 0,
            damaged: 0,
            repaired: 0,
            damaged_chunks: Vec::new(),
        };
        let shard = self.0.shards.owner_of(name);
        for chunk in params.from..end {
            let check = |reply| Command::CheckChunk { volume: lineage.id, chunk, reply };
            let checked = self.0.shards.ask(shard, check).await??;
            let equal = equals(&checked, base.as_ref(), chunk, &lineage);
            match (checked.digest, checked.changed) {
                (None, _) => found.absent += 1,
                (Some(_), Some(true)) => found.changed += 1,
                (Some(_), _) if equal => found.equal += 1,
                (Some(_), None) => found.unexplained += 1,
                (Some(_), Some(false)) => {
                    found.damaged += 1;
                    if found.damaged_chunks.len() < NAMED_MAX {
                        found.damaged_chunks.push(chunk);
                    }
                    if params.repair && self.repair(&lineage, base.as_ref(), chunk).await? {
                        found.repaired += 1;
                    }
                    tracing::warn!(
                        volume = name,
                        chunk,
                        "the volume's disk holds something else than was written there"
                    );
                }
            }
        }
        Ok(found)
    }
}

fn chunks_of(lineage: &VolumeLineage) -> u32 {
    u32::try_from(lineage.size_bytes.div_ceil(u64::from(lineage.chunk_bytes))).unwrap_or(u32::MAX)
}

fn entry(manifest: &Manifest, chunk: u32) -> Option<([u8; 32], u32)> {
    if chunk >= manifest.chunk_count() {
        return None;
    }
    match manifest.chunk(chunk) {
        ChunkEntry::Zero => None,
        ChunkEntry::Stored { digest, .. } => Some((digest, manifest.chunk_len(chunk))),
    }
}

/// Chunks that two snapshots hold differently.
fn differing(a: &Manifest, b: &Manifest, chunks: u32) -> ChunkSet {
    (0..chunks).filter(|chunk| entry(a, *chunk) != entry(b, *chunk)).collect()
}

fn with_data(manifest: &Manifest, chunks: u32) -> ChunkSet {
    (0..chunks).filter(|chunk| entry(manifest, *chunk).is_some()).collect()
}

/// Whether a chunk on the disk is what the snapshot has there.
fn equals(checked: &CheckedChunk, base: Option<&Manifest>, chunk: u32, lineage: &VolumeLineage) -> bool {
    let at = u64::from(chunk) * u64::from(lineage.chunk_bytes);
    let len = u32::try_from((lineage.size_bytes - at).min(u64::from(lineage.chunk_bytes))).unwrap_or(u32::MAX);
    match base.and_then(|base| entry(base, chunk)) {
        None => checked.zero,
        // The snapshot's last chunk goes on with zeroes in a longer volume, which its digest says nothing of.
        Some((_, stored)) if stored < len => true,
        Some((digest, _)) => checked.digest == Some(digest),
    }
}
