//! How fast an object store is from here: the latency of small reads, and bytes per second by the number of large ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::executor::block_on;
use serde::Serialize;
use volley_server::object_store::ObjectStore;
use volley_server::platform::blocking::ToolStore;

use super::features::{LARGE_BYTES, SMALL_BYTES, large_key, small_key};

/// Enough for a p99 that is not the longest.
const SMALL_GETS: usize = 128;
/// What a coalesced read of hydration may ask for.
const LARGE_GET_BYTES: u64 = 4 << 20;
const CONCURRENCIES: [usize; 4] = [1, 4, 16, 32];
/// A measurement ends after this, however slow the store is.
const MEASURE_MAX: Duration = Duration::from_secs(3);
/// And on a fast one after so many bytes.
const MEASURE_BYTES: u64 = 512 << 20;

/// Of small reads, one after the other.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) bytes: usize,
    pub(super) requests: usize,
    pub(super) p50_ms: f64,
    pub(super) p90_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) max_ms: f64,
}

/// Of large reads, so many at a time.
#[derive(Debug, Serialize)]
pub(super) struct Throughput {
    pub(super) concurrency: usize,
    pub(super) get_bytes: u64,
    pub(super) mib_per_second: f64,
    pub(super) failed: u64,
}

/// `None` when none succeeds.
pub(super) fn small_gets(store: &ToolStore, prefix: &str) -> Option<Latency> {
    let key = small_key(prefix);
    let end = Instant::now() + MEASURE_MAX * 2;
    let mut times = Vec::new();
    while times.len() < SMALL_GETS && Instant::now() < end {
        let begun = Instant::now();
        block_on(store.get_range(&key, 0..SMALL_BYTES as u64)).ok()?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1).copied();
    Some(Latency {
        bytes: SMALL_BYTES,
        requests: times.len(),
        p50_ms: at(50)?,
        p90_ms: at(90)?,
        p99_ms: at(99)?,
        max_ms: at(100)?,
    })
}

pub(super) fn large_gets(store: &ToolStore, prefix: &str) -> Vec<Throughput> {
    let key = large_key(prefix);
    CONCURRENCIES.iter().map(|concurrency| measure(store, &key, *concurrency)).collect()
}

fn measure(store: &ToolStore, key: &str, concurrency: usize) -> Throughput {
    let (got, failed, next) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    let read = || {
        let pieces = LARGE_BYTES as u64 / LARGE_GET_BYTES;
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if begun.elapsed() >= MEASURE_MAX || piece * LARGE_GET_BYTES >= MEASURE_BYTES {
                return;
            }
            let start = piece % pieces * LARGE_GET_BYTES;
            match block_on(store.get_range(key, start..start + LARGE_GET_BYTES)) {
                Ok(bytes) => got.fetch_add(bytes.len() as u64, Ordering::Relaxed),
                Err(_) => failed.fetch_add(1, Ordering::Relaxed),
            };
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..concurrency {
            scope.spawn(read);
        }
    });
    let mib = got.load(Ordering::Relaxed) as f64 / f64::from(1 << 20);
    Throughput {
        concurrency,
        get_bytes: LARGE_GET_BYTES,
        mib_per_second: mib / begun.elapsed().as_secs_f64(),
        failed: failed.load(Ordering::Relaxed),
    }
}
