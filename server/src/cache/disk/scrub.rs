//! The scrub of the disk tier: chunks at rest are read and held against their digests, long before anybody wants them.
//!
//! A shard scrubs the files that it writes, so every slot of the node is read by one shard. What does not agree is dropped, as
//! by a read that somebody waited for; a chunk is fetched again when it is wanted.

use super::{DiskTier, READ_ATTEMPTS};
use crate::cache::slots::Place;
use crate::platform::Platform;

/// Slots of the table looked at before others have their turn: a nearly empty one is large too.
const SLOTS_AT_ONCE: u32 = 16 << 10;

/// What a part of a scrub read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    pub chunks: u64,
    /// As they are stored.
    pub bytes: u64,
    /// Of the chunks: dropped, because they could not be read or were not what they should be.
    pub dropped: u64,
    /// Slot to go on from; `None`: that was the last.
    pub next: Option<u32>,
}

impl<P: Platform> DiskTier<P> {
    /// Reads the chunks that begin in slot `from` or behind, one after the other, until `bytes_max` are read.
    pub async fn scrub(&self, from: u32, bytes_max: u64) -> Scrubbed {
        let mut done = Scrubbed { next: Some(from), ..Scrubbed::default() };
        while let Some(from) = done.next
            && done.bytes < bytes_max
        {
            if self.0.platform.now() < self.0.paused_until.get() {
                // A disk that is left alone is left alone by this too; the next round has it.
                done.next = None;
                break;
            }
            let place = {
                let state = self.0.state.borrow();
                let (place, next) = state.slots.next_chunk(from, SLOTS_AT_ONCE);
                done.next = next;
                place.cloned()
            };
            match place {
                Some(place) => {
                    done.chunks += 1;
                    done.bytes += u64::from(place.record.stored_len);
                    done.dropped += u64::from(self.drop_if_faulty(&place).await);
                }
                None => self.0.platform.yield_now().await,
            }
        }
        if done.dropped > 0 {
            // The index says so too, or a restart would find them again.
            self.wake_writer();
        }
        done
    }

    async fn drop_if_faulty(&self, place: &Place) -> bool {
        let (digest, chunk_len) = (place.record.digest, place.record.chunk_len);
        for attempt in 1..=READ_ATTEMPTS {
            let content = self.read_place(None, place).await;
            match self.decode(&digest, chunk_len, content).await {
                Ok(_) => return false,
                Err(fault) if attempt == READ_ATTEMPTS => return self.drop_faulty(&digest, None, place, &fault),
                Err(_) => {}
            }
        }
        false
    }
}
