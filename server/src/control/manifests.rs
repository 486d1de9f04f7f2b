//! Manifests in memory, for requests that each need a little of one: a backup asks for thousands of blocks in a row.
//!
//! A manifest begins with the digest of its body. So one read of 64 bytes tells whether what is kept is still what the
//! object store has, and no request is answered from a snapshot that was deleted or made anew.

use std::sync::Arc;

use tokio::sync::Mutex;

use crate::snapshot::{Manifest, manifest, manifest_key};

use super::Control;
use super::problem::{Answer, Problem};

/// Manifests kept, at most.
const KEPT_MAX: usize = 8;
/// Chunks of all of them, at most, unless a single one has more: 44 bytes each.
const KEPT_CHUNKS_MAX: u64 = 4 << 20;

/// Those used last, the newest at the end.
#[derive(Default)]
pub(super) struct Manifests(Mutex<Vec<Kept>>);

struct Kept {
    header: Vec<u8>,
    manifest: Arc<Manifest>,
}

impl Control {
    /// The manifest of a snapshot as it is in the object store now.
    pub(super) async fn kept_manifest(&self, name: &str) -> Answer<Arc<Manifest>> {
        if volley_protocol::name::check_name(name).is_err() {
            return Err(Problem::unknown_snapshot(name));
        }
        let (shards, key) = (&self.0.shards, manifest_key(name));
        let header = shards.get_object_range(&key, 0..manifest::HEADER_BYTES as u64).await?;
        let header = header.ok_or_else(|| Problem::unknown_snapshot(name))?;
        // Held while one is fetched: who asks for the same then finds it.
        let mut kept = self.0.manifests.0.lock().await;
        if let Some(at) = kept.iter().position(|kept| kept.manifest.name == name) {
            let found = kept.remove(at);
            if found.header == header {
                let manifest = found.manifest.clone();
                kept.push(found);
                return Ok(manifest);
            }
        }
        let data = shards.get_object(&key).await?.ok_or_else(|| Problem::unknown_snapshot(name))?;
        let manifest = Arc::new(Control::checked_manifest(name, &data)?);
        kept.push(Kept { header: data[..manifest::HEADER_BYTES].to_vec(), manifest: manifest.clone() });
        forget_oldest(&mut kept);
        Ok(manifest)
    }
}

fn forget_oldest(kept: &mut Vec<Kept>) {
    let chunks = |kept: &[Kept]| kept.iter().map(|kept| u64::from(kept.manifest.chunk_count())).sum::<u64>();
    while kept.len() > 1 && (kept.len() > KEPT_MAX || chunks(kept) > KEPT_CHUNKS_MAX) {
        kept.remove(0);
    }
}
