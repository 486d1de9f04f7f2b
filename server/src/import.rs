//! Import: a disk image, or a volume, becomes a snapshot.
//!
//! Threads read, test for zeroes, digest and compress chunks in parallel; the calling thread places them into packs in
//! device order; one more thread stores the packs. Memory is bounded by the window of [`crate::parallel`] and three packs.
//!
//! Protocol with the object store (P4): marker, list of manifests (to reuse their chunks), packs, manifest by one
//! `put_if_absent`, removal of the marker. Whatever stops it before the manifest leaves packs under the marker's id;
//! the next run of the same name finds them by the marker and stores none of their chunks again.
#![allow(clippy::disallowed_methods)] // Import runs in command-line tools, never on a shard.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use futures::executor::block_on;
use serde::Serialize;
use thiserror::Error;
use volley_protocol::name::check_name;

use crate::object_store::{ObjectError, ObjectStore};
use crate::parallel::{self, Parallel};
use crate::platform::Platform;
use crate::platform::blocking::Blocking;
use crate::snapshot::claim::{Claim, ClaimError};
use crate::snapshot::manifest::check_geometry;
use crate::snapshot::{CatalogError, Manifest, ManifestError, SnapshotInfo, import_key, manifest_key, marker};

pub mod copy;
mod device;
mod known;
mod packer;
mod qcow2;
mod source;
mod volume;
mod worker;

pub(crate) use device::{Device, Found};
use known::KnownChunks;
use packer::Packer;
use source::Source;
pub(crate) use volume::{Begun, Captured, StoredVolume, begin_snapshot};

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Debug)]
pub struct ImportOptions {
    pub image: PathBuf,
    /// Name of the snapshot to make.
    pub name: String,
    /// Power of two, 64 KiB to 4 MiB.
    pub chunk_bytes: u32,
    /// `None`: by the image's magic.
    pub format: Option<ImageFormat>,
    /// `None`: one per core.
    pub threads: Option<usize>,
}

/// What an import did.
#[derive(Clone, Debug, Serialize)]
pub struct ImportReport {
    pub name: String,
    /// 32 hex digits.
    pub id: String,
    pub format: ImageFormat,
    /// Size of the disk in the image.
    pub image_bytes: u64,
    /// Size of the device: the image padded to a multiple of 512.
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    #[serde(flatten)]
    pub chunks: ChunkCounts,
    /// Raw bytes of the chunks this import stored.
    pub raw_bytes: u64,
    /// Bytes of the packs this import stored.
    pub stored_bytes: u64,
    pub packs: u32,
    pub elapsed_ms: u64,
    /// Things the operator should know, one sentence each.
    pub notes: Vec<String>,
}

/// Where the chunks of the device came from; the parts add up to `chunks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChunkCounts {
    pub chunks: u32,
    pub zero_chunks: u32,
    /// Same as another chunk of this image.
    pub duplicate_chunks: u32,
    /// Stored already by another snapshot.
    pub shared_chunks: u32,
    /// Stored already by an interrupted import of the same name.
    pub resumed_chunks: u32,
    pub stored_chunks: u32,
}

#[derive(Debug, Error)]
pub enum ImportError {
    #[error("{0}")]
    Invalid(String),
    #[error("image {}: {why}", image.display())]
    Image { image: PathBuf, why: String },
    #[error("volume {volume:?}: {why}")]
    Volume { volume: String, why: String },
    #[error("snapshot {0:?} exists already: choose another name or delete it first")]
    NameTaken(String),
    #[error("another import of {0:?} is running, or was dropped by 'volley image gc': run it again when no other is")]
    Interfered(String),
    #[error(
        "the marker of an interrupted import of {0:?} is damaged: drop it with 'volley image gc --incomplete {0}', \
         then import again"
    )]
    Marker(String),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("{0}; what was stored is kept: the same import run again goes on from there")]
    Store(#[from] ObjectError),
}

/// Imports an image. `progress` is told (device bytes done, device bytes in all) now and then.
///
/// # Errors
/// See [`ImportError`]. No snapshot exists after an error.
pub fn import<S: ObjectStore + Send + Sync>(
    store: &S,
    options: &ImportOptions,
    progress: impl Fn(u64, u64),
) -> Result<ImportReport, ImportError> {
    let started = Instant::now();
    let name = &options.name;
    check_name(name).map_err(ImportError::Invalid)?;
    refuse_taken(store, name)?;
    let image_error = |why: String| ImportError::Image { image: options.image.clone(), why };
    let source = Source::open(&options.image, options.format).map_err(image_error)?;
    check_geometry(source.device_bytes(), options.chunk_bytes).map_err(ImportError::Invalid)?;

    // The marker first: from here on, garbage collection leaves alone what the listing below finds.
    let claim = begin(store, name)?;
    let known = block_on(KnownChunks::load(store, claim.id))?;
    let plan = Packing { id: claim.id, chunk_bytes: options.chunk_bytes, threads: options.threads };
    let packed = pack_chunks(store, &plan, &source, &known, &progress).map_err(|e| match e {
        PackError::Unreadable(chunk, e) => unreadable(&options.image, chunk, &e),
        PackError::Import(e) => named(e, name),
    })?;
    if !source.is_unchanged().map_err(|e| image_error(e.to_string()))? {
        return Err(image_error("it was changed while it was read: stop its writer and import again".to_owned()));
    }

    let info = SnapshotInfo {
        id: claim.id,
        name: name.clone(),
        size_bytes: source.device_bytes(),
        chunk_bytes: options.chunk_bytes,
        parent: None,
        created_unix_ms: Blocking.wall_clock_ms(),
    };
    let manifest = Manifest::new(info, packed.pack_keys, &packed.entries)?;
    block_on(claim.commit(store, &manifest))?;

    let mut notes = source.notes.clone();
    notes.extend(known.notes);
    let padding = source.device_bytes() - source.image_bytes;
    if padding > 0 {
        notes.push(format!("padded with {padding} zero bytes to a multiple of 512"));
    }
    Ok(ImportReport {
        name: name.clone(),
        id: format!("{:032x}", claim.id),
        format: source.format,
        image_bytes: source.image_bytes,
        size_bytes: manifest.size_bytes,
        chunk_bytes: manifest.chunk_bytes,
        chunks: packed.counts,
        raw_bytes: packed.raw_bytes,
        stored_bytes: packed.stored_bytes,
        packs: packed.packs_written,
        elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        notes,
    })
}

/// How the chunks of a device become packs.
struct Packing {
    id: u128,
    chunk_bytes: u32,
    threads: Option<usize>,
}

enum PackError {
    /// A chunk of the device.
    Unreadable(u32, io::Error),
    Import(ImportError),
}

impl From<ImportError> for PackError {
    fn from(e: ImportError) -> PackError {
        PackError::Import(e)
    }
}

fn pack_chunks<S: ObjectStore + Send + Sync>(
    store: &S,
    plan: &Packing,
    device: &impl Device,
    known: &KnownChunks,
    progress: &impl Fn(u64, u64),
) -> Result<packer::Packed, PackError> {
    let (device_bytes, chunk_bytes) = (device.device_bytes(), plan.chunk_bytes);
    let count = u32::try_from(device_bytes.div_ceil(u64::from(chunk_bytes))).expect("check_geometry");
    let parallel = Parallel::for_chunks(plan.threads, chunk_bytes);
    let worker = worker::Worker::new(device, known, chunk_bytes);
    std::thread::scope(|scope| {
        let mut packer = Packer::start(scope, store, known, plan.id);
        parallel::in_order(
            count,
            parallel,
            |index| worker.process(index),
            |index, result| {
                let done = ((u64::from(index) + 1) * u64::from(chunk_bytes)).min(device_bytes);
                let chunk = result.map_err(|e| PackError::Unreadable(index, e))?;
                packer.place(chunk)?;
                progress(done, device_bytes);
                Ok(())
            },
        )
        .and_then(|()| Ok(packer.finish()?))
    })
}

/// Pack numbers are fresh, so if one is taken someone else is storing packs under this import's id.
fn named(e: ImportError, name: &str) -> ImportError {
    match e {
        ImportError::Store(ObjectError::AlreadyExists(_)) => ImportError::Interfered(name.to_owned()),
        e => e,
    }
}

fn unreadable(image: &Path, chunk: u32, error: &io::Error) -> ImportError {
    ImportError::Image { image: image.to_path_buf(), why: format!("cannot read chunk {chunk}: {error}") }
}

/// Refuses a name in use. A marker left behind by the very import that made the snapshot is removed.
fn refuse_taken<S: ObjectStore>(store: &S, name: &str) -> Result<(), ImportError> {
    let bytes = match block_on(store.get(&manifest_key(name))) {
        Err(ObjectError::NotFound(_)) => return Ok(()),
        other => other?,
    };
    if let Ok(manifest) = Manifest::decode(&bytes)
        && block_on(marker::read(store, name))?.is_some_and(|m| m.id == Some(manifest.id))
    {
        block_on(store.delete(&import_key(name)))?;
    }
    Err(ImportError::NameTaken(name.to_owned()))
}

fn begin<S: ObjectStore>(store: &S, name: &str) -> Result<Claim, ImportError> {
    let id = u128::from(Blocking.random_u64()) << 64 | u128::from(Blocking.random_u64());
    Ok(block_on(Claim::begin(store, name, id))?)
}

impl From<ClaimError> for ImportError {
    fn from(e: ClaimError) -> ImportError {
        match e {
            ClaimError::NameTaken(name) => ImportError::NameTaken(name),
            ClaimError::Interfered(name) => ImportError::Interfered(name),
            ClaimError::Marker(name) => ImportError::Marker(name),
            ClaimError::Store(e) => ImportError::Store(e),
        }
    }
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<ImageFormat, String> {
        match text {
            "raw" => Ok(ImageFormat::Raw),
            "qcow2" => Ok(ImageFormat::Qcow2),
            _ => Err(format!("image format {text:?} is not known: raw or qcow2")),
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        })
    }
}

#[cfg(test)]
mod tests;
