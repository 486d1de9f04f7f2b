//! The base of a volume store whose filesystem can share extents: one copy of each chunk, which volumes share.
//!
//! Each shard has a file of slots per store, `base/<shard>.chunks`, for the chunks that it owns. It begins empty with each
//! start and is never synced: nothing in it is believed after a crash, and what volumes share of it is theirs. A clone
//! refers to bytes that were written before it, and the sync of the volume reaches the device's own cache, so it makes
//! the base's bytes durable too (ARCHITECTURE.md).

mod lend;
mod slots;
#[cfg(test)]
mod slots_tests;
mod supply;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cache::ChunkData;
use crate::platform::{File, OpenMode, Platform, Time};
use crate::shard::api::StoreSharing;
use crate::shard::signal::{Signal, within};
use crate::shard::stats::Counter;
use crate::shard::volume::copy_padded;
use crate::transfer::Digest;
use crate::types::SECTOR;
pub use slots::Seat;
use slots::{Claim, Lease, Slots};
pub use supply::Order;
pub(super) use supply::{Supplied, Supply, Want};

/// Directory of the bases in a volume store.
pub const BASE_DIR: &str = "base";

/// After so many failures in a row the base is left alone for a while.
const FAILURES_MAX: u32 = 8;
const REST: Duration = Duration::from_secs(30);
/// Below this part of the filesystem the base gives back what it has, and takes nothing until twice as much is free.
const SCARCE_PART: u64 = 20;
/// A stop waits so long for clones and writes before it leaves the files open.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// Where a chunk is in the base. It stays there for as long as this lives.
#[derive(Clone, Debug)]
pub struct Place {
    shard: usize,
    pub(super) offset: u64,
    pub(super) len: u64,
    _lease: Lease,
}

impl Place {
    /// Whether the place of a next chunk continues this one, which holds a whole chunk of so many bytes.
    pub(super) fn joins(&self, next: &Place, chunk_bytes: u64) -> bool {
        self.len == chunk_bytes && self.shard == next.shard && self.offset + self.len == next.offset
    }
}

/// How far the base has proved itself lately.
#[derive(Default)]
struct Trust {
    failures: Cell<u32>,
    rests_until: Cell<Time>,
}

impl Trust {
    /// Whether this failure was one too many.
    fn failed(&self, now: Time) -> bool {
        let failures = self.failures.get() + 1;
        self.failures.set(failures % FAILURES_MAX);
        if failures == FAILURES_MAX {
            self.rests_until.set(now.after(REST));
        }
        failures == FAILURES_MAX
    }

    fn worked(&self) {
        self.failures.set(0);
    }

    fn rests(&self, now: Time) -> bool {
        now < self.rests_until.get()
    }
}

#[derive(Default)]
struct BaseCounters {
    written_chunks: Counter,
    written_bytes: Counter,
    evicted_bytes: Counter,
    cloned_chunks: Counter,
    cloned_bytes: Counter,
    clones: Counter,
    failures: Counter,
}

/// One store's base as one shard sees it: its own file, and those of the others to clone from.
pub(super) struct Base<P: Platform> {
    platform: P,
    dir: PathBuf,
    shard: usize,
    shares: Cell<bool>,
    scarce: Cell<bool>,
    slots: RefCell<Slots>,
    /// A slot was written, or will not be.
    settled: Signal,
    files: RefCell<BTreeMap<usize, P::File>>,
    opening: futures::lock::Mutex<()>,
    /// Whoever uses an open file, and that one has ended.
    using: Cell<usize>,
    ended: Signal,
    trust: Trust,
    counters: BaseCounters,
}

impl<P: Platform> Base<P> {
    /// `bytes`: what this shard's file may hold.
    pub(super) fn new(platform: &P, store: &Path, shard: usize, bytes: u64) -> Base<P> {
        Base {
            platform: platform.clone(),
            dir: store.join(BASE_DIR),
            shard,
            shares: Cell::new(false),
            scarce: Cell::new(false),
            slots: RefCell::new(Slots::new(bytes)),
            settled: Signal::default(),
            files: RefCell::default(),
            opening: futures::lock::Mutex::new(()),
            using: Cell::new(0),
            ended: Signal::default(),
            trust: Trust::default(),
            counters: BaseCounters::default(),
        }
    }

    /// Removes what an earlier life left to this shard, and tries whether the filesystem can share extents.
    pub(super) async fn open(&self, shards: usize) -> io::Result<()> {
        let entries = match self.platform.list_dir(&self.dir).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            entries => entries?,
        };
        for entry in entries {
            let Some((stem, "chunks" | "probe")) = entry.name.split_once('.') else { continue };
            if stem.parse::<usize>().is_ok_and(|n| n % shards == self.shard) {
                self.platform.remove_file(&self.dir.join(&entry.name)).await?;
            }
        }
        if self.slots.borrow().budget() == 0 {
            return Ok(());
        }
        self.platform.create_dir_all(&self.dir).await?;
        self.shares.set(self.probe().await?);
        Ok(())
    }

    async fn probe(&self) -> io::Result<bool> {
        let path = self.dir.join(format!("{}.probe", self.shard));
        let file = self.platform.open(&path, OpenMode::CreateNew).await?;
        let cloned = async {
            let mut block = self.platform.alloc(SECTOR as usize);
            block.fill(1);
            file.set_len(3 * SECTOR).await?;
            file.write_at(0, block).await?;
            // An odd place: with larger blocks than sectors the filesystem refuses it.
            file.clone_range(SECTOR, &file, 0, SECTOR).await
        };
        let cloned = cloned.await;
        drop(file.close().await);
        self.platform.remove_file(&path).await?;
        match cloned {
            Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => Ok(false),
            cloned => cloned.map(|()| true),
        }
    }

    /// Whether chunks are to be asked for here.
    pub(super) fn is_usable(&self) -> bool {
        self.shares.get() && !self.trust.rests(self.platform.now())
    }

    fn takes_more(&self) -> bool {
        self.is_usable() && !self.scarce.get()
    }

    fn place(&self, (place, lease): (Range<u64>, Lease)) -> Place {
        Place { shard: self.shard, offset: place.start, len: place.end - place.start, _lease: lease }
    }

    fn find(&self, digest: &Digest) -> Option<Place> {
        let found = self.slots.borrow_mut().find(digest)?;
        Some(self.place(found))
    }

    /// A chunk's bytes into its place; short by less than a sector where the snapshot ends.
    async fn write(&self, place: &Range<u64>, data: &ChunkData) -> io::Result<()> {
        let _use = Use::begin(&self.using, &self.ended);
        let file = self.own_file().await?;
        if data.len() as u64 == place.end - place.start {
            return file.write_shared_at(place.start, data.clone(), 0..data.len()).await;
        }
        let mut buf = self.platform.alloc((place.end - place.start) as usize);
        copy_padded(&mut buf, data, 0);
        file.write_at(place.start, buf).await
    }

    async fn own_file(&self) -> io::Result<P::File> {
        self.file_of(self.shard, OpenMode::CreateNew).await
    }

    /// The base of any shard, open.
    async fn file_of(&self, shard: usize, mode: OpenMode) -> io::Result<P::File> {
        let open = || self.files.borrow().get(&shard).cloned();
        if let Some(file) = open() {
            return Ok(file);
        }
        let _one = self.opening.lock().await;
        if let Some(file) = open() {
            return Ok(file);
        }
        let file = self.platform.open(&self.dir.join(format!("{shard}.chunks")), mode).await?;
        self.files.borrow_mut().insert(shard, file.clone());
        Ok(file)
    }

    /// The file that a place is in, open as long as the other lives.
    async fn file_with(&self, place: &Place) -> io::Result<(P::File, Use<'_>)> {
        let using = Use::begin(&self.using, &self.ended);
        if !self.shares.get() {
            return Err(io::Error::other("it is closed"));
        }
        Ok((self.file_of(place.shard, OpenMode::Read).await?, using))
    }

    /// Gives places back to the filesystem. What fails stays until the next start.
    async fn punch(&self, places: Vec<Range<u64>>) -> io::Result<()> {
        let _use = Use::begin(&self.using, &self.ended);
        for place in places {
            let len = place.end - place.start;
            self.own_file().await?.deallocate(place.start, len).await?;
            self.counters.evicted_bytes.add(len);
        }
        Ok(())
    }

    async fn drop_idle(&self) -> io::Result<()> {
        let idle = self.slots.borrow_mut().drop_idle();
        self.punch(idle).await
    }

    /// Looks how much space is left; where it is scarce, the base gives back what it has.
    pub(super) async fn watch(&self) -> io::Result<()> {
        if !self.shares.get() || (self.slots.borrow().used() == 0 && !self.scarce.get()) {
            return Ok(());
        }
        let space = self.platform.space(&self.dir).await?;
        let bound = space.total_bytes / SCARCE_PART * if self.scarce.get() { 2 } else { 1 };
        self.scarce.set(space.free_bytes < bound);
        if self.scarce.get() { self.drop_idle().await } else { Ok(()) }
    }

    /// Closes the files once nobody uses them; nobody begins to from now on.
    pub(super) async fn close(&self) {
        self.shares.set(false);
        if within(&self.platform, CLOSE_MAX, self.ended.until(|| self.using.get() == 0)).await.is_none() {
            return;
        }
        for file in self.files.take().into_values() {
            drop(file.close().await);
        }
    }

    pub(super) fn status(&self) -> StoreSharing {
        let (slots, counters) = (self.slots.borrow(), &self.counters);
        StoreSharing {
            shares_extents: self.shares.get(),
            base_bytes_max: if self.shares.get() { slots.budget() } else { 0 },
            base_bytes: slots.used(),
            base_chunks: slots.len() as u64,
            base_written_chunks: counters.written_chunks.get(),
            base_written_bytes: counters.written_bytes.get(),
            base_evicted_bytes: counters.evicted_bytes.get(),
            cloned_chunks: counters.cloned_chunks.get(),
            cloned_bytes: counters.cloned_bytes.get(),
            clones: counters.clones.get(),
            clone_failures: counters.failures.get(),
        }
    }

    pub(super) fn check_invariants(&self) -> Result<(), String> {
        self.slots.borrow().check()
    }
}

/// Counts one more for as long as it lives.
struct Use<'a> {
    count: &'a Cell<usize>,
    ended: &'a Signal,
}

impl<'a> Use<'a> {
    fn begin(count: &'a Cell<usize>, ended: &'a Signal) -> Use<'a> {
        count.set(count.get() + 1);
        Use { count, ended }
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
        self.ended.wake_all();
    }
}
