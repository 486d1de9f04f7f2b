//! Background hydration: one hydrator per volume store; [`HydrationQueue`] says which volume is next, sector order
//! what of it.
//!
//! A volume gives one run of neighbouring chunks per turn; the runs in flight are bounded per store, their bytes are
//! charged to the store's and the volume's token buckets, and work starts only while both are positive. Chunks that
//! guests missed while the store's share was spent come before the sector order. Errors put the volume off with
//! exponential back-off; the others go on.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::StreamExt;

use crate::budget::{RateMeter, TokenBucket};
use crate::error::{Error, Result, Status};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue, Time};
use crate::shard::Shard;
use crate::shard::base::Want;
use crate::shard::fill_turns::{FillTurn, FillTurns};
use crate::shard::fills::{Fill, gathered};
use crate::shard::hydration_queue::{Class, HydrationQueue};
use crate::shard::residency::ResidencyMap;
use crate::shard::signal::{Signal, within};
use crate::shard::store_stats::Moved;
use crate::shard::volume::{Volume, is_zero};
use crate::snapshot::{ChunkEntry, Manifest};
use crate::transfer::STRETCH_BYTES;
use crate::types::{HydrationRate, VolumeId};

/// Bytes of the volume in one run, which ends with its stretch of a pack: one GET of one shard.
const RUN_BYTES: u64 = 8 << 20;
/// Runs in flight per store and shard: enough to overlap fetch, verification and fill; fewer where they take longer than
/// a second. What of them may write is for [`FillTurns`] to say.
const RUNS_MAX: usize = 8;
/// A run that waits for the object store does not hold up all others.
const RUNS_MIN: usize = 2;
/// Chunks of a run written at the same time.
pub(super) const RUN_FILLS_MAX: usize = 2;
/// Chunks of a boot set in one run: they lie anywhere, and the run's first error puts off the rest.
const BOOT_RUN_CHUNKS: usize = 8;
/// Volumes looked at for one run before others have their turn on the core.
const LOOKS_MAX: usize = 64;
/// Zero chunks made resident in one step; bounds how many chunk locks are held together.
pub const ZERO_RUN_CHUNKS_MAX: u32 = 64;
/// Chunks that the owners are asked for together, whether the base holds them: a look-up each, half a millisecond.
const LENT_CHUNKS_MAX: usize = 512;
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// A volume whose store is full or whose object store is gone is tried again this often at least.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Background hydration of one volume, as the hydrator sees it.
pub struct Hydration {
    pub rate: HydrationRate,
    pub bucket: TokenBucket,
    /// Where the sector order goes on.
    pub cursor: u32,
    /// Chunks being fetched or filled by the hydrator, or ahead of a reader, now.
    pub running: hashbrown::HashSet<u32, ahash::RandomState>,
    /// How far it was asked what the base holds already: of a new volume, before anything is fetched. `u32::MAX`: no more.
    pub lent_cursor: u32,
    /// How far the boot set has been gone through.
    pub boot_cursor: usize,
    /// Chunks that guests missed while the store's share was spent: served before the sector order.
    pub owed: std::collections::BTreeSet<u32>,
    /// Not before this time, after an error.
    pub not_before: Time,
    pub failures: u32,
    pub state: &'static str,
    pub last_error: Option<String>,
    pub meter: RateMeter,
}

/// Folder of a volume store with what snapshots being taken still need.
pub const STAGING_DIR: &str = "staging";

/// A volume store as one shard sees it.
pub struct Store {
    pub label: Arc<str>,
    /// Directory of the volume files.
    pub volumes_dir: PathBuf,
    /// Directory of what snapshots being taken still need.
    pub staging_dir: PathBuf,
    pub staged_bytes: Cell<u64>,
    /// This shard's part of the fixed hydration share, in bytes.
    pub budget: RefCell<TokenBucket>,
    pub(super) fills: FillTurns,
    /// What guests' I/O moved, and fills by their class.
    pub(super) guest_io: Moved,
    pub(super) filled: [Moved; Class::ALL.len()],
    /// Guests' I/O at the disk now.
    pub(super) guests: Cell<u64>,
    /// Bytes that guests write, and that fills do.
    pub(super) guest_writes: RefCell<RateMeter>,
    pub(super) hydrated: RefCell<RateMeter>,
    pub(super) wake: Signal,
    pub(super) queue: RefCell<HydrationQueue<VolumeId>>,
    running: Cell<usize>,
}

impl Store {
    pub fn new(label: Arc<str>, path: &Path, budget: TokenBucket, fills: FillTurns) -> Store {
        Store {
            label,
            volumes_dir: path.join("volumes"),
            staging_dir: path.join(STAGING_DIR),
            staged_bytes: Cell::default(),
            budget: RefCell::new(budget),
            fills,
            guest_io: Moved::default(),
            filled: Default::default(),
            guests: Cell::default(),
            guest_writes: RefCell::default(),
            hydrated: RefCell::default(),
            wake: Signal::default(),
            queue: RefCell::default(),
            running: Cell::new(0),
        }
    }
}

enum Next<P: Platform> {
    Run(Rc<Volume<P>>, Run),
    /// Nothing to do before this time; `None`: before something changes.
    Wait(Option<Time>),
    /// Many volumes had nothing to do: look again.
    Again,
}

/// Chunks to bring, and how urgent they are.
struct Run {
    chunks: Vec<u32>,
    class: Class,
    /// Only what the base holds already is wanted.
    lent: bool,
    /// Its bytes have come off the budgets: at once where the manifest is known, so that no other run starts on them.
    charged: bool,
}

impl Run {
    fn of(chunks: Vec<u32>, class: Class) -> Run {
        Run { chunks, class, lent: false, charged: false }
    }
}

enum Turn {
    Run(Run),
    /// Not before this time.
    Later(Time),
    /// Nothing to do before something changes; the end of one of its runs is such a thing.
    Leave,
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Something changed: the volume may have work, or more urgent work than before.
    pub(super) fn wake_hydrator(&self, volume: &Volume<P>) {
        let store = &self.0.stores[volume.store];
        store.queue.borrow_mut().put(volume.spec.id, self.rank_of(volume));
        store.wake.wake_all();
    }

    pub(super) async fn hydrate_store(self, store: usize) {
        let state = &self.0.stores[store];
        while !self.0.stopping.get() {
            let woken = state.wake.waiter();
            match self.next_run(store) {
                Next::Run(volume, run) => {
                    state.running.set(state.running.get() + 1);
                    let shard = self.clone();
                    self.0.platform.spawn(Queue::Background, async move { shard.hydrate_run(volume, run).await });
                    self.0.platform.yield_now().await;
                }
                Next::Wait(Some(until)) => {
                    let pause = until.since(self.0.platform.now());
                    within(&self.0.platform, pause, woken).await;
                }
                Next::Wait(None) => drop(woken.await),
                Next::Again => self.0.platform.yield_now().await,
            }
        }
    }

    fn next_run(&self, store: usize) -> Next<P> {
        let state = &self.0.stores[store];
        let now = self.0.platform.now();
        let runs_max = state.fills.bytes_per_second(now).map_or(RUNS_MAX, |bytes| (bytes / RUN_BYTES) as usize);
        if state.running.get() >= runs_max.clamp(RUNS_MIN, RUNS_MAX) {
            return Next::Wait(None);
        }
        for _ in 0..LOOKS_MAX {
            let Some((id, rank)) = state.queue.borrow_mut().first(now) else {
                return Next::Wait(state.queue.borrow().wakes_at());
            };
            let Ok(volume) = self.volume(id) else {
                state.queue.borrow_mut().remove(id);
                continue;
            };
            let wait = state.budget.borrow_mut().wait(now);
            if !wait.is_zero() {
                volume.hydration.borrow_mut().state = "store_budget";
                return Next::Wait(Some(now.after(wait)));
            }
            let pace = state.fills.pace_wait(now);
            if !pace.is_zero() {
                return Next::Wait(Some(now.after(pace)));
            }
            state.queue.borrow_mut().remove(id);
            let boot_set = volume.spec.snapshot.as_ref().and_then(|snapshot| self.0.boots.set_of(snapshot));
            match turn(&volume, boot_set.as_deref(), self.0.bases[store].is_usable(), now) {
                Turn::Run(mut run) => {
                    if let Some(manifest) = volume.manifest().filter(|_| !run.lent) {
                        self.charge(&volume, &manifest, &run.chunks);
                        run.charged = true;
                    }
                    state.queue.borrow_mut().put(id, self.rank_of(&volume));
                    return Next::Run(volume, run);
                }
                Turn::Later(until) => state.queue.borrow_mut().sleep(id, rank, until),
                Turn::Leave => {}
            }
        }
        Next::Again
    }

    async fn hydrate_run(self, volume: Rc<Volume<P>>, run: Run) {
        let result = self.hydrate_chunks(&volume, &run).await;
        self.note_run(&volume, &run.chunks, result);
        let store = &self.0.stores[volume.store];
        store.running.set(store.running.get() - 1);
        let wants_more = !volume.deleted.get() && !volume.map.borrow().is_full();
        if wants_more && !store.queue.borrow().contains(volume.spec.id) {
            self.wake_hydrator(&volume);
        }
        store.wake.wake_all();
    }

    async fn hydrate_chunks(&self, volume: &Rc<Volume<P>>, run: &Run) -> Result<()> {
        let manifest = self.manifest_of(volume).await?;
        if run.lent {
            if self.share_what_is_there(volume, &manifest, &run.chunks).await == 0 {
                volume.hydration.borrow_mut().lent_cursor = u32::MAX;
            }
            return Ok(());
        }
        let (zero, stored): (Vec<u32>, Vec<u32>) = run.chunks.iter().partition(|chunk| is_zero(&manifest, **chunk));
        for run in zero.chunk_by(|a, b| a + 1 == *b) {
            volume.fill_zero(run[0]..=run[run.len() - 1]).await?;
            self.note_dirty(volume);
        }
        if !run.charged {
            self.charge(volume, &manifest, &run.chunks);
        }
        self.copy_chunks(volume, &manifest, stored, run.class).await
    }

    /// What chunks will move comes off the budgets of their store and volume.
    fn charge(&self, volume: &Volume<P>, manifest: &Manifest, chunks: &[u32]) {
        let stored = chunks.iter().filter(|chunk| !is_zero(manifest, **chunk));
        let bytes: u64 = stored.map(|chunk| u64::from(manifest.chunk_len(*chunk))).sum();
        let now = self.0.platform.now();
        self.0.stores[volume.store].budget.borrow_mut().charge(bytes, now);
        volume.hydration.borrow_mut().bucket.charge(bytes, now);
    }

    /// Copies what can be copied; the first error is told after the rest is done.
    async fn copy_chunks(
        &self,
        volume: &Rc<Volume<P>>,
        manifest: &Manifest,
        chunks: Vec<u32>,
        class: Class,
    ) -> Result<()> {
        let orders = self.orders(volume, manifest, &chunks, None);
        let supplied = chunks.into_iter().zip(self.supplies(volume, orders, Want::Place, class.fetch_class()));
        let fills = gathered(supplied, volume.spec.chunk_bytes).map(async |fill| {
            let fill = fill.map_err(|(_, error)| error)?;
            if let Fill::Run(first, places) = &fill {
                // They are in the store already: whoever brought them paid.
                let lens = (*first..).take(places.len()).map(|chunk| u64::from(manifest.chunk_len(chunk)));
                let store = &self.0.stores[volume.store];
                store.budget.borrow_mut().give_back(lens.sum(), self.0.platform.now());
            }
            let filled = self.fill(volume, fill, FillTurn::Paced(class)).await;
            self.0.platform.yield_now().await;
            filled
        });
        fills.buffered(RUN_FILLS_MAX).fold(Ok(()), async |all, filled| all.and(filled)).await
    }

    fn note_run(&self, volume: &Rc<Volume<P>>, chunks: &[u32], result: Result<()>) {
        let now = self.0.platform.now();
        let mut hydration = volume.hydration.borrow_mut();
        for chunk in chunks {
            hydration.running.remove(chunk);
        }
        let Err(error) = result else {
            hydration.failures = 0;
            hydration.state = if volume.hydrated.get() { "done" } else { "running" };
            hydration.last_error = None;
            return;
        };
        if hydration.failures == 0 {
            let message = format!("hydration of volume {:?} waits: {error}", &*volume.spec.name);
            self.0.counters.event(self.0.platform.wall_clock_ms(), &message);
        }
        hydration.failures = (hydration.failures + 1).min(16);
        let backoff = (BACKOFF_MIN * 2_u32.pow(hydration.failures - 1)).min(BACKOFF_MAX);
        let jitter = backoff.mul_f64(self.0.platform.random_u64() as f64 / u64::MAX as f64 / 4.0);
        hydration.not_before = now.after(backoff + jitter);
        hydration.state = waiting_on(&error);
        // A corrupt chunk must not hold up the rest: the sector order comes back to it after the others.
        if error.status != Status::Corrupt {
            hydration.cursor = hydration.cursor.min(chunks[0]);
            hydration.boot_cursor = 0;
        }
        hydration.last_error = Some(error.message);
    }
}

fn waiting_on(error: &Error) -> &'static str {
    match error.status {
        Status::NoSpace => "store_full",
        Status::Io => "store_failed",
        Status::Corrupt => "corrupt",
        _ => "object_store",
    }
}

/// What the hydrator may do for a volume now. Chooses the run and marks its chunks as running.
fn turn<P: Platform>(volume: &Volume<P>, boot_set: Option<&[u32]>, has_base: bool, now: Time) -> Turn {
    let map = volume.map.borrow();
    let mut hydration = volume.hydration.borrow_mut();
    if volume.deleted.get() || map.is_full() {
        hydration.owed.clear();
        return Turn::Leave;
    }
    if volume.retired.get() {
        // Fills do nothing to it: it would be asked for the same chunk again and again.
        return Turn::Leave;
    }
    if now < hydration.not_before {
        return Turn::Later(hydration.not_before);
    }
    while let Some(owed) = hydration.owed.pop_first() {
        if !map.is_chunk_resident(owed) && hydration.running.insert(owed) {
            return Turn::Run(Run::of(vec![owed], Class::Priority));
        }
    }
    if hydration.rate == HydrationRate::None {
        hydration.state = "paused";
        return Turn::Leave;
    }
    let wait = hydration.bucket.wait(now);
    if !wait.is_zero() {
        hydration.state = "rate";
        return Turn::Later(now.after(wait));
    }
    // A pace is kept, whatever it costs to be faster.
    if has_base && hydration.rate == HydrationRate::Unlimited && volume.manifest().is_some() {
        let chunks = next_lent_chunks(&map, &mut hydration);
        if !chunks.is_empty() {
            hydration.running.extend(chunks.iter().copied());
            hydration.state = "running";
            return Turn::Run(Run { lent: true, ..Run::of(chunks, Class::Background) });
        }
    }
    let boot = next_boot_chunks(volume, &map, &mut hydration, boot_set.unwrap_or_default());
    if !boot.is_empty() {
        hydration.running.extend(boot.iter().copied());
        hydration.state = "running";
        return Turn::Run(Run::of(boot, Class::BootSet));
    }
    let Some(first) = next_chunk(volume, &map, &hydration) else { return Turn::Leave };
    let manifest = volume.manifest();
    let zero = |chunk: u32| manifest.as_ref().is_some_and(|m| is_zero(m, chunk));
    let most = match zero(first) {
        true => ZERO_RUN_CHUNKS_MAX,
        false => u32::try_from(RUN_BYTES / u64::from(volume.spec.chunk_bytes)).unwrap_or(1).max(1),
    };
    let end = first.saturating_add(most).min(map.chunks());
    let stretch = |chunk: u32| manifest.as_ref().and_then(|m| stretch_of(m, chunk));
    let here = stretch(first);
    let wanted = |c: &u32| !map.is_chunk_resident(*c) && !hydration.running.contains(c) && stretch(*c) == here;
    let chunks: Vec<u32> = (first..end).take_while(wanted).collect();
    hydration.running.extend(chunks.iter().copied());
    hydration.cursor = first + chunks.len() as u32;
    hydration.state = "running";
    Turn::Run(Run::of(chunks, Class::Background))
}

/// The next absent chunks of which the base was not asked yet; none once it was asked of all.
fn next_lent_chunks(map: &ResidencyMap, hydration: &mut Hydration) -> Vec<u32> {
    let mut chunks = Vec::new();
    while chunks.len() < LENT_CHUNKS_MAX
        && let Some(chunk) = map.next_absent_chunk(hydration.lent_cursor)
    {
        hydration.lent_cursor = chunk + 1;
        if !hydration.running.contains(&chunk) {
            chunks.push(chunk);
        }
    }
    if chunks.is_empty() {
        hydration.lent_cursor = u32::MAX;
    }
    chunks
}

/// The next chunks of the boot set that are neither resident nor on their way.
fn next_boot_chunks<P: Platform>(
    volume: &Volume<P>,
    map: &ResidencyMap,
    hydration: &mut Hydration,
    boot_set: &[u32],
) -> Vec<u32> {
    let mut chunks = Vec::new();
    while let Some(chunk) = boot_set.get(hydration.boot_cursor).filter(|_| chunks.len() < BOOT_RUN_CHUNKS) {
        hydration.boot_cursor += 1;
        let inside = *chunk < volume.spec.chunks();
        if inside && !map.is_chunk_resident(*chunk) && !hydration.running.contains(chunk) {
            chunks.push(*chunk);
        }
    }
    chunks
}

/// Where a chunk's stored bytes are: pack and stretch in it; `None` for a zero chunk.
pub(super) fn stretch_of(manifest: &Manifest, chunk: u32) -> Option<(u32, u64)> {
    let entry = (chunk < manifest.chunk_count()).then(|| manifest.chunk(chunk))?;
    match entry {
        ChunkEntry::Stored { pack, offset, .. } => Some((pack, offset / STRETCH_BYTES)),
        ChunkEntry::Zero => None,
    }
}

/// The next chunk in sector order that is neither resident nor on its way; wraps once.
fn next_chunk<P: Platform>(volume: &Volume<P>, map: &ResidencyMap, hydration: &Hydration) -> Option<u32> {
    let from = |start: u32| {
        let mut chunk = map.next_absent_chunk(start);
        while let Some(c) = chunk.filter(|c| hydration.running.contains(c)) {
            chunk = map.next_absent_chunk(c + 1);
        }
        chunk
    };
    debug_assert_eq!(map.chunks(), volume.spec.chunks());
    from(hydration.cursor).or_else(|| from(0))
}
