//! Reads the whole content of a snapshot, in order and in parallel: verification and export.

use std::io::{self, Write};

use futures::executor::block_on;
use serde::Serialize;
use thiserror::Error;

use super::{ChunkEntry, Manifest, decode_chunk};
use crate::object_store::{ObjectError, ObjectStore};
use crate::parallel::{self, Parallel};
use crate::platform::AlignedBytes;

pub use chosen::export_chosen;

mod chosen;

/// A chunk that can't be had from the object store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Error)]
#[error("chunk {chunk} (pack {pack}, {stored_len} bytes at offset {offset}): {why}")]
pub struct BadChunk {
    pub chunk: u32,
    /// Object key.
    pub pack: String,
    /// In the pack.
    pub offset: u64,
    pub stored_len: u32,
    pub why: String,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub chunks: u32,
    pub zero_chunks: u32,
    /// Stored bytes read.
    pub stored_bytes: u64,
    pub bad: Vec<BadChunk>,
}

#[derive(Debug, Error)]
pub enum ExportError {
    #[error(transparent)]
    Chunk(#[from] BadChunk),
    #[error("cannot write the export: {0}")]
    Write(#[from] io::Error),
}

/// Where an export goes. Every byte of the device is given exactly once, in order.
pub trait ExportTo {
    /// # Errors
    /// When the output can't be written.
    fn data(&mut self, data: &[u8]) -> io::Result<()>;
    /// # Errors
    /// When the output can't be written.
    fn zeroes(&mut self, len: u32) -> io::Result<()>;
}

/// Any writer is an export target without holes.
impl<W: Write> ExportTo for W {
    fn data(&mut self, data: &[u8]) -> io::Result<()> {
        self.write_all(data)
    }

    fn zeroes(&mut self, len: u32) -> io::Result<()> {
        self.write_all(&vec![0; len as usize])
    }
}

/// Fetches every chunk and checks its digest. `progress` is told (device bytes done, device bytes in all).
///
/// # Errors
/// When the object store fails altogether; damaged and missing chunks are part of the result.
pub fn verify<S: ObjectStore + Send + Sync>(
    store: &S,
    manifest: &Manifest,
    threads: Option<usize>,
    progress: impl Fn(u64, u64),
) -> Result<Verified, ObjectError> {
    let mut verified = Verified::default();
    each_chunk(store, manifest, threads, |index, content| {
        verified.chunks += 1;
        match content {
            Content::Zero => verified.zero_chunks += 1,
            Content::Data { stored_len, .. } => verified.stored_bytes += u64::from(stored_len),
            Content::Bad(bad) => verified.bad.push(bad),
            Content::StoreFailed(e) => return Err(e),
        }
        progress(done_bytes(manifest, index), manifest.size_bytes);
        Ok(())
    })?;
    Ok(verified)
}

/// Writes the content of the snapshot, verified, to `out`.
///
/// # Errors
/// The first chunk that can't be had, or the failure of `out`.
pub fn export<S: ObjectStore + Send + Sync>(
    store: &S,
    manifest: &Manifest,
    threads: Option<usize>,
    out: &mut impl ExportTo,
    progress: impl Fn(u64, u64),
) -> Result<(), ExportError> {
    each_chunk(store, manifest, threads, |index, content| {
        match content {
            Content::Zero => out.zeroes(manifest.chunk_len(index))?,
            Content::Data { raw, .. } => out.data(&raw)?,
            Content::Bad(bad) => return Err(bad.into()),
            Content::StoreFailed(e) => return Err(bad_chunk(manifest, index, e.to_string()).into()),
        }
        progress(done_bytes(manifest, index), manifest.size_bytes);
        Ok(())
    })
}

enum Content {
    Zero,
    Data { raw: AlignedBytes, stored_len: u32 },
    Bad(BadChunk),
    StoreFailed(ObjectError),
}

fn each_chunk<S: ObjectStore + Send + Sync, E>(
    store: &S,
    manifest: &Manifest,
    threads: Option<usize>,
    consume: impl FnMut(u32, Content) -> Result<(), E>,
) -> Result<(), E> {
    let parallel = Parallel::for_chunks(threads, manifest.chunk_bytes);
    parallel::in_order(manifest.chunk_count(), parallel, |index| fetch(store, manifest, index), consume)
}

fn fetch<S: ObjectStore>(store: &S, manifest: &Manifest, index: u32) -> Content {
    let entry = manifest.chunk(index);
    let ChunkEntry::Stored { pack, offset, stored_len, .. } = entry else { return Content::Zero };
    let range = offset..offset + u64::from(stored_len);
    let stored = match block_on(store.get_range(manifest.pack_key(pack), range)) {
        Ok(stored) => stored,
        Err(ObjectError::NotFound(_)) => {
            return Content::Bad(bad_chunk(manifest, index, "the pack is missing".to_owned()));
        }
        Err(ObjectError::Corrupt(why)) => {
            return Content::Bad(bad_chunk(manifest, index, format!("the pack is truncated: {why}")));
        }
        Err(e) => return Content::StoreFailed(e),
    };
    match decode_chunk(&entry, &stored, manifest.chunk_len(index)) {
        Ok(raw) => Content::Data { raw, stored_len },
        Err(e) => Content::Bad(bad_chunk(manifest, index, e.to_string())),
    }
}

fn bad_chunk(manifest: &Manifest, index: u32, why: String) -> BadChunk {
    let (pack, offset, stored_len) = match manifest.chunk(index) {
        ChunkEntry::Stored { pack, offset, stored_len, .. } => (manifest.pack_key(pack), offset, stored_len),
        ChunkEntry::Zero => ("", 0, 0),
    };
    BadChunk { chunk: index, pack: pack.to_owned(), offset, stored_len, why }
}

fn done_bytes(manifest: &Manifest, index: u32) -> u64 {
    u64::from(index) * u64::from(manifest.chunk_bytes) + u64::from(manifest.chunk_len(index))
}
