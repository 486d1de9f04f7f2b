//! Chunks the object store holds already: of other snapshots, and of an interrupted run of this import.

use hashbrown::HashMap;

use crate::object_store::{ObjectError, ObjectMeta, ObjectStore};
use crate::snapshot::claim::StoredPacks;
use crate::snapshot::pack::HEADER_BYTES;
use crate::snapshot::{
    CatalogError, ChunkEntry, Encoding, Manifest, PackIndex, PackedChunk, catalog, pack_prefix, parse_pack_key,
};

/// Where a known chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KnownChunk {
    /// Index into [`KnownChunks::packs`].
    pub pack: u32,
    pub offset: u32,
    pub stored_len: u32,
    pub encoding: Encoding,
    /// Stored by an earlier run of this import, not by another snapshot.
    pub resumed: bool,
}

#[derive(Default)]
pub(super) struct KnownChunks {
    chunks: HashMap<[u8; 32], KnownChunk>,
    /// Keys of the packs that known chunks are in.
    pub packs: Vec<String>,
    /// The first pack number that no earlier run of this import has used.
    pub next_pack: u32,
    /// What was found and could not be used, one sentence each.
    pub notes: Vec<String>,
}

impl KnownChunks {
    /// What these manifests name, and an earlier run of this import stored.
    pub(super) async fn of<S: ObjectStore>(
        store: &S,
        manifests: &[&Manifest],
        import_id: u128,
    ) -> Result<KnownChunks, CatalogError> {
        let mut known = KnownChunks::default();
        let mut prefixes = std::collections::BTreeSet::from([pack_prefix(import_id)]);
        let keys = manifests.iter().flat_map(|manifest| manifest.pack_keys());
        prefixes.extend(keys.filter_map(|key| parse_pack_key(key)).map(|(id, _)| pack_prefix(id)));
        let stored = StoredPacks::under(store, prefixes).await?;
        let sizes = stored.reusable();
        manifests.iter().for_each(|manifest| known.add_manifest(manifest, &sizes));
        known.add_own_packs(store, &stored.listed, import_id).await?;
        Ok(known)
    }

    /// Collects what the store holds. Damaged manifests and packs are noted and not used.
    pub(super) async fn load<S: ObjectStore>(store: &S, import_id: u128) -> Result<KnownChunks, CatalogError> {
        let mut known = KnownChunks::default();
        // Sizes, so that no chunk is taken from a pack that is gone, condemned or truncated.
        let stored = StoredPacks::load(store).await?;
        let (listed, sizes) = (&stored.listed, stored.reusable());
        for name in catalog::names(store).await? {
            match catalog::load(store, &name).await {
                Ok(manifest) => known.add_manifest(&manifest, &sizes),
                Err(e @ CatalogError::Store(_)) => return Err(e),
                Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => {}
                Err(e) => known.notes.push(format!("shares no chunks with a damaged snapshot: {e}")),
            }
        }
        known.add_own_packs(store, listed, import_id).await?;
        Ok(known)
    }

    async fn add_own_packs<S: ObjectStore>(
        &mut self,
        store: &S,
        listed: &[ObjectMeta],
        import_id: u128,
    ) -> Result<(), ObjectError> {
        let prefix = pack_prefix(import_id);
        for object in listed.iter().filter(|o| o.key.starts_with(&prefix)) {
            let Some((id, number)) = parse_pack_key(&object.key) else { continue };
            self.next_pack = self.next_pack.max(number.saturating_add(1));
            match read_index(store, &object.key, object.size_bytes, (id, number)).await? {
                Ok(chunks) => self.add_pack(&object.key, &chunks),
                Err(why) => self.notes.push(format!("does not reuse {}: {why}", object.key)),
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, digest: &[u8; 32]) -> Option<KnownChunk> {
        self.chunks.get(digest).copied()
    }

    fn add_manifest(&mut self, manifest: &Manifest, sizes: &HashMap<&str, u64>) {
        let mut numbers: HashMap<u32, Option<(u32, u64)>> = HashMap::new();
        for index in 0..manifest.chunk_count() {
            let ChunkEntry::Stored { pack, offset, stored_len, encoding, digest } = manifest.chunk(index) else {
                continue;
            };
            let number = *numbers.entry(pack).or_insert_with(|| {
                let size = *sizes.get(manifest.pack_key(pack))?;
                Some((self.intern(manifest.pack_key(pack)), size))
            });
            if let Some((pack, size)) = number
                && offset + u64::from(stored_len) <= size
            {
                let offset = u32::try_from(offset).expect("a checked manifest stays inside packs");
                self.add(digest, KnownChunk { pack, offset, stored_len, encoding, resumed: false });
            }
        }
    }

    fn add_pack(&mut self, key: &str, chunks: &[PackedChunk]) {
        let pack = self.intern(key);
        for chunk in chunks {
            let PackedChunk { digest, offset, stored_len, encoding, .. } = *chunk;
            self.add(digest, KnownChunk { pack, offset, stored_len, encoding, resumed: true });
        }
    }

    fn add(&mut self, digest: [u8; 32], chunk: KnownChunk) {
        self.chunks.entry(digest).or_insert(chunk);
    }

    fn intern(&mut self, key: &str) -> u32 {
        self.packs.push(key.to_owned());
        u32::try_from(self.packs.len() - 1).expect("manifests hold fewer packs than that")
    }
}

/// Reads the index of a pack. The outer error is the store's, the inner one says why the pack is of no use.
async fn read_index<S: ObjectStore>(
    store: &S,
    key: &str,
    size_bytes: u64,
    identity: (u128, u32),
) -> Result<Result<Vec<PackedChunk>, String>, ObjectError> {
    let range = match PackIndex::trailer_range(size_bytes) {
        Ok(range) => range,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let index = match PackIndex::parse_trailer(size_bytes, &store.get_range(key, range).await?) {
        Ok(index) => index,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let header = store.get_range(key, 0..HEADER_BYTES as u64).await?;
    let entries = store.get_range(key, index.range()).await?;
    Ok(index.parse(&header, &entries, identity).map_err(|e| e.to_string()))
}
