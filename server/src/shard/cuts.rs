//! Snapshots of volumes, on their shard: the cut, which all volumes of a group make together, and what is captured of it afterwards.
//!
//! *Freezing* holds new writes of guests back and waits for those at the disk; a *cut* says what belongs to the snapshot, and thaws. That is
//! the whole stall: nothing is read or copied in it. Afterwards a write to a chunk that was not captured yet first puts its old
//! content into the staging file, by sharing extents where the store can. A snapshot that fails never fails a guest.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use crate::error::{Error, Result, Status};
use crate::journal::Record;
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::{File, OpenMode, Platform, Queue};
use crate::shard::Shard;
use crate::shard::api::{CutVolume, CutWanted, VolumeLineage};
use crate::shard::changes::{ChunkSet, Staged};
use crate::shard::datapath::Writing;
use crate::shard::fill_turns::FillTurn;
use crate::shard::hydration_queue::Class;
use crate::shard::locks::{Guard, Mode};
use crate::shard::residency::SectorRange;
use crate::shard::signal::{AtWork, within};
use crate::shard::volume::{Volume, copy_padded, is_zero};
use crate::transfer::{ChunkSource, FetchClass};
use crate::types::{SECTOR, SnapshotRef, VolumeId};

/// Guests are held back so long at most: then the snapshot is given up.
const FREEZE_MAX: Duration = Duration::from_secs(1);
/// A write of one sector puts this much around it aside: few writes of a guest that writes in order wait for it.
const COPIED_SECTORS: u32 = 16;
/// So many pieces of a volume's old content are on their way into the staging area before guests wait for one.
const PUT_ASIDE_MAX: usize = 64;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// What the next snapshot of a volume builds on.
    pub(super) fn lineage(&self, name: &str) -> Result<VolumeLineage> {
        let volume = self.by_name(name)?;
        let changes = volume.changes.borrow();
        let lineage = changes.lineage();
        Ok(VolumeLineage {
            id: volume.spec.id,
            size_bytes: volume.spec.size_bytes,
            chunk_bytes: volume.spec.chunk_bytes,
            source: volume.spec.snapshot.clone(),
            hydrated: volume.hydrated.get(),
            attached: volume.attached.get().is_some(),
            lineage,
        })
    }

    /// Holds writes to the volumes back and waits for those at the disk. Without a cut in time they go on.
    pub(super) async fn freeze(&self, names: &[String], cut: u64) -> Result<()> {
        self.refuse_when_stopping()?;
        let volumes = names.iter().map(|name| self.by_name(name)).collect::<Result<Vec<_>>>()?;
        for (at, volume) in volumes.iter().enumerate() {
            if let Err(error) = self.may_freeze(volume) {
                volumes[..at].iter().for_each(|volume| thaw(volume, cut));
                return Err(error);
            }
            volume.frozen.set(Some(cut));
            volume.frozen_at.set(self.0.platform.now());
        }
        let (platform, frozen) = (self.0.platform.clone(), volumes.clone());
        self.0.platform.spawn(Queue::Serve, async move {
            platform.sleep(FREEZE_MAX).await;
            frozen.iter().for_each(|volume| thaw(volume, cut));
        });
        if mutation::on(Mutation::CutDoesNotWaitForWrites) {
            return Ok(());
        }
        let still = async {
            for volume in &volumes {
                volume.writes_done.until(|| volume.writing.get() == 0).await;
            }
        };
        if within(&self.0.platform, FREEZE_MAX, still).await.is_none() {
            volumes.iter().for_each(|volume| thaw(volume, cut));
            let message = format!("writes at the disk did not end within {FREEZE_MAX:?}: try again");
            return Err(Error::new(Status::Busy, message));
        }
        Ok(())
    }

    fn may_freeze(&self, volume: &Volume<P>) -> Result<()> {
        let name = &*volume.spec.name;
        if let Some(why) = volume.failure() {
            return Err(Error::new(Status::Io, format!("volume {name:?} takes no snapshots: {why}")));
        }
        if volume.retired.get() {
            return Err(Error::new(
                Status::Conflict,
                format!("volume {name:?} is being rolled back or resized: try again"),
            ));
        }
        if volume.changes.borrow().cut().is_some() || volume.frozen.get().is_some() {
            let message = format!("a snapshot of volume {name:?} is being taken: wait until it is done");
            return Err(Error::new(Status::Conflict, message));
        }
        Ok(())
    }

    /// Cuts frozen volumes and lets their guests go on.
    pub(super) fn cut(&self, wanted: &[CutWanted], cut: u64) -> Result<Vec<CutVolume>> {
        let mut cuts = Vec::with_capacity(wanted.len());
        let mut make = || {
            for wanted in wanted {
                cuts.push(self.cut_one(&*self.by_name(&wanted.name)?, wanted, cut)?);
            }
            Ok(())
        };
        let made: Result<()> = make();
        for wanted in wanted {
            let Ok(volume) = self.by_name(&wanted.name) else { continue };
            if made.is_err() {
                volume.changes.borrow_mut().end(cut, None);
            }
            thaw(&volume, cut);
        }
        made.map(|()| cuts)
    }

    fn cut_one(&self, volume: &Volume<P>, wanted: &CutWanted, cut: u64) -> Result<CutVolume> {
        let name = &*volume.spec.name;
        if volume.frozen.get() != Some(cut) {
            return Err(Error::new(
                Status::Busy,
                format!("volume {name:?}: the snapshot took too long to begin: try again"),
            ));
        }
        let mut changes = volume.changes.borrow_mut();
        let known = changes.is_changed(0).is_some() && !wanted.all;
        let map = volume.map.borrow();
        let held = || (0..map.chunks()).filter(|chunk| !map.is_absent(map.chunk_sectors(*chunk)));
        let chunks = changes.begin(cut, (!known).then(held), wanted.also.filter(|chunk| *chunk < map.chunks()));
        let chunks =
            chunks.ok_or_else(|| Error::new(Status::Conflict, format!("volume {name:?} is being cut already")))?;
        let stall = self.0.platform.now().since(volume.frozen_at.get());
        self.0.stages.cut(stall);
        Ok(CutVolume {
            volume: volume.spec.id,
            name: volume.spec.name.to_string(),
            base: if known { changes.base().cloned() } else { volume.spec.snapshot.clone() },
            known,
            chunks,
            stall,
        })
    }

    /// A guest's write has its locks and may go to the disk: nothing holds it back, the journal knows that its chunks may change, and what
    /// snapshots need of its sectors is safe.
    pub(super) async fn begin_write<'a>(
        &self,
        volume: &'a Rc<Volume<P>>,
        sectors: SectorRange,
        mode: Mode,
    ) -> Result<(Vec<Guard>, Writing<'a, P>)> {
        let mut mode = mode;
        let (chunks, all) = {
            let map = volume.map.borrow();
            (map.chunk_of(sectors.start)..=map.chunk_of(sectors.end - 1), map.chunks())
        };
        let needed = |chunk: u32| {
            let whole = volume.map.borrow().chunk_sectors(chunk);
            let part = sectors.start.max(whole.start)..sectors.end.min(whole.end);
            volume.changes.borrow().needed(chunk, (part.start - whole.start) as u32..(part.end - whole.start) as u32)
        };
        let pending = || chunks.clone().filter(|chunk| !needed(*chunk).is_empty());
        loop {
            // Not one write in a million waits here: the others are not to pay for the waiting.
            if volume.frozen.get().is_some() && !mutation::on(Mutation::CutDoesNotWaitForWrites) {
                volume.thawed.until(|| volume.frozen.get().is_none()).await;
            }
            if volume.changes.borrow().unannounced(&chunks, all).is_some() {
                self.announce(volume, &chunks, all).await?;
            }
            if pending().next().is_some() {
                mode = Mode::Alone;
            }
            let locks = volume.locks.lock_all(chunks.clone(), mode).await;
            let staged: Vec<u32> = pending().collect();
            if !staged.is_empty() && mode == Mode::Shared {
                continue;
            }
            if !mutation::on(Mutation::WriteOvertakesCapture) {
                let skips = mutation::on(Mutation::SecondChunkOvertakesCapture);
                for chunk in staged.into_iter().take(if skips { 1 } else { usize::MAX }) {
                    self.stage(volume, chunk, &needed(chunk)).await;
                }
            }
            let mut changes = volume.changes.borrow_mut();
            let frozen = volume.frozen.get().is_some() && !mutation::on(Mutation::CutDoesNotWaitForWrites);
            if frozen || changes.unannounced(&chunks, all).is_some() {
                continue;
            }
            chunks.clone().for_each(|chunk| changes.write(chunk));
            return Ok((locks, Writing::begin(volume)));
        }
    }

    /// Tells the journal that chunks may change.
    async fn announce(&self, volume: &Volume<P>, chunks: &RangeInclusive<u32>, all: u32) -> Result<()> {
        self.0.journal.admit().await?;
        let Some(run) = volume.changes.borrow().unannounced(chunks, all) else { return Ok(()) };
        let record = Record::Changing { volume: volume.spec.id, run: (run.start, run.end - run.start) };
        let lsn = self.0.journal.append(&record);
        let announcement = volume.changes.borrow().announce(run);
        self.0.journal.commit(lsn).await?;
        volume.changes.borrow_mut().announced(announcement);
        Ok(())
    }

    /// Puts the old content of sectors of a chunk aside; the caller has the chunk alone. Where that fails, so does the snapshot.
    async fn stage(&self, volume: &Rc<Volume<P>>, chunk: u32, sectors: &[u32]) {
        let Some(cut) = volume.changes.borrow().cut() else { return };
        if let Err(error) = self.try_stage(volume, cut, chunk, sectors).await {
            self.give_up(volume, cut, error);
        }
    }

    fn give_up(&self, volume: &Volume<P>, cut: u64, error: Error) {
        if volume.changes.borrow().cut() == Some(cut) {
            let text = format!("volume {:?}: its snapshot was given up: {}", &*volume.spec.name, error.message);
            self.0.counters.event(self.0.platform.wall_clock_ms(), &text);
            volume.changes.borrow_mut().fail(error.message);
        }
    }

    async fn try_stage(&self, volume: &Rc<Volume<P>>, cut: u64, chunk: u32, sectors: &[u32]) -> Result<()> {
        let at_work = volume.staging_writes.begin(chunk);
        let store = &self.0.stores[volume.store];
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let shares_extents = self.0.bases[volume.store].is_usable();
        let sectors = self.to_stage(volume, chunk, sectors, shares_extents);
        let mut staged = Staged::default();
        for sector in sectors {
            let own = volume.map.borrow().is_sector_resident(whole.start + u64::from(sector));
            if own { &mut staged.own } else { &mut staged.source }.insert(sector);
        }
        let runs = runs_of(whole, &staged.own);
        let bytes = runs.iter().map(|run| (run.end - run.start) * SECTOR).sum::<u64>();
        if store.staged_bytes.get() + bytes > self.0.config.staging_bytes {
            let message = format!(
                "the staging area of store {:?} is full: guests overwrite faster than the snapshot is stored (snapshots.staging_bytes)",
                &*store.label
            );
            return Err(Error::new(Status::NoSpace, message));
        }
        if bytes > 0 {
            let staging = self.staging_of(volume).await?;
            let mut copied = Vec::new();
            for run in runs {
                if !shares_extents || !volume.share_out(run, &staging).await? {
                    copied.push((run.start * SECTOR, volume.copy_out(run).await?));
                }
            }
            let write = self.clone().put_aside(volume.clone(), cut, staging, copied, at_work);
            // The guest waits for the old content to be read, and only where much is waiting also for it to be written.
            match volume.staging_writes.count() > PUT_ASIDE_MAX {
                true => write.await,
                false => self.0.platform.spawn(Queue::Background, write),
            }
        }
        if volume.changes.borrow_mut().staged(cut, chunk, &staged, bytes) {
            store.staged_bytes.set(store.staged_bytes.get() + bytes);
            self.0.counters.staged_bytes.add(bytes);
        }
        Ok(())
    }

    /// Writes old content into the staging file, while nobody reads it there.
    async fn put_aside(
        self,
        volume: Rc<Volume<P>>,
        cut: u64,
        staging: P::File,
        copied: Vec<(u64, P::WriteBuf)>,
        at_work: AtWork,
    ) {
        for (offset, buf) in copied {
            if let Err(error) = staging.write_at(offset, buf).await {
                self.give_up(&volume, cut, self.staging_error(&volume, &error));
            }
        }
        drop(at_work);
    }

    /// What to put aside where these sectors have to be. Extents are shared a chunk at a time, which costs the guest no more than a sector would;
    /// what is copied is copied in small pieces.
    fn to_stage(&self, volume: &Volume<P>, chunk: u32, sectors: &[u32], shares_extents: bool) -> Vec<u32> {
        let (Some(first), Some(last)) = (sectors.first(), sectors.last()) else { return Vec::new() };
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let all = (whole.end - whole.start) as u32;
        let part = match shares_extents {
            true => 0..all,
            false => first / COPIED_SECTORS * COPIED_SECTORS..(last + 1).next_multiple_of(COPIED_SECTORS).min(all),
        };
        volume.changes.borrow().needed(chunk, part)
    }

    fn staging_error(&self, volume: &Volume<P>, error: &std::io::Error) -> Error {
        Error::from_io(&format!("staging file {}", self.staging_path(volume).display()), error)
    }

    fn staging_path(&self, volume: &Volume<P>) -> PathBuf {
        self.0.stores[volume.store].staging_dir.join(format!("{}.raw", volume.spec.id))
    }

    /// The volume's staging file, as long as the volume: a chunk lies at its own place.
    async fn staging_of(&self, volume: &Volume<P>) -> Result<P::File> {
        let _one = volume.staging_opening.lock().await;
        if let Some(file) = volume.staging.borrow().as_ref() {
            return Ok(file.clone());
        }
        let path = self.staging_path(volume);
        let failed = |e: std::io::Error| self.staging_error(volume, &e);
        let dir = &self.0.stores[volume.store].staging_dir;
        self.0.platform.create_dir_all(dir).await.map_err(failed)?;
        let file = self.0.platform.open(&path, OpenMode::CreateNew).await.map_err(failed)?;
        // Whatever comes: who ends the cut removes it.
        *volume.staging.borrow_mut() = Some(file.clone());
        file.set_len(volume.spec.size_bytes.next_multiple_of(SECTOR)).await.map_err(failed)?;
        Ok(file)
    }

    /// What a chunk held at the cut, as long as it is in the device.
    pub(super) async fn capture(&self, id: VolumeId, cut: u64, chunk: u32) -> Result<Vec<u8>> {
        self.refuse_when_stopping()?;
        let volume = self.volume(id)?;
        let whole = volume.map.borrow().chunk_sectors(chunk);
        let bytes = (whole.end - whole.start) * SECTOR;
        let store = &self.0.stores[volume.store];
        let turn = store.fills.turn(&self.0.platform, bytes, FillTurn::Paced(Class::Background)).await;
        let mut content = vec![0; bytes as usize];
        let own = self.capture_own(&volume, cut, chunk, whole, &mut content).await?;
        drop(turn);
        if own.iter().map(|run| run.end - run.start).sum::<u64>() < whole.end - whole.start {
            self.add_source(&volume, chunk, whole, &own, &mut content).await?;
        }
        let end = volume.spec.size_bytes - u64::from(chunk) * u64::from(volume.spec.chunk_bytes);
        content.truncate(end.min(bytes) as usize);
        Ok(content)
    }

    /// Reads what was the volume's own: runs of sectors.
    async fn capture_own(
        &self,
        volume: &Rc<Volume<P>>,
        cut: u64,
        chunk: u32,
        whole: SectorRange,
        content: &mut [u8],
    ) -> Result<Vec<SectorRange>> {
        let _alone = volume.locks.lock(chunk, Mode::Alone).await;
        volume.staging_writes.ended_on(chunk).await;
        let given_up =
            |why| Error::new(Status::Conflict, format!("the snapshot of {:?} was given up: {why}", &*volume.spec.name));
        let staged = volume.changes.borrow().find(cut, chunk).map_err(given_up)?;
        let place = |run: &SectorRange| {
            ((run.start - whole.start) * SECTOR) as usize..((run.end - whole.start) * SECTOR) as usize
        };
        let in_volume = |sector: u32| {
            volume.map.borrow().is_sector_resident(whole.start + u64::from(sector)) && !staged.source.contains(sector)
        };
        let own: ChunkSet = (0..(whole.end - whole.start) as u32).filter(|sector| in_volume(*sector)).collect();
        let own = runs_of(whole, &own);
        for run in &own {
            content[place(run)].copy_from_slice(&volume.read_sectors(*run).await?);
        }
        let staging = volume.staging.borrow().clone();
        for run in runs_of(whole, &staged.own) {
            let file = staging.as_ref().ok_or_else(|| given_up("its staging file is gone".to_owned()))?;
            let target = &mut content[place(&run)];
            let read = file.read_at(run.start * SECTOR, target.len()).await.and_then(|read| {
                if read.len() == target.len() { Ok(read) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
            });
            target.copy_from_slice(&read.map_err(|e| self.staging_error(volume, &e))?);
        }
        volume.changes.borrow_mut().captured(cut, chunk);
        Ok(own)
    }

    /// Adds to a chunk what is still its source's.
    async fn add_source(
        &self,
        volume: &Rc<Volume<P>>,
        chunk: u32,
        whole: SectorRange,
        own: &[SectorRange],
        content: &mut [u8],
    ) -> Result<()> {
        let manifest = self.manifest_of(volume).await?;
        if is_zero(&manifest, chunk) {
            return Ok(());
        }
        let Some(source) = ChunkSource::of(&manifest, chunk, &volume.account.origin) else { return Ok(()) };
        let Some(answer) = self.request(vec![source], FetchClass::Background).pop() else { return Ok(()) };
        let fetched = answer.chunk().await?;
        let mut at = whole.start;
        for own in own.iter().copied().chain([SectorRange { start: whole.end, end: whole.end }]) {
            let (from, to) = (((at - whole.start) * SECTOR) as usize, ((own.start - whole.start) * SECTOR) as usize);
            copy_padded(&mut content[from..to], &fetched.data, from);
            at = own.end;
        }
        Ok(())
    }

    /// Ends a cut: with the snapshot it became, or as if it had never been begun.
    pub(super) async fn end_cut(&self, id: VolumeId, cut: u64, snapshot: Option<SnapshotRef>) -> Result<()> {
        let volume = self.volume(id)?;
        if volume.changes.borrow().cut() != Some(cut) {
            return Ok(());
        }
        self.drop_staging(&volume).await;
        let ready = if snapshot.is_some() { self.before_lineage(&volume).await } else { Ok(()) };
        let snapshot = snapshot.filter(|_| ready.is_ok());
        let committed = snapshot.is_some();
        if volume.changes.borrow_mut().end(cut, snapshot) && committed {
            let lineage = volume.changes.borrow_mut().recorded();
            let lsn = self.0.journal.append(&Record::Lineage { volume: id, lineage });
            return self.0.journal.commit(lsn).await;
        }
        ready
    }

    /// What was captured is durable in the volume too: a write that no flush has covered may be in the snapshot, and a power cut that takes it
    /// from the volume would leave a chunk that differs from its base, and that nobody has changed since.
    async fn before_lineage(&self, volume: &Volume<P>) -> Result<()> {
        if !mutation::on(Mutation::BaseBeforeSync) {
            volume.sync(&self.0.journal, &self.0.counters).await?;
        }
        self.0.journal.admit().await
    }

    /// Frees what was staged for a volume.
    pub(super) async fn drop_staging(&self, volume: &Volume<P>) {
        // Writes that are at it still need the file, and none is to begin.
        volume.changes.borrow_mut().fail("it has ended".to_owned());
        volume.staging_writes.ended().await;
        let store = &self.0.stores[volume.store];
        store.staged_bytes.set(store.staged_bytes.get().saturating_sub(volume.changes.borrow().staged_bytes()));
        let file = volume.staging.borrow_mut().take();
        let Some(file) = file else { return };
        drop(file.close().await);
        if let Err(error) = self.0.platform.remove_file(&self.staging_path(volume)).await {
            let text = format!("{} stays behind until the next start: {error}", self.staging_path(volume).display());
            self.0.counters.event(self.0.platform.wall_clock_ms(), &text);
        }
    }
}

/// The sectors of a set, which counts from the first of the chunk, in runs.
fn runs_of(chunk: SectorRange, sectors: &ChunkSet) -> Vec<SectorRange> {
    let run = |(first, len): (u32, u32)| {
        let start = chunk.start + u64::from(first);
        SectorRange { start, end: start + u64::from(len) }
    };
    sectors.runs().into_iter().map(run).collect()
}

fn thaw<P: Platform>(volume: &Volume<P>, cut: u64) {
    if volume.frozen.get() == Some(cut) {
        volume.frozen.set(None);
        volume.thawed.wake_all();
    }
}
