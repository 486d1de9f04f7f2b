//! `GET /v1/images` and `/v1/images/{name}` (also as `/v1/snapshots`): what can be made into volumes.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use crate::error::Status;
use crate::snapshot::deletion::{self, deletion_key};
use crate::snapshot::diff::digest_text;
use crate::snapshot::{ChunkEntry, MANIFEST_PREFIX, Manifest, manifest_key, merkle, reference_prefix};

use super::Control;
use super::blocks::off_thread;
use super::extract::Segment;
use super::problem::{Answer, Problem};

#[derive(Serialize)]
pub(super) struct Image {
    id: String,
    name: String,
    size_bytes: u64,
    chunk_bytes: u32,
    parent: Option<String>,
    created_unix_ms: u64,
    chunks: u32,
    zero_chunks: u32,
    /// Bytes of the packs that its chunks occupy; chunks that occur twice count once.
    stored_bytes: u64,
    packs: usize,
    /// Stands for the whole content; only of a single image.
    #[serde(skip_serializing_if = "Option::is_none")]
    merkle_root: Option<String>,
    /// Ids of nodes with volumes that still need it; only of a single image.
    #[serde(skip_serializing_if = "Option::is_none")]
    referenced_by: Option<Vec<String>>,
}

#[derive(Serialize)]
pub(super) struct Images {
    images: Vec<Image>,
}

pub(super) async fn list(State(control): State<Control>) -> Answer<Json<Images>> {
    let objects = control.0.shards.list_objects(MANIFEST_PREFIX).await?;
    let mut images = Vec::with_capacity(objects.len());
    for object in objects {
        let name = object.key.strip_prefix(MANIFEST_PREFIX).unwrap_or_default();
        match control.manifest_as_it_is(name).await {
            Ok(manifest) => images.push(Image::new(&manifest)),
            // One bad or just deleted manifest must not hide the others.
            Err(problem) => tracing::warn!(image = name, error = problem.detail(), "image not listed"),
        }
    }
    Ok(Json(Images { images }))
}

pub(super) async fn show(State(control): State<Control>, Segment(name): Segment) -> Answer<Json<Image>> {
    let manifest = control.manifest_as_it_is(&name).await?;
    let mut image = off_thread(move || {
        let merkle_root = Some(digest_text(&merkle::root(&manifest)));
        Image { merkle_root, ..Image::new(&manifest) }
    })
    .await?;
    let prefix = reference_prefix(&name);
    let references = control.0.shards.list_objects(&prefix).await?;
    image.referenced_by =
        Some(references.iter().filter_map(|object| object.key.strip_prefix(&prefix)).map(str::to_string).collect());
    Ok(Json(image))
}

impl Control {
    /// The manifest of a snapshot that new volumes are to be made of. One that is to be deleted is refused: whoever deletes
    /// it puts the intention and then looks for references, so the intention is looked for before the manifest.
    pub(super) async fn manifest(&self, name: &str) -> Answer<Manifest> {
        let intention = match volley_protocol::name::check_name(name) {
            Ok(()) => self.0.shards.get_object(&deletion_key(name)).await?,
            Err(_) => None,
        };
        let manifest = self.manifest_as_it_is(name).await?;
        if intention.is_some_and(|intention| deletion::concerns(&intention, manifest.id)) {
            let detail = format!("snapshot {name:?} is to be deleted: no new volumes are made of it");
            return Err(Problem::new(Status::Conflict, detail));
        }
        Ok(manifest)
    }

    /// Fetches and checks the manifest of a snapshot.
    pub(super) async fn manifest_as_it_is(&self, name: &str) -> Answer<Manifest> {
        let unknown = || Problem::unknown_snapshot(name);
        if volley_protocol::name::check_name(name).is_err() {
            return Err(unknown());
        }
        let data = self.0.shards.get_object(&manifest_key(name)).await?.ok_or_else(unknown)?;
        Control::checked_manifest(name, &data)
    }

    /// The manifest in the bytes of the object of a snapshot.
    pub(super) fn checked_manifest(name: &str, data: &[u8]) -> Answer<Manifest> {
        let corrupt = |why: String| Problem::new(Status::Corrupt, format!("snapshot {name:?}: {why}"));
        let manifest = Manifest::decode(data).map_err(|e| corrupt(e.to_string()))?;
        if manifest.name != name {
            return Err(corrupt(format!("its manifest is of {:?}", manifest.name)));
        }
        Ok(manifest)
    }
}

impl Image {
    pub(super) fn new(manifest: &Manifest) -> Image {
        let mut zero_chunks = 0;
        let mut stored: Vec<(u32, u64, u32)> = Vec::new();
        for index in 0..manifest.chunk_count() {
            match manifest.chunk(index) {
                ChunkEntry::Zero => zero_chunks += 1,
                ChunkEntry::Stored { pack, offset, stored_len, .. } => stored.push((pack, offset, stored_len)),
            }
        }
        stored.sort_unstable();
        stored.dedup();
        Image {
            id: format!("{:032x}", manifest.id),
            name: manifest.name.clone(),
            size_bytes: manifest.size_bytes,
            chunk_bytes: manifest.chunk_bytes,
            parent: manifest.parent.clone(),
            created_unix_ms: manifest.created_unix_ms,
            chunks: manifest.chunk_count(),
            zero_chunks,
            stored_bytes: stored.iter().map(|(_, _, len)| u64::from(*len)).sum(),
            packs: manifest.pack_keys().len(),
            merkle_root: None,
            referenced_by: None,
        }
    }
}
