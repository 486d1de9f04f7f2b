//! Counters of a shard and its recent events. Plain cells: one thread owns them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

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
    corrupt_chunks: "Chunks that failed their digest and were dropped.",
    filled_chunks: "Chunks written into volumes by hydration.",
    filled_bytes: "Bytes written into volumes by hydration.",
    fills_deferred: "Fills of read misses put off because the store's hydration share was spent.",
    syncs: "Volume file syncs.",
    checkpoints: "Journal checkpoints.",
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
