//! A snapshot in the making: blocks come one by one in any order, and what does not come is the parent's, or zero.
//!
//! Blocks are collected into packs of [`PACK_BYTES_TARGET`]; one that is sealed waits here until it is stored, and
//! nothing is put before it is. So a draft has at most two packs in memory, and an attempt to store can be repeated. Pure.

use std::sync::Arc;

use hashbrown::HashMap;

use super::pack::INDEX_ENTRY_BYTES;
use super::{ChunkEntry, EncodedChunk, Manifest, ManifestError, PackBuilder, SnapshotInfo, pack_key};

/// A pack is sealed at this size: a node stores it in one go beside its guests' I/O. Far below the limit of a pack.
pub const PACK_BYTES_TARGET: usize = 8 << 20;
/// Different blocks stored, at most, for each block of the device: rewriting a block for ever must not fill the store.
const REWRITES_MAX: usize = 4;

const _: () = assert!(2 * PACK_BYTES_TARGET as u64 <= super::PACK_BYTES_MAX);

/// A block that was put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    Zero,
    Data(EncodedChunk),
}

/// Blocks are put again and again instead of once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("blocks were put again with other contents too often: an upload is for one snapshot")]
pub struct TooManyRewrites;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Zero,
    /// Put with the content that the parent has there.
    Parent,
    /// `pack` is a number of an own pack.
    Own(ChunkEntry),
}

/// See the module.
pub struct Draft {
    info: SnapshotInfo,
    parent: Option<Arc<Manifest>>,
    blocks: HashMap<u32, Source>,
    /// Where each stored content is.
    stored: HashMap<[u8; 32], ChunkEntry>,
    filling: PackBuilder,
    filled_bytes: usize,
    /// Number of the pack being filled.
    number: u32,
    sealed: Option<(String, Vec<u8>)>,
}

impl Draft {
    /// A draft of which nothing has come. A parent has the same geometry, which the caller has checked.
    #[must_use]
    pub fn new(info: SnapshotInfo, parent: Option<Arc<Manifest>>) -> Draft {
        let filling = PackBuilder::new(info.id, 0);
        Draft {
            info,
            parent,
            blocks: HashMap::new(),
            stored: HashMap::new(),
            filling,
            filled_bytes: 0,
            number: 0,
            sealed: None,
        }
    }

    /// Blocks that were put, each counted once.
    #[must_use]
    pub fn blocks_put(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("indexes are u32 and below the number of blocks")
    }

    /// Takes a block; a later one of the same index replaces it. No pack may be waiting: see [`Draft::sealed`].
    ///
    /// # Errors
    /// [`TooManyRewrites`].
    pub fn put(&mut self, index: u32, block: &Put) -> Result<(), TooManyRewrites> {
        assert!(self.sealed.is_none(), "a sealed pack is stored before the next block");
        let source = match block {
            Put::Zero => Source::Zero,
            Put::Data(chunk) if self.parents(index) == Some(chunk.digest) => Source::Parent,
            Put::Data(chunk) => Source::Own(match self.stored.get(&chunk.digest) {
                Some(entry) => *entry,
                None => self.store(chunk)?,
            }),
        };
        self.blocks.insert(index, source);
        Ok(())
    }

    /// Closes the pack being filled, if anything is in it; for the end of the draft.
    pub fn seal(&mut self) {
        if self.filling.is_empty() || self.sealed.is_some() {
            return;
        }
        let key = pack_key(self.info.id, self.number);
        self.number += 1;
        self.filled_bytes = 0;
        let filled = std::mem::replace(&mut self.filling, PackBuilder::new(self.info.id, self.number));
        self.sealed = Some((key, filled.finish()));
    }

    /// Key and bytes of the pack that is to be stored next.
    #[must_use]
    pub fn sealed(&self) -> Option<(&str, &[u8])> {
        self.sealed.as_ref().map(|(key, bytes)| (key.as_str(), bytes.as_slice()))
    }

    /// The pack of [`Draft::sealed`] is in the object store.
    pub fn sealed_is_stored(&mut self) {
        self.sealed = None;
    }

    /// The manifest, once every pack is stored: seal first.
    ///
    /// # Errors
    /// When it would exceed the limits of the format.
    pub fn manifest(&self, created_unix_ms: u64) -> Result<Manifest, ManifestError> {
        assert!(self.filling.is_empty() && self.sealed.is_none(), "every pack is stored before the manifest");
        let mut packs = Packs::default();
        let count = self.info.size_bytes.div_ceil(u64::from(self.info.chunk_bytes));
        let count = u32::try_from(count).expect("checked geometry");
        let entries: Vec<ChunkEntry> = (0..count).map(|index| self.entry(index, &mut packs)).collect();
        let info = SnapshotInfo { created_unix_ms, ..self.info.clone() };
        Manifest::new(info, packs.keys, &entries)
    }

    fn entry(&self, index: u32, packs: &mut Packs) -> ChunkEntry {
        match (self.blocks.get(&index), &self.parent) {
            (Some(Source::Zero), _) | (None | Some(Source::Parent), None) => ChunkEntry::Zero,
            (Some(Source::Own(entry)), _) => packs.placed(*entry, true, |pack| pack_key(self.info.id, pack)),
            (None | Some(Source::Parent), Some(parent)) => {
                packs.placed(parent.chunk(index), false, |pack| parent.pack_key(pack).to_owned())
            }
        }
    }

    fn parents(&self, index: u32) -> Option<[u8; 32]> {
        self.parent.as_ref()?.digest(index)
    }

    fn store(&mut self, chunk: &EncodedChunk) -> Result<ChunkEntry, TooManyRewrites> {
        let blocks = self.info.size_bytes.div_ceil(u64::from(self.info.chunk_bytes)) as usize;
        if self.stored.len() >= blocks * REWRITES_MAX {
            return Err(TooManyRewrites);
        }
        let entry = ChunkEntry::Stored {
            pack: self.number,
            offset: u64::from(self.filling.push(chunk)),
            stored_len: u32::try_from(chunk.stored.len()).expect("a chunk has at most 4 MiB"),
            encoding: chunk.encoding,
            digest: chunk.digest,
        };
        self.stored.insert(chunk.digest, entry);
        self.filled_bytes += chunk.stored.len() + INDEX_ENTRY_BYTES;
        // A chunk has at most half of the target, so that the next one always has room.
        if self.filled_bytes >= PACK_BYTES_TARGET {
            self.seal();
        }
        Ok(entry)
    }
}

/// The packs that a manifest names, in the order of their first use.
#[derive(Default)]
struct Packs {
    keys: Vec<String>,
    numbers: HashMap<(bool, u32), u32>,
}

impl Packs {
    fn placed(&mut self, entry: ChunkEntry, own: bool, key: impl FnOnce(u32) -> String) -> ChunkEntry {
        let ChunkEntry::Stored { pack, offset, stored_len, encoding, digest } = entry else { return entry };
        let pack = *self.numbers.entry((own, pack)).or_insert_with(|| {
            self.keys.push(key(pack));
            u32::try_from(self.keys.len() - 1).expect("fewer packs than blocks")
        });
        ChunkEntry::Stored { pack, offset, stored_len, encoding, digest }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::{decode_chunk, encode_chunk};

    const CHUNK: u32 = 64 << 10;
    type Objects = std::collections::HashMap<String, Vec<u8>>;

    fn content(seed: u8, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        if seed != 0 {
            blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        }
        bytes
    }

    fn info(id: u128, blocks: u32, parent: Option<&Manifest>) -> SnapshotInfo {
        SnapshotInfo {
            id,
            name: format!("s{id}"),
            size_bytes: u64::from(blocks) * u64::from(CHUNK) - 512,
            chunk_bytes: CHUNK,
            parent: parent.map(|parent| parent.name.clone()),
            created_unix_ms: 0,
        }
    }

    fn store_sealed(draft: &mut Draft, objects: &mut Objects) {
        if let Some((key, bytes)) = draft.sealed() {
            assert!(objects.insert(key.to_owned(), bytes.to_vec()).is_none(), "each pack is stored once");
            draft.sealed_is_stored();
        }
    }

    /// Puts blocks into a draft and commits it; a content of 0 is zeroes.
    fn commit(id: u128, blocks: u32, parent: Option<Manifest>, puts: &[(u32, u8)], objects: &mut Objects) -> Manifest {
        let info = info(id, blocks, parent.as_ref());
        let mut draft = Draft::new(info.clone(), parent.map(Arc::new));
        for (index, seed) in puts {
            let len = if *index == blocks - 1 { CHUNK - 512 } else { CHUNK };
            let put = match seed {
                0 => Put::Zero,
                seed => Put::Data(encode_chunk(&content(*seed, len), 1)),
            };
            draft.put(*index, &put).unwrap();
            store_sealed(&mut draft, objects);
        }
        draft.seal();
        store_sealed(&mut draft, objects);
        let manifest = draft.manifest(7).unwrap();
        assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        manifest
    }

    fn read(manifest: &Manifest, index: u32, objects: &Objects) -> Vec<u8> {
        let len = manifest.chunk_len(index);
        match manifest.chunk(index) {
            ChunkEntry::Zero => vec![0; len as usize],
            entry @ ChunkEntry::Stored { pack, offset, stored_len, .. } => {
                let at = offset as usize;
                let stored = &objects[manifest.pack_key(pack)][at..at + stored_len as usize];
                decode_chunk(&entry, stored, len).unwrap().to_vec()
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_snapshot_is_its_parent_with_what_was_put(
            parent in prop::option::of(prop::collection::vec((0u32..9, 0u8..4), 0..12)),
            puts in prop::collection::vec((0u32..9, 0u8..4), 0..24),
        ) {
            let mut objects = Objects::new();
            let mut model = [0u8; 9];
            let mut apply = |puts: &[(u32, u8)]| puts.iter().for_each(|(index, seed)| model[*index as usize] = *seed);
            let parent = parent.map(|puts| {
                apply(&puts);
                commit(1, 9, None, &puts, &mut objects)
            });
            apply(&puts);
            let manifest = commit(2, 9, parent, &puts, &mut objects);
            for index in 0..9 {
                let expected = content(model[index as usize], manifest.chunk_len(index));
                prop_assert!(read(&manifest, index, &objects) == expected, "block {}", index);
            }
        }
    }

    #[test]
    fn packs_are_sealed_at_their_size_and_blocks_of_equal_content_stored_once() {
        let mut objects = Objects::new();
        let puts: Vec<(u32, u8)> = (0..255).map(|n| (n, n as u8)).chain((255..400).map(|n| (n, 7))).collect();
        let manifest = commit(3, 500, None, &puts, &mut objects);
        assert_eq!(objects.len(), 2, "254 blocks of noise");
        assert_eq!(manifest.pack_keys().len(), 2);
        assert!(objects.values().all(|pack| pack.len() < PACK_BYTES_TARGET + (1 << 20)));
    }

    #[test]
    fn a_block_as_in_the_parent_stores_nothing_and_rewriting_has_an_end() {
        let mut objects = Objects::new();
        let parent = commit(1, 2, None, &[(0, 5)], &mut objects);
        let child = commit(2, 2, Some(parent.clone()), &[(0, 5)], &mut objects);
        assert_eq!((child.chunk(0), objects.len()), (parent.chunk(0), 1));

        let mut draft = Draft::new(info(3, 2, None), None);
        let mut put = |seed| draft.put(0, &Put::Data(encode_chunk(&content(seed, CHUNK), 1)));
        assert!((1..9).all(|seed| put(seed).is_ok()));
        assert_eq!(put(9), Err(TooManyRewrites));
        assert_eq!(put(1), Ok(()), "a content that is there costs nothing");
        assert_eq!(draft.blocks_put(), 1);
    }
}
