//! Marking: which packs the manifests of an object store reference, and how much of each.

use hashbrown::HashMap;

use crate::object_store::ObjectStore;
use crate::snapshot::{CatalogError, ChunkEntry, Manifest, catalog};

/// Around the chunks of a pack: header and trailer, and an index entry for each chunk.
const PACK_OVERHEAD_BYTES: u64 = 48;
const CHUNK_OVERHEAD_BYTES: u64 = 48;

/// Owner of a chunk that several snapshots reference.
pub(super) const SHARED: u32 = u32::MAX;

/// What all manifests together reference.
#[derive(Default)]
pub struct Mark {
    /// Names of the snapshots that were read.
    pub names: Vec<String>,
    /// Referenced packs by key, with the snapshots that reference each, as indexes into `names`.
    pub users: HashMap<String, Vec<u32>>,
    /// Referenced parts of packs, by pack and offset. Filled on demand: it takes some 40 bytes for each chunk.
    parts: HashMap<(u32, u32), Part>,
    /// For each snapshot the sum of its different parts, filled with them.
    pub(super) sums: Vec<Live>,
    pack_numbers: HashMap<String, u32>,
}

/// A range of a pack that holds a referenced chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub stored_len: u32,
    /// The last snapshot that was found to reference it.
    last: u32,
    /// The only snapshot that references it, or [`SHARED`].
    pub owner: u32,
}

/// How much of a pack is referenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    pub chunks: u64,
    pub bytes: u64,
}

impl Live {
    /// What a pack with just these chunks would weigh.
    #[must_use]
    pub fn packed_bytes(self) -> u64 {
        if self.chunks == 0 { 0 } else { self.bytes + self.chunks * CHUNK_OVERHEAD_BYTES + PACK_OVERHEAD_BYTES }
    }
}

/// How exactly to mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    Packs,
    Chunks,
}

impl Mark {
    #[must_use]
    pub fn is_used(&self, pack: &str) -> bool {
        self.users.contains_key(pack)
    }

    /// Names of the snapshots that reference the pack.
    pub fn users_of(&self, pack: &str) -> impl Iterator<Item = &str> {
        self.users.get(pack).into_iter().flatten().map(|index| self.names[*index as usize].as_str())
    }

    /// What is referenced of each pack, after [`Depth::Chunks`].
    #[must_use]
    pub fn live(&self) -> HashMap<&str, Live> {
        let mut by_number = vec![Live::default(); self.pack_numbers.len()];
        for ((pack, _), part) in &self.parts {
            let live = &mut by_number[*pack as usize];
            live.chunks += 1;
            live.bytes += u64::from(part.stored_len);
        }
        self.pack_numbers.iter().map(|(key, number)| (key.as_str(), by_number[*number as usize])).collect()
    }

    /// All referenced parts with the number of their pack.
    pub(super) fn parts(&self) -> impl Iterator<Item = (u32, Part)> {
        self.parts.iter().map(|((pack, _), part)| (*pack, *part))
    }

    /// The number of a referenced pack in [`Mark::parts`].
    pub(super) fn number(&self, pack: &str) -> Option<u32> {
        self.pack_numbers.get(pack).copied()
    }

    fn add(&mut self, manifest: &Manifest, depth: Depth) {
        let snapshot = u32::try_from(self.names.len()).expect("fewer snapshots than that");
        self.names.push(manifest.name.clone());
        for pack in manifest.pack_keys() {
            let users = self.users.entry_ref(pack.as_str()).or_default();
            if users.last() != Some(&snapshot) {
                users.push(snapshot);
            }
        }
        if depth == Depth::Chunks {
            self.add_parts(manifest, snapshot);
        }
    }

    fn add_parts(&mut self, manifest: &Manifest, snapshot: u32) {
        let mut sum = Live::default();
        let numbers: Vec<u32> = manifest.pack_keys().iter().map(|key| self.number_of(key)).collect();
        for index in 0..manifest.chunk_count() {
            let ChunkEntry::Stored { pack, offset, stored_len, .. } = manifest.chunk(index) else { continue };
            let offset = u32::try_from(offset).expect("a checked manifest stays inside packs");
            let new = Part { stored_len, last: SHARED, owner: snapshot };
            let part = self.parts.entry((numbers[pack as usize], offset)).or_insert(new);
            if part.owner != snapshot {
                part.owner = SHARED;
            }
            if part.last != snapshot {
                part.last = snapshot;
                sum.chunks += 1;
                sum.bytes += u64::from(stored_len);
            }
        }
        self.sums.push(sum);
    }

    fn number_of(&mut self, pack: &str) -> u32 {
        let next = u32::try_from(self.pack_numbers.len()).expect("fewer packs than that");
        *self.pack_numbers.entry_ref(pack).or_insert(next)
    }
}

/// Reads all manifests, but that of `except`.
///
/// # Errors
/// `Unreadable` names a snapshot whose manifest is damaged: nobody knows what it references.
pub async fn mark<S: ObjectStore>(store: &S, depth: Depth, except: Option<&str>) -> Result<Mark, CatalogError> {
    let mut mark = Mark::default();
    for name in catalog::names(store).await? {
        if Some(name.as_str()) == except {
            continue;
        }
        match catalog::load(store, &name).await {
            Ok(manifest) => mark.add(&manifest, depth),
            // Deleted meanwhile.
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => {}
            Err(e @ CatalogError::Store(_)) => return Err(e),
            Err(e) => return Err(CatalogError::Unreadable(Box::new(e))),
        }
    }
    Ok(mark)
}
