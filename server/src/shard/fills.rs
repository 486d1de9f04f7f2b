//! Fills: what was fetched is written into the volume, behind an answered guest or before the answer.

use std::rc::Rc;

use crate::cache::ChunkData;
use crate::error::{Error, Result};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::datapath::Content;
use crate::shard::fill_turns::FillTurn;
use crate::shard::volume::Volume;

/// Fills behind read misses that may hold their chunk in memory at once, per shard; beyond it they are owed.
pub(super) const MISS_FILLS_MAX: usize = 64;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Fills the volume behind an answered read: at once while the store's hydration share lasts, else the hydrator
    /// owes it and later misses are answered from the cache again.
    pub(super) fn fill_behind(&self, volume: &Rc<Volume<P>>, chunk: u32, content: Content) {
        let bytes = content.bytes().len() as u64;
        if !self.may_fill(volume, chunk, bytes) {
            return;
        }
        self.0.miss_fills.set(self.0.miss_fills.get() + 1);
        let (shard, volume) = (self.clone(), volume.clone());
        self.0.platform.spawn(Queue::Background, async move {
            if let Err(error) = shard.fill(&volume, chunk, &content, FillTurn::Waits).await {
                shard.owe(&volume, chunk, &error);
            }
            shard.0.miss_fills.set(shard.0.miss_fills.get() - 1);
        });
    }

    /// A guest's read or write of a volume's file begins or ends.
    pub(super) fn note_guest_io(&self, volume: &Volume<P>) {
        self.0.stores[volume.store].fills.note_guest(self.0.platform.now());
    }

    /// Whether an absent chunk may be filled at once; if so the store's share is charged, if not it is owed.
    pub(super) fn may_fill(&self, volume: &Volume<P>, chunk: u32, bytes: u64) -> bool {
        if volume.map.borrow().is_chunk_resident(chunk) {
            return false;
        }
        let store = &self.0.stores[volume.store];
        let over = self.0.miss_fills.get() >= MISS_FILLS_MAX;
        if over || store.budget.borrow_mut().take(bytes, self.0.platform.now()).is_err() {
            self.0.counters.fills_deferred.add(1);
            volume.hydration.borrow_mut().owed.insert(chunk);
            self.wake_hydrator(volume);
            return false;
        }
        true
    }

    /// A fill failed: the hydrator tries again.
    pub(super) fn owe(&self, volume: &Volume<P>, chunk: u32, error: &Error) {
        self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message);
        volume.hydration.borrow_mut().owed.insert(chunk);
        self.wake_hydrator(volume);
    }

    pub(super) async fn fill(
        &self,
        volume: &Rc<Volume<P>>,
        chunk: u32,
        content: &Content,
        turn: FillTurn,
    ) -> Result<()> {
        match content {
            Content::Zero => volume.fill_zero(chunk..=chunk).await,
            Content::Data(fetched) => self.fill_data(volume, chunk, &fetched.data, turn).await,
        }
    }

    /// Writes what is absent of a chunk, when its turn has come.
    pub(super) async fn fill_data(
        &self,
        volume: &Rc<Volume<P>>,
        chunk: u32,
        data: &ChunkData,
        turn: FillTurn,
    ) -> Result<()> {
        let turns = &self.0.stores[volume.store].fills;
        let _turn = turns.turn(data.len() as u64, turn, || self.0.platform.now()).await;
        if volume.deleted.get() {
            return Ok(());
        }
        let written = volume.fill(chunk, data).await?;
        if written > 0 {
            self.0.counters.filled_chunks.add(1);
            self.0.counters.filled_bytes.add(written);
            let now = self.0.platform.now();
            volume.hydration.borrow_mut().meter.add(written, now);
            self.0.stores[volume.store].hydrated.borrow_mut().add(written, now);
            self.note_dirty(volume);
        }
        Ok(())
    }
}
