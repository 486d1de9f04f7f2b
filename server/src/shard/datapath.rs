//! The data path of guest requests: reads, writes and flushes of volumes of this shard; [`super::zeroing`] has discards.
//!
//! Reads take no lock: what is resident comes from the file, what is not from a verified chunk in memory, and the
//! guest is answered before the chunk is written into the volume. Writes never wait for the object store, except for
//! the edges of writes that are not aligned to sectors, whose old content must be known.

use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

use futures::future::join_all;

use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Time};
use crate::shard::Shard;
use crate::shard::api::{ConnectionId, ReadData, Reply};
use crate::shard::base::{Supplied, Want};
use crate::shard::fills::Content;
use crate::shard::harm::GuestIo;
use crate::shard::locks::Mode;
use crate::shard::mesh::MeshMessage;
use crate::shard::residency::SectorRange;
use crate::shard::signal::within;
use crate::shard::volume::{Volume, copy_padded, is_zero};
use crate::transfer::{ChunkSource, FetchClass, Fetched};
use crate::types::{LOGICAL_BLOCK_BYTES, SECTOR, VolumeId};

/// A chunk on its way from the shard that owns it. Dropping it cancels nothing.
pub(super) struct Answer(pub(super) flume::Receiver<Result<Fetched>>);

impl Answer {
    pub(super) async fn chunk(self) -> Result<Fetched> {
        let stopped = |_| Err(Error::new(Status::Busy, "the shard that fetches the chunk is overloaded or stopping"));
        self.0.recv_async().await.unwrap_or_else(stopped)
    }
}

/// By what right a request uses a volume (P7).
#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub(super) volume: VolumeId,
    pub(super) generation: u64,
    pub(super) from: ConnectionId,
}

/// A byte range inside the device.
#[derive(Clone, Copy)]
pub(super) struct ByteRange {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl ByteRange {
    pub(super) fn check<P: Platform>(volume: &Volume<P>, offset: u64, len: u64) -> Result<ByteRange> {
        let block = u64::from(LOGICAL_BLOCK_BYTES);
        let name = &*volume.spec.name;
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) || len == 0 {
            let message = format!("volume {name:?}: offset {offset} or length {len} is not a positive multiple of 512");
            return Err(Error::new(Status::Misaligned, message));
        }
        if offset.checked_add(len).is_none_or(|end| end > volume.spec.size_bytes) {
            let size = volume.spec.size_bytes;
            let message = format!("volume {name:?}: offset {offset} length {len} is past the end of {size} bytes");
            return Err(Error::new(Status::OutOfRange, message));
        }
        Ok(ByteRange { offset, len })
    }

    pub(super) fn end(self) -> u64 {
        self.offset + self.len
    }

    pub(super) fn sectors(self) -> SectorRange {
        SectorRange::covering(self.offset, self.len)
    }

    /// Where it lies in the bytes of its chunk; `None` if it goes on behind them.
    pub(super) fn in_chunk<P: Platform>(self, volume: &Volume<P>, chunk_len: usize) -> Option<Range<usize>> {
        let from = (self.offset % u64::from(volume.spec.chunk_bytes)) as usize;
        let part = from..from + self.len as usize;
        (part.end <= chunk_len).then_some(part)
    }

    pub(super) fn chunks<P: Platform>(self, volume: &Volume<P>) -> RangeInclusive<u32> {
        let map = volume.map.borrow();
        let sectors = self.sectors();
        map.chunk_of(sectors.start)..=map.chunk_of(sectors.end - 1)
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// The volume, if the claim on it holds.
    pub(super) fn writer(&self, claim: Claim) -> Result<Rc<Volume<P>>> {
        let volume = self.volume(claim.volume)?;
        self.check_claim(&volume, claim)?;
        Ok(volume)
    }

    pub(super) fn check_claim(&self, volume: &Volume<P>, claim: Claim) -> Result<()> {
        let (name, generation, current) = (&*volume.spec.name, claim.generation, volume.generation.get());
        if volume.deleted.get() && !volume.retired.get() {
            return Err(Error::new(Status::UnknownVolume, format!("volume {name:?} was deleted")));
        }
        if volume.retired.get() {
            let message = format!("volume {name:?} is being rolled back or resized: attach it again");
            return Err(Error::new(Status::StaleGeneration, message));
        }
        if generation < current && !mutation::on(Mutation::StaleGenerationAccepted) {
            self.0.counters.stale_generations.add(1);
            let message =
                format!("volume {name:?}: generation {generation} is fenced by {current}: another host attached");
            return Err(Error::new(Status::StaleGeneration, message));
        }
        let fenced = volume.attached.get() != Some(claim.from) && !mutation::on(Mutation::OldConnectionAccepted);
        if generation > current || (fenced && !mutation::on(Mutation::StaleGenerationAccepted)) {
            let message =
                format!("volume {name:?} is not attached with generation {generation} on this connection: attach it");
            return Err(Error::new(Status::NotAttached, message));
        }
        Ok(())
    }

    pub(super) async fn read(&self, claim: Claim, offset: u64, len: u32) -> Result<Reply> {
        let volume = self.writer(claim)?;
        let range = ByteRange::check(&volume, offset, u64::from(len))?;
        self.note_read(&volume, range);
        if volume.map.borrow().is_resident(range.sectors()) {
            let mut out = Vec::with_capacity(len as usize);
            self.read_resident(&volume, range, &mut out).await?;
            return Ok(Reply::Data(out.into()));
        }
        self.count_miss(&volume);
        let begun = self.0.platform.now();
        let contents = self.contents(&volume, range, Some(Want::Bytes)).await?;
        let contents = self.share_now(&volume, contents).await?;
        // Residency is looked up again from here on: what guests wrote while the chunks were fetched is in the file.
        let data = match part_of_one(&volume, range, &contents) {
            Some(data) => data,
            None => self.assemble(&volume, claim, range, &contents).await?.into(),
        };
        self.note_miss(&volume, range, &contents, begun);
        for (chunk, content) in contents {
            self.fill_behind(&volume, chunk, content);
        }
        Ok(Reply::Data(data))
    }

    /// What the file has and what the chunks have, side by side.
    async fn assemble(
        &self,
        volume: &Volume<P>,
        claim: Claim,
        range: ByteRange,
        contents: &[(u32, Content)],
    ) -> Result<Vec<u8>> {
        let chunk_bytes = u64::from(volume.spec.chunk_bytes);
        let runs = volume.map.borrow().runs(range.sectors());
        let mut out = Vec::with_capacity(range.len as usize);
        for run in runs {
            let (mut at, end) = ((run.start * SECTOR).max(range.offset), (run.end * SECTOR).min(range.end()));
            if run.resident {
                self.read_resident(volume, ByteRange { offset: at, len: end - at }, &mut out).await?;
                continue;
            }
            while at < end {
                let chunk = (at / chunk_bytes) as u32;
                let stop = end.min((u64::from(chunk) + 1) * chunk_bytes);
                let Some(content) = find(contents, chunk) else {
                    // Brought, and not filled into a volume that was rolled back or deleted meanwhile.
                    self.check_claim(volume, claim)?;
                    let message = format!("volume {:?} was changed while it was read: try again", &*volume.spec.name);
                    return Err(Error::new(Status::Busy, message));
                };
                let begin = out.len();
                out.resize(begin + (stop - at) as usize, 0);
                copy_padded(&mut out[begin..], content.bytes(), (at % chunk_bytes) as usize);
                at = stop;
            }
        }
        Ok(out)
    }

    pub(super) fn note_read(&self, volume: &Rc<Volume<P>>, range: ByteRange) {
        self.0.counters.guest_reads.add(1);
        self.0.counters.guest_read_bytes.add(range.len);
        volume.counters.reads.add(1);
        volume.counters.read_bytes.add(range.len);
        volume.account.asked_bytes.add(range.len);
        self.note_touched(volume, range.chunks(volume));
        self.read_ahead(volume, range.chunks(volume));
    }

    pub(super) fn count_miss(&self, volume: &Volume<P>) {
        self.0.counters.guest_read_misses.add(1);
        volume.counters.read_misses.add(1);
    }

    /// Where the time of a read that found chunks absent went; told in the log when it was a lot.
    fn note_miss(&self, volume: &Volume<P>, range: ByteRange, contents: &[(u32, Content)], begun: Time) {
        let took = self.0.platform.now().since(begun);
        let stories = contents.iter().filter_map(|(_, content)| content.story());
        let Some(slowest) = stories.max_by_key(|story| (story.tier, story.queue + story.transfer + story.verify))
        else {
            return;
        };
        self.0.stages.read_missed(slowest.tier, took);
        if self.0.config.trace_slow.is_some_and(|slow| took >= slow) {
            tracing::warn!(
                volume = &*volume.spec.name,
                offset = range.offset,
                len = range.len,
                tier = slowest.tier.name(),
                total_us = took.as_micros(),
                queue_us = slowest.queue.as_micros(),
                transfer_us = slowest.transfer.as_micros(),
                verify_us = slowest.verify.as_micros(),
                "slow read"
            );
        }
    }

    /// Appends what the file has there.
    async fn read_resident(&self, volume: &Volume<P>, range: ByteRange, out: &mut Vec<u8>) -> Result<()> {
        let sectors = range.sectors();
        let buf = {
            let _io = self.guest_io(volume, GuestIo::read(range.len), range.len);
            volume.read_sectors(sectors).await?
        };
        let from = (range.offset - sectors.start * SECTOR) as usize;
        out.extend_from_slice(&buf[from..from + range.len as usize]);
        Ok(())
    }

    /// The snapshot's content of every chunk of the range that is not wholly resident; as places in the base only if that
    /// is `wanted`.
    pub(super) async fn contents(
        &self,
        volume: &Rc<Volume<P>>,
        range: ByteRange,
        wanted: Option<Want>,
    ) -> Result<Vec<(u32, Content)>> {
        let absent: Vec<u32> = {
            let map = volume.map.borrow();
            range.chunks(volume).filter(|chunk| !map.is_chunk_resident(*chunk)).collect()
        };
        let limit = self.0.config.guest_deadline;
        let contents = within(&self.0.platform, limit, self.chunk_contents(volume, absent, wanted)).await;
        contents.unwrap_or_else(|| Err(self.too_late(volume)))
    }

    pub(super) fn too_late(&self, volume: &Volume<P>) -> Error {
        let limit = self.0.config.guest_deadline.as_millis();
        let message = format!("volume {:?}: no data from the object store within {limit} ms", &*volume.spec.name);
        self.0.counters.event(self.0.platform.wall_clock_ms(), &message);
        Error::new(Status::DeadlineExceeded, message)
    }

    async fn chunk_contents(
        &self,
        volume: &Rc<Volume<P>>,
        chunks: Vec<u32>,
        wanted: Option<Want>,
    ) -> Result<Vec<(u32, Content)>> {
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let manifest = self.manifest_of(volume).await?;
        let (zero, stored): (Vec<u32>, Vec<u32>) = chunks.into_iter().partition(|chunk| is_zero(&manifest, *chunk));
        let mut contents: Vec<_> = zero.into_iter().map(|chunk| (chunk, Content::Zero)).collect();
        if let Some(want) = wanted {
            let orders = self.orders(volume, &manifest, &stored, None);
            let answers = self.supplies(volume, orders, want, FetchClass::Priority);
            let answers = join_all(answers.into_iter().map(Supplied::get)).await;
            for (chunk, supply) in stored.into_iter().zip(answers) {
                let content = supply?.into();
                self.note_near(&manifest, chunk, &content);
                contents.push((chunk, content));
            }
            return Ok(contents);
        }
        let source = |chunk: &u32| {
            ChunkSource::of(&manifest, *chunk, &volume.account.origin).expect("zero chunks were sorted out")
        };
        let sources = stored.iter().map(source).collect();
        let answers = join_all(self.request(sources, FetchClass::Priority).into_iter().map(Answer::chunk)).await;
        for (chunk, data) in stored.into_iter().zip(answers) {
            let content = Content::Data(data?);
            self.note_near(&manifest, chunk, &content);
            contents.push((chunk, content));
        }
        Ok(contents)
    }

    /// Asks the shards that own the chunks for them: the answers, in the order asked.
    pub(super) fn request(&self, sources: Vec<ChunkSource>, class: FetchClass) -> Vec<Answer> {
        let mut by_owner: Vec<Vec<_>> = (0..self.0.config.shards).map(|_| Vec::new()).collect();
        let mut answers = Vec::with_capacity(sources.len());
        let asked_by_guests = sources.first().filter(|_| class <= FetchClass::ReadAhead);
        let wave = asked_by_guests.is_some_and(|source| self.0.transfer.account(&source.origin).is_wave());
        for source in sources {
            let (sender, receiver) = flume::bounded(1);
            by_owner[source.owner(self.0.config.shards)].push((source, sender));
            answers.push(Answer(receiver));
        }
        for (owner, wanted) in by_owner.into_iter().enumerate() {
            if wanted.is_empty() {
                continue;
            }
            if owner == self.0.config.shard {
                self.0.transfer.fetch(wanted, class, wave);
            } else if let Err(error) = self.0.mesh.send(owner, MeshMessage::Fetch { wanted, class, wave }) {
                // The senders inside the message are gone: the answers below say so.
                self.0.counters.requests_refused_busy.add(1);
                tracing::debug!(%error, "fetch not sent");
            }
        }
        answers
    }

    pub(super) async fn write(&self, claim: Claim, offset: u64, data: &[u8], fua: bool) -> Result<Reply> {
        let volume = self.writer(claim)?;
        let range = ByteRange::check(&volume, offset, data.len() as u64)?;
        self.count_write(&volume, range.len);
        self.write_range(&volume, claim, range, Some(data)).await?;
        self.finish_write(&volume, fua).await
    }

    pub(super) fn count_write(&self, volume: &Volume<P>, len: u64) {
        self.0.counters.guest_writes.add(1);
        self.0.counters.guest_written_bytes.add(len);
        volume.counters.writes.add(1);
        volume.counters.written_bytes.add(len);
        self.0.stores[volume.store].guest_writes.borrow_mut().add(len, self.0.platform.now());
    }

    pub(super) async fn finish_write(&self, volume: &Rc<Volume<P>>, fua: bool) -> Result<Reply> {
        if fua && !mutation::on(Mutation::FuaIgnored) {
            self.sync_for_guest(volume).await?;
        }
        Ok(Reply::Done)
    }

    async fn sync_for_guest(&self, volume: &Rc<Volume<P>>) -> Result<()> {
        // What costs nothing says nothing of the disk.
        let _io = volume.needs_sync().then(|| self.guest_io(volume, GuestIo::Flush, 0));
        volume.sync(&self.0.journal, &self.0.counters).await
    }

    /// Writes `data` (`None`: zeroes) to a range of any alignment to 512 bytes.
    pub(super) async fn write_range(
        &self,
        volume: &Rc<Volume<P>>,
        claim: Claim,
        range: ByteRange,
        data: Option<&[u8]>,
    ) -> Result<()> {
        let sectors = range.sectors();
        // The tail of the device's last sector is nobody's: a write up to the end needs no old content there.
        let cut_head = !range.offset.is_multiple_of(SECTOR);
        let cut_tail = !range.end().is_multiple_of(SECTOR) && range.end() != volume.spec.size_bytes;
        let mut edges = Vec::new();
        if cut_head {
            edges.push(sectors.start);
        }
        if cut_tail && (!cut_head || sectors.end - 1 != sectors.start) {
            edges.push(sectors.end - 1);
        }
        let mut old = Vec::with_capacity(edges.len());
        for sector in &edges {
            if volume.map.borrow().is_sector_resident(*sector) {
                continue;
            }
            let at = ByteRange { offset: sector * SECTOR, len: LOGICAL_BLOCK_BYTES.into() };
            old.extend(self.contents(volume, at, None).await?);
        }
        let mode = if edges.is_empty() { Mode::Shared } else { Mode::Alone };
        let (_locks, _writing) = self.begin_write(volume, sectors, mode).await?;
        // While the locks were awaited another host may have attached.
        if !mutation::on(Mutation::ClaimNotCheckedAgain) {
            self.check_claim(volume, claim)?;
        }
        if mutation::on(Mutation::ResidentBeforeWritten) {
            volume.map.borrow_mut().mark_written(sectors);
        }
        let mut buf = self.0.platform.alloc(((sectors.end - sectors.start) * SECTOR) as usize);
        let len = buf.len();
        buf[len - SECTOR as usize..].fill(0);
        for sector in edges {
            let place = ((sector - sectors.start) * SECTOR) as usize;
            let target = &mut buf[place..place + SECTOR as usize];
            match mutation::on(Mutation::EdgeWithoutOldContent) {
                true => target.fill(0),
                false => self.old_sector(volume, sector, &old, target).await?,
            }
        }
        let from = (range.offset - sectors.start * SECTOR) as usize;
        let target = &mut buf[from..from + range.len as usize];
        match data {
            Some(data) => target.copy_from_slice(data),
            None => target.fill(0),
        }
        {
            let _io = self.guest_io(volume, GuestIo::write(range.len), range.len);
            volume.write_sectors(sectors.start, buf).await?;
        }
        volume.map.borrow_mut().mark_written(sectors);
        self.note_dirty(volume);
        volume.note_change();
        Ok(())
    }

    /// What a sector holds before a write to a part of it; the caller has the chunk alone.
    async fn old_sector(
        &self,
        volume: &Volume<P>,
        sector: u64,
        contents: &[(u32, Content)],
        out: &mut [u8],
    ) -> Result<()> {
        let resident = volume.map.borrow().is_sector_resident(sector);
        if resident {
            out.copy_from_slice(&volume.read_sectors(SectorRange { start: sector, end: sector + 1 }).await?);
            return Ok(());
        }
        let chunk_bytes = u64::from(volume.spec.chunk_bytes);
        let content = find(contents, (sector * SECTOR / chunk_bytes) as u32);
        let content = content.expect("residency never shrinks: an absent chunk was fetched");
        copy_padded(out, content.bytes(), (sector * SECTOR % chunk_bytes) as usize);
        Ok(())
    }

    pub(super) async fn flush(&self, claim: Claim) -> Result<Reply> {
        let volume = self.writer(claim)?;
        self.0.counters.guest_flushes.add(1);
        volume.counters.flushes.add(1);
        self.sync_for_guest(&volume).await?;
        Ok(Reply::Done)
    }
}

/// A range of one chunk of which nothing is in the volume: it is sent from where the chunk is.
fn part_of_one<P: Platform>(volume: &Volume<P>, range: ByteRange, contents: &[(u32, Content)]) -> Option<ReadData> {
    let [(_, Content::Data(Fetched { data, .. }))] = contents else { return None };
    let part = range.in_chunk(volume, data.len()).filter(|_| volume.map.borrow().is_absent(range.sectors()))?;
    Some(ReadData::Chunk { data: data.clone(), part })
}

/// A chunk that became resident while others were fetched is in the file: only absent chunks are looked up here.
fn find(contents: &[(u32, Content)], chunk: u32) -> Option<&Content> {
    contents.iter().find(|(c, _)| *c == chunk).map(|(_, content)| content)
}

/// A guest write in its I/O phase.
pub(super) struct Writing<'a, P: Platform>(&'a Volume<P>);

impl<'a, P: Platform> Writing<'a, P> {
    pub(super) fn begin(volume: &'a Volume<P>) -> Self {
        volume.writing.set(volume.writing.get() + 1);
        Writing(volume)
    }
}

impl<P: Platform> Drop for Writing<'_, P> {
    fn drop(&mut self) {
        self.0.writing.set(self.0.writing.get() - 1);
        self.0.writes_done.wake_all();
    }
}
