//! A volume becomes a snapshot: what was captured of it is stored, all else is where the snapshot it builds on has it.

use futures::executor::block_on;
use volley_protocol::name::check_name;

use super::known::KnownChunks;
use super::{ChunkCounts, Device, ImportError, PackError, Packing, begin, named, pack_chunks, refuse_taken};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::platform::blocking::Blocking;
use crate::snapshot::claim::Claim;
use crate::snapshot::{Manifest, SnapshotInfo};

/// An import with its marker in place: garbage collection leaves alone what was listed since.
pub(crate) struct Begun(Claim);

/// What becomes a snapshot.
pub(crate) struct Captured<'a, D> {
    pub name: String,
    pub chunk_bytes: u32,
    pub device: &'a D,
    /// Manifests whose chunks it may be made of.
    pub builds_on: &'a [&'a Manifest],
    /// Chunks of any snapshot may be among it: look at all of them.
    pub look_everywhere: bool,
    pub parent: Option<String>,
    pub threads: usize,
}

/// What was stored of it; the snapshot does not exist yet.
pub(crate) struct StoredVolume {
    pub manifest: Manifest,
    pub counts: ChunkCounts,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
}

/// Refuses a name that is taken, and places the marker.
pub(crate) fn begin_snapshot<S: ObjectStore>(store: &S, name: &str) -> Result<Begun, ImportError> {
    check_name(name).map_err(ImportError::Invalid)?;
    refuse_taken(store, name)?;
    begin(store, name).map(Begun)
}

impl Begun {
    /// Takes the marker back, where nothing was stored.
    pub(crate) fn abandon<S: ObjectStore>(&self, store: &S, name: &str) {
        if let Err(error) = block_on(self.0.abandon(store)) {
            tracing::warn!(snapshot = name, %error, "the marker of a snapshot that was not taken stays behind");
        }
    }

    /// Makes the snapshot exist.
    pub(crate) fn commit<S: ObjectStore>(&self, store: &S, manifest: &Manifest) -> Result<(), ImportError> {
        Ok(block_on(self.0.commit(store, manifest))?)
    }

    /// Stores what is new of it.
    pub(crate) fn store<S: ObjectStore + Send + Sync, D: Device>(
        &self,
        store: &S,
        captured: &Captured<'_, D>,
        progress: &impl Fn(u64, u64),
    ) -> Result<StoredVolume, ImportError> {
        let known = match captured.look_everywhere {
            true => block_on(KnownChunks::load(store, self.0.id))?,
            false => block_on(KnownChunks::of(store, captured.builds_on, self.0.id))?,
        };
        let threads = Some(captured.threads);
        let plan = Packing { id: self.0.id, chunk_bytes: captured.chunk_bytes, threads };
        let packed = pack_chunks(store, &plan, captured.device, &known, progress).map_err(|e| match e {
            PackError::Unreadable(_, e) => ImportError::Volume { volume: captured.name.clone(), why: e.to_string() },
            PackError::Import(e) => named(e, &captured.name),
        })?;
        let info = SnapshotInfo {
            id: self.0.id,
            name: captured.name.clone(),
            size_bytes: captured.device.device_bytes(),
            chunk_bytes: captured.chunk_bytes,
            parent: captured.parent.clone(),
            created_unix_ms: Blocking.wall_clock_ms(),
        };
        let manifest = Manifest::new(info, packed.pack_keys, &packed.entries)?;
        let (counts, raw_bytes, stored_bytes) = (packed.counts, packed.raw_bytes, packed.stored_bytes);
        Ok(StoredVolume { manifest, counts, raw_bytes, stored_bytes })
    }
}
