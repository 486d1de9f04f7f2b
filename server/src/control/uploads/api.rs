//! The handlers of uploads: start, put a block, show, complete, abandon.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::{Body as HttpBody, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use volley_protocol::name::check_name;

use crate::error::Status;
use crate::snapshot::claim::StoredPacks;
use crate::snapshot::diff::digest_text;
use crate::snapshot::draft::{Draft, Put};
use crate::snapshot::manifest::{self, check_geometry};
use crate::snapshot::{
    Manifest, SnapshotInfo, chunk, import_key, is_zero, manifest_key, marker, pack_prefix, parse_pack_key,
};
use crate::types::{CHUNK_BYTES_DEFAULT, CHUNK_BYTES_MAX};
use crate::upload::{self, Record};

use super::super::blocks::{BLAKE3, CHECKSUM, CHECKSUM_ALGORITHM, check_index, id_text, off_thread};
use super::super::create::random_numbers;
use super::super::extract::{BODY_DEADLINE, BlockOf, Body, Segment};
use super::super::problem::{Answer, Problem};
use super::super::snapshots::Image;
use super::{BLOCKS_MAX, Control, IDLE_MAX, UPLOADS_MAX, Upload, lock};

/// As imports: more costs more time than it saves bytes.
const ZSTD_LEVEL: i32 = 3;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::control) struct StartRequest {
    size_bytes: Option<u64>,
    chunk_bytes: Option<u32>,
    parent: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::control) struct CompleteRequest {
    blocks_changed: u32,
}

#[derive(Serialize)]
pub(in crate::control) struct Shown {
    upload: String,
    snapshot: String,
    parent: Option<String>,
    size_bytes: u64,
    block_bytes: u32,
    /// Blocks put, each counted once.
    blocks: u32,
    started_unix_ms: u64,
    idle_seconds: u64,
    expires_seconds: u64,
}

#[derive(Serialize)]
pub(in crate::control) struct Listed {
    uploads: Vec<Shown>,
}

#[derive(Serialize)]
pub(in crate::control) struct BlockPut {
    index: u32,
    length: u32,
    digest: String,
    blocks: u32,
}

pub(in crate::control) async fn start(
    State(control): State<Control>,
    Segment(name): Segment,
    Body(request): Body<StartRequest>,
) -> Answer<(StatusCode, Json<Shown>)> {
    // A client that goes away must not leave a marker that nobody knows of.
    let started = tokio::spawn(async move { control.start_upload(name, request).await }).await;
    let upload = started.map_err(|e| Problem::new(Status::Internal, format!("starting an upload: {e}")))??;
    Ok((StatusCode::CREATED, Json(Shown::of(&upload))))
}

pub(in crate::control) async fn put(
    State(control): State<Control>,
    BlockOf(id, index): BlockOf,
    request: Request,
) -> Answer<Json<BlockPut>> {
    let _turn = control.block_turn().await?;
    let (parts, body) = request.into_parts();
    // Before anything is refused: who sends a block may not look for an answer until it is sent.
    let body = read_body(body).await?;
    let upload = control.0.uploads.get(&id)?;
    let checksum = Checksum::of(&parts.headers)?;
    let len = upload.block_len(index)?;
    if body.len() != len as usize {
        let text = format!("block {index} of this upload has {len} bytes, {} have come", body.len());
        return Err(Problem::invalid(text));
    }
    let (digest, block) = off_thread(move || checksum.check(index, &body)).await??;
    let mut draft = upload.draft.lock().await;
    upload.check_open(&control.0.uploads)?;
    control.store_sealed(&upload, &mut draft).await?;
    draft.put(index, &block).map_err(|e| Problem::invalid(e.to_string()))?;
    let blocks = draft.blocks_put();
    control.0.block_tally.note_put(len as usize);
    upload.blocks.store(blocks, Ordering::Relaxed);
    Ok(Json(BlockPut { index, length: len, digest: digest_text(&digest), blocks }))
}

pub(in crate::control) async fn list(State(control): State<Control>) -> Json<Listed> {
    let uploads = lock(&control.0.uploads.open).values().map(|upload| Shown::of(upload)).collect();
    Json(Listed { uploads })
}

pub(in crate::control) async fn show(State(control): State<Control>, Segment(id): Segment) -> Answer<Json<Shown>> {
    let open = super::parse_id(&id).and_then(|id| lock(&control.0.uploads.open).get(&id).cloned());
    // Looking at an upload does not keep it.
    match open {
        Some(upload) => Ok(Json(Shown::of(&upload))),
        None => control.0.uploads.get(&id).map(|upload| Json(Shown::of(&upload))),
    }
}

pub(in crate::control) async fn complete(
    State(control): State<Control>,
    Segment(id): Segment,
    Body(request): Body<CompleteRequest>,
) -> Answer<Json<Image>> {
    let completed = tokio::spawn(async move { control.complete_upload(&id, request.blocks_changed).await }).await;
    let manifest = completed.map_err(|e| Problem::new(Status::Internal, format!("completing an upload: {e}")))??;
    Ok(Json(Image::new(&manifest)))
}

pub(in crate::control) async fn abandon(State(control): State<Control>, Segment(id): Segment) -> Answer<StatusCode> {
    let abandoned = tokio::spawn(async move { control.abandon_upload(&id).await }).await;
    abandoned.map_err(|e| Problem::new(Status::Internal, format!("abandoning an upload: {e}")))??;
    Ok(StatusCode::NO_CONTENT)
}

impl Shown {
    fn of(upload: &Upload) -> Shown {
        let idle = lock(&upload.last_used).elapsed();
        Shown {
            upload: id_text(upload.id),
            snapshot: upload.snapshot.clone(),
            parent: upload.parent.clone(),
            size_bytes: upload.size_bytes,
            block_bytes: upload.chunk_bytes,
            blocks: upload.blocks.load(Ordering::Relaxed),
            started_unix_ms: upload.started_unix_ms,
            idle_seconds: idle.as_secs(),
            expires_seconds: IDLE_MAX.saturating_sub(idle).as_secs(),
        }
    }
}

impl Upload {
    fn block_len(&self, index: u32) -> Answer<u32> {
        let count = self.size_bytes.div_ceil(u64::from(self.chunk_bytes));
        check_index(index, u32::try_from(count).unwrap_or(u32::MAX))?;
        let rest = self.size_bytes - u64::from(index) * u64::from(self.chunk_bytes);
        Ok(u32::try_from(rest).map_or(self.chunk_bytes, |rest| rest.min(self.chunk_bytes)))
    }
}

/// What the client says its block hashes to.
enum Checksum {
    Blake3([u8; 32]),
    Sha256([u8; 32]),
}

impl Checksum {
    fn of(headers: &HeaderMap) -> Answer<Checksum> {
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let given = text(CHECKSUM).ok_or_else(|| Problem::invalid("header Volley-Checksum is missing"))?;
        let digest = blake3::Hash::from_hex(given)
            .map_err(|_| Problem::invalid(format!("header Volley-Checksum: {given:?} is not 64 hexadecimal digits")))?;
        match text(CHECKSUM_ALGORITHM) {
            None | Some(BLAKE3) => Ok(Checksum::Blake3(*digest.as_bytes())),
            Some("SHA256") => Ok(Checksum::Sha256(*digest.as_bytes())),
            Some(other) => {
                Err(Problem::invalid(format!("header Volley-Checksum-Algorithm: {other:?} is not BLAKE3 or SHA256")))
            }
        }
    }

    /// Checks a block against it, and encodes the block.
    fn check(&self, index: u32, body: &[u8]) -> Answer<([u8; 32], Put)> {
        let digest = *blake3::hash(body).as_bytes();
        let (given, found) = match self {
            Checksum::Blake3(given) => (given, digest),
            Checksum::Sha256(given) => (given, Sha256::digest(body).into()),
        };
        if *given != found {
            let found = digest_text(&found);
            return Err(Problem::checksum(format!("block {index} was damaged on its way: what came has {found}")));
        }
        let block = match is_zero(body) {
            true => Put::Zero,
            false => Put::Data(chunk::encode_with_digest(body, digest, ZSTD_LEVEL)),
        };
        Ok((digest, block))
    }
}

async fn read_body(body: HttpBody) -> Answer<Bytes> {
    let body = tokio::time::timeout(BODY_DEADLINE, to_bytes(body, CHUNK_BYTES_MAX as usize)).await;
    body.map_err(|_| Problem::body_late(BODY_DEADLINE))?.map_err(|e| {
        // The limit is found in the chain of causes only, and a body that breaks off has nobody to answer.
        Problem::new(Status::TooLarge, format!("a block has at most {CHUNK_BYTES_MAX} bytes: {e}"))
    })
}

impl Control {
    /// The parent as it is now, after the marker: none of its packs is about to be collected.
    async fn reusable(&self, parent: &Arc<Manifest>) -> Answer<Arc<Manifest>> {
        let parent = self.same_again(parent).await?;
        let keys = parent.pack_keys().iter().filter_map(|key| parse_pack_key(key)).map(|(id, _)| pack_prefix(id));
        let prefixes: BTreeSet<String> = keys.collect();
        let packs = StoredPacks::under(&self.0.shards, prefixes).await;
        let packs = packs.map_err(|e| Problem::new(Status::ObjectStore, e.to_string()))?;
        let reusable = packs.reusable();
        match parent.pack_keys().iter().find(|key| !reusable.contains_key(key.as_str())) {
            None => Ok(parent),
            Some(key) => {
                let detail =
                    format!("{key} of snapshot {:?} (parent) is gone or about to be collected: try again", parent.name);
                Err(Problem::new(Status::Conflict, detail))
            }
        }
    }

    async fn start_upload(&self, name: String, request: StartRequest) -> Answer<Arc<Upload>> {
        check_name(&name).map_err(Problem::invalid)?;
        let uploads = &self.0.uploads;
        let place = uploads.places.clone().try_acquire_owned().map_err(|_| {
            Problem::new(Status::Busy, format!("{UPLOADS_MAX} uploads are open: complete or abandon one first"))
        })?;
        if self.0.shards.get_object_range(&manifest_key(&name), 0..manifest::HEADER_BYTES as u64).await?.is_some() {
            return Err(Problem::new(Status::NameTaken, format!("snapshot {name:?} exists already")));
        }
        let parent = match &request.parent {
            Some(parent) => Some(self.kept_manifest(parent).await.map_err(|problem| problem.and(" (parent)"))?),
            None => None,
        };
        let (size_bytes, chunk_bytes) = geometry(&request, parent.as_deref())?;
        let id = new_id()?;
        let record = Record { id, snapshot: name.clone() };
        self.mark(&record).await?;
        // From here on garbage collection leaves the packs alone that the parent has now, if it is still there.
        let parent = match parent {
            None => None,
            Some(parent) => match self.reusable(&parent).await {
                Ok(parent) => Some(parent),
                Err(problem) => {
                    self.leave_record(record, true).await;
                    return Err(problem);
                }
            },
        };
        let info = SnapshotInfo {
            id,
            name: name.clone(),
            size_bytes,
            chunk_bytes,
            parent: request.parent.clone(),
            created_unix_ms: 0,
        };
        let upload = Arc::new(Upload {
            id,
            snapshot: name,
            parent: request.parent,
            size_bytes,
            chunk_bytes,
            started_unix_ms: unix_ms(),
            last_used: std::sync::Mutex::new(Instant::now()),
            blocks: AtomicU32::new(0),
            over: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            draft: tokio::sync::Mutex::new(Draft::new(info, parent)),
            _place: place,
        });
        lock(&uploads.open).insert(id, upload.clone());
        uploads.tally.started.fetch_add(1, Ordering::Relaxed);
        Ok(upload)
    }

    /// Puts the marker of an upload, after the file that says so.
    async fn mark(&self, record: &Record) -> Answer<()> {
        let (data, written) = (self.0.settings.data.clone(), record.clone());
        let written = off_thread(move || upload::write(&data, &written)).await?;
        written.map_err(|e| Problem::new(Status::Io, e.to_string()))?;
        let name = &record.snapshot;
        match self.0.shards.put_object_if_absent(import_key(name), marker::encode(record.id)).await {
            Ok(true) => Ok(()),
            other => {
                self.leave_record(record.clone(), true).await;
                other?;
                let why = format!(
                    "an upload or import of {name:?} is open or was interrupted: complete or abandon it (GET /v1/uploads), \
                     or drop it with 'volley image gc --incomplete {name}'"
                );
                Err(Problem::new(Status::Conflict, why))
            }
        }
    }

    /// The manifest of a parent as it is now.
    async fn same_again(&self, parent: &Manifest) -> Answer<Arc<Manifest>> {
        let found = self.kept_manifest(&parent.name).await?;
        match found.id == parent.id {
            true => Ok(found),
            false => Err(Problem::new(Status::Conflict, format!("snapshot {:?} was made anew meanwhile", parent.name))),
        }
    }
}

/// Size of the device and of its blocks: as asked for, the parent's, or the default.
fn geometry(request: &StartRequest, parent: Option<&Manifest>) -> Answer<(u64, u32)> {
    let (size, chunk) = match parent {
        None => {
            let size = request.size_bytes.ok_or_else(|| Problem::invalid("give size_bytes or parent"))?;
            (size, request.chunk_bytes.unwrap_or(CHUNK_BYTES_DEFAULT))
        }
        Some(parent) => {
            let (size, chunk) = (parent.size_bytes, parent.chunk_bytes);
            let asked = (request.size_bytes.unwrap_or(size), request.chunk_bytes.unwrap_or(chunk));
            if asked != (size, chunk) {
                let text = format!("size_bytes and chunk_bytes are those of the parent: {size} and {chunk}");
                return Err(Problem::invalid(text));
            }
            asked
        }
    };
    check_geometry(size, chunk).map_err(Problem::invalid)?;
    let blocks = size.div_ceil(u64::from(chunk));
    if blocks > u64::from(BLOCKS_MAX) {
        let text =
            format!("{blocks} blocks are more than an upload may have ({BLOCKS_MAX}): use larger blocks, or import");
        return Err(Problem::invalid(text));
    }
    Ok((size, chunk))
}

fn new_id() -> Answer<u128> {
    let random = random_numbers(2)?;
    Ok(u128::from(random[0]) << 64 | u128::from(random[1]))
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
