//! Transfer: object store → verified chunk in the cache of the chunk's shard, one fetch per chunk per node.
//!
//! The queue (plain core) decides the order; this shell runs GETs, verifies, retries and answers the waiters. A fetch
//! belongs to the chunk's shard, never to its first caller: a caller that goes away cancels nothing.

mod queue;
mod tiers;

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub use queue::{FetchClass, FetchQueue, GetPlan, QueueLimits};

use crate::cache::disk::DiskTier;
use crate::cache::reads::ReadQueue;
use crate::cache::{ChunkCache, ChunkData, Rank};
use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::object_store::{ObjectBytes, ObjectError, ObjectStore};
use crate::platform::{Platform, Queue, Time};
use crate::shard::stats::Counters;
use crate::snapshot::{ChunkEntry, Manifest, decode_chunk};

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
}

/// Chunks of one pack whose offsets fall into the same stretch of this size belong to one shard, so that neighbours
/// can be fetched by one ranged GET; the next stretch belongs to another shard, so that all of them verify one volume's
/// chunks at the same time.
pub const STRETCH_BYTES: u64 = 4 << 20;

impl ChunkSource {
    /// `None` for a zero chunk.
    #[must_use]
    pub fn of(manifest: &Manifest, chunk: u32) -> Option<ChunkSource> {
        let entry = manifest.chunk(chunk);
        let ChunkEntry::Stored { pack, offset, stored_len, digest, .. } = entry else { return None };
        let pack_key = Arc::from(manifest.pack_key(pack));
        Some(ChunkSource { pack_key, entry, digest, offset, stored_len, chunk_len: manifest.chunk_len(chunk) })
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
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            deadline: Duration::from_secs(30),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(3),
            corrupt_attempts: 3,
        }
    }
}

pub type FetchReply = flume::Sender<Result<ChunkData>>;

struct Inner<P: Platform, O: ObjectStore> {
    platform: P,
    objects: O,
    retry: RetryPolicy,
    counters: Rc<Counters>,
    queue: RefCell<FetchQueue<FetchReply>>,
    cache: RefCell<ChunkCache>,
    disk: OnceCell<DiskTier<P>>,
    reads: RefCell<ReadQueue<FetchReply>>,
}

/// Cheap clone.
pub struct Transfer<P: Platform, O: ObjectStore>(Rc<Inner<P, O>>);

impl<P: Platform, O: ObjectStore> Clone for Transfer<P, O> {
    fn clone(&self) -> Self {
        Transfer(self.0.clone())
    }
}

impl<P: Platform, O: ObjectStore> Transfer<P, O> {
    pub fn new(
        platform: P,
        objects: O,
        cache_bytes: usize,
        limits: QueueLimits,
        retry: RetryPolicy,
        counters: Rc<Counters>,
    ) -> Self {
        let queue = RefCell::new(FetchQueue::new(limits));
        let cache = RefCell::new(ChunkCache::new(cache_bytes));
        let (disk, reads) = (OnceCell::new(), RefCell::default());
        Transfer(Rc::new(Inner { platform, objects, retry, counters, queue, cache, disk, reads }))
    }

    fn cached(&self, digest: &Digest, class: FetchClass) -> Option<ChunkData> {
        self.0.cache.borrow_mut().get(digest, tiers::rank_of(class))
    }

    /// Answers each reply with its verified chunk: from a tier of the cache, by joining (and promoting) a fetch that is
    /// under way, or by a new one. All are queued before the first GET starts, so that neighbours share one.
    pub fn fetch(&self, wanted: Vec<(ChunkSource, FetchReply)>, class: FetchClass) {
        for (source, reply) in wanted {
            if let Some(data) = self.cached(&source.digest, class) {
                let _ = reply.send(Ok(data));
                continue;
            }
            if self.on_disk(&source.digest) {
                self.0.reads.borrow_mut().push(source, class, reply);
                continue;
            }
            if self.0.queue.borrow_mut().push(source, class, reply) {
                self.0.counters.fetches_joined.add(1);
            }
        }
        self.start_reads();
        self.dispatch();
    }

    /// Checks cache and queue against themselves and their limits.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check_invariants(&self) -> std::result::Result<(), String> {
        self.check_tiers()?;
        self.0.queue.borrow().check()
    }

    /// Gauges: chunks queued, GETs in flight.
    pub fn gauges(&self) -> (u64, u64) {
        let queue = self.0.queue.borrow();
        (queue.queued() as u64, queue.gets_in_flight() as u64)
    }

    fn dispatch(&self) {
        loop {
            let Some(plan) = self.0.queue.borrow_mut().next_get() else { return };
            let task_queue = match plan.class {
                FetchClass::Background => Queue::Background,
                FetchClass::Priority | FetchClass::BootSet => Queue::Serve,
            };
            let transfer = self.clone();
            self.0.platform.spawn(task_queue, async move { transfer.run(plan).await });
        }
    }

    async fn run(self, plan: GetPlan) {
        let deadline = self.0.platform.now().after(self.0.retry.deadline);
        let got = self.get(&plan, deadline).await;
        if plan.class != FetchClass::Priority && self.any_promoted(&plan) {
            // A priority fetch joined meanwhile: what is left to do runs at its urgency.
            let transfer = self.clone();
            self.0.platform.spawn(Queue::Serve, async move { transfer.deliver(plan, got, deadline).await });
        } else {
            self.deliver(plan, got, deadline).await;
        }
    }

    fn any_promoted(&self, plan: &GetPlan) -> bool {
        let queue = self.0.queue.borrow();
        plan.sources.iter().any(|source| queue.is_promoted(&source.digest))
    }

    async fn deliver(&self, plan: GetPlan, got: Result<ObjectBytes>, deadline: Time) {
        let mut order: Vec<usize> = (0..plan.sources.len()).collect();
        order.sort_by_key(|i| !self.0.queue.borrow().is_promoted(&plan.sources[*i].digest));
        for i in order {
            let source = &plan.sources[i];
            let result = match &got {
                Ok(bytes) => self.verify(source, &bytes[plan.slice(i)], deadline).await,
                Err(error) => Err(error.clone()),
            };
            self.finish(source, plan.class, result);
            self.0.platform.yield_now().await;
        }
        self.0.queue.borrow_mut().get_done(plan.class);
        self.dispatch();
    }

    fn finish(&self, source: &ChunkSource, class: FetchClass, result: Result<ChunkData>) {
        let result = match result {
            Err(_) if mutation::on(Mutation::FailedFetchIsZeroes) => Ok(Arc::new(vec![0; source.chunk_len as usize])),
            result => result,
        };
        match &result {
            Ok(data) => {
                let promoted = self.0.queue.borrow().is_promoted(&source.digest);
                let rank = if promoted { Rank::Normal } else { tiers::rank_of(class) };
                self.0.cache.borrow_mut().insert(source.digest, data.clone(), rank);
            }
            Err(error) => {
                self.0.counters.fetch_failures.add(1);
                self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message);
            }
        }
        let waiters = self.0.queue.borrow_mut().take_waiters(&source.digest);
        let gone = waiters.first().is_some_and(|first| first.is_disconnected());
        for waiter in waiters {
            if gone && mutation::on(Mutation::FetchEndsWithCaller) {
                continue;
            }
            let _ = waiter.send(result.clone());
        }
    }

    /// One ranged GET, retried with jittered exponential back-off until the deadline.
    async fn get(&self, plan: &GetPlan, deadline: Time) -> Result<ObjectBytes> {
        let mut backoff = self.0.retry.backoff_min;
        loop {
            self.0.counters.object_gets.add(1);
            let error = match self.0.objects.get_range(&plan.pack_key, plan.range.clone()).await {
                Ok(bytes) if bytes.len() as u64 == plan.range.end - plan.range.start => {
                    self.0.counters.object_get_bytes.add(bytes.len() as u64);
                    return Ok(bytes);
                }
                Ok(bytes) => ObjectError::Corrupt(format!("{}: short answer of {} bytes", plan.pack_key, bytes.len())),
                Err(error) => error,
            };
            self.0.counters.object_errors.add(1);
            let status = match error {
                ObjectError::Retry(_) => Status::ObjectStore,
                ObjectError::NotFound(_) | ObjectError::Corrupt(_) => Status::Corrupt,
                ObjectError::Fatal(_) | ObjectError::AlreadyExists(_) => Status::ObjectStore,
            };
            let wait = self.jittered(backoff);
            let retry = matches!(error, ObjectError::Retry(_));
            if !retry || self.0.platform.now().after(wait) >= deadline {
                return Err(Error::new(status, format!("object store: {error}")));
            }
            self.0.counters.object_retries.add(1);
            self.0.platform.sleep(wait).await;
            backoff = (backoff * 2).min(self.0.retry.backoff_max);
        }
    }

    /// Half to the whole of the back-off, so that shards do not retry in step.
    fn jittered(&self, backoff: Duration) -> Duration {
        backoff / 2 + backoff.mul_f64(self.0.platform.random_u64() as f64 / u64::MAX as f64) / 2
    }

    /// Checks a chunk against its digest (P3); fetches it again alone when it is corrupt.
    async fn verify(&self, source: &ChunkSource, stored: &[u8], deadline: Time) -> Result<ChunkData> {
        let mut again;
        let mut stored = stored;
        for attempt in 1.. {
            match decode_chunk(&source.entry, stored, source.chunk_len) {
                Ok(data) => {
                    self.keep_on_disk(source, stored);
                    return Ok(Arc::new(data));
                }
                Err(corrupt) => {
                    self.0.counters.corrupt_chunks.add(1);
                    let at = format!("{} offset {}", source.pack_key, source.offset);
                    self.0
                        .counters
                        .event(self.0.platform.wall_clock_ms(), &format!("corrupt chunk in {at}: {corrupt}"));
                    if attempt >= self.0.retry.corrupt_attempts || self.0.platform.now() >= deadline {
                        return Err(Error::new(Status::Corrupt, format!("chunk in {at} is corrupt: {corrupt}")));
                    }
                }
            }
            again = self.get(&GetPlan::single(source.clone()), deadline).await?;
            stored = &again;
        }
        unreachable!("the loop ends by returning")
    }
}
