//! Reads some chunks of a snapshot, in order and in parallel: what an incremental export needs.

use std::io;

use super::{Content, ExportError, bad_chunk, fetch};
use crate::object_store::ObjectStore;
use crate::parallel::{self, Parallel};
use crate::snapshot::Manifest;

/// Gives `take` each chunk of `wanted`, verified, in the order given; `None` for one of zeroes.
///
/// # Errors
/// The first chunk that can't be had, or the failure of `take`.
pub fn export_chosen<S: ObjectStore + Send + Sync>(
    store: &S,
    manifest: &Manifest,
    wanted: &[u32],
    threads: Option<usize>,
    mut take: impl FnMut(u32, Option<&[u8]>) -> io::Result<()>,
) -> Result<(), ExportError> {
    let count = u32::try_from(wanted.len()).expect("fewer than the chunks of a snapshot");
    let parallel = Parallel::for_chunks(threads, manifest.chunk_bytes);
    let chunk = |n: u32| wanted[n as usize];
    parallel::in_order(
        count,
        parallel,
        |n| fetch(store, manifest, chunk(n)),
        |n, content| {
            match content {
                Content::Zero => take(chunk(n), None)?,
                Content::Data { raw, .. } => take(chunk(n), Some(&raw))?,
                Content::Bad(bad) => return Err(bad.into()),
                Content::StoreFailed(e) => return Err(bad_chunk(manifest, chunk(n), e.to_string()).into()),
            }
            Ok(())
        },
    )
}
