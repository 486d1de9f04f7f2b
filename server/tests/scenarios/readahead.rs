//! Reading ahead of guests that read in order, on the real shards and the simulated platform: exact counts of GETs, each
//! byte fetched once, and nothing for guests that read elsewhere.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use futures::join;
use volley_server::platform::Platform;
use volley_server::platform::sim::{ObjectFaults, SimObjects, SimWorld};
use volley_server::shard::api::{AttachInfo, Command};
use volley_server::transfer::{GateLimits, QueueLimits, RetryPolicy};
use volley_server::types::HydrationRate;

use crate::support::{self, CHUNK, Image, Node, Options};

const READ: u32 = 128 << 10;

fn world(seed: u64, chunks: u32) -> (SimWorld, SimObjects, Image) {
    let made = support::world("img", chunks, 0, 0, seed);
    made.1.set_faults(faults(Duration::from_millis(20)));
    made
}

fn faults(latency: Duration) -> ObjectFaults {
    ObjectFaults { latency: latency..latency + Duration::from_millis(1), ..ObjectFaults::default() }
}

fn options(readahead_bytes_max: u64) -> Options {
    // A second attempt would be a second GET of the same bytes.
    let retry = RetryPolicy { hedge_percent: 0, ..RetryPolicy::default() };
    Options { cache_bytes: 32 << 20, readahead_bytes_max, retry, ..Options::default() }
}

async fn volume(node: &Node, image: &Image, name: &str, rate: HydrationRate) -> AttachInfo {
    node.create(node.spec(name, image, rate)).await.expect("created");
    node.attach(name).await.expect("attached")
}

/// Reads a range in order, one request after another.
async fn read(node: &Node, volume: &AttachInfo, image: &Image, range: Range<u32>) {
    let (mut at, end) = (u64::from(range.start) * u64::from(CHUNK), u64::from(range.end) * u64::from(CHUNK));
    while at < end {
        let got = node.read(volume, at, READ.min((end - at) as u32)).await.expect("read");
        assert!(got[..] == image.content[at as usize..][..got.len()], "at {at}");
        at += got.len() as u64;
    }
}

/// GETs of packs and the bytes of their ranges; panics when a byte was asked for twice.
fn gets(objects: &SimObjects) -> (u64, u64) {
    let (mut gets, mut seen) = (0, BTreeSet::new());
    for ((key, start, end), times) in &objects.stats().ranges {
        if key.starts_with("packs/") {
            gets += times;
            assert!(*times == 1 && (*start..*end).all(|byte| seen.insert(byte)), "{start}..{end} fetched again");
        }
    }
    (gets, seen.len() as u64)
}

#[test]
fn a_sequential_reader_causes_one_get_for_2_mib_and_hardly_waits() {
    let (world, objects, img) = world(1, 512);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(4 << 20)).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..64).await;
        let (first_gets, _) = gets(&objects);
        assert!(first_gets <= 10, "{first_gets} GETs while the window grows");
        let begun = node.platform.now();
        read(&node, &volume, &img, 64..512).await;
        let took = node.platform.now().since(begun);
        let (all_gets, bytes) = gets(&objects);
        assert!(all_gets - first_gets <= 28 / 2, "{} GETs for 28 MiB", all_gets - first_gets);
        let stored = node.ledger("img", None).await.object_bytes;
        assert_eq!(bytes, stored, "every chunk once");
        // Alone, each of the 448 chunks costs 20 ms.
        assert!(took < Duration::from_millis(20 * 448 / 8), "{took:?}");
        node.platform.sleep(Duration::from_secs(1)).await;
        let (ahead, used) =
            (node.counter(0, "readahead_chunks_total").await, node.counter(0, "readahead_used_chunks_total").await);
        assert!(ahead >= 500 && ahead == used, "{ahead} chunks were fetched ahead, {used} were used");
        assert_eq!(node.counter(0, "readahead_wasted_chunks_total").await, 0);
    });
}

#[test]
fn a_slow_reader_that_finds_everything_present_keeps_the_window_ahead_of_it() {
    let (world, objects, img) = world(2, 128);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(512 << 10)).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        for chunk in 0..128 {
            read(&node, &volume, &img, chunk..chunk + 1).await;
            node.platform.sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(node.counter(0, "guest_read_misses_total").await, 2, "the two that began the stream");
        assert_eq!(node.counter(0, "readahead_used_chunks_total").await, 126);
        gets(&objects);
    });
}

#[test]
fn two_streams_of_a_volume_on_three_shards_are_both_read_ahead_and_hydration_fetches_the_rest_once() {
    let (world, objects, img) = world(3, 256);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options { shards: 3, ..options(1 << 20) }).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        let rate = |rate| move |reply| Command::SetRate { name: "v".into(), rate, reply };
        for step in 0..48 {
            read(&node, &volume, &img, step..step + 1).await;
            read(&node, &volume, &img, 160 + step..161 + step).await;
        }
        let owner = node.owner("v");
        let used = node.counter(owner, "readahead_used_chunks_total").await;
        assert!(used >= 90, "{used} of 96 chunks were read ahead");
        node.command(owner, rate(HydrationRate::Unlimited)).await.expect("a rate");
        node.wait_hydrated("v").await.expect("hydrated");
        let (_, bytes) = gets(&objects);
        let stored = node.ledger("img", None).await.object_bytes;
        assert_eq!(bytes, stored);
    });
}

#[test]
fn a_reader_inside_a_run_of_the_hydrator_promotes_it_and_fetches_nothing_twice() {
    let (world, objects, img) = world(10, 256);
    world.block_on(async {
        // The hydrator's GETs wait for the budget, the reader's do not.
        let gate = GateLimits { bytes_per_second: Some(256 << 10), ..GateLimits::default() };
        let fetch_limits = QueueLimits { gate, ..QueueLimits::default() };
        let node = Node::start(world.platform(), &objects, &Options { fetch_limits, ..options(512 << 10) }).await;
        let node = node.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::Unlimited).await;
        read(&node, &volume, &img, 40..72).await;
        node.wait_hydrated("v").await.expect("hydrated");
        let (_, bytes) = gets(&objects);
        assert_eq!(bytes, node.ledger("img", None).await.object_bytes);
        node.shards[0].check_invariants().unwrap();
    });
}

#[test]
fn a_read_that_catches_up_joins_the_fetch_in_flight() {
    let (world, objects, img) = world(4, 16);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(512 << 10)).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..1).await;
        objects.set_faults(faults(Duration::from_millis(500)));
        let begun = node.platform.now();
        // Chunk 2 is asked for ahead of the read of chunk 1, and wanted while it is on its way.
        let late = async {
            node.platform.sleep(Duration::from_millis(250)).await;
            read(&node, &volume, &img, 2..3).await;
            node.platform.now().since(begun)
        };
        let ((), took) = join!(read(&node, &volume, &img, 1..2), late);
        assert!(took < Duration::from_millis(600), "it waited {took:?}");
        assert_eq!(node.counter(0, "fetches_joined_total").await, 1);
        node.platform.sleep(Duration::from_secs(2)).await;
        let (gets, _) = gets(&objects);
        assert_eq!(gets, 4, "chunks 0, 1, 2, and 3 and 4 together");
    });
}

#[test]
fn a_read_that_catches_up_promotes_the_fetch_that_waits_for_a_slot() {
    let (world, objects, img) = world(5, 64);
    world.block_on(async {
        let gate = GateLimits { gets_max: 3, gets_background_max: 1, ..GateLimits::default() };
        let fetch_limits = QueueLimits { gate, ..QueueLimits::default() };
        let node = Node::start(world.platform(), &objects, &Options { fetch_limits, ..options(512 << 10) }).await;
        let node = node.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..1).await;
        read(&node, &volume, &img, 32..33).await;
        // The first stream's read-ahead takes the only slot that is not priority's, the second's waits for it.
        objects.set_faults(faults(Duration::from_secs(5)));
        let first = read(&node, &volume, &img, 1..2);
        let second = async {
            node.platform.sleep(Duration::from_millis(100)).await;
            read(&node, &volume, &img, 33..34).await;
        };
        let catches_up = async {
            node.platform.sleep(Duration::from_millis(200)).await;
            let begun = node.platform.now();
            objects.set_faults(faults(Duration::from_millis(20)));
            // Both of priority's slots are taken until chunk 1 and 33 are there.
            read(&node, &volume, &img, 34..35).await;
            node.platform.now().since(begun)
        };
        let ((), (), took) = join!(first, second, catches_up);
        assert!(took < Duration::from_secs(5), "it waited {took:?}");
        assert_eq!(node.counter(0, "fetches_joined_total").await, 1);
        node.platform.sleep(Duration::from_secs(10)).await;
        gets(&objects);
    });
}

#[test]
fn a_guest_that_reads_here_and_there_causes_no_read_ahead_and_one_that_leaves_is_counted() {
    let (world, objects, img) = world(6, 512);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(4 << 20)).await.unwrap();
        let there = volume(&node, &img, "there", HydrationRate::None).await;
        for step in 0..100 {
            let chunk = step * 37 % 512;
            read(&node, &there, &img, chunk..chunk + 1).await;
        }
        node.platform.sleep(Duration::from_secs(1)).await;
        assert_eq!(node.counter(0, "readahead_chunks_total").await, 0);
        assert_eq!(gets(&objects).0, 100);

        let leaves = volume(&node, &img, "leaves", HydrationRate::None).await;
        read(&node, &leaves, &img, 0..16).await;
        node.platform.sleep(Duration::from_secs(1)).await;
        let ahead = node.counter(0, "readahead_chunks_total").await;
        let used = node.counter(0, "readahead_used_chunks_total").await;
        assert!(ahead > used && ahead <= 2 * 16, "{ahead} chunks were fetched ahead of 16, {used} used");
        for chunk in [100, 200, 300, 400] {
            read(&node, &leaves, &img, chunk..chunk + 1).await;
        }
        assert_eq!(node.counter(0, "readahead_wasted_chunks_total").await, ahead - used);
    });
}

#[test]
fn what_is_fetched_ahead_of_a_volume_that_is_deleted_is_wasted_and_harms_nothing() {
    let (world, objects, img) = world(7, 64);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1 << 20)).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..9).await;
        let delete = |reply| Command::DeleteVolume { name: "v".into(), force: true, reply };
        node.command(0, delete).await.expect("deleted");
        node.platform.sleep(Duration::from_secs(1)).await;
        let ahead = node.counter(0, "readahead_chunks_total").await;
        let used = node.counter(0, "readahead_used_chunks_total").await;
        assert_eq!(node.counter(0, "readahead_wasted_chunks_total").await, ahead - used);
        assert!(ahead > used);
        node.shards[0].check_invariants().unwrap();
    });
}

#[test]
fn where_the_stores_share_is_spent_reads_are_answered_from_the_cache() {
    let (world, objects, img) = world(8, 128);
    world.block_on(async {
        let options = Options { hydration_bandwidth: Some(256 << 10), ..options(1 << 20) };
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..128).await;
        assert!(node.counter(0, "fills_deferred_total").await > 50);
        assert!(node.counter(0, "readahead_used_chunks_total").await > 120);
        while node.status("v").await.unwrap().remaining_bytes > 0 {
            node.platform.sleep(Duration::from_secs(1)).await;
        }
        gets(&objects);
    });
}

#[test]
fn a_read_ahead_that_fails_costs_the_guest_nothing() {
    let (world, objects, img) = world(9, 64);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1 << 20)).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None).await;
        read(&node, &volume, &img, 0..6).await;
        node.platform.sleep(Duration::from_secs(1)).await;
        // The next window's GET fails for good, the present one is in the volume.
        objects.outage(Duration::from_secs(40));
        read(&node, &volume, &img, 6..10).await;
        node.platform.sleep(Duration::from_secs(41)).await;
        assert!(node.counter(0, "fetch_failures_total").await > 0);
        read(&node, &volume, &img, 10..64).await;
        node.shards[0].check_invariants().unwrap();
    });
}
