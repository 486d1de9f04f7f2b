//! Discards and write-zeroes of guests.

use std::rc::Rc;

use crate::error::Result;
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::Reply;
use crate::shard::datapath::{ByteRange, Claim};
use crate::shard::locks::Mode;
use crate::shard::residency::SectorRange;
use crate::shard::volume::Volume;
use crate::types::SECTOR;

/// Bytes one discard or write-zeroes punches at a time, so that the chunks' locks are held briefly.
const ZERO_STEP_BYTES: u64 = 32 << 20;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Discard and write-zeroes: whole sectors become holes, resident as zeroes; nothing is fetched for them. The edges
    /// of a write-zeroes are written; those of a discard, which is advice, are left alone.
    pub(super) async fn zero(&self, claim: Claim, range: (u64, u64), write_edges: bool, fua: bool) -> Result<Reply> {
        let volume = self.writer(claim)?;
        let range = ByteRange::check(&volume, range.0, range.1)?;
        self.count_write(&volume, range.len);
        let to_end = range.end() == volume.spec.size_bytes;
        let inner_start = match mutation::on(Mutation::ZeroRoundsOutward) {
            true => range.offset / SECTOR * SECTOR,
            false => range.offset.next_multiple_of(SECTOR),
        };
        let inner_end = if to_end { range.end().next_multiple_of(SECTOR) } else { range.end() / SECTOR * SECTOR };
        if inner_start >= inner_end {
            if write_edges {
                self.write_range(&volume, claim, range, None).await?;
            }
            return self.finish_write(&volume, fua).await;
        }
        if write_edges && range.offset < inner_start {
            let head = ByteRange { offset: range.offset, len: inner_start - range.offset };
            self.write_range(&volume, claim, head, None).await?;
        }
        let mut at = inner_start;
        while at < inner_end {
            let end = (at + ZERO_STEP_BYTES).min(inner_end);
            self.punch(&volume, claim, SectorRange { start: at / SECTOR, end: end / SECTOR }).await?;
            at = end;
        }
        if write_edges && inner_end < range.end() {
            let tail = ByteRange { offset: inner_end, len: range.end() - inner_end };
            self.write_range(&volume, claim, tail, None).await?;
        }
        self.finish_write(&volume, fua).await
    }

    async fn punch(&self, volume: &Rc<Volume<P>>, claim: Claim, sectors: SectorRange) -> Result<()> {
        let (_locks, _writing) = self.begin_write(volume, sectors, Mode::Shared).await?;
        self.check_claim(volume, claim)?;
        if !mutation::on(Mutation::ZeroWithoutPunch) {
            volume.zero_sectors(sectors).await?;
        }
        volume.map.borrow_mut().mark_zeroed(sectors);
        self.note_dirty(volume);
        volume.note_change();
        Ok(())
    }
}
