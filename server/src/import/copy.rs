//! Copy: a snapshot of one object store becomes a snapshot of another.
//!
//! It is an import whose chunks come from a manifest instead of an image: same marker, same packs, same commit, and what
//! the target has already, of other snapshots or of an interrupted run, is not sent. Each chunk that is sent is checked
//! against its digest on the way, and stays as it was encoded.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use futures::executor::block_on;
use hashbrown::HashSet;
use serde::Serialize;
use thiserror::Error;
use volley_protocol::name::check_name;

use super::known::KnownChunks;
use super::packer::{Packed, Packer};
use super::worker::Chunk;
use super::{ChunkCounts, ImportError, begin, refuse_taken};
use crate::bootset::boot_set_key;
use crate::object_store::{ObjectError, ObjectStore};
use crate::parallel::{self, Parallel};
use crate::platform::Platform;
use crate::platform::blocking::Blocking;
use crate::snapshot::read::BadChunk;
use crate::snapshot::{ChunkEntry, EncodedChunk, Manifest, SnapshotInfo, decode_chunk};

/// What a copy did.
#[derive(Clone, Debug, Serialize)]
pub struct CopyReport {
    /// In the target.
    pub name: String,
    /// 32 hex digits.
    pub id: String,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    #[serde(flatten)]
    pub chunks: ChunkCounts,
    /// Bytes of the packs stored in the target.
    pub stored_bytes: u64,
    pub packs: u32,
    pub elapsed_ms: u64,
    /// Things the operator should know, one sentence each.
    pub notes: Vec<String>,
}

#[derive(Debug, Error)]
pub enum CopyError {
    #[error("source: {0}")]
    Chunk(#[from] BadChunk),
    #[error("source: {0}; what was stored is kept: the same copy run again goes on from there")]
    Source(ObjectError),
    #[error("target: {0}")]
    Target(#[from] ImportError),
}

/// Copies the snapshot `manifest` of `source` to `target`, under `name`. `progress` is told (device bytes done, device
/// bytes in all) now and then.
///
/// # Errors
/// See [`CopyError`]. The target has no such snapshot after an error.
pub fn copy<A: ObjectStore + Send + Sync, B: ObjectStore + Send + Sync>(
    source: &A,
    manifest: &Manifest,
    target: &B,
    name: &str,
    threads: Option<usize>,
    progress: impl Fn(u64, u64),
) -> Result<CopyReport, CopyError> {
    let started = Instant::now();
    check_name(name).map_err(ImportError::Invalid)?;
    refuse_taken(target, name)?;
    // The marker first: from here on, garbage collection leaves alone what the listing below finds.
    let claim = begin(target, name)?;
    let known = block_on(KnownChunks::load(target, claim.id)).map_err(ImportError::from)?;
    let sender = Sender { source, manifest, known: &known, taken: Mutex::default() };
    let packed = sender.send_all(target, claim.id, threads, &progress).map_err(|e| match e {
        // Pack numbers are fresh, so someone else is storing packs under this copy's id.
        CopyError::Target(ImportError::Store(ObjectError::AlreadyExists(_))) => {
            CopyError::Target(ImportError::Interfered(name.to_owned()))
        }
        e => e,
    })?;
    let info = SnapshotInfo {
        id: claim.id,
        name: name.to_owned(),
        size_bytes: manifest.size_bytes,
        chunk_bytes: manifest.chunk_bytes,
        parent: manifest.parent.clone(),
        created_unix_ms: Blocking.wall_clock_ms(),
    };
    let copied = Manifest::new(info, packed.pack_keys, &packed.entries).map_err(ImportError::from)?;
    block_on(claim.commit(target, &copied)).map_err(ImportError::from)?;
    let mut notes = known.notes;
    notes.extend(copy_boot_set(source, &manifest.name, target, name));
    Ok(CopyReport {
        name: name.to_owned(),
        id: format!("{:032x}", claim.id),
        size_bytes: copied.size_bytes,
        chunk_bytes: copied.chunk_bytes,
        chunks: packed.counts,
        stored_bytes: packed.stored_bytes,
        packs: packed.packs_written,
        elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        notes,
    })
}

struct Sender<'a, A> {
    source: &'a A,
    manifest: &'a Manifest,
    known: &'a KnownChunks,
    /// Digests that some thread has taken on.
    taken: Mutex<HashSet<[u8; 32]>>,
}

impl<A: ObjectStore + Send + Sync> Sender<'_, A> {
    fn send_all<B: ObjectStore + Send + Sync>(
        &self,
        target: &B,
        id: u128,
        threads: Option<usize>,
        progress: &impl Fn(u64, u64),
    ) -> Result<Packed, CopyError> {
        let (count, chunk_bytes, size) =
            (self.manifest.chunk_count(), self.manifest.chunk_bytes, self.manifest.size_bytes);
        std::thread::scope(|scope| {
            let mut packer = Packer::start(scope, target, self.known, id);
            let place = |index: u32, chunk: Result<Chunk, CopyError>| {
                packer.place(chunk?)?;
                progress(((u64::from(index) + 1) * u64::from(chunk_bytes)).min(size), size);
                Ok::<(), CopyError>(())
            };
            parallel::in_order(count, Parallel::for_chunks(threads, chunk_bytes), |index| self.fetch(index), place)?;
            Ok(packer.finish()?)
        })
    }

    /// What is to be done about one chunk.
    fn fetch(&self, index: u32) -> Result<Chunk, CopyError> {
        let entry = self.manifest.chunk(index);
        let ChunkEntry::Stored { pack, offset, stored_len, encoding, digest } = entry else { return Ok(Chunk::Zero) };
        if let Some(known) = self.known.get(&digest) {
            return Ok(Chunk::Known(known, digest));
        }
        if !self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(digest) {
            return Ok(Chunk::Duplicate(digest));
        }
        let pack = self.manifest.pack_key(pack);
        let bad = |why: String| BadChunk { chunk: index, pack: pack.to_owned(), offset, stored_len, why };
        let stored = match block_on(self.source.get_range(pack, offset..offset + u64::from(stored_len))) {
            Ok(stored) => Vec::from(stored),
            Err(ObjectError::NotFound(_)) => return Err(bad("the pack is missing".to_owned()).into()),
            Err(ObjectError::Corrupt(why)) => return Err(bad(format!("the pack is truncated: {why}")).into()),
            Err(e) => return Err(CopyError::Source(e)),
        };
        let raw_len = self.manifest.chunk_len(index);
        decode_chunk(&entry, &stored, raw_len).map_err(|e| bad(e.to_string()))?;
        Ok(Chunk::New(EncodedChunk { digest, encoding, stored, raw_len }))
    }
}

/// What boots of the image touch is known by digests, so it holds in the target as well. Nothing depends on it but speed.
fn copy_boot_set<A: ObjectStore, B: ObjectStore>(source: &A, from: &str, target: &B, to: &str) -> Option<String> {
    let copied = block_on(async {
        let set = source.get(&boot_set_key(from)).await?;
        target.put_if_absent(&boot_set_key(to), &set).await
    });
    match copied {
        Ok(()) | Err(ObjectError::NotFound(_) | ObjectError::AlreadyExists(_)) => None,
        Err(e) => Some(format!("the boot set was not copied: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{CHUNK, Lab, OVER_ONE_PACK, mixed, noise};
    use super::*;
    use crate::snapshot::{IMPORT_PREFIX, PACK_PREFIX};

    fn run(from: &Lab, name: &str, to: &Lab, new: &str) -> Result<CopyReport, CopyError> {
        let progress = |done, total| assert!(done <= total);
        copy(&from.store, &from.manifest(name), &to.store, new, Some(3), progress)
    }

    #[test]
    fn a_copy_is_the_snapshot_and_sends_nothing_twice() {
        let (here, there) = (Lab::new(), Lab::new());
        let content = mixed();
        here.import(&here.file("image", &content), "a").unwrap();
        let report = run(&here, "a", &there, "a").unwrap();
        assert_eq!(there.export("a"), content);
        assert!(report.chunks.stored_chunks > 0 && report.chunks.duplicate_chunks > 0);
        assert!(there.keys(IMPORT_PREFIX).is_empty());

        let again = run(&here, "a", &there, "b").unwrap();
        assert_eq!((again.chunks.stored_chunks, again.packs), (0, 0));
        assert_eq!(there.export("b"), content);
        assert!(matches!(run(&here, "a", &there, "a"), Err(CopyError::Target(ImportError::NameTaken(_)))));
    }

    #[test]
    fn an_interrupted_copy_goes_on_where_it_stopped() {
        let (here, there) = (Lab::new(), Lab::new());
        let content = noise(9, OVER_ONE_PACK);
        here.import(&here.file("image", &content), "a").unwrap();
        // The marker and one pack.
        there.allow_puts(2);
        assert!(run(&here, "a", &there, "a").is_err());
        there.allow_puts(usize::MAX);
        assert_eq!((there.keys("snapshots/").len(), there.keys(PACK_PREFIX).len()), (0, 1));
        let report = run(&here, "a", &there, "a").unwrap();
        assert!(report.chunks.resumed_chunks as usize > OVER_ONE_PACK / CHUNK - 4, "{:?}", report.chunks);
        assert!(there.export("a") == content);
    }

    #[test]
    fn damage_in_the_source_is_not_copied() {
        let (here, there) = (Lab::new(), Lab::new());
        here.import(&here.file("image", &noise(3, 4 * CHUNK)), "a").unwrap();
        let key = here.keys(PACK_PREFIX).remove(0);
        let mut pack = block_on(here.store.get(&key)).unwrap();
        pack[2 * CHUNK] ^= 1;
        block_on(here.store.put(&key, &pack)).unwrap();
        let error = run(&here, "a", &there, "a").unwrap_err().to_string();
        assert!(error.contains("source: chunk 1") && error.contains(&key), "{error}");
        assert!(there.keys("snapshots/").is_empty());
    }
}
