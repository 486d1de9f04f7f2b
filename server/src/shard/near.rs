//! Requests that are answered at once from a chunk in the memory of some shard, used by guests of this one a moment ago
//! ([`crate::transfer::near`]): no task, no message to the chunk's owner, no copy of its own. Whatever is not plainly so is `None`, and
//! goes the long way.

use std::rc::Rc;
use std::time::Duration;

use crate::cache::ChunkData;
use crate::error::Result;
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::{ReadData, Reply};
use crate::shard::datapath::{ByteRange, Claim};
use crate::shard::fills::Content;
use crate::shard::volume::Volume;
use crate::snapshot::{ChunkEntry, Manifest};
use crate::transfer::{Fetched, Story, Tier};

/// Chunks that a priority fetch looks up at once before it becomes a task of its own.
const FETCH_CHUNKS_MAX: u32 = 8;

/// A chunk in the memory of some shard.
struct NearChunk {
    chunk: u32,
    data: ChunkData,
    stored_len: u32,
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// A read of one chunk of which nothing in the range is in the volume: its part is sent from the cache's memory.
    pub(super) fn read_now(&self, claim: Claim, offset: u64, len: u32) -> Option<Result<Reply>> {
        let volume = self.volume(claim.volume).ok()?;
        let claimed = claim.generation == volume.generation.get() && volume.attached.get() == Some(claim.from);
        if volume.deleted.get() || !claimed {
            return None;
        }
        let range = ByteRange::check(&volume, offset, u64::from(len)).ok()?;
        let chunks = range.chunks(&volume);
        if chunks.start() != chunks.end() || !volume.map.borrow().is_absent(range.sectors()) {
            return None;
        }
        let near = self.near(&volume, *chunks.start())?;
        let part = range.in_chunk(&volume, near.data.len())?;
        self.note_read(&volume, range);
        self.count_miss(&volume);
        self.0.stages.read_missed(Tier::Ram, Duration::ZERO);
        self.use_near(&volume, &near);
        Some(Ok(Reply::Data(ReadData::Chunk { data: near.data, part })))
    }

    /// Some chunks of the range are absent, and all of these are in memory: readable, and filled as by any priority fetch.
    pub(super) fn fetch_now(&self, volume: &Rc<Volume<P>>, range: ByteRange) -> Option<Result<Reply>> {
        let chunks = range.chunks(volume);
        if chunks.end() - chunks.start() >= FETCH_CHUNKS_MAX {
            return None;
        }
        let absent = chunks.filter(|chunk| !volume.map.borrow().is_chunk_resident(*chunk));
        let near = absent.map(|chunk| self.near(volume, chunk)).collect::<Option<Vec<_>>>()?;
        self.note_fetch(volume, range);
        near.iter().for_each(|near| self.use_near(volume, near));
        Some(Ok(Reply::Done))
    }

    /// A chunk was given to a guest: if its bytes are in memory, they are near from now on.
    pub(super) fn note_near(&self, manifest: &Manifest, chunk: u32, content: &Content) {
        if let (Content::Data(fetched), Some(digest)) = (content, manifest.digest(chunk)) {
            self.0.transfer.note_near(digest, &fetched.data);
        }
    }

    fn near(&self, volume: &Volume<P>, chunk: u32) -> Option<NearChunk> {
        let manifest = volume.manifest()?;
        if chunk >= manifest.chunk_count() {
            return None;
        }
        let ChunkEntry::Stored { digest, stored_len, .. } = manifest.chunk(chunk) else { return None };
        Some(NearChunk { chunk, data: self.0.transfer.near(&digest)?, stored_len })
    }

    /// A guest gets the chunk: accounts for it, and fills it as behind a miss, unless the hydrator brings it anyway.
    fn use_near(&self, volume: &Rc<Volume<P>>, near: &NearChunk) {
        let NearChunk { chunk, data, stored_len } = near;
        volume.account.ram_bytes.add(data.len() as u64);
        volume.account.saved_bytes.add(u64::from(*stored_len));
        let coming = {
            let hydration = volume.hydration.borrow();
            hydration.owed.contains(chunk) || hydration.running.contains(chunk)
        };
        if !coming {
            let fetched = Fetched { data: data.clone(), story: Story::RAM };
            self.fill_behind(volume, *chunk, Content::Data(fetched));
        }
    }
}
