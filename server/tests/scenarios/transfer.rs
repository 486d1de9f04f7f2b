//! What transfer promises, on the real shards and the simulated platform: one fetch however many ask, budgets, second
//! attempts, restraint when the object store asks for it, and a ledger that adds up. Virtual time, exact counts.

use std::time::Duration;

use futures::future::join_all;
use volley_server::error::Status;
use volley_server::platform::Platform;
use volley_server::platform::sim::{ObjectFaults, SimObjects, SimWorld};
use volley_server::shard::api::{AttachInfo, Command};
use volley_server::transfer::{GateLimits, QueueLimits, RetryPolicy};
use volley_server::types::HydrationRate;

use crate::support::{self, CHUNK, Image, Node, Options, status_of};

/// A world with one image of `chunks` chunks, none of them zero.
fn world(seed: u64, chunks: u32) -> (SimWorld, SimObjects, Image) {
    support::world("img", chunks, 0, 0, seed)
}

fn quick() -> ObjectFaults {
    ObjectFaults { latency: Duration::from_millis(1)..Duration::from_millis(2), ..ObjectFaults::default() }
}

async fn volume(node: &Node, image: &Image, name: &str, rate: HydrationRate, batch: Option<u64>) -> AttachInfo {
    let mut spec = node.spec(name, image, rate);
    spec.batch = batch;
    node.create(spec).await.expect("created");
    node.attach(name).await.expect("attached")
}

/// Reads the first block of each chunk in turn; how many of them failed past the deadline.
async fn read_all(node: &Node, volume: &AttachInfo, chunks: std::ops::Range<u32>) -> usize {
    let mut late = 0;
    for chunk in chunks {
        match node.read(volume, u64::from(chunk) * u64::from(CHUNK), 512).await {
            Ok(_) => {}
            error => {
                assert_eq!(status_of(error), Status::DeadlineExceeded);
                late += 1;
            }
        }
    }
    late
}

#[test]
fn six_thousand_volumes_that_want_the_same_chunk_at_the_same_instant_cause_one_get() {
    let (world, objects, img) = world(1, 3);
    objects.set_faults(quick());
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options { shards: 3, ..Options::default() }).await.unwrap();
        let mut specs: Vec<Vec<_>> = vec![Vec::new(); 3];
        let names: Vec<String> = (0..6000).map(|n| format!("vm-{n}")).collect();
        for name in &names {
            let spec = node.spec(name, &img, HydrationRate::None);
            specs[spec.id.owner(3)].push(spec);
        }
        for (shard, specs) in specs.into_iter().enumerate() {
            node.command(shard, |reply| Command::CreateVolumes { specs, reply }).await.expect("created");
        }
        let volumes = join_all(names.iter().map(|name| node.attach(name))).await;
        let volumes: Vec<AttachInfo> = volumes.into_iter().map(|volume| volume.expect("attached")).collect();
        let before = objects.stats().gets;
        let at = u64::from(CHUNK) + 4096;
        let reads = join_all(volumes.iter().map(|volume| node.read(volume, at, 512))).await;
        assert!(reads.iter().all(|read| read.as_ref().expect("read")[..] == img.content[at as usize..][..512]));
        assert_eq!(objects.stats().gets - before, 1);
        let ledger = node.ledger("img", None).await;
        assert_eq!((ledger.gets, ledger.fetched_bytes, ledger.asked_bytes), (1, CHUNK.into(), 6000 * 512));
        assert!(ledger.ram_bytes + ledger.joined_bytes >= 5999 * u64::from(CHUNK));
    });
}

#[test]
fn the_ledger_says_what_sharing_saved_by_batch() {
    let (world, objects, img) = world(2, 8);
    objects.set_faults(quick());
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        let first = volume(&node, &img, "a", HydrationRate::None, Some(1)).await;
        let second = volume(&node, &img, "b", HydrationRate::None, Some(2)).await;
        for volume in [&first, &second, &second] {
            node.read(volume, 0, 1024).await.expect("read");
        }
        let (one, two) = (node.ledger("img", Some(1)).await, node.ledger("img", Some(2)).await);
        let chunk = u64::from(CHUNK);
        assert_eq!((one.gets, one.fetched_bytes, one.ram_bytes, one.asked_bytes), (1, chunk, 0, 1024));
        assert_eq!((two.gets, two.fetched_bytes, two.asked_bytes), (0, 0, 2048));
        assert!(two.ram_bytes >= chunk, "found in the cache");
        assert!(one.object_bytes > 0 && one.saved_bytes == 0);
        assert_eq!(two.saved_bytes % one.object_bytes, 0, "in stored bytes");
        assert!(two.saved_bytes >= one.object_bytes);
    });
}

#[test]
fn a_slow_get_that_a_guest_waits_for_is_sent_again() {
    let late = |hedge_percent: u32| {
        let (world, objects, img) = world(3, 160);
        objects.set_faults(quick());
        world.block_on(async {
            let retry = RetryPolicy { hedge_percent, ..RetryPolicy::default() };
            let node = Node::start(world.platform(), &objects, &Options { retry, ..Options::default() }).await.unwrap();
            let volume = volume(&node, &img, "v", HydrationRate::None, None).await;
            assert_eq!(read_all(&node, &volume, 0..60).await, 0);
            objects.set_faults(ObjectFaults { hang_ppm: 200_000, ..quick() });
            let late = read_all(&node, &volume, 60..160).await;
            let hedges = node.counter(0, "object_hedges_total").await;
            assert_eq!(node.ledger("img", None).await.hedges, hedges);
            (late, hedges)
        })
    };
    let (alone, none) = late(0);
    let (twice, hedges) = late(100);
    assert_eq!(none, 0);
    assert!(alone >= 10 && twice * 2 < alone, "{alone} reads were late without second attempts, {twice} with them");
    assert!(hedges >= 10, "{hedges} second attempts");
    let (_, few) = late(5);
    assert!(few <= 160 * 5 / 100, "{few} second attempts of 160 GETs exceed their share");
}

#[test]
fn an_object_store_that_asks_to_slow_down_is_asked_less_and_more_again_later() {
    let (world, objects, img) = world(4, 400);
    objects.set_faults(quick());
    world.block_on(async {
        let options = Options { guest_deadline: Duration::from_secs(2), ..Options::default() };
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::None, None).await;
        assert_eq!(read_all(&node, &volume, 0..1).await, 0);
        assert_eq!(node.gauge(0, "object_gets_window").await, 16);
        objects.set_faults(ObjectFaults { retry_ppm: 1_000_000, ..quick() });
        assert_eq!(read_all(&node, &volume, 1..5).await, 4);
        let throttled = node.gauge(0, "object_gets_window").await;
        assert!(throttled <= 4, "{throttled} GETs at once");
        assert!(node.counter(0, "object_throttles_total").await > 0);
        assert!(node.events(0).await.iter().any(|event| event.contains("asks to slow down")));
        objects.set_faults(quick());
        node.platform.sleep(Duration::from_secs(40)).await;
        assert_eq!(read_all(&node, &volume, 5..300).await, 0);
        let window = node.gauge(0, "object_gets_window").await;
        assert!(window > 2 * throttled, "{window} GETs at once again, after {throttled}");
    });
}

#[test]
fn background_keeps_to_the_requests_per_second_and_a_guest_does_not_wait_for_them() {
    let (world, objects, img) = world(5, 300);
    objects.set_faults(quick());
    world.block_on(async {
        // A GET brings one chunk.
        let gate = GateLimits { gets_per_second: Some(10), ..GateLimits::default() };
        let fetch_limits = QueueLimits { gate, get_bytes_max: 1, share: true };
        let options = Options { fetch_limits, cache_bytes: 0, ..Options::default() };
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        let volume = volume(&node, &img, "v", HydrationRate::Unlimited, None).await;
        let begun = node.platform.now();
        node.platform.sleep(Duration::from_secs(2)).await;
        let asked = node.platform.now();
        node.read(&volume, 299 * u64::from(CHUNK), 512).await.expect("read");
        let waited = node.platform.now().since(asked);
        assert!(waited < Duration::from_millis(50), "a guest waited {waited:?}");
        node.wait_hydrated("v").await.expect("hydrated");
        let took = node.platform.now().since(begun).as_secs_f64();
        assert!((28.0..33.0).contains(&took), "300 GETs at 10/s took {took} s");
        assert_eq!(node.counter(0, "object_gets_total").await, 300);
    });
}

#[test]
fn without_sharing_every_volume_fetches_for_itself() {
    let (world, objects, img) = world(6, 4);
    objects.set_faults(quick());
    world.block_on(async {
        let fetch_limits = QueueLimits { share: false, ..QueueLimits::default() };
        let options = Options { fetch_limits, ..Options::default() };
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        for name in ["a", "b", "c"] {
            let volume = volume(&node, &img, name, HydrationRate::None, None).await;
            assert_eq!(node.read(&volume, 0, 512).await.expect("read")[..], img.content[..512]);
        }
        let ledger = node.ledger("img", None).await;
        assert_eq!((ledger.gets, ledger.saved_bytes, ledger.ram_bytes, ledger.joined_bytes), (3, 0, 0, 0));
    });
}
