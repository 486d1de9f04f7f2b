//! Transfer: object store → verified chunk in the cache of the chunk's shard, one fetch per chunk per node.
//!
//! The queue (plain core) decides the order; this shell runs GETs, verifies, retries and answers the waiters. A fetch
//! belongs to the chunk's shard, never to its first caller: a caller that goes away cancels nothing.

mod gate;
mod get;
mod hedge;
pub mod ledger;
mod near;
mod queue;
mod tiers;
mod waves;

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub use gate::GateLimits;
pub use queue::{FetchClass, FetchQueue, GetPlan, Next, QueueLimits};

use crate::cache::disk::DiskTier;
use crate::cache::reads::ReadQueue;
use crate::cache::{ChunkCache, ChunkData, RamLimits, Rank};
use crate::error::Result;
use crate::mutation::{self, Mutation};
use crate::object_store::{ObjectBytes, ObjectStore};
use crate::platform::{Platform, Queue, Time};
use crate::shard::stats::{Counters, StageTimes};
use crate::snapshot::{ChunkEntry, Manifest};
use hedge::Hedge;
use ledger::{Account, Ledger, Origin};
use near::Near;
use waves::Waves;

/// BLAKE3 digest of a chunk's content: its name.
pub type Digest = [u8; 32];

/// Where a chunk is and how it is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSource {
    pub pack_key: Arc<str>,
    pub entry: ChunkEntry,
    pub digest: Digest,
    pub offset: u64,
    pub stored_len: u32,
    pub chunk_len: u32,
    pub origin: Arc<Origin>,
}

/// Chunks of one pack whose offsets fall into the same stretch of this size belong to one shard, so that neighbours
/// can be fetched by one ranged GET; the next stretch belongs to another shard, so that all of them verify one volume's
/// chunks at the same time.
pub const STRETCH_BYTES: u64 = 4 << 20;

impl ChunkSource {
    /// `None` for a zero chunk.
    #[must_use]
    pub fn of(manifest: &Manifest, chunk: u32, origin: &Arc<Origin>) -> Option<ChunkSource> {
        let entry = manifest.chunk(chunk);
        let ChunkEntry::Stored { pack, offset, stored_len, digest, .. } = entry else { return None };
        let pack_key = Arc::from(manifest.pack_key(pack));
        let (chunk_len, origin) = (manifest.chunk_len(chunk), origin.clone());
        Some(ChunkSource { pack_key, entry, digest, offset, stored_len, chunk_len, origin })
    }

    /// The shard that fetches and caches the chunk.
    #[must_use]
    pub fn owner(&self, shards: usize) -> usize {
        (self.placement() % shards as u64) as usize
    }

    /// What decides the owner, whatever the number of shards is.
    #[must_use]
    pub fn placement(&self) -> u64 {
        u64::from(crc32fast::hash(self.pack_key.as_bytes())) + self.offset / STRETCH_BYTES
    }
}

/// Bounds of the retries of one fetch.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// After this the waiters get the error.
    pub deadline: Duration,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// How often a chunk that fails its digest is fetched again.
    pub corrupt_attempts: u32,
    /// Of 100 priority GETs so many may be sent a second time when they are slow; 0: none.
    pub hedge_percent: u32,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            deadline: Duration::from_secs(30),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(3),
            corrupt_attempts: 3,
            hedge_percent: 5,
        }
    }
}

/// Where a chunk was when it was asked for, the nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    Ram,
    Disk,
    ObjectStore,
}

impl Tier {
    /// As in metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Tier::Ram => "ram",
            Tier::Disk => "disk",
            Tier::ObjectStore => "object_store",
        }
    }
}

/// What became of a fetch, stage by stage, for those who ask why a read was slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Story {
    pub tier: Tier,
    /// Waiting for its turn.
    pub queue: Duration,
    /// Asking the object store, repetitions included.
    pub transfer: Duration,
    /// Decompression and digest, those of chunks before it in the same GET included.
    pub verify: Duration,
}

impl Story {
    pub(crate) const RAM: Story =
        Story { tier: Tier::Ram, queue: Duration::ZERO, transfer: Duration::ZERO, verify: Duration::ZERO };
}

/// A verified chunk.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub data: ChunkData,
    pub story: Story,
}

impl Fetched {
    /// A chunk that somebody has already.
    #[must_use]
    pub fn from_ram(data: ChunkData) -> Fetched {
        Fetched { data, story: Story::RAM }
    }
}

pub type FetchReply = flume::Sender<Result<Fetched>>;

struct Inner<P: Platform, O: ObjectStore> {
    platform: P,
    objects: O,
    retry: RetryPolicy,
    counters: Rc<Counters>,
    stages: Rc<StageTimes>,
    ledger: Ledger,
    queue: RefCell<FetchQueue<FetchReply>>,
    hedge: RefCell<Hedge>,
    cache: RefCell<ChunkCache>,
    waves: RefCell<Waves>,
    near: RefCell<Near>,
    disk: OnceCell<DiskTier<P>>,
    reads: RefCell<ReadQueue<FetchReply>>,
    /// A task waits for the budgets.
    waits_for_budget: Cell<bool>,
}

/// Cheap clone.
pub struct Transfer<P: Platform, O: ObjectStore>(Rc<Inner<P, O>>);

impl<P: Platform, O: ObjectStore> Clone for Transfer<P, O> {
    fn clone(&self) -> Self {
        Transfer(self.0.clone())
    }
}

/// A dispatch that waits for a budget looks again at least this often.
const BUDGET_WAIT_MAX: Duration = Duration::from_secs(1);

impl<P: Platform, O: ObjectStore> Transfer<P, O> {
    pub fn new(
        platform: P,
        objects: O,
        ram: RamLimits,
        limits: QueueLimits,
        retry: RetryPolicy,
        counters: Rc<Counters>,
        stages: Rc<StageTimes>,
    ) -> Self {
        let queue = RefCell::new(FetchQueue::new(limits, platform.now()));
        let cache = RefCell::new(ChunkCache::new(ram.bytes));
        let hedge = RefCell::new(Hedge::new(retry.hedge_percent));
        Transfer(Rc::new(Inner {
            platform,
            objects,
            retry,
            counters,
            stages,
            ledger: Ledger::default(),
            queue,
            hedge,
            cache,
            waves: RefCell::new(Waves::new(ram.pin_waves)),
            near: RefCell::default(),
            disk: OnceCell::new(),
            reads: RefCell::default(),
            waits_for_budget: Cell::new(false),
        }))
    }

    /// The account of an origin on this shard.
    pub fn account(&self, origin: &Origin) -> Rc<Account> {
        self.0.ledger.account(origin)
    }

    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    fn cached(&self, source: &ChunkSource, class: FetchClass) -> Option<ChunkData> {
        let data = self.0.cache.borrow_mut().get(&source.digest, tiers::rank_of(class))?;
        let account = self.account(&source.origin);
        account.ram_bytes.add(u64::from(source.chunk_len));
        account.saved_bytes.add(u64::from(source.stored_len));
        Some(data)
    }

    /// A chunk that this shard's guests used a moment ago, if it is still in the memory of some shard.
    #[must_use]
    pub fn near(&self, digest: &Digest) -> Option<ChunkData> {
        self.0.near.borrow_mut().get(digest, self.0.platform.now())
    }

    /// A guest of this shard was given a verified chunk.
    pub fn note_near(&self, digest: Digest, data: &ChunkData) {
        if self.0.queue.borrow().shares() {
            self.0.near.borrow_mut().note(digest, data, self.0.platform.now());
        }
    }

    /// Answers each reply with its verified chunk: from a tier of the cache, by joining (and promoting) a fetch that is
    /// under way, or by a new one. All are queued before the first GET starts, so that neighbours share one.
    /// `wave`: guests of a wave ask.
    pub fn fetch(&self, wanted: Vec<(ChunkSource, FetchReply)>, class: FetchClass, wave: bool) {
        for (source, reply) in wanted {
            if wave && self.0.queue.borrow().shares() {
                self.keep_for_wave(&source);
            }
            if !self.0.queue.borrow().shares() {
                self.enqueue(source, class, reply);
            } else if let Some(data) = self.cached(&source, class) {
                let _ = reply.send(Ok(Fetched { data, story: Story::RAM }));
            } else if self.on_disk(&source.digest) {
                self.0.reads.borrow_mut().push(source, class, reply);
            } else {
                self.enqueue(source, class, reply);
            }
        }
        self.start_reads();
        self.dispatch();
    }

    /// Joins a fetch of the chunk, or makes one.
    fn enqueue(&self, source: ChunkSource, class: FetchClass, reply: FetchReply) {
        let (chunk_len, stored_len) = (u64::from(source.chunk_len), u64::from(source.stored_len));
        let (account, now) = (self.account(&source.origin), self.0.platform.now());
        if self.0.queue.borrow_mut().push(source, class, reply, now) {
            self.0.counters.fetches_joined.add(1);
            account.joined_bytes.add(chunk_len);
            account.saved_bytes.add(stored_len);
        } else {
            account.fetched_bytes.add(chunk_len);
        }
    }

    /// Checks cache and queue against themselves and their limits.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check_invariants(&self) -> std::result::Result<(), String> {
        self.check_tiers()?;
        self.0.queue.borrow().check()
    }

    /// A guest of a wave asks for the chunk: it is pinned now, or when it comes.
    fn keep_for_wave(&self, source: &ChunkSource) {
        let cost = source.chunk_len as usize;
        let room = self.0.cache.borrow().can_pin(cost);
        let new = self.0.waves.borrow_mut().asked(source.digest, cost, room, self.0.platform.now());
        if new && self.0.cache.borrow().holds(&source.digest) {
            self.pin_for_wave(&source.digest);
        }
    }

    /// The chunk is in the cache.
    fn pin_for_wave(&self, digest: &Digest) {
        let mut waves = self.0.waves.borrow_mut();
        if !waves.wants(digest) {
            return;
        }
        if self.0.cache.borrow_mut().pin(digest) {
            waves.pinned(digest);
        } else {
            waves.forget(digest);
        }
    }

    /// Unpins what no guest of a wave has asked for lately.
    pub fn release_waves(&self) {
        let due = self.0.waves.borrow_mut().due(self.0.platform.now());
        due.iter().for_each(|digest| self.0.cache.borrow_mut().unpin(digest));
    }

    /// Name, help text and value of each gauge.
    pub fn gauges(&self) -> Vec<(&'static str, &'static str, u64)> {
        let queue = self.0.queue.borrow();
        vec![
            (
                "cache_wave_pinned_bytes",
                "Bytes of chunks in RAM that are pinned because guests of a wave asked for them.",
                self.0.waves.borrow().pinned_bytes() as u64,
            ),
            ("fetches_queued", "Chunks waiting for a GET.", queue.queued() as u64),
            ("object_gets_in_flight", "GETs in flight to the object store.", queue.gate.in_flight() as u64),
            (
                "object_gets_window",
                "GETs that may be in flight: halved when the object store asks to slow down.",
                queue.gate.window() as u64,
            ),
        ]
    }

    fn dispatch(&self) {
        loop {
            let next = self.0.queue.borrow_mut().next_get(self.0.platform.now());
            let plan = match next {
                Next::Start(plan) => plan,
                Next::After(wait) => return self.dispatch_after(wait.min(BUDGET_WAIT_MAX)),
                Next::Idle => return,
            };
            let task_queue = match plan.class {
                FetchClass::Background => Queue::Background,
                FetchClass::Priority | FetchClass::ReadAhead | FetchClass::BootSet => Queue::Serve,
            };
            let transfer = self.clone();
            self.0.platform.spawn(task_queue, async move { transfer.run(plan).await });
        }
    }

    fn dispatch_after(&self, wait: Duration) {
        if self.0.waits_for_budget.replace(true) {
            return;
        }
        let transfer = self.clone();
        self.0.platform.spawn(Queue::Background, async move {
            transfer.0.platform.sleep(wait).await;
            transfer.0.waits_for_budget.set(false);
            transfer.dispatch();
        });
    }

    async fn run(self, plan: GetPlan) {
        let begun = self.0.platform.now();
        let deadline = begun.after(self.0.retry.deadline);
        let got = self.get(&plan, deadline).await;
        let flight = Flight { begun, answered: self.0.platform.now(), deadline };
        if plan.class != FetchClass::Priority && self.any_promoted(&plan) {
            // A priority fetch joined meanwhile: what is left to do runs at its urgency.
            let transfer = self.clone();
            self.0.platform.spawn(Queue::Serve, async move { transfer.deliver(plan, got, flight).await });
        } else {
            self.deliver(plan, got, flight).await;
        }
    }

    fn any_promoted(&self, plan: &GetPlan) -> bool {
        let queue = self.0.queue.borrow();
        plan.sources.iter().any(|source| queue.is_promoted(&source.digest))
    }

    async fn deliver(&self, plan: GetPlan, got: Result<ObjectBytes>, flight: Flight) {
        let mut order: Vec<usize> = (0..plan.sources.len()).collect();
        order.sort_by_key(|i| !self.0.queue.borrow().is_promoted(&plan.sources[*i].digest));
        for i in order {
            let source = &plan.sources[i];
            let result = match &got {
                Ok(bytes) => self.verify(source, &bytes[plan.slice(i)], flight.deadline).await,
                Err(error) => Err(error.clone()),
            };
            self.finish(source, plan.class, result, self.story(&plan, &flight));
            self.0.platform.yield_now().await;
        }
        self.0.queue.borrow_mut().gate.done(plan.class);
        self.dispatch();
    }

    fn story(&self, plan: &GetPlan, flight: &Flight) -> Story {
        let story = Story {
            tier: Tier::ObjectStore,
            queue: flight.begun.since(plan.queued_at),
            transfer: flight.answered.since(flight.begun),
            verify: self.0.platform.now().since(flight.answered),
        };
        self.0.stages.fetched(&story);
        story
    }

    fn finish(&self, source: &ChunkSource, class: FetchClass, result: Result<ChunkData>, story: Story) {
        let result = match result {
            Err(_) if mutation::on(Mutation::FailedFetchIsZeroes) => {
                Ok(ChunkData::new(vec![0; source.chunk_len as usize][..].into()))
            }
            result => result,
        };
        match &result {
            Ok(_) if !self.0.queue.borrow().shares() => {}
            Ok(data) => {
                let promoted = self.0.queue.borrow().is_promoted(&source.digest);
                let rank = if promoted { Rank::Normal } else { tiers::rank_of(class) };
                self.0.cache.borrow_mut().insert(source.digest, data.clone(), rank);
                self.pin_for_wave(&source.digest);
            }
            Err(error) => {
                self.0.counters.fetch_failures.add(1);
                self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message);
            }
        }
        let result = result.map(|data| Fetched { data, story });
        let waiters = self.0.queue.borrow_mut().take_waiters(&source.digest);
        let gone = waiters.first().is_some_and(|first| first.is_disconnected());
        for waiter in waiters {
            if gone && mutation::on(Mutation::FetchEndsWithCaller) {
                continue;
            }
            let _ = waiter.send(result.clone());
        }
    }
}

/// Times of one GET.
struct Flight {
    begun: Time,
    answered: Time,
    deadline: Time,
}
