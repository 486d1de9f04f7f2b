//! Chunks that this shard's guests used a moment ago, whoever's cache holds them: found again without asking their owner.
//! Plain synchronous core: time is an argument.
//!
//! The references are weak, so they keep nothing in memory that its owner has evicted. After some uses, and after some time, a chunk
//! is forgotten here, so that its owner hears of it: eviction and waves go by what owners are asked for.

use std::sync::Weak;
use std::time::Duration;

use hashbrown::HashMap;

use super::Digest;
use crate::cache::ChunkData;
use crate::platform::{AlignedBytes, Time};

/// Owners hear of one use in so many at least.
const USES_MAX: u32 = 64;
/// Far below what waves are kept for.
const SPAN: Duration = Duration::from_millis(500);
/// Chunks known at once: as many as fit in a large cache.
const CHUNKS_MAX: usize = 8192;

struct Known {
    data: Weak<AlignedBytes>,
    until: Time,
    uses_left: u32,
}

/// What one shard knows.
pub struct Near(HashMap<Digest, Known, ahash::RandomState>);

impl Default for Near {
    fn default() -> Near {
        Near(HashMap::with_hasher(ahash::RandomState::with_seeds(61, 62, 63, 64)))
    }
}

impl Near {
    /// The owner of a verified chunk has just given it.
    pub fn note(&mut self, digest: Digest, data: &ChunkData, now: Time) {
        if self.0.len() >= CHUNKS_MAX {
            // Rare, and what is in use comes back at once.
            self.0.clear();
        }
        let known = Known { data: std::sync::Arc::downgrade(data), until: now.after(SPAN), uses_left: USES_MAX };
        self.0.insert(digest, known);
    }

    /// The chunk, unless its owner has to be asked.
    pub fn get(&mut self, digest: &Digest, now: Time) -> Option<ChunkData> {
        let known = self.0.get_mut(digest)?;
        let data = known.data.upgrade().filter(|_| known.uses_left > 0 && now < known.until);
        match &data {
            Some(_) => known.uses_left -= 1,
            None => drop(self.0.remove(digest)),
        }
        data
    }

    /// Forgets a chunk that was dropped from the cache.
    pub fn forget(&mut self, digest: &Digest) {
        self.0.remove(digest);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::{CHUNKS_MAX, Near, SPAN, USES_MAX};
    use crate::cache::ChunkData;
    use crate::platform::{AlignedBytes, Time};

    fn chunk() -> ChunkData {
        let mut bytes = AlignedBytes::with_capacity(4096);
        bytes.resize(4096);
        Arc::new(bytes)
    }

    fn at(millis: u64) -> Time {
        Time::default().after(Duration::from_millis(millis))
    }

    #[test]
    fn a_chunk_is_near_for_some_uses_some_time_and_while_somebody_holds_it() {
        let (mut near, data) = (Near::default(), chunk());
        near.note([1; 32], &data, at(0));
        for _ in 0..USES_MAX {
            assert!(near.get(&[1; 32], at(1)).is_some_and(|found| Arc::ptr_eq(&found, &data)));
        }
        assert!(near.get(&[1; 32], at(1)).is_none(), "its owner has to hear of it");
        near.note([1; 32], &data, at(1));
        assert!(near.get(&[1; 32], at(1).after(SPAN)).is_none(), "that was too long ago");
        near.note([1; 32], &data, at(1));
        assert!(near.get(&[2; 32], at(1)).is_none());
        drop(data);
        assert!(near.get(&[1; 32], at(1)).is_none(), "its owner has evicted it");
    }

    #[test]
    fn what_is_known_is_bounded() {
        let (mut near, data) = (Near::default(), chunk());
        for number in 0..2 * CHUNKS_MAX + 7 {
            let mut digest = [0; 32];
            digest[..8].copy_from_slice(&number.to_le_bytes());
            near.note(digest, &data, at(0));
            assert!(near.0.len() <= CHUNKS_MAX);
            assert!(near.get(&digest, at(0)).is_some());
            near.forget(&digest);
            assert!(near.get(&digest, at(0)).is_none());
            near.note(digest, &data, at(0));
        }
    }
}
