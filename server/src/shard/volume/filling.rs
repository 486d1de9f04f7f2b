//! Filling a volume with its snapshot's content: only what is absent is written, and only with the chunks' locks alone.

use std::ops::{Range, RangeInclusive};

use super::{SECTOR, Volume, ZERO_RUN_CHUNKS_MAX, copy_padded};
use crate::cache::ChunkData;
use crate::error::Result;
use crate::mutation::{self, Mutation};
use crate::platform::{File, Platform};
use crate::shard::locks::Mode;
use crate::shard::residency::SectorRange;

/// Shorter pieces of a chunk are copied to be written: that is less than another thread's turn costs.
const SHARED_WRITE_BYTES_MIN: usize = 128 << 10;

/// Where the content of chunks is. Past its end (the tail of the device's last sector, and of a volume larger than its
/// snapshot) are zeroes.
enum Content<'a, F> {
    Memory(&'a ChunkData),
    /// In another file, here.
    Base(&'a F, Range<u64>),
}

/// What a fill found absent.
pub struct Filled {
    pub chunks: u64,
    pub bytes: u64,
    /// Clones it took.
    pub clones: u64,
}

impl<P: Platform> Volume<P> {
    /// Writes the sectors of a chunk that are not resident, and only those. Returns the bytes written.
    pub async fn fill(&self, chunk: u32, content: &ChunkData) -> Result<u64> {
        Ok(self.fill_from(chunk..=chunk, Content::Memory(content)).await?.bytes)
    }

    /// [`Volume::fill`] without copying, for neighbouring chunks: their sectors share what lies at `place` of the base of
    /// the volume's store, one chunk after the other.
    pub async fn share(&self, chunks: RangeInclusive<u32>, base: &P::File, place: Range<u64>) -> Result<Filled> {
        self.fill_from(chunks, Content::Base(base, place)).await
    }

    async fn fill_from(&self, chunks: RangeInclusive<u32>, content: Content<'_, P::File>) -> Result<Filled> {
        let early = mutation::on(Mutation::FillDecidesBeforeLock).then(|| self.absent_runs(&chunks));
        let _alone = match mutation::on(Mutation::FillWithoutLock) {
            true => Vec::new(),
            false => self.locks.lock_all(chunks.clone(), Mode::Alone).await,
        };
        let Some(_filling) = Filling::begin(self) else { return Ok(Filled { chunks: 0, bytes: 0, clones: 0 }) };
        let whole = self.sectors_of(&chunks);
        let mut absent = early.unwrap_or_else(|| self.absent_runs(&chunks));
        if mutation::on(Mutation::FillIgnoresSectors) {
            absent = vec![whole];
        }
        let missing = chunks.filter(|chunk| !self.map.borrow().is_chunk_resident(*chunk)).count() as u64;
        let mut filled = Filled { chunks: missing, bytes: 0, clones: 0 };
        for run in absent {
            let part = (run.start - whole.start) * SECTOR..(run.end - whole.start) * SECTOR;
            filled.bytes += part.end - part.start;
            match &content {
                Content::Memory(content) => self.write_part(run.start, content, part).await?,
                Content::Base(base, place) => {
                    self.share_part(run.start, base, place, part).await?;
                    filled.clones += 1;
                }
            }
            self.map.borrow_mut().mark_written(run);
        }
        self.note_change();
        Ok(filled)
    }

    fn sectors_of(&self, chunks: &RangeInclusive<u32>) -> SectorRange {
        let map = self.map.borrow();
        SectorRange { start: map.chunk_sectors(*chunks.start()).start, end: map.chunk_sectors(*chunks.end()).end }
    }

    fn absent_runs(&self, chunks: &RangeInclusive<u32>) -> Vec<SectorRange> {
        let runs = self.map.borrow().runs(self.sectors_of(chunks));
        let absent = runs.into_iter().filter(|run| !run.resident);
        absent.map(|run| SectorRange { start: run.start, end: run.end }).collect()
    }

    async fn write_part(&self, start_sector: u64, content: &ChunkData, part: Range<u64>) -> Result<()> {
        let part = part.start as usize..part.end as usize;
        if part.len() >= SHARED_WRITE_BYTES_MIN && part.end <= content.len() {
            return self.write_shared_sectors(start_sector, content.clone(), part).await;
        }
        let mut buf = self.platform.alloc(part.len());
        copy_padded(&mut buf, content, part.start);
        self.write_sectors(start_sector, buf).await
    }

    async fn share_part(&self, start_sector: u64, base: &P::File, place: &Range<u64>, part: Range<u64>) -> Result<()> {
        let len = part.end - part.start;
        let shared = part.end.min(place.end - place.start).saturating_sub(part.start);
        if shared > 0 {
            self.clone_sectors(start_sector, base, place.start + part.start, shared).await?;
        }
        if shared == len {
            return Ok(());
        }
        let mut zeroes = self.platform.alloc((len - shared) as usize);
        zeroes.fill(0);
        self.write_sectors(start_sector + shared / SECTOR, zeroes).await
    }

    /// [`Volume::write_sectors`] from a part of a chunk that others use too.
    async fn write_shared_sectors(&self, start_sector: u64, chunk: ChunkData, part: Range<usize>) -> Result<()> {
        self.change("write", async |file| file.write_shared_at(start_sector * SECTOR, chunk, part).await).await
    }

    /// [`Volume::write_sectors`] of bytes that another file holds.
    async fn clone_sectors(&self, start_sector: u64, base: &P::File, offset: u64, len: u64) -> Result<()> {
        let clone = async |file: P::File| file.clone_range(start_sector * SECTOR, base, offset, len).await;
        self.change("clone into", clone).await
    }

    /// Writes over a whole chunk that is resident what it should hold, if `may` says so once it is held alone.
    pub async fn overwrite(
        &self,
        chunk: u32,
        content: &[u8],
        may: impl FnOnce(&Volume<P>) -> Result<bool>,
    ) -> Result<bool> {
        let _alone = self.locks.lock(chunk, Mode::Alone).await;
        let Some(_filling) = Filling::begin(self) else { return Ok(false) };
        if !may(self)? || !self.map.borrow().is_chunk_resident(chunk) {
            return Ok(false);
        }
        let whole = self.map.borrow().chunk_sectors(chunk);
        let mut buf = self.platform.alloc(((whole.end - whole.start) * SECTOR) as usize);
        copy_padded(&mut buf, content, 0);
        self.write_sectors(whole.start, buf).await?;
        Ok(true)
    }

    /// Makes absent sectors of zero chunks resident: nothing is fetched.
    pub async fn fill_zero(&self, chunks: RangeInclusive<u32>) -> Result<()> {
        assert!((chunks.end() - chunks.start()) < ZERO_RUN_CHUNKS_MAX, "bounded by the caller");
        let _alone = self.locks.lock_all(chunks.clone(), Mode::Alone).await;
        let Some(_filling) = Filling::begin(self) else { return Ok(()) };
        for absent in self.absent_runs(&chunks) {
            if !mutation::on(Mutation::ZeroFillTrustsFile) {
                self.zero_sectors(absent).await?;
            }
            self.map.borrow_mut().mark_zeroed(absent);
        }
        self.note_change();
        Ok(())
    }
}

/// A fill in its I/O phase.
struct Filling<'a, P: Platform>(&'a Volume<P>);

impl<'a, P: Platform> Filling<'a, P> {
    /// `None`: the volume is another one by now, or is about to be.
    fn begin(volume: &'a Volume<P>) -> Option<Self> {
        if volume.retired.get() {
            return None;
        }
        volume.filling.set(volume.filling.get() + 1);
        Some(Filling(volume))
    }
}

impl<P: Platform> Drop for Filling<'_, P> {
    fn drop(&mut self) {
        self.0.filling.set(self.0.filling.get() - 1);
        self.0.fills_done.wake_all();
    }
}
