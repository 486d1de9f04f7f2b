//! `/v1/volumes/{name}/rollback`, `/verify` and growing: a volume made equal to a snapshot, and what it holds proved.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use crate::error::Status;
use crate::shard::api::{Command, VolumeLineage};
use crate::snapshot::Manifest;
use crate::snapshot::diff::differing;
use crate::snapshot::sectors::Differing;

use super::Control;
use super::blocks::id_text;
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
    /// Say which sectors of the chunks that guests wrote to differ.
    #[serde(default)]
    pub(super) sectors: bool,
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
    /// If it was asked for: what differs in chunks that are changed, absent or unexplained. All else is equal, but for damaged chunks.
    sectors: Option<Differing>,
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
        let differs = match (&base, &lineage.lineage.base) {
            // Deleted: nobody can say what the volume holds.
            (None, Some(_)) => (0..lineage.chunks()).collect(),
            _ => differing(base.as_deref(), &target, lineage.chunks()).collect(),
        };
        let command = |reply| Command::RollBack {
            name: name.to_owned(),
            snapshot: target.reference(),
            base: lineage.lineage.base.clone(),
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
    async fn base_of(&self, lineage: &VolumeLineage) -> Answer<Option<Arc<Manifest>>> {
        let Some(base) = &lineage.lineage.base else { return Ok(None) };
        match self.kept_manifest(&base.name).await {
            Ok(manifest) => Ok(Some(manifest).filter(|manifest| manifest.id == base.id)),
            Err(problem) if problem.is(Status::UnknownSnapshot) => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// What a chunk has in a snapshot, as far as that is not zeroes.
    async fn wanted(&self, manifest: Option<&Arc<Manifest>>, chunk: u32) -> Answer<Vec<u8>> {
        match manifest.filter(|manifest| entry(manifest, chunk).is_some()) {
            None => Ok(Vec::new()),
            Some(manifest) => Ok(self.block(manifest, chunk).await?.to_vec()),
        }
    }

    /// Puts back what a chunk should hold.
    async fn repair(&self, lineage: &VolumeLineage, manifest: Option<&Arc<Manifest>>, chunk: u32) -> Answer<bool> {
        let content = self.wanted(manifest, chunk).await?;
        let (volume, base) = (lineage.id, lineage.lineage.base.clone());
        let repair = |reply| Command::RepairChunk { volume, chunk, base, content, reply };
        Ok(self.0.shards.ask(volume.owner(self.0.shards.count()), repair).await??)
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
        let chunks = lineage.chunks();
        let end = params.from.saturating_add(count).min(chunks);
        let mut found = Verified {
            volume: name.to_owned(),
            snapshot: base.as_ref().map(|base| base.name.clone()),
            snapshot_id: base.as_ref().map(|base| id_text(base.id)),
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
            sectors: params.sectors.then(Differing::default),
        };
        let shard = self.0.shards.owner_of(name);
        for chunk in params.from..end {
            let wanted = base.as_ref().and_then(|base| entry(base, chunk));
            let (volume, base_ref) = (lineage.id, lineage.lineage.base.clone());
            let len = wanted.map_or(0, |(_, len)| len);
            let check =
                |reply| Command::CheckChunk { volume, chunk, len, base: base_ref, content: params.sectors, reply };
            let checked = self.0.shards.ask(shard, check).await??;
            // Behind the end of the snapshot a longer volume has zeroes.
            let equal = checked.rest_is_zero && wanted.is_none_or(|(digest, _)| checked.digest == Some(digest));
            let is_damaged = checked.digest.is_some() && checked.changed == Some(false);
            if let Some(differing) = found.sectors.as_mut().filter(|_| !equal && !is_damaged)
                && !checked.content.is_empty()
            {
                let wanted = self.wanted(base.as_ref(), chunk).await?;
                differing.compare(&checked.content, u64::from(chunk) * u64::from(lineage.chunk_bytes), &wanted);
            }
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

/// Digest and length of a chunk that a snapshot has data for.
fn entry(manifest: &Manifest, chunk: u32) -> Option<([u8; 32], u32)> {
    manifest.digest(chunk).map(|digest| (digest, manifest.chunk_len(chunk)))
}
