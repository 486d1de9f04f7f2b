//! The disk tier: verified chunks in slot files on a local disk, so that a restart stays warm. docs/cache.md.
//!
//! A hint and never a truth: what is read back is compared with the record of its slot and with the digest of the chunk,
//! and what does not agree is dropped, counted and fetched again (P3). So nothing here is ever synced, and a torn write,
//! an old index or a failing disk cost a GET and no guest anything. Writes happen behind the answers, one chunk at a
//! time, from a bounded queue; what does not fit in is not kept.
//!
//! A shard writes only its own files. It reads those of other shards too, for the chunks that an earlier life with
//! another number of shards put there: by the time it reads, the other may have evicted them, which their records tell.

pub mod files;
pub mod scrub;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use futures::future::try_join_all;

use super::record::{PART_BYTES, RECORD_BYTES, Record, RecordRead, SLOT_BYTES, parts_of};
use super::slots::{Place, Slots};
use super::{ChunkData, Rank, TierStatus};
use crate::mutation::{self, Mutation};
use crate::platform::{AlignedBytes, File, Platform, Queue, Time};
use crate::shard::signal::Signal;
use crate::shard::stats::Counters;
use crate::snapshot::{ChunkDecoder, ChunkEntry, Encoding};
use crate::transfer::{ChunkSource, Digest};
use files::Files;

/// Stored bytes waiting to be written, per shard: a burst of a few large GETs. Beyond it chunks are not kept.
pub const WRITE_BEHIND_BYTES_MAX: usize = 64 << 20;
/// After a write that failed, and a read that took too long, the disk is left alone for so long.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(10);
/// A read that failed may have met its slot while it was rewritten: the second one tells.
pub const READ_ATTEMPTS: u32 = 2;
/// Index pages are written when there is nothing else to write, or after so many chunks.
const INDEX_EVERY_CHUNKS: u32 = 64;

/// Where the disk tier is and how large, of the whole node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCacheConfig {
    pub dir: PathBuf,
    pub bytes: u64,
}

/// Whose tier it is.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    pub node_id: u128,
    pub shard: usize,
    pub shards: usize,
}

struct Pending {
    record: Record,
    stored: Vec<u8>,
}

struct State {
    slots: Slots,
    /// Chunks of this shard in files of others: file and place.
    elsewhere: hashbrown::HashMap<Digest, (usize, Place), ahash::RandomState>,
    pending: VecDeque<Pending>,
    /// What is being written; `None` also if it was dropped meanwhile.
    current: Option<Digest>,
    /// Of both.
    pending_bytes: usize,
    tally: TierStatus,
}

struct Inner<P: Platform> {
    platform: P,
    counters: Rc<Counters>,
    files: Files<P>,
    state: RefCell<State>,
    writing: Cell<bool>,
    paused_until: Cell<Time>,
    /// A chunk was written or given up.
    written: Signal,
}

/// Cheap clone.
pub struct DiskTier<P: Platform>(Rc<Inner<P>>);

impl<P: Platform> Clone for DiskTier<P> {
    fn clone(&self) -> Self {
        DiskTier(self.0.clone())
    }
}

/// What a chunk's slots hold, not verified yet.
pub struct Loaded {
    /// `None`: the shard's own.
    file: Option<usize>,
    place: Place,
    content: SlotContent,
}

/// The stored bytes of a chunk and the record they stand under.
type SlotContent = Result<(Record, Vec<u8>), SlotFault>;

/// Why a slot did not give its part of a chunk.
enum SlotFault {
    /// The disk failed.
    Io(std::io::Error),
    /// It holds something else by now, or nothing.
    Stale,
    /// It is torn or rotten.
    Corrupt(String),
}

impl<P: Platform> DiskTier<P> {
    /// Opens the files and reads their indexes.
    ///
    /// # Errors
    /// One line that names the file. The node runs without the tier then.
    pub async fn open(
        platform: P,
        config: &DiskCacheConfig,
        owner: Owner,
        counters: Rc<Counters>,
    ) -> Result<DiskTier<P>, String> {
        let opened = files::open(&platform, config, owner).await?;
        let state = State {
            slots: opened.slots,
            elsewhere: opened.elsewhere,
            pending: VecDeque::new(),
            current: None,
            pending_bytes: 0,
            tally: TierStatus::default(),
        };
        Ok(DiskTier(Rc::new(Inner {
            platform,
            counters,
            files: opened.files,
            state: RefCell::new(state),
            writing: Cell::new(false),
            paused_until: Cell::new(Time::default()),
            written: Signal::default(),
        })))
    }

    /// Whether a read of the chunk is worth trying now.
    #[must_use]
    pub fn is_ready_with(&self, digest: &Digest) -> bool {
        self.0.platform.now() >= self.0.paused_until.get() && self.holds(digest)
    }

    #[must_use]
    pub fn holds(&self, digest: &Digest) -> bool {
        let state = self.0.state.borrow();
        state.slots.place(digest).is_some() || state.elsewhere.contains_key(digest)
    }

    pub fn note_miss(&self) {
        self.0.state.borrow_mut().tally.misses += 1;
    }

    /// Reads the chunk's slots. `None`: it is not here any more.
    pub async fn load(&self, source: &ChunkSource, rank: Rank) -> Option<Loaded> {
        self.0.state.borrow_mut().slots.touch(&source.digest, rank);
        let (file, place) = self.find(&source.digest)?;
        let content = self.read_place(file, &place).await;
        Some(Loaded { file, place, content })
    }

    /// The verified chunk. `None`: what was read is not good; if it was the `last` attempt, the slots are given up, counted
    /// and named, and the chunk has to be fetched. Large chunks are verified in slices, between which others run.
    pub async fn verify(&self, source: &ChunkSource, loaded: Loaded, last: bool) -> Option<ChunkData> {
        let Loaded { file, place, content } = loaded;
        match self.decode(&source.digest, source.chunk_len, content).await {
            Ok(data) => {
                let tally = &mut self.0.state.borrow_mut().tally;
                tally.hits += 1;
                tally.hit_bytes += data.len() as u64;
                Some(ChunkData::new(data))
            }
            Err(fault) => {
                if last {
                    self.drop_faulty(&source.digest, file, &place, &fault);
                }
                None
            }
        }
    }

    /// The content, if it is the chunk of this digest.
    async fn decode(&self, digest: &Digest, chunk_len: u32, content: SlotContent) -> Result<AlignedBytes, SlotFault> {
        let (record, stored) = content?;
        if mutation::on(Mutation::SlotNotVerified) && record.encoding == Encoding::Raw {
            return Ok(stored[..].into());
        }
        let digest = match mutation::on(Mutation::SlotOfAnotherChunk) {
            true => record.digest,
            false => *digest,
        };
        let (stored_len, encoding) = (record.stored_len, record.encoding);
        let entry = ChunkEntry::Stored { pack: 0, offset: 0, stored_len, encoding, digest };
        let decoded = ChunkDecoder::new(&entry, &stored, chunk_len).run(&self.0.platform).await;
        decoded.map_err(|corrupt| SlotFault::Corrupt(corrupt.to_string()))
    }

    /// `None` as file: its own.
    fn find(&self, digest: &Digest) -> Option<(Option<usize>, Place)> {
        let state = self.0.state.borrow();
        let own = state.slots.place(digest).map(|place| (None, place.clone()));
        own.or_else(|| state.elsewhere.get(digest).map(|(file, place)| (Some(*file), place.clone())))
    }

    async fn read_place(&self, file: Option<usize>, place: &Place) -> SlotContent {
        let runs = runs(&place.slots).map(async |(first, count)| {
            let (file, offset) = self.0.files.locate(file, first);
            file.read_at(offset, count * SLOT_BYTES).await
        });
        let runs = try_join_all(runs).await.map_err(SlotFault::Io)?;
        let mut slots = runs.iter().flat_map(|run| run.chunks_exact(SLOT_BYTES)).peekable();
        let record = expected(&place.record, slots.peek().copied().unwrap_or_default());
        let mut stored = Vec::with_capacity(record.stored_len as usize);
        for (part, slot) in slots.take(record.parts()).enumerate() {
            check_slot(&record.with_part(part), slot)?;
            stored.extend_from_slice(&slot[RECORD_BYTES..RECORD_BYTES + record.part_range(part).len()]);
        }
        // Shorter: the file ends before it, since its shard made it smaller.
        match stored.len() == record.stored_len as usize {
            true => Ok((record, stored)),
            false => Err(SlotFault::Stale),
        }
    }

    /// Forgets a chunk that could not be read, unless it is another copy by now. Whether it did.
    fn drop_faulty(&self, digest: &Digest, file: Option<usize>, place: &Place, fault: &SlotFault) -> bool {
        let unchanged = self.find(digest).is_some_and(|found| found == (file, place.clone()));
        if !unchanged {
            return false;
        }
        let state = &mut *self.0.state.borrow_mut();
        match file {
            None => drop(state.slots.remove(digest)),
            Some(_) => drop(state.elsewhere.remove(digest)),
        }
        let at = || format!("{} slot {}", self.0.files.name(file, place.slots[0]), self.0.files.slot(place.slots[0]));
        let event = match fault {
            SlotFault::Stale => {
                state.tally.stale += 1;
                return true;
            }
            SlotFault::Io(error) => {
                state.tally.errors += 1;
                format!("disk cache: {}: {error}; the chunk is dropped and fetched again", at())
            }
            SlotFault::Corrupt(why) => {
                state.tally.corrupt += 1;
                format!("disk cache: {} is corrupt: {why}; the chunk is dropped and fetched again", at())
            }
        };
        self.0.counters.event(self.0.platform.wall_clock_ms(), &event);
        true
    }

    /// Keeps a verified chunk, stored as `encoding` says, if there is time for it.
    pub fn offer(&self, source: &ChunkSource, encoding: Encoding, stored: &[u8]) {
        if self.holds(&source.digest) {
            return;
        }
        let state = &mut *self.0.state.borrow_mut();
        let on_its_way = state.pending.iter().any(|pending| pending.record.digest == source.digest);
        if on_its_way || state.current == Some(source.digest) {
            return;
        }
        let busy = state.pending_bytes + stored.len() > WRITE_BEHIND_BYTES_MAX;
        let too_large = parts_of(stored.len()) > state.slots.budget();
        if busy || too_large || self.0.platform.now() < self.0.paused_until.get() {
            state.tally.skipped += 1;
            return;
        }
        let record = Record {
            digest: source.digest,
            sequence: 0,
            placement: source.placement(),
            stored_len: u32::try_from(stored.len()).expect("a chunk has at most 4 MiB"),
            chunk_len: source.chunk_len,
            encoding,
            part: 0,
        };
        state.pending_bytes += stored.len();
        state.pending.push_back(Pending { record, stored: stored.to_vec() });
        self.wake_writer();
    }

    fn wake_writer(&self) {
        if !self.0.writing.replace(true) {
            let tier = self.clone();
            self.0.platform.spawn(Queue::Background, async move { tier.write_behind().await });
        }
    }

    /// Writes until nothing is left to write.
    async fn write_behind(self) {
        let mut since_index = 0;
        loop {
            let next = self.0.state.borrow_mut().pending.pop_front();
            let Some(pending) = next else {
                let wrote = self.write_index().await;
                if wrote || !self.0.state.borrow().pending.is_empty() {
                    continue;
                }
                break;
            };
            self.write_pending(pending).await;
            since_index += 1;
            if since_index >= INDEX_EVERY_CHUNKS {
                since_index = 0;
                self.write_index().await;
            }
            self.0.platform.yield_now().await;
        }
        self.0.writing.set(false);
        self.0.written.wake_all();
    }

    async fn write_pending(&self, pending: Pending) {
        let len = pending.stored.len();
        if let Err(error) = self.write(pending).await {
            self.pause(&format!("write failed: {error}"));
        }
        {
            let state = &mut *self.0.state.borrow_mut();
            (state.current, state.pending_bytes) = (None, state.pending_bytes - len);
        }
        self.0.written.wake_all();
    }

    async fn write(&self, pending: Pending) -> std::io::Result<()> {
        let Pending { record, stored } = pending;
        let begun = self.0.state.borrow_mut().slots.begin(record.parts());
        self.0.state.borrow_mut().current = Some(record.digest);
        let Some((sequence, slots)) = begun else {
            self.0.state.borrow_mut().tally.skipped += 1;
            return Ok(());
        };
        let record = Record { sequence, ..record };
        let mut part = 0;
        for (first, count) in runs(&slots) {
            let mut buffer = self.0.platform.alloc(count * SLOT_BYTES);
            for slot in buffer.chunks_mut(SLOT_BYTES) {
                fill_slot(slot, &record.with_part(part), &stored[record.part_range(part)]);
                part += 1;
            }
            let (file, offset) = self.0.files.locate(None, first);
            if let Err(error) = file.write_at(offset, buffer).await {
                self.0.state.borrow_mut().slots.abort(&slots);
                return Err(error);
            }
        }
        let state = &mut *self.0.state.borrow_mut();
        if state.current.is_none() {
            state.slots.abort(&slots);
            return Ok(());
        }
        state.tally.inserted += 1;
        state.elsewhere.remove(&record.digest);
        // All enter at one rank: what a scan brings is what the scan after a restart reads.
        state.slots.complete(Place { record, slots }, Rank::Normal);
        Ok(())
    }

    /// Writes what changed of the index; whether there was something and it could be written.
    async fn write_index(&self) -> bool {
        let mut wrote = false;
        loop {
            let dirty = self.0.state.borrow_mut().slots.take_dirty();
            let Some((page, bytes)) = dirty else { return wrote };
            let mut buffer = self.0.platform.alloc(bytes.len());
            buffer.copy_from_slice(&bytes);
            let (file, offset) = self.0.files.locate_page(page);
            if let Err(error) = file.write_at(offset, buffer).await {
                self.0.state.borrow_mut().slots.mark_dirty(page);
                self.pause(&format!("write failed: {error}"));
                return false;
            }
            wrote = true;
        }
    }

    /// Leaves the disk alone for a while.
    pub fn pause(&self, why: &str) {
        let now = self.0.platform.now();
        self.0.state.borrow_mut().tally.errors += 1;
        if now >= self.0.paused_until.get() {
            let text = format!("disk cache: {why}; it is left alone for {PAUSE_AFTER_ERROR:?}");
            self.0.counters.event(self.0.platform.wall_clock_ms(), &text);
        }
        self.0.paused_until.set(now.after(PAUSE_AFTER_ERROR));
    }

    /// Forgets a chunk, also on the disk (as soon as its index is written); whether it was there.
    pub fn remove(&self, digest: &Digest) -> bool {
        let removed = {
            let state = &mut *self.0.state.borrow_mut();
            let waiting = state.pending.iter().position(|pending| pending.record.digest == *digest);
            if let Some(pending) = waiting.and_then(|at| state.pending.remove(at)) {
                state.pending_bytes -= pending.stored.len();
            }
            let writing = state.current.take_if(|current| current == digest).is_some();
            let elsewhere = state.elsewhere.remove(digest).is_some();
            state.slots.remove(digest) | elsewhere | writing | waiting.is_some()
        };
        if removed {
            self.wake_writer();
        }
        removed
    }

    /// Waits until half of the write-behind queue is free: for those who have time.
    pub async fn room(&self) {
        self.0.written.until(|| self.0.state.borrow().pending_bytes <= WRITE_BEHIND_BYTES_MAX / 2).await;
    }

    /// Waits until everything offered so far is written or given up, and the index says so.
    pub async fn settled(&self) {
        self.0.written.until(|| !self.0.writing.get()).await;
    }

    #[must_use]
    pub fn status(&self) -> TierStatus {
        let state = self.0.state.borrow();
        TierStatus {
            budget_bytes: (state.slots.budget() * SLOT_BYTES) as u64,
            used_bytes: (state.slots.used() * SLOT_BYTES) as u64,
            chunks: (state.slots.len() + state.elsewhere.len()) as u64,
            evicted: state.slots.evicted(),
            ..state.tally
        }
    }

    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let state = self.0.state.borrow();
        let waiting: usize = state.pending.iter().map(|pending| pending.stored.len()).sum();
        if waiting > state.pending_bytes || state.pending_bytes > WRITE_BEHIND_BYTES_MAX {
            return Err(format!("{waiting} bytes wait for the disk cache, {} are counted", state.pending_bytes));
        }
        state.slots.check()
    }
}

/// Neighbouring slots: first and number of each run.
fn runs(slots: &[u32]) -> impl Iterator<Item = (u32, usize)> {
    slots.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run.len()))
}

fn fill_slot(slot: &mut [u8], record: &Record, part: &[u8]) {
    let end = RECORD_BYTES + part.len();
    slot[..RECORD_BYTES].copy_from_slice(&record.encode());
    slot[RECORD_BYTES..end].copy_from_slice(part);
    // What lay in the buffer before must not lie on the disk.
    slot[end..].fill(0);
}

/// What the slots of a chunk must say, of which the first is given.
fn expected(record: &Record, first: &[u8]) -> Record {
    match Record::decode(first) {
        RecordRead::Valid(found) if mutation::on(Mutation::SlotOfAnotherChunk) => found.with_part(0),
        _ => *record,
    }
}

fn check_slot(expected: &Record, slot: &[u8]) -> Result<(), SlotFault> {
    match Record::decode(slot) {
        RecordRead::Valid(found) if found == *expected => Ok(()),
        RecordRead::Valid(_) | RecordRead::Free => Err(SlotFault::Stale),
        RecordRead::Unreadable => Err(SlotFault::Corrupt("its record fails its checksum".into())),
    }
}

const _: () = assert!(PART_BYTES + RECORD_BYTES == SLOT_BYTES);
