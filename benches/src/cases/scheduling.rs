//! What hydration asks before each of its steps: whose turn it is, and whether the budget allows it.

use std::hint::black_box;

use volley_server::budget::TokenBucket;
use volley_server::platform::Time;
use volley_server::shard::hydration_queue::{Class, HydrationQueue, Rank};

use super::{Case, Work};

const BATCH: u32 = 1024;
/// Volumes of one store that hydrate.
const VOLUMES: u64 = 1000;

pub(super) const CASES: [Case; 2] = [
    Case::new("scheduling/pick", (BATCH, "pick"), pick),
    Case::new("scheduling/token_bucket_take", (BATCH, "take"), token_bucket_take),
];

/// A volume has its turn and stands behind its equals again. A few have a deadline; those of the most urgent class take turns.
fn pick() -> Box<dyn Work> {
    let mut queue = HydrationQueue::default();
    for volume in 0..VOLUMES {
        let class = Class::ALL[(volume % 3) as usize];
        queue.put(volume, Rank::new(class, (volume % 60 == 1).then_some(1_767_225_600_000 + volume)));
    }
    Box::new(move || {
        for _ in 0..BATCH {
            let (volume, rank) = queue.first(Time(0)).expect("none leaves");
            queue.remove(volume);
            queue.put(black_box(volume), rank);
        }
    })
}

/// Chunks of 64 KiB at 1 GiB/s. One comes every 40 µs but takes 61: about a third is refused.
fn token_bucket_take() -> Box<dyn Work> {
    let mut now = 0;
    let mut bucket = TokenBucket::new(Some(1 << 30), Time(now));
    // Without what a bucket holds at its start it is in its steady state at once.
    bucket.charge((1 << 30) / 10, Time(now));
    Box::new(move || {
        for _ in 0..BATCH {
            now += 40_000;
            let _ = black_box(bucket.take(black_box(64 << 10), Time(now)));
        }
    })
}
