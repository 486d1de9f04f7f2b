//! What each volume store's queues hold and did on this shard, for `/metrics`.

use crate::histogram::HistogramCounts;
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::StoreStats;
use crate::shard::harm::GuestIo;
use crate::shard::hydrate::Store;
use crate::shard::hydration_queue::Class;
use crate::shard::stats::Counter;

/// Bytes, and in how many pieces.
#[derive(Default)]
pub struct Moved {
    pub bytes: Counter,
    pub pieces: Counter,
}

impl Moved {
    pub fn add(&self, bytes: u64) {
        self.bytes.add(bytes);
        self.pieces.add(1);
    }
}

type Values = Vec<(&'static str, &'static str, u64)>;

/// One name for each class of hydration, in its order.
macro_rules! by_class {
    ($name:literal) => {
        [
            concat!($name, "{class=\"priority\"}"),
            concat!($name, "{class=\"boot_set\"}"),
            concat!($name, "{class=\"background\"}"),
        ]
    };
}

/// One name for each kind of guest I/O, in its order.
macro_rules! by_io {
    ($name:literal) => {
        [
            concat!($name, "{io=\"read\"}"),
            concat!($name, "{io=\"large_read\"}"),
            concat!($name, "{io=\"write\"}"),
            concat!($name, "{io=\"large_write\"}"),
            concat!($name, "{io=\"flush\"}"),
        ]
    };
}

const BYTES: &str = "Bytes that went to the disk: of guests, and of fills by why they were made.";
const CHUNKS: &str = "Chunks filled, by why.";
const VOLUMES: &str = "Volumes that wait for their turn to hydrate, by the most urgent thing they lack.";
const FILLS: &str = "Chunks in memory that wait for their turn to be written.";
const WAITS: &str = "How long fills waited for their turn.";
const BASELINE: &str = "p99 of guests' I/O at the disk while nothing is filled; 0: not known yet.";
const PRESENT: &str = "p99 of guests' I/O at the disk in the last second; 0: there was none.";

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// In the order of the stores.
    pub(super) fn store_stats(&self) -> Vec<StoreStats> {
        self.0.stores.iter().map(|store| self.stats_of(store)).collect()
    }

    fn stats_of(&self, store: &Store) -> StoreStats {
        let now = self.0.platform.now();
        let (rate, floor, slow_downs) = store.fills.with_harm(|harm| (harm.rate(), harm.floor(), harm.slow_downs()));
        let queue = store.queue.borrow();
        let of_class = |names: [&'static str; 3], help: &'static str, value: &dyn Fn(Class) -> u64| -> Values {
            names.into_iter().zip(Class::ALL).map(|(name, class)| (name, help, value(class))).collect()
        };
        let mut counters =
            of_class(by_class!("store_class_bytes_total"), BYTES, &|class| store.filled[class as usize].bytes.get());
        counters.push(("store_class_bytes_total{class=\"guest\"}", BYTES, store.guest_io.bytes.get()));
        counters.extend(of_class(by_class!("store_class_chunks_total"), CHUNKS, &|class| {
            store.filled[class as usize].pieces.get()
        }));
        counters.push(("store_guest_ios_total", "Guests' I/O that went to the disk.", store.guest_io.pieces.get()));
        let slowed = "How often hydration was slowed down because guests' p99 was over its bound.";
        counters.push(("store_hydration_slow_downs_total", slowed, slow_downs));

        let mut gauges =
            of_class(by_class!("store_class_volumes_waiting"), VOLUMES, &|class| queue.ready(class) as u64);
        gauges.extend(of_class(by_class!("store_class_fills_waiting"), FILLS, &|class| {
            store.fills.waiting(class).0 as u64
        }));
        let asleep = "Volumes that wait for their own rate, or after an error.";
        gauges.push(("store_volumes_asleep", asleep, queue.asleep() as u64));
        gauges.push(("store_guest_ios", "Guests' I/O at the disk.", store.guests.get()));
        gauges.push(("store_fills_bytes", "Bytes of fills at the disk.", store.fills.in_flight_bytes()));
        let limit = "Bytes per second that hydration may write while guests use the store; 0: there is no bound.";
        gauges.push(("store_hydration_limit_bytes_per_second", limit, rate));
        let least = "Bytes per second that hydration may write whatever guests feel.";
        gauges.push(("store_hydration_floor_bytes_per_second", least, floor));
        let baselines = by_io!("store_guest_p99_baseline_microseconds");
        let present = by_io!("store_guest_p99_microseconds");
        for (io, (baseline_name, present_name)) in GuestIo::ALL.into_iter().zip(baselines.into_iter().zip(present)) {
            let (baseline, present) = store.fills.with_harm(|harm| harm.p99(io, now));
            gauges.push((baseline_name, BASELINE, baseline));
            gauges.push((present_name, PRESENT, present));
        }
        let waits = by_class!("store_class_wait_seconds").into_iter().zip(Class::ALL);
        let waits = waits.map(|(name, class)| (name, WAITS, store.fills.waiting(class).1.snapshot()));
        let histograms: Vec<(&'static str, &'static str, HistogramCounts)> = waits.collect();
        StoreStats { store: store.label.to_string(), counters, gauges, histograms }
    }
}
