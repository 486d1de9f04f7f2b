//! Priority fetches: a guest or its host asks for data to come, without waiting for the background.

use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::{FetchUntil, Reply};
use crate::shard::base::Want;
use crate::shard::datapath::ByteRange;
use crate::shard::fill_turns::FillTurn;
use crate::shard::fills::{Fill, gather};
use crate::shard::volume::Volume;
use crate::types::VolumeId;

/// Chunks one priority fetch works on at a time: bounds the memory of a request over a whole device.
const PREFETCH_WINDOW_CHUNKS: usize = 32;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// The hot request: a range that is resident already is one look-up, and one whose chunks somebody used a moment ago is
    /// readable.
    pub(super) fn priority_fetch_now(
        &self,
        id: VolumeId,
        offset: u64,
        len: u64,
        until: FetchUntil,
    ) -> Option<Result<Reply>> {
        let volume = self.volume(id).ok()?;
        let range = ByteRange::check(&volume, offset, len).ok()?;
        let map = volume.map.borrow();
        let there = match until {
            FetchUntil::Durable => map.is_durable(range.sectors()),
            FetchUntil::Readable | FetchUntil::Resident => map.is_resident(range.sectors()),
        };
        if !there {
            drop(map);
            return if until == FetchUntil::Readable { self.fetch_now(&volume, range) } else { None };
        }
        drop(map);
        self.note_fetch(&volume, range);
        self.0.counters.priority_fetch_hits.add(1);
        Some(Ok(Reply::Done))
    }

    pub(super) fn note_fetch(&self, volume: &Volume<P>, range: ByteRange) {
        self.0.counters.priority_fetches.add(1);
        volume.counters.priority_fetches.add(1);
        self.note_touched(volume, range.chunks(volume));
    }

    pub(super) async fn priority_fetch(&self, id: VolumeId, offset: u64, len: u64, until: FetchUntil) -> Result<Reply> {
        let volume = self.volume(id)?;
        let range = ByteRange::check(&volume, offset, len)?;
        self.note_fetch(&volume, range);
        let chunk_bytes = u64::from(volume.spec.chunk_bytes);
        let window_bytes = chunk_bytes * PREFETCH_WINDOW_CHUNKS as u64;
        let mut at = range.offset;
        while at < range.end() {
            let end = range.end().min((at / window_bytes + 1) * window_bytes);
            let window = ByteRange { offset: at, len: end - at };
            if until == FetchUntil::Readable {
                for (chunk, content) in self.contents(&volume, window, Some(Want::Bytes)).await? {
                    self.fill_behind(&volume, chunk, content);
                }
            } else {
                let contents = self.contents(&volume, window, Some(Want::Place)).await?;
                for fill in gather(contents, volume.spec.chunk_bytes) {
                    // Charged, not asked: priority work never waits for the background's share.
                    if let Fill::Data(_, fetched) = &fill {
                        self.charge_store(&volume, fetched.data.len() as u64);
                    }
                    self.fill(&volume, fill, FillTurn::AtOnce).await?;
                }
            }
            at = end;
        }
        if until != FetchUntil::Readable && volume.retired.get() {
            // Nothing is filled into it any more.
            let message = format!("volume {:?} is being rolled back or resized: try again", &*volume.spec.name);
            return Err(Error::new(Status::Busy, message));
        }
        if mutation::on(Mutation::DurableFetchNotSynced) {
            return Ok(Reply::Done);
        }
        if until == FetchUntil::Durable && !volume.map.borrow().is_durable(range.sectors()) {
            volume.map.borrow_mut().record_zeroes(range.sectors());
            volume.sync(&self.0.journal, &self.0.counters).await?;
        }
        Ok(Reply::Done)
    }
}
