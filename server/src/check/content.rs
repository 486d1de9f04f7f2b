//! Volumes against their snapshots: manifests from the object store, and chunks against their digests.
#![allow(clippy::disallowed_methods)] // Runs in a tool, on no shard's thread.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use futures::executor::block_on;

use super::extents::has_data;
use crate::object_store::ObjectError;
use crate::object_store::any::StoreChoice;
use crate::parallel::{self, Parallel};
use crate::platform::blocking::{self, ToolStore};
use crate::snapshot::{Manifest, catalog, is_zero};
use crate::types::{SnapshotRef, VolumeSpec};

/// The snapshots of an object store, each read once.
pub(super) struct Snapshots {
    store: ToolStore,
    loaded: HashMap<u128, Result<Arc<Manifest>, String>>,
}

impl Snapshots {
    pub(super) fn open(choice: &StoreChoice) -> Result<Snapshots, ObjectError> {
        let store = blocking::open_store(choice)?;
        Ok(Snapshots { store, loaded: HashMap::new() })
    }

    /// The manifest, or why it can't be had.
    pub(super) fn get(&mut self, snapshot: &SnapshotRef) -> Result<Arc<Manifest>, String> {
        let store = &self.store;
        let load = || match block_on(catalog::load(store, &snapshot.name)) {
            Ok(manifest) if manifest.id == snapshot.id => Ok(Arc::new(manifest)),
            Ok(_) => Err(format!("snapshot {:?} was replaced by another one of the same name", snapshot.name)),
            Err(error) => Err(error.to_string()),
        };
        self.loaded.entry(snapshot.id).or_insert_with(load).clone()
    }
}

/// How the resident chunks of a volume compare with its snapshot.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) equal: u64,
    /// Without data, though the snapshot has some.
    pub(super) holes: Vec<u32>,
    pub(super) different: Vec<u32>,
}

enum Chunk {
    Equal,
    Hole,
    Different,
}

/// Compares `chunks`, all wholly resident. `quick` looks at extents only and counts what they can't tell as neither.
///
/// # Errors
/// Where the file could not be read.
pub(super) fn compare(
    file: &File,
    spec: &VolumeSpec,
    manifest: &Manifest,
    chunks: &[u32],
    quick: bool,
) -> io::Result<Compared> {
    let mut compared = Compared::default();
    let parallel = Parallel::for_chunks(None, spec.chunk_bytes);
    let count = u32::try_from(chunks.len()).expect("fewer than the chunks of a volume");
    parallel::in_order(
        count,
        parallel,
        |index| compare_chunk(file, spec, manifest, chunks[index as usize], quick),
        |index, outcome| {
            let chunk = chunks[index as usize];
            match outcome? {
                Some(Chunk::Equal) => compared.equal += 1,
                Some(Chunk::Hole) => compared.holes.push(chunk),
                Some(Chunk::Different) => compared.different.push(chunk),
                None => {}
            }
            Ok::<(), io::Error>(())
        },
    )?;
    Ok(compared)
}

fn compare_chunk(
    file: &File,
    spec: &VolumeSpec,
    manifest: &Manifest,
    chunk: u32,
    quick: bool,
) -> io::Result<Option<Chunk>> {
    let start = u64::from(chunk) * u64::from(spec.chunk_bytes);
    let end = spec.size_bytes.min(start + u64::from(spec.chunk_bytes));
    let digest = manifest.digest(chunk);
    // A stored chunk is not all zeroes, so it has data somewhere.
    match (digest, has_data(file, start, end)?) {
        (Some(_), false) => return Ok(Some(Chunk::Hole)),
        (None, false) => return Ok(Some(Chunk::Equal)),
        _ if quick => return Ok(None),
        _ => {}
    }
    let mut content = vec![0; usize::try_from(end - start).expect("at most a chunk")];
    file.read_exact_at(&mut content, start)?;
    let len = if digest.is_some() { manifest.chunk_len(chunk) as usize } else { 0 };
    let (own, padding) = content.split_at(len.min(content.len()));
    let equal = digest.is_none_or(|digest| *blake3::hash(own).as_bytes() == digest) && is_zero(padding);
    Ok(Some(if equal { Chunk::Equal } else { Chunk::Different }))
}
