//! Counters of a shard and its recent events. Plain cells: one thread owns them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use crate::histogram::{Histogram, HistogramCounts};
use crate::transfer::{Story, Tier};

/// Events kept for the operator; older ones are only in the log.
const EVENTS_MAX: usize = 64;

#[derive(Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.set(self.0.get().wrapping_add(n));
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

macro_rules! counters {
    ($($name:ident: $help:literal),* $(,)?) => {
        /// Monotonic counters since the shard started.
        #[derive(Default)]
        pub struct Counters {
            $(pub $name: Counter,)*
            events: RefCell<VecDeque<String>>,
        }

        impl Counters {
            /// Metric name, help text and value of each counter.
            #[must_use]
            pub fn snapshot(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((concat!(stringify!($name), "_total"), $help, self.$name.get()),)*]
            }
        }
    };
}

counters! {
    guest_reads: "Guest reads answered or refused.",
    guest_read_bytes: "Bytes asked by guest reads.",
    guest_writes: "Guest writes, discards and write-zeroes.",
    guest_written_bytes: "Bytes of guest writes.",
    guest_flushes: "Guest flushes.",
    guest_read_misses: "Guest reads that touched a chunk that was not resident.",
    guest_errors: "Guest requests answered with an error.",
    priority_fetches: "Priority fetches asked.",
    priority_fetch_hits: "Priority fetches answered by one look-up: the range was resident.",
    requests_forwarded: "Requests passed on to the shard that owns the volume.",
    requests_refused_busy: "Requests refused because the queue to another shard was full.",
    stale_generations: "Requests refused because another host had attached the volume.",
    fetches_joined: "Fetches that joined one already queued or in flight.",
    fetch_failures: "Chunks whose fetch failed for good.",
    object_gets: "GETs sent to the object store.",
    object_get_bytes: "Bytes received from the object store.",
    object_errors: "GETs that failed.",
    object_retries: "GETs repeated after a failure.",
    object_throttles: "GETs that the object store asked to slow down, or did not answer in time.",
    object_hedges: "Second attempts of slow priority GETs.",
    corrupt_chunks: "Chunks that failed their digest and were dropped.",
    filled_chunks: "Chunks written into volumes by hydration.",
    filled_bytes: "Bytes written into volumes by hydration.",
    staged_bytes: "Bytes put aside for snapshots because guests wrote there first.",
    fills_deferred: "Fills of read misses put off because hydration of the store was at its limit.",
    boots_recorded: "First boots of volumes whose touched chunks were recorded.",
    boot_chunks_prefetched: "Chunks of boot sets, and of the images of waves, fetched into the cache before anybody asked.",
    readahead_chunks: "Chunks fetched ahead of guests that read in order.",
    readahead_used_chunks: "Chunks asked for ahead of a guest that it read afterwards.",
    readahead_wasted_chunks: "Chunks asked for ahead of a guest that went on elsewhere, or whose volume was deleted.",
    syncs: "Volume file syncs.",
    checkpoints: "Journal checkpoints.",
}

/// Where the time of fetches and of reads that waited for them went.
#[derive(Default)]
pub struct StageTimes {
    queue: Histogram,
    transfer: Histogram,
    verify: Histogram,
    read_ram: Histogram,
    read_disk: Histogram,
    read_object_store: Histogram,
    cut: Histogram,
}

impl StageTimes {
    /// A chunk came from the object store.
    pub fn fetched(&self, story: &Story) {
        self.queue.add(story.queue);
        self.transfer.add(story.transfer);
        self.verify.add(story.verify);
    }

    /// Guests of a volume were held back so long for a snapshot.
    pub fn cut(&self, stall: Duration) {
        self.cut.add(stall);
    }

    /// A guest's read found chunks absent; `tier` is the slowest that it waited for.
    pub fn read_missed(&self, tier: Tier, took: Duration) {
        match tier {
            Tier::Ram => self.read_ram.add(took),
            Tier::Disk => self.read_disk.add(took),
            Tier::ObjectStore => self.read_object_store.add(took),
        }
    }

    /// Metric name with labels, help text and counts of each histogram.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(&'static str, &'static str, HistogramCounts)> {
        const FETCH: &str = "Stages of chunks fetched from the object store.";
        const READ: &str = "Guest reads that touched an absent chunk, by the slowest tier that answered.";
        vec![
            ("fetch_stage_seconds{stage=\"queue\"}", FETCH, self.queue.snapshot()),
            ("fetch_stage_seconds{stage=\"transfer\"}", FETCH, self.transfer.snapshot()),
            ("fetch_stage_seconds{stage=\"verify\"}", FETCH, self.verify.snapshot()),
            ("snapshot_stall_seconds", "How long a snapshot held guests' writes back.", self.cut.snapshot()),
            ("guest_read_miss_seconds{tier=\"ram\"}", READ, self.read_ram.snapshot()),
            ("guest_read_miss_seconds{tier=\"disk\"}", READ, self.read_disk.snapshot()),
            ("guest_read_miss_seconds{tier=\"object_store\"}", READ, self.read_object_store.snapshot()),
        ]
    }
}

impl Counters {
    /// Notes an event that names a cause, for the operator and the log.
    pub fn event(&self, wall_clock_ms: u64, text: &str) {
        tracing::warn!(event = text);
        let mut events = self.events.borrow_mut();
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(format!("{wall_clock_ms} {text}"));
    }

    #[must_use]
    pub fn events(&self) -> Vec<String> {
        self.events.borrow().iter().cloned().collect()
    }
}
