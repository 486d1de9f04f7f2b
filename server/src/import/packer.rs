//! Places chunks into packs in device order and has the packs stored by a thread of its own.

use std::thread::{Scope, ScopedJoinHandle};

use futures::executor::block_on;
use hashbrown::HashMap;

use super::known::{KnownChunk, KnownChunks};
use super::worker::Chunk;
use super::{ChunkCounts, ImportError};
use crate::object_store::{ObjectError, ObjectStore};
use crate::snapshot::{ChunkEntry, EncodedChunk, PackBuilder, pack_key};

/// Packs waiting for the storing thread: one, so that at most three are in memory (filled, waiting, being stored).
const PACKS_WAITING: usize = 1;

/// The result: one entry per chunk, and the packs they name.
pub(super) struct Packed {
    pub entries: Vec<ChunkEntry>,
    pub pack_keys: Vec<String>,
    pub counts: ChunkCounts,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
    pub packs_written: u32,
}

pub(super) struct Packer<'scope, 'a> {
    known: &'a KnownChunks,
    id: u128,
    next_number: u32,
    /// The pack being filled, and its index in `packed.pack_keys`.
    filling: Option<(PackBuilder, u32)>,
    packed: Packed,
    /// Index in `packed.pack_keys` of each known pack that is used.
    known_packs: HashMap<u32, u32>,
    placed: HashMap<[u8; 32], ChunkEntry>,
    /// Chunks whose content another worker had taken on: their index and digest.
    waiting: Vec<(usize, [u8; 32])>,
    to_store: Option<flume::Sender<(String, Vec<u8>)>>,
    storing: Option<ScopedJoinHandle<'scope, Result<(), ObjectError>>>,
}

impl<'scope, 'a> Packer<'scope, 'a> {
    pub(super) fn start<'env, S: ObjectStore + Send + Sync>(
        scope: &'scope Scope<'scope, 'env>,
        store: &'env S,
        known: &'a KnownChunks,
        id: u128,
    ) -> Packer<'scope, 'a> {
        let (to_store, packs) = flume::bounded::<(String, Vec<u8>)>(PACKS_WAITING);
        let storing = scope.spawn(move || {
            // Ending early closes the channel, which the packer notices.
            packs.iter().try_for_each(|(key, bytes)| block_on(store.put_if_absent(&key, &bytes)))
        });
        Packer {
            known,
            id,
            next_number: known.next_pack,
            filling: None,
            packed: Packed {
                entries: Vec::new(),
                pack_keys: Vec::new(),
                counts: ChunkCounts::default(),
                raw_bytes: 0,
                stored_bytes: 0,
                packs_written: 0,
            },
            known_packs: HashMap::new(),
            placed: HashMap::new(),
            waiting: Vec::new(),
            to_store: Some(to_store),
            storing: Some(storing),
        }
    }

    /// Takes the next chunk of the device.
    pub(super) fn place(&mut self, chunk: Chunk) -> Result<(), ImportError> {
        self.packed.counts.chunks += 1;
        let entry = match chunk {
            Chunk::Zero => {
                self.packed.counts.zero_chunks += 1;
                ChunkEntry::Zero
            }
            Chunk::Known(known, digest) => self.place_known(known, digest),
            Chunk::Duplicate(digest) => {
                self.packed.counts.duplicate_chunks += 1;
                self.waiting.push((self.packed.entries.len(), digest));
                ChunkEntry::Zero
            }
            Chunk::New(chunk) => self.place_new(&chunk)?,
        };
        self.packed.entries.push(entry);
        Ok(())
    }

    /// Stores the last pack, waits until all are stored, and fills in the chunks that were waiting.
    pub(super) fn finish(mut self) -> Result<Packed, ImportError> {
        self.send_filled()?;
        self.stored()?;
        for (index, digest) in &self.waiting {
            self.packed.entries[*index] = self.placed[digest];
        }
        Ok(self.packed)
    }

    fn place_known(&mut self, known: KnownChunk, digest: [u8; 32]) -> ChunkEntry {
        if self.placed.contains_key(&digest) {
            self.packed.counts.duplicate_chunks += 1;
        } else if known.resumed {
            self.packed.counts.resumed_chunks += 1;
        } else {
            self.packed.counts.shared_chunks += 1;
        }
        let keys = &mut self.packed.pack_keys;
        let pack = *self.known_packs.entry(known.pack).or_insert_with(|| {
            keys.push(self.known.packs[known.pack as usize].clone());
            u32::try_from(keys.len() - 1).expect("fewer packs than chunks")
        });
        let entry = ChunkEntry::Stored {
            pack,
            offset: u64::from(known.offset),
            stored_len: known.stored_len,
            encoding: known.encoding,
            digest,
        };
        self.placed.insert(digest, entry);
        entry
    }

    fn place_new(&mut self, chunk: &EncodedChunk) -> Result<ChunkEntry, ImportError> {
        if self.filling.as_ref().is_some_and(|(builder, _)| !builder.has_room(chunk.stored.len())) {
            self.send_filled()?;
        }
        let (builder, pack) = self.filling.get_or_insert_with(|| {
            self.packed.pack_keys.push(pack_key(self.id, self.next_number));
            let pack = u32::try_from(self.packed.pack_keys.len() - 1).expect("fewer packs than chunks");
            self.next_number += 1;
            (PackBuilder::new(self.id, self.next_number - 1), pack)
        });
        let entry = ChunkEntry::Stored {
            pack: *pack,
            offset: u64::from(builder.push(chunk)),
            stored_len: u32::try_from(chunk.stored.len()).expect("a chunk has at most 4 MiB"),
            encoding: chunk.encoding,
            digest: chunk.digest,
        };
        self.packed.counts.stored_chunks += 1;
        self.packed.raw_bytes += u64::from(chunk.raw_len);
        self.placed.insert(chunk.digest, entry);
        Ok(entry)
    }

    fn send_filled(&mut self) -> Result<(), ImportError> {
        let Some((builder, pack)) = self.filling.take() else { return Ok(()) };
        let key = self.packed.pack_keys[pack as usize].clone();
        let bytes = builder.finish();
        self.packed.stored_bytes += bytes.len() as u64;
        self.packed.packs_written += 1;
        let sent = self.to_store.as_ref().is_some_and(|to_store| to_store.send((key, bytes)).is_ok());
        if sent { Ok(()) } else { self.stored() }
    }

    /// Ends the storing thread and returns its error, if any.
    fn stored(&mut self) -> Result<(), ImportError> {
        self.to_store = None;
        let Some(storing) = self.storing.take() else { return Ok(()) };
        match storing.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(e.into()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
