//! What the guests of a wave ask for, and until when it is kept in RAM. Plain synchronous core: time is an argument.
//!
//! A wave is several volumes of one batch. A chunk that its guests ask for is pinned, and released when no guest of any
//! wave has asked for it for a while; so no shard need know whether a batch still runs elsewhere. What does not fit the
//! part of the cache that may be pinned is not kept, and an operator's pins come first.

use std::time::Duration;

use hashbrown::HashMap;

use super::Digest;
use crate::platform::Time;

struct Kept {
    asked_at: Time,
    cost: usize,
    /// `false`: it is on its way into the cache.
    pinned: bool,
}

/// Chunks kept for waves on one shard.
pub struct Waves {
    span: Duration,
    chunks: HashMap<Digest, Kept, ahash::RandomState>,
    pinned_bytes: usize,
}

impl Waves {
    /// Chunks are kept for `span` after they were asked for; zero: none are.
    #[must_use]
    pub fn new(span: Duration) -> Waves {
        let chunks = HashMap::with_hasher(ahash::RandomState::with_seeds(53, 54, 55, 56));
        Waves { span, chunks, pinned_bytes: 0 }
    }

    #[must_use]
    pub fn pinned_bytes(&self) -> usize {
        self.pinned_bytes
    }

    /// A guest of a wave asks for a chunk; `true`: it is to be pinned once it is in the cache. `room`: one more may be.
    pub fn asked(&mut self, digest: Digest, cost: usize, room: bool, now: Time) -> bool {
        if self.span.is_zero() {
            return false;
        }
        if let Some(kept) = self.chunks.get_mut(&digest) {
            kept.asked_at = now;
            return !kept.pinned;
        }
        if !room {
            return false;
        }
        self.chunks.insert(digest, Kept { asked_at: now, cost, pinned: false });
        true
    }

    /// Whether the chunk is to be pinned and is not yet.
    #[must_use]
    pub fn wants(&self, digest: &Digest) -> bool {
        self.chunks.get(digest).is_some_and(|kept| !kept.pinned)
    }

    /// The chunk was pinned on our behalf.
    pub fn pinned(&mut self, digest: &Digest) {
        if let Some(kept) = self.chunks.get_mut(digest)
            && !std::mem::replace(&mut kept.pinned, true)
        {
            self.pinned_bytes += kept.cost;
        }
    }

    /// The chunk could not be pinned, or left the cache all the same. `true`: it was pinned on our behalf.
    pub fn forget(&mut self, digest: &Digest) -> bool {
        let Some(kept) = self.chunks.remove(digest) else { return false };
        if kept.pinned {
            self.pinned_bytes -= kept.cost;
        }
        kept.pinned
    }

    /// Takes out the pinned chunk that nobody has asked for for longest, to make room for an operator's pins; it must be
    /// unpinned.
    pub fn give_up(&mut self) -> Option<Digest> {
        let pinned = self.chunks.iter().filter(|(_, kept)| kept.pinned);
        let digest = *pinned.min_by_key(|(digest, kept)| (kept.asked_at, **digest))?.0;
        self.forget(&digest);
        Some(digest)
    }

    /// Takes out what nobody has asked for in time: chunks to unpin, the longest unasked first.
    pub fn due(&mut self, now: Time) -> Vec<Digest> {
        let late = |kept: &Kept| now.since(kept.asked_at) >= self.span;
        let mut due: Vec<(Time, Digest)> = Vec::new();
        for (digest, kept) in self.chunks.extract_if(|_, kept| late(kept)) {
            if kept.pinned {
                self.pinned_bytes -= kept.cost;
                due.push((kept.asked_at, digest));
            }
        }
        due.sort_unstable();
        due.into_iter().map(|(_, digest)| digest).collect()
    }

    /// Checks the sums.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let pinned: usize = self.chunks.values().filter(|kept| kept.pinned).map(|kept| kept.cost).sum();
        match pinned == self.pinned_bytes {
            true => Ok(()),
            false => Err(format!("waves have pinned {pinned} bytes and count {}", self.pinned_bytes)),
        }
    }
}

#[cfg(test)]
#[path = "waves_tests.rs"]
mod tests;
