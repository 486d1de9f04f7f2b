//! `/v1/snapshots/{name}/blocks` and `/changed`: what backup tools read of snapshots, block by block.
//!
//! Lists come from manifests. A block is fetched through a shard, like every object, and checked against its digest before
//! a byte of the answer is sent. The blocks in memory are counted until the last byte of them has left.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Status;
use crate::platform::AlignedBytes;
use crate::snapshot::diff::{self, Block, Change, Page, digest_text};
use crate::snapshot::{ChunkEntry, Manifest, decode_chunk};

use super::Control;
use super::extract::{BlockOf, Params, Segment};
use super::problem::{Answer, Problem};

use token::List;

mod tally;
mod token;

pub(super) use tally::{BlockTally, Operation};

/// Blocks of one page, unless asked otherwise, and at most.
const PAGE_DEFAULT: u32 = 1000;
const PAGE_MAX: u32 = 10_000;
/// Blocks read or written at once by all clients: with their stored form 8 MiB each, at most.
const BLOCKS_AT_ONCE: usize = 16;
/// A request that has not got one of these by then is told to come back.
const TURN_DEADLINE: Duration = Duration::from_secs(10);

pub(super) const CHECKSUM: &str = "volley-checksum";
pub(super) const CHECKSUM_ALGORITHM: &str = "volley-checksum-algorithm";
const CHECKSUM_SHA256: &str = "volley-checksum-sha256";
const BLOCK_ZERO: &str = "volley-block-zero";
const SNAPSHOT_ID: &str = "volley-snapshot-id";
pub(super) const BLAKE3: &str = "BLAKE3";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    starting: Option<u32>,
    max: Option<u32>,
    token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangedParams {
    since: String,
    starting: Option<u32>,
    max: Option<u32>,
    token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockParams {
    checksum: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Listed {
    #[serde(flatten)]
    of: Described,
    blocks: Vec<Block>,
    /// Token of the next page.
    next: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Changed {
    #[serde(flatten)]
    of: Described,
    since: String,
    since_id: String,
    changes: Vec<Change>,
    next: Option<String>,
}

#[derive(Serialize)]
struct Described {
    snapshot: String,
    id: String,
    size_bytes: u64,
    block_bytes: u32,
}

pub(super) async fn list(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(params): Params<ListParams>,
) -> Answer<Json<Listed>> {
    let manifest = control.kept_manifest(&name).await?;
    let list = List { id: manifest.id, since: None };
    let part = Part::new(params.starting, params.max, params.token.as_deref(), list)?;
    let of = Described::new(&manifest);
    let page = off_thread(move || diff::page(diff::blocks(&manifest, part.starting), part.max)).await?;
    let Page { items, next } = page;
    Ok(Json(Listed { of, blocks: items, next: next.map(|next| token::write(list, next)) }))
}

pub(super) async fn changed(
    State(control): State<Control>,
    Segment(name): Segment,
    Params(params): Params<ChangedParams>,
) -> Answer<Json<Changed>> {
    let manifest = control.kept_manifest(&name).await?;
    let since = control.kept_manifest(&params.since).await.map_err(|problem| problem.and(" (since)"))?;
    let list = List { id: manifest.id, since: Some(since.id) };
    let part = Part::new(params.starting, params.max, params.token.as_deref(), list)?;
    let (of, since_id) = (Described::new(&manifest), id_text(since.id));
    let compared = off_thread(move || {
        diff::changes(&manifest, &since, part.starting).map(|changes| diff::page(changes, part.max))
    });
    let Page { items, next } = compared.await?.map_err(|e| Problem::invalid(format!("since: {e}")))?;
    let next = next.map(|next| token::write(list, next));
    Ok(Json(Changed { of, since: params.since, since_id, changes: items, next }))
}

pub(super) async fn show(
    State(control): State<Control>,
    BlockOf(name, index): BlockOf,
    Params(params): Params<BlockParams>,
) -> Answer<Response> {
    let sha256 = match params.checksum.as_deref() {
        None => false,
        Some("sha256") => true,
        Some(other) => return Err(Problem::invalid(format!("checksum: {other:?} is not sha256"))),
    };
    let manifest = control.kept_manifest(&name).await?;
    check_index(index, manifest.chunk_count())?;
    let turn = control.block_turn().await?;
    let entry = manifest.chunk(index);
    let stored = control.stored_block(&manifest, index).await?;
    let id = id_text(manifest.id);
    let content = off_thread(move || Content::of(&manifest, index, &stored, sha256)).await?;
    let Content { raw, digest, sha256 } = content?;
    control.0.block_tally.note_read(raw.len());
    let zero = if entry == ChunkEntry::Zero { "true" } else { "false" };
    let mut response = Response::new(Body::from(Bytes::from_owner(Lent { raw, _turn: turn })));
    let headers = response.headers_mut();
    let text = |text: &str| HeaderValue::from_str(text).expect("hexadecimal digits");
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CHECKSUM_ALGORITHM, HeaderValue::from_static(BLAKE3));
    headers.insert(CHECKSUM, text(&digest_text(&digest)));
    headers.insert(BLOCK_ZERO, HeaderValue::from_static(zero));
    headers.insert(SNAPSHOT_ID, text(&id));
    if let Some(sha256) = sha256 {
        headers.insert(CHECKSUM_SHA256, text(&digest_text(&sha256)));
    }
    Ok(response)
}

/// The part of a list that a request asks for.
struct Part {
    starting: u32,
    max: usize,
}

impl Part {
    fn new(starting: Option<u32>, max: Option<u32>, token: Option<&str>, list: List) -> Answer<Part> {
        let max = max.unwrap_or(PAGE_DEFAULT);
        if max == 0 || max > PAGE_MAX {
            return Err(Problem::invalid(format!("max: {max} is not 1 to {PAGE_MAX}")));
        }
        let starting = match (starting, token) {
            (Some(_), Some(_)) => return Err(Problem::invalid("starting and token exclude each other")),
            (starting, None) => starting.unwrap_or(0),
            (None, Some(token)) => token::read(token, list).map_err(|why| Problem::invalid(format!("token: {why}")))?,
        };
        Ok(Part { starting, max: max as usize })
    }
}

impl Described {
    fn new(manifest: &Manifest) -> Described {
        Described {
            snapshot: manifest.name.clone(),
            id: id_text(manifest.id),
            size_bytes: manifest.size_bytes,
            block_bytes: manifest.chunk_bytes,
        }
    }
}

/// Block data and the turn it takes until it is sent.
struct Lent {
    raw: AlignedBytes,
    _turn: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.raw
    }
}

struct Content {
    raw: AlignedBytes,
    digest: [u8; 32],
    sha256: Option<[u8; 32]>,
}

impl Content {
    /// The verified bytes of a block.
    fn of(manifest: &Manifest, index: u32, stored: &[u8], sha256: bool) -> Answer<Content> {
        let len = manifest.chunk_len(index);
        let (raw, digest) = match manifest.chunk(index) {
            ChunkEntry::Zero => {
                let mut raw = AlignedBytes::default();
                raw.resize(len as usize);
                let digest = *blake3::hash(&raw).as_bytes();
                (raw, digest)
            }
            entry @ ChunkEntry::Stored { digest, .. } => {
                let raw = decode_chunk(&entry, stored, len).map_err(|e| corrupt(manifest, index, &e.to_string()))?;
                (raw, digest)
            }
        };
        let sha256 = sha256.then(|| Sha256::digest(&raw[..]).into());
        Ok(Content { raw, digest, sha256 })
    }
}

/// Limits the blocks in memory.
pub(super) struct BlockTurns(Arc<Semaphore>);

impl Default for BlockTurns {
    fn default() -> BlockTurns {
        BlockTurns(Arc::new(Semaphore::new(BLOCKS_AT_ONCE)))
    }
}

impl Control {
    /// The right to have one block in memory.
    pub(super) async fn block_turn(&self) -> Answer<OwnedSemaphorePermit> {
        let turn = tokio::time::timeout(TURN_DEADLINE, self.0.block_turns.0.clone().acquire_owned()).await;
        let busy = || Problem::new(Status::Busy, format!("{BLOCKS_AT_ONCE} blocks are being read or written already"));
        turn.map_err(|_| busy())?.map_err(|_| busy())
    }

    /// The verified bytes of a block.
    pub(super) async fn block(&self, manifest: &Arc<Manifest>, index: u32) -> Answer<AlignedBytes> {
        let _turn = self.block_turn().await?;
        let (stored, manifest) = (self.stored_block(manifest, index).await?, manifest.clone());
        Ok(off_thread(move || Content::of(&manifest, index, &stored, false)).await??.raw)
    }

    /// The bytes of a block as they are in its pack.
    async fn stored_block(&self, manifest: &Manifest, index: u32) -> Answer<Vec<u8>> {
        let ChunkEntry::Stored { pack, offset, stored_len, .. } = manifest.chunk(index) else {
            return Ok(Vec::new());
        };
        let range = offset..offset + u64::from(stored_len);
        let stored = self.0.shards.get_object_range(manifest.pack_key(pack), range).await?;
        stored.ok_or_else(|| corrupt(manifest, index, "the pack is missing"))
    }
}

/// Refuses the number of a block past the end.
pub(super) fn check_index(index: u32, count: u32) -> Answer<()> {
    match index < count {
        true => Ok(()),
        false => Err(Problem::invalid(format!("index: {index} is past the last block {}", count - 1))),
    }
}

/// Runs what takes milliseconds of a core beside the thread that serves all requests.
pub(super) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Problem::new(Status::Internal, format!("a request's work: {e}")))
}

fn corrupt(manifest: &Manifest, index: u32, why: &str) -> Problem {
    let pack = match manifest.chunk(index) {
        ChunkEntry::Stored { pack, .. } => manifest.pack_key(pack),
        ChunkEntry::Zero => "",
    };
    Problem::new(Status::Corrupt, format!("snapshot {:?}: block {index} (pack {pack}): {why}", manifest.name))
}

pub(super) fn id_text(id: u128) -> String {
    format!("{id:032x}")
}
