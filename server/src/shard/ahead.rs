//! Reads ahead of guests that read in order: chunks that are absent are fetched before they are asked for, and filled
//! into the volume as behind a read miss. [`super::readahead`] says which.

use std::ops::RangeInclusive;
use std::rc::Rc;

use futures::stream::StreamExt;

use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::base::Want;
use crate::shard::fill_turns::FillTurn;
use crate::shard::fills::{Arrived, Fill, gathered};
use crate::shard::hydrate::{RUN_FILLS_MAX, stretch_of};
use crate::shard::hydration_queue::Class;
use crate::shard::volume::{Volume, is_zero};
use crate::transfer::FetchClass;

/// Chunks that are on their way ahead of their readers take at most this part of a shard's RAM cache.
const CACHE_PART: u64 = 4;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// A guest reads these chunks: asks for those that it will want next. What the read itself misses is asked first.
    pub(super) fn read_ahead(&self, volume: &Rc<Volume<P>>, chunks: RangeInclusive<u32>) {
        let chunk_bytes = u64::from(volume.spec.chunk_bytes);
        let most = u32::try_from(self.0.config.readahead_bytes_max / chunk_bytes).unwrap_or(u32::MAX);
        let mut streams = volume.streams.borrow_mut();
        if most == 0 || (volume.hydrated.get() && streams.unread() == 0) {
            return;
        }
        let noted = streams.read(chunks, most, volume.spec.chunks());
        self.0.counters.readahead_used_chunks.add(noted.used.into());
        self.0.counters.readahead_wasted_chunks.add(noted.wasted.into());
        let (Some(ahead), Some(manifest)) = (noted.ahead, volume.manifest()) else { return };
        // One shard merges GETs across stretches, several do not.
        let ahead = match self.0.config.shards {
            1 => ahead,
            _ => ahead.cut(|chunk| stretch_of(&manifest, chunk)),
        };
        let mut hydration = volume.hydration.borrow_mut();
        let absent: Vec<u32> = {
            let map = volume.map.borrow();
            let wanted = |chunk: &u32| !map.is_chunk_resident(*chunk) && !is_zero(&manifest, *chunk);
            ahead.chunks.clone().filter(wanted).collect()
        };
        // What is on its way for the hydrator is only promoted: it fills that itself.
        let own: Vec<u32> = absent.iter().copied().filter(|chunk| !hydration.running.contains(chunk)).collect();
        let bytes = self.0.ahead_bytes.get() + own.len() as u64 * chunk_bytes;
        if bytes > self.ahead_bytes_max() {
            // The stream's next read asks again.
            return;
        }
        streams.asked(&ahead, &own);
        if absent.is_empty() {
            return;
        }
        self.0.ahead_bytes.set(bytes);
        hydration.running.extend(&own);
        let orders = self.orders(volume, &manifest, &absent, None);
        let (shard, volume) = (self.clone(), volume.clone());
        self.0.platform.spawn(Queue::Serve, async move {
            let answers = shard.supplies(&volume, orders, Want::Place, FetchClass::ReadAhead);
            let own = absent.into_iter().zip(answers).filter(|(chunk, _)| own.contains(chunk));
            let fills = gathered(own, volume.spec.chunk_bytes).map(|fill| shard.fill_ahead(&volume, fill));
            fills.buffered(RUN_FILLS_MAX).for_each(async |()| ()).await;
        });
    }

    /// Bytes of chunks that may be on their way ahead of their readers.
    pub(super) fn ahead_bytes_max(&self) -> u64 {
        self.0.config.cache_bytes as u64 / CACHE_PART
    }

    /// Fills chunks under the store's share, or owes them. The hydrator leaves them alone until then.
    async fn fill_ahead(&self, volume: &Rc<Volume<P>>, fill: Arrived) {
        let chunks = fill.as_ref().map_or_else(|(chunk, _)| *chunk..*chunk + 1, Fill::chunks);
        match fill {
            Ok(fill) => {
                self.0.counters.readahead_chunks.add(chunks.len() as u64);
                let may = match &fill {
                    Fill::Data(chunk, fetched) => self.may_fill(volume, *chunk, Some(fetched.data.len() as u64)),
                    Fill::Zero(_) | Fill::Run(..) => true,
                };
                if may && let Err(error) = self.fill(volume, fill, FillTurn::Admitted(Class::Priority)).await {
                    chunks.clone().for_each(|chunk| self.owe(volume, chunk, &error));
                }
            }
            // Whoever reads it is told.
            Err((chunk, _)) => volume.streams.borrow_mut().failed(chunk),
        }
        for chunk in chunks {
            volume.hydration.borrow_mut().running.remove(&chunk);
            self.0.ahead_bytes.set(self.0.ahead_bytes.get() - u64::from(volume.spec.chunk_bytes));
        }
        if !volume.hydrated.get() {
            self.wake_hydrator(volume);
        }
    }

    /// The volume goes away.
    pub(super) fn end_read_ahead(&self, volume: &Volume<P>) {
        self.0.counters.readahead_wasted_chunks.add(volume.streams.borrow_mut().clear().into());
    }
}
