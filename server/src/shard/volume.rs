//! One volume: its file, its residency map, its generation, and the order data sync → journal record → answer.
//!
//! **Invariant (P1):** a residency record is captured before the data sync it depends on and appended after it.

mod file;
mod filling;
mod retiring;

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use crate::budget::{RateMeter, TokenBucket};
use crate::error::{Error, Result, Status};
use crate::journal::{Journal, Record};
use crate::mutation::{self, Mutation};
use crate::platform::{File, OpenMode, Platform, Time};
use crate::shard::api::ConnectionId;
use crate::shard::boots::Recording;
use crate::shard::changes::Changes;
use crate::shard::hydrate::{Hydration, ZERO_RUN_CHUNKS_MAX};
use crate::shard::locks::ChunkLocks;
use crate::shard::readahead::ReadAhead;
use crate::shard::residency::{ResidencyMap, SectorRange};
use crate::shard::signal::{Busy, Signal};
use crate::shard::stats::{Counter, Counters};
use crate::snapshot::Manifest;
use crate::transfer::ledger::Account;
use crate::types::{HydrationRate, SECTOR, VolumeSpec, VolumeState};

/// File name extension of a volume that is being deleted.
pub const SET_ASIDE: &str = "deleted";

/// Chunks without data in the snapshot that one sync also writes down, so that a restart knows them as resident: a bound
/// on what the sync of a very large volume carries.
const ZEROES_RECORDED_MAX: usize = 4096;

/// What guests did to one volume.
#[derive(Default)]
pub struct VolumeCounters {
    pub reads: Counter,
    pub read_bytes: Counter,
    pub writes: Counter,
    pub written_bytes: Counter,
    pub flushes: Counter,
    pub read_misses: Counter,
    pub priority_fetches: Counter,
}

pub struct Volume<P: Platform> {
    pub spec: VolumeSpec,
    /// Index of the volume store among those configured.
    pub store: usize,
    pub map: RefCell<ResidencyMap>,
    pub locks: Rc<ChunkLocks>,
    pub generation: Cell<u64>,
    /// The connection that attached or resumed the current generation last; `None` once it detached or closed.
    pub attached: Cell<Option<ConnectionId>>,
    /// Guest writes in their I/O phase; a new attach waits for them.
    pub writing: Cell<u32>,
    pub writes_done: Signal,
    /// Residency changed, the volume was hydrated durably or deleted.
    pub changed: Signal,
    pub hydrated: Cell<bool>,
    /// Everything is resident and a task is making that durable.
    pub finishing: Cell<bool>,
    pub deleted: Cell<bool>,
    pub hydration: RefCell<Hydration>,
    pub streams: RefCell<ReadAhead>,
    /// Its first boot, while that is recorded.
    pub recording: RefCell<Option<Recording>>,
    pub counters: VolumeCounters,
    pub changes: RefCell<Changes>,
    /// The snapshot whose cut holds guests' writes back, and since when.
    pub frozen: Cell<Option<u64>>,
    pub frozen_at: Cell<Time>,
    pub thawed: Signal,
    /// The volume is being replaced: guests and fills have to end.
    pub retired: Cell<bool>,
    /// By this, once the journal may know it.
    pub replacement: RefCell<Option<Rc<Volume<P>>>>,
    /// Fills in their I/O phase.
    pub filling: Cell<u32>,
    pub fills_done: Signal,
    /// Old content of chunks that a snapshot still needs.
    pub staging: RefCell<Option<P::File>>,
    pub staging_opening: futures::lock::Mutex<()>,
    /// Writes that put something aside.
    pub staging_writes: Rc<Busy>,
    /// On whose account its chunks are fetched.
    pub account: Rc<Account>,
    manifest: RefCell<Option<Arc<Manifest>>>,
    platform: P,
    path: PathBuf,
    file: RefCell<Option<P::File>>,
    opening: futures::lock::Mutex<()>,
    /// The journal speaks of data in the file: a file shorter than the volume has lost some.
    has_durable_data: Cell<bool>,
    /// Something was written since the last sync began.
    unsynced: Cell<bool>,
    /// A killed process may have left writes in the disk's own cache: the first flush of a life reaches the disk even if
    /// nothing was written in it.
    synced_in_this_life: Cell<bool>,
    syncing: futures::lock::Mutex<()>,
    sync_arrivals: Cell<u64>,
    sync_covered: Cell<u64>,
    /// A failed data sync: what the disk holds is unknown, so nothing is acknowledged until a restart.
    poisoned: RefCell<Option<Error>>,
}

impl<P: Platform> Volume<P> {
    /// `residency`: `None` for a volume created just now, whose file is pristine.
    ///
    /// # Errors
    /// `Corrupt` when the journal's residency does not fit the volume.
    pub fn new(
        platform: &P,
        state: VolumeState,
        path: PathBuf,
        store: usize,
        account: Rc<Account>,
    ) -> Result<Volume<P>> {
        let VolumeState { spec, generation, residency, hydrated, lineage } = state;
        let now = platform.now();
        // Half the range apart from any earlier life's version.
        let mut map = ResidencyMap::new(spec.size_bytes, spec.chunk_bytes, platform.random_u64() >> 1);
        if hydrated {
            map.restore_hydrated();
        } else {
            let fits = map.restore(&residency);
            fits.map_err(|e| Error::new(Status::Corrupt, format!("volume {:?}: journal: {e}", &*spec.name)))?;
        }
        let bucket = TokenBucket::new(bucket_rate(spec.rate), now);
        let hydration = Hydration {
            rate: spec.rate,
            bucket,
            cursor: 0,
            boot_cursor: 0,
            lent_cursor: 0,
            running: hashbrown::HashSet::with_hasher(ahash::RandomState::with_seeds(21, 22, 23, 24)),
            owed: std::collections::BTreeSet::new(),
            not_before: now,
            failures: 0,
            state: if hydrated { "done" } else { "running" },
            last_error: None,
            meter: RateMeter::default(),
        };
        let has_durable_data = Cell::new(hydrated || !residency.is_empty());
        Ok(Volume {
            has_durable_data,
            spec,
            store,
            map: RefCell::new(map),
            locks: Rc::default(),
            generation: Cell::new(generation),
            attached: Cell::new(None),
            writing: Cell::new(0),
            writes_done: Signal::default(),
            changed: Signal::default(),
            hydrated: Cell::new(hydrated),
            finishing: Cell::new(false),
            deleted: Cell::new(false),
            hydration: RefCell::new(hydration),
            streams: RefCell::default(),
            recording: RefCell::default(),
            counters: VolumeCounters::default(),
            changes: RefCell::new(Changes::new(lineage)),
            frozen: Cell::default(),
            frozen_at: Cell::new(now),
            thawed: Signal::default(),
            retired: Cell::default(),
            replacement: RefCell::default(),
            filling: Cell::default(),
            fills_done: Signal::default(),
            staging: RefCell::default(),
            staging_opening: futures::lock::Mutex::new(()),
            staging_writes: Rc::default(),
            account,
            manifest: RefCell::new(None),
            platform: platform.clone(),
            path,
            file: RefCell::new(None),
            opening: futures::lock::Mutex::new(()),
            unsynced: Cell::new(false),
            synced_in_this_life: Cell::new(false),
            syncing: futures::lock::Mutex::new(()),
            sync_arrivals: Cell::new(0),
            sync_covered: Cell::new(0),
            poisoned: RefCell::new(None),
        })
    }

    /// The manifest, if it has been loaded.
    pub fn manifest(&self) -> Option<Arc<Manifest>> {
        self.manifest.borrow().clone()
    }

    /// Gives the volume its manifest. In a `pristine` volume the zero chunks are resident at once: its file has holes.
    pub fn set_manifest(&self, manifest: Arc<Manifest>, pristine: bool) {
        if pristine {
            let mut map = self.map.borrow_mut();
            for chunk in 0..map.chunks() {
                if is_zero(&manifest, chunk) {
                    map.mark_zero_by_nature(chunk);
                }
            }
        }
        *self.manifest.borrow_mut() = Some(manifest);
    }

    pub fn set_rate(&self, rate: HydrationRate) {
        let mut hydration = self.hydration.borrow_mut();
        hydration.rate = rate;
        hydration.bucket = TokenBucket::new(bucket_rate(rate), self.platform.now());
    }

    /// The rate is the only part of the spec that changes.
    pub fn spec_now(&self) -> VolumeSpec {
        VolumeSpec { rate: self.hydration.borrow().rate, ..self.spec.clone() }
    }

    /// For a checkpoint: every fact whose record was appended so far, and none whose data is not synced.
    pub fn durable_state(&self) -> VolumeState {
        if let Some(replacement) = &*self.replacement.borrow() {
            return replacement.durable_state();
        }
        let hydrated =
            self.hydrated.get() || (self.synced_in_this_life.get() && self.map.borrow().is_full_and_durable());
        let zeroes = self.synced_in_this_life.get();
        let residency = if hydrated { Vec::new() } else { self.map.borrow().durable(zeroes) };
        let lineage = self.changes.borrow_mut().recorded();
        VolumeState { spec: self.spec_now(), generation: self.generation.get(), residency, hydrated, lineage }
    }

    /// Deleted, also under a later life of it.
    pub fn is_gone(&self) -> bool {
        self.replacement.borrow().as_ref().map_or(self.deleted.get(), |replacement| replacement.is_gone())
    }

    fn file_len(&self) -> u64 {
        self.spec.size_bytes.next_multiple_of(SECTOR)
    }

    /// Closes the file; the next access opens it again.
    pub async fn close_file(&self) {
        let file = self.file.borrow_mut().take();
        if let Some(file) = file
            && let Err(e) = file.close().await
        {
            tracing::warn!(volume = &*self.spec.name, error = %e, "closing the volume file");
        }
    }

    fn io_error(&self, what: &str, error: &std::io::Error) -> Error {
        Error::from_io(&format!("volume {:?}: {what} {}", &*self.spec.name, self.path.display()), error)
    }

    async fn file(&self) -> Result<P::File> {
        if let Some(file) = self.file.borrow().as_ref() {
            return Ok(file.clone());
        }
        let _one = self.opening.lock().await;
        if let Some(file) = self.file.borrow().as_ref() {
            return Ok(file.clone());
        }
        let opened = self.platform.open(&self.path, OpenMode::ReadWrite).await;
        let file = opened.map_err(|e| match self.deleted.get() {
            true => Error::new(Status::UnknownVolume, format!("volume {:?} was deleted", &*self.spec.name)),
            false => self.io_error("open", &e),
        })?;
        let len = file.len().await.map_err(|e| self.io_error("stat", &e))?;
        if len < self.file_len() {
            if self.has_durable_data.get() {
                let message = format!("volume {:?}: {} is truncated", &*self.spec.name, self.path.display());
                return Err(Error::new(Status::Io, message));
            }
            // A crash right after the creation: the file is there, its length was not durable yet.
            file.set_len(self.file_len()).await.map_err(|e| self.io_error("extend", &e))?;
        }
        *self.file.borrow_mut() = Some(file.clone());
        Ok(file)
    }

    /// Reads whole sectors from the volume file.
    pub async fn read_sectors(&self, range: SectorRange) -> Result<P::ReadBuf> {
        let len = ((range.end - range.start) * SECTOR) as usize;
        let read = self.file().await?.read_at(range.start * SECTOR, len).await;
        let buf = read.map_err(|e| self.io_error("read", &e))?;
        if buf.len() != len {
            let message = format!("volume {:?}: {} is shorter than the volume", &*self.spec.name, self.path.display());
            return Err(Error::new(Status::Io, message));
        }
        Ok(buf)
    }

    /// Sectors of the range for which the file stores anything, in order: at most `max` runs. Of what lies behind the last
    /// of `max` nothing is said.
    pub async fn stored_sectors(&self, range: SectorRange, max: usize) -> Result<Vec<SectorRange>> {
        let stored = self.file().await?.stored(range.start * SECTOR..range.end * SECTOR, max).await;
        let stored = stored.map_err(|e| self.io_error("map", &e))?;
        // A file system with smaller blocks may store a part of a sector.
        Ok(stored.into_iter().map(|s| SectorRange::covering(s.start, s.end - s.start)).collect())
    }

    /// Writes whole sectors to the volume file. The caller holds the chunks' locks and marks the map afterwards.
    pub async fn write_sectors(&self, start_sector: u64, buf: P::WriteBuf) -> Result<()> {
        self.change("write", async |file| file.write_at(start_sector * SECTOR, buf).await).await
    }

    /// Makes sectors of the file read as zeroes. Locks and map as for writes.
    pub async fn zero_sectors(&self, range: SectorRange) -> Result<()> {
        let len = (range.end - range.start) * SECTOR;
        self.change("punch a hole into", async |file| file.deallocate(range.start * SECTOR, len).await).await
    }

    /// Changes the file: what a failed change has done must be synced too, and a sync that began meanwhile did not cover it.
    async fn change(&self, what: &str, change: impl AsyncFnOnce(P::File) -> std::io::Result<()>) -> Result<()> {
        self.check_poison()?;
        let file = self.file().await?;
        self.unsynced.set(true);
        let changed = change(file).await;
        self.unsynced.set(true);
        changed.map_err(|e| self.io_error(what, &e))
    }

    /// A sync failed: whatever is written now is refused.
    pub fn takes_no_writes(&self) -> bool {
        self.poisoned.borrow().is_some()
    }

    /// Why it is of no use: the failed sync, if there was one, or that its store fails.
    pub fn failure(&self) -> Option<String> {
        let poison = self.poisoned.borrow().as_ref().map(|error| error.message.clone());
        let hydration = self.hydration.borrow();
        poison.or_else(|| hydration.last_error.clone().filter(|_| hydration.state == "store_failed"))
    }

    /// Bytes of the device that are in the volume.
    pub fn resident_bytes(&self) -> u64 {
        (self.map.borrow().resident_sectors() * SECTOR).min(self.spec.size_bytes)
    }

    fn check_poison(&self) -> Result<()> {
        self.poisoned.borrow().clone().map_or(Ok(()), Err)
    }

    pub fn note_change(&self) {
        self.changed.wake_all();
    }

    pub fn needs_sync(&self) -> bool {
        let map = self.map.borrow();
        self.unsynced.get() || map.has_dirty() || (map.is_full() && !self.hydrated.get())
    }

    /// Makes every write that completed before the call durable, together with the knowledge of it (P1).
    /// Calls that wait together share one sync.
    pub async fn sync(&self, journal: &Journal<P>, counters: &Counters) -> Result<()> {
        let arrival = self.sync_arrivals.get() + 1;
        self.sync_arrivals.set(arrival);
        let _one = self.syncing.lock().await;
        if self.sync_covered.get() >= arrival {
            return self.check_poison();
        }
        self.check_poison()?;
        let covers = self.sync_arrivals.get();
        if mutation::on(Mutation::FirstFlushTrustsEarlierLife) {
            self.synced_in_this_life.set(true);
        }
        if self.needs_sync() || !self.synced_in_this_life.get() {
            counters.syncs.add(1);
            self.sync_now(journal).await?;
        }
        self.sync_covered.set(covers);
        Ok(())
    }

    async fn sync_now(&self, journal: &Journal<P>) -> Result<()> {
        let was_unsynced = self.unsynced.replace(false);
        self.map.borrow_mut().record_some_zeroes(ZEROES_RECORDED_MAX);
        let mut changes = self.map.borrow_mut().capture_dirty();
        if mutation::on(Mutation::FlushSkipsMap) {
            changes.clear();
        }
        let synced = async {
            if mutation::on(Mutation::RecordBeforeData) && !changes.is_empty() {
                let record = Record::Residency { volume: self.spec.id, chunks: changes.clone() };
                journal.commit(journal.append(&record)).await?;
            }
            if was_unsynced || !self.synced_in_this_life.get() {
                if !self.synced_in_this_life.get() {
                    // A sync that failed in an earlier life may have lost the length for good, though the file shows it.
                    let sized = self.file().await?.set_len(self.file_len()).await;
                    sized.map_err(|e| self.io_error("set the length of", &e))?;
                }
                let file = self.file().await?;
                if !mutation::on(Mutation::FlushSkipsDatasync)
                    && let Err(e) = file.datasync().await
                {
                    return Err(self.poison(&e));
                }
                self.synced_in_this_life.set(true);
            }
            if !changes.is_empty() {
                journal.admit().await?;
                self.check_not_replaced()?;
                let lsn = journal.append(&Record::Residency { volume: self.spec.id, chunks: changes });
                self.map.borrow_mut().sync_appended();
                journal.commit(lsn).await?;
                self.has_durable_data.set(true);
            }
            Ok(())
        };
        match synced.await {
            Ok(()) => self.map.borrow_mut().sync_done(),
            Err(error) => {
                self.map.borrow_mut().sync_failed();
                self.unsynced.set(true);
                return Err(error);
            }
        }
        if !self.hydrated.get() && self.map.borrow().is_full_and_durable() {
            journal.admit().await?;
            self.check_not_replaced()?;
            let lsn = journal.append(&Record::Hydrated { volume: self.spec.id });
            journal.commit(lsn).await?;
            self.hydrated.set(true);
            self.hydration.borrow_mut().state = "done";
            *self.manifest.borrow_mut() = None;
            self.note_change();
        }
        Ok(())
    }

    fn poison(&self, error: &std::io::Error) -> Error {
        let mut error = self.io_error("sync", error);
        error.message += "; the volume takes no writes until volleyd is restarted";
        *self.poisoned.borrow_mut() = Some(error.clone());
        error
    }
}

/// Nothing was ever written to the file: it takes no storage.
pub(super) async fn has_no_data(file: &impl File) -> io::Result<bool> {
    Ok(file.stored(0..file.len().await?, 1).await?.is_empty())
}

/// Whether a chunk of a volume has no data in its snapshot: a zero chunk, or past the snapshot's end.
#[must_use]
pub fn is_zero(manifest: &Manifest, chunk: u32) -> bool {
    chunk >= manifest.chunk_count() || matches!(manifest.chunk(chunk), crate::snapshot::ChunkEntry::Zero)
}

/// Copies `content` from `from` into `buf`; zeroes where the content has ended.
pub fn copy_padded(buf: &mut [u8], content: &[u8], from: usize) {
    let have = content.len().saturating_sub(from).min(buf.len());
    if have > 0 {
        buf[..have].copy_from_slice(&content[from..from + have]);
    }
    buf[have..].fill(0);
}

fn bucket_rate(rate: HydrationRate) -> Option<u64> {
    match rate {
        HydrationRate::BytesPerSecond(rate) => Some(rate),
        HydrationRate::Unlimited | HydrationRate::None => None,
    }
}
