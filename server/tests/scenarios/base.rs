//! Volumes that share chunks with the base of their store, on a simulated disk that can share extents.

use std::path::PathBuf;
use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, SimObjects, SimWorld};
use volley_server::shard::api::{AttachInfo, Command, FetchUntil, Request, StoreSharing};
use volley_server::types::HydrationRate;

use crate::support::{self, CHUNK, Image, Node, Options, STORE};

const CHUNKS: u64 = 24;
/// Every eighth chunk is zero.
const STORED: u64 = CHUNKS - CHUNKS / 8;
const VOLUMES: u64 = 20;

fn options(shards: usize) -> Options {
    Options { shards, base_bytes: 64 << 20, ..Options::default() }
}

fn world(seed: u64) -> (SimWorld, SimObjects, Image) {
    let made = support::world("debian", CHUNKS as u32, 512, 8, seed);
    made.0.share_extents(true);
    made
}

async fn sharing(node: &Node) -> StoreSharing {
    let mut sum = StoreSharing::default();
    for shard in 0..node.shards.len() {
        sum += node.command(shard, |reply| Command::Stats { reply }).await.sharing[0];
    }
    sum
}

async fn counters(node: &Node, name: &str) -> u64 {
    let mut sum = 0;
    for shard in 0..node.shards.len() {
        sum += node.counter(shard, name).await;
    }
    sum
}

async fn create(node: &Node, image: &Image, count: u64, rate: HydrationRate) {
    for n in 0..count {
        node.create(node.spec(&format!("v{n}"), image, rate)).await.expect("created");
    }
}

fn path_of(info: &AttachInfo) -> PathBuf {
    PathBuf::from(STORE).join(format!("volumes/{}.raw", info.volume))
}

/// The file of a hydrated volume holds the image.
async fn assert_holds(world: &SimWorld, node: &Node, name: &str, image: &Image) {
    let info = node.attach(name).await.expect("attached");
    let bytes = world.file_bytes(&path_of(&info)).expect("the file");
    assert!(bytes[..image.content.len()] == image.content[..], "volume {name} differs from the image");
}

#[test]
fn each_chunk_is_written_once_and_shared_by_every_volume() {
    for shards in [1, 3] {
        let (world, objects, image) = world(1);
        world.block_on(async {
            let node = Node::start(world.platform(), &objects, &options(shards)).await.expect("start");
            create(&node, &image, VOLUMES, HydrationRate::Unlimited).await;
            for n in 0..VOLUMES {
                node.wait_hydrated(&format!("v{n}")).await.expect("hydrated");
            }
            let shared = sharing(&node).await;
            assert_eq!((shared.base_written_chunks, shared.base_chunks), (STORED, STORED));
            assert_eq!(shared.base_bytes, STORED * u64::from(CHUNK), "the tail is padded to whole sectors");
            assert_eq!((shared.cloned_chunks, shared.clone_failures), (VOLUMES * STORED, 0));
            assert_eq!(shared.cloned_bytes, VOLUMES * shared.base_bytes);
            assert_eq!(counters(&node, "filled_chunks_total").await, 0, "nothing is copied");
            assert_eq!(node.ledger("debian", None).await.fetched_bytes, STORED * u64::from(CHUNK) - 512);
            for n in 0..VOLUMES {
                assert_holds(&world, &node, &format!("v{n}"), &image).await;
            }
            // A guest's write is in its own volume only.
            let first = node.attach("v0").await.expect("attached");
            node.write(&first, u64::from(CHUNK), vec![0xee; 8192], true).await.expect("written");
            assert_eq!(node.read(&first, u64::from(CHUNK), 8192).await.expect("read"), vec![0xee; 8192]);
            assert_holds(&world, &node, "v1", &image).await;
            node.stop().await;
        });
    }
}

/// Each eighth chunk is zero and is not cloned.
const RUNS: u64 = CHUNKS / 8;

#[test]
fn a_volume_is_born_with_what_the_base_holds_and_neighbours_are_cloned_together() {
    for shards in [1, 3] {
        let (world, objects, image) = world(11);
        world.block_on(async {
            let node = Node::start(world.platform(), &objects, &options(shards)).await.expect("start");
            create(&node, &image, 1, HydrationRate::Unlimited).await;
            node.wait_hydrated("v0").await.expect("hydrated");
            let (first, fetched) = (sharing(&node).await, node.ledger("debian", None).await.fetched_bytes);
            node.create(node.spec("w", &image, HydrationRate::Unlimited)).await.expect("created");
            node.wait_hydrated("w").await.expect("hydrated");
            let shared = sharing(&node).await;
            assert_eq!(shared.cloned_chunks - first.cloned_chunks, STORED);
            let clones = shared.clones - first.clones;
            let stretches = if shards == 1 { 1 } else { 2 };
            assert!((RUNS..=RUNS * stretches).contains(&clones), "{clones} clones");
            assert_eq!(node.ledger("debian", None).await.fetched_bytes, fetched, "nothing but the base was asked");
            assert_holds(&world, &node, "w", &image).await;
            node.stop().await;
        });
    }
}

#[test]
fn a_clone_of_neighbours_leaves_out_what_guests_wrote_and_fetches_share_at_once() {
    let (world, objects, image) = world(12);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        node.create(node.spec("w", &image, HydrationRate::None)).await.expect("created");
        let info = node.attach("w").await.expect("attached");
        let at = 2 * u64::from(CHUNK) + 4096;
        node.write(&info, at, vec![7; 4096], false).await.expect("written");
        let before = sharing(&node).await;
        let until = FetchUntil::Resident;
        let fetch = Request::PriorityFetch { volume: info.volume, offset: 0, len: image.content.len() as u64, until };
        node.request(0, fetch).await.expect("fetched");
        let shared = sharing(&node).await;
        assert_eq!(shared.cloned_chunks - before.cloned_chunks, STORED);
        assert_eq!(shared.clones - before.clones, RUNS + 1, "around what the guest wrote");
        assert_eq!(shared.cloned_bytes - before.cloned_bytes, STORED * u64::from(CHUNK) - 4096);
        let mut expected = image.content.clone();
        expected[at as usize..at as usize + 4096].fill(7);
        assert!(node.read(&info, 0, image.content.len() as u32).await.expect("read") == expected);
        node.stop().await;
    });
}

#[test]
fn a_volume_with_a_pace_keeps_it() {
    let (world, objects, image) = world(13);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        let (begun, pace) = (world.now(), u64::from(CHUNK));
        node.create(node.spec("w", &image, HydrationRate::BytesPerSecond(pace))).await.expect("created");
        node.wait_hydrated("w").await.expect("hydrated");
        // The last run is charged, not waited for.
        assert!(world.now().since(begun) >= Duration::from_secs(CHUNKS / 3), "{:?}", world.now().since(begun));
        node.stop().await;
    });
}

#[test]
fn a_chunk_in_the_base_is_read_without_the_cache_or_the_object_store() {
    let (world, objects, image) = world(2);
    world.block_on(async {
        let options = Options { cache_bytes: 0, ..options(1) };
        let node = Node::start(world.platform(), &objects, &options).await.expect("start");
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        node.create(node.spec("w", &image, HydrationRate::None)).await.expect("created");
        let gets = counters(&node, "object_gets_total").await;
        objects.outage(Duration::from_secs(3600));
        let info = node.attach("w").await.expect("attached");
        let at = 3 * u64::from(CHUNK) / 2;
        let read = node.read(&info, at, CHUNK).await.expect("read from the base");
        assert!(read == image.content[at as usize..at as usize + CHUNK as usize]);
        // A write that cut the chunk before is kept.
        node.write(&info, 3 * u64::from(CHUNK) + 4096, vec![7; 4096], false).await.expect("written");
        let mut expected = image.content[3 * CHUNK as usize..4 * CHUNK as usize].to_vec();
        expected[4096..8192].fill(7);
        assert!(node.read(&info, 3 * u64::from(CHUNK), CHUNK).await.expect("read") == expected);
        let until = FetchUntil::Durable;
        let fetch = Request::PriorityFetch { volume: info.volume, offset: 0, len: image.content.len() as u64, until };
        node.request(0, fetch).await.expect("fetched");
        assert_eq!(counters(&node, "object_gets_total").await, gets);
        let tiers = node.shards[0].tiers();
        assert_eq!(sharing(&node).await.cloned_chunks, 2 * STORED, "{tiers:?}");
        node.stop().await;
    });
}

#[test]
fn the_tail_of_a_volume_larger_than_its_snapshot_reads_as_zeroes() {
    let (world, objects, image) = world(3);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        for name in ["a", "b"] {
            let mut spec = node.spec(name, &image, HydrationRate::Unlimited);
            spec.size_bytes = image.content.len() as u64 + 512 + u64::from(CHUNK) / 2;
            // The last chunk of the snapshot ends in the middle of one of the volume's.
            node.create(spec).await.expect("created");
            node.wait_hydrated(name).await.expect("hydrated");
            let info = node.attach(name).await.expect("attached");
            let at = image.content.len() as u64 - 512;
            let tail = node.read(&info, at, 512 + 512 + CHUNK / 2).await.expect("read");
            assert!(tail[..512] == image.content[at as usize..] && tail[512..].iter().all(|byte| *byte == 0));
        }
        assert_eq!(sharing(&node).await.cloned_chunks, 2 * STORED);
        node.stop().await;
    });
}

#[test]
fn clones_that_fail_are_copies_and_a_base_that_fails_again_and_again_rests() {
    let (world, objects, image) = world(4);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        assert_eq!(sharing(&node).await.cloned_chunks, STORED);
        world.share_extents(false);
        for name in ["w0", "w1"] {
            node.create(node.spec(name, &image, HydrationRate::Unlimited)).await.expect("created");
            node.wait_hydrated(name).await.expect("hydrated by copies");
            assert_holds(&world, &node, name, &image).await;
        }
        let failed = sharing(&node).await;
        assert_eq!(failed.cloned_chunks, STORED);
        assert_eq!(counters(&node, "filled_chunks_total").await, 2 * STORED);
        // Each run of neighbours is tried once as lent and once as fetched, until the eighth failure; those that were on
        // their way then fail too.
        assert!((8..4 * RUNS).contains(&failed.clone_failures), "{failed:?}");
        assert!(node.events(0).await.iter().any(|event| event.contains("volumes get copies for a while")));
        // After its rest the base is used again.
        world.share_extents(true);
        world.platform().sleep(Duration::from_secs(31)).await;
        node.create(node.spec("x", &image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("x").await.expect("hydrated");
        assert_eq!(sharing(&node).await.cloned_chunks, 2 * STORED);
        node.stop().await;
    });
}

#[test]
fn a_base_that_cannot_be_written_costs_copies_and_no_more() {
    let (world, objects, image) = world(5);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        world.fail_disk(&format!("{STORE}/base"), DiskOp::Write, 1_000_000);
        create(&node, &image, 2, HydrationRate::Unlimited).await;
        for name in ["v0", "v1"] {
            node.wait_hydrated(name).await.expect("hydrated by copies");
            assert_holds(&world, &node, name, &image).await;
        }
        let shared = sharing(&node).await;
        assert_eq!((shared.cloned_chunks, shared.base_chunks), (0, 0));
        assert!(shared.clone_failures >= 8, "{shared:?}");
        node.stop().await;
    });
}

#[test]
fn the_base_evicts_within_its_budget_and_volumes_keep_what_they_share() {
    let (world, objects, image) = world(6);
    world.block_on(async {
        let room = 5 * u64::from(CHUNK);
        let node = Node::start(world.platform(), &objects, &Options { base_bytes: room, ..options(1) }).await.unwrap();
        create(&node, &image, 3, HydrationRate::Unlimited).await;
        for n in 0..3 {
            node.wait_hydrated(&format!("v{n}")).await.expect("hydrated");
        }
        let shared = sharing(&node).await;
        assert!(shared.base_bytes <= room && shared.base_chunks <= 5, "{shared:?}");
        assert_eq!(shared.base_written_bytes - shared.base_bytes, shared.base_evicted_bytes);
        assert!(shared.base_evicted_bytes > 0);
        for n in 0..3 {
            assert_holds(&world, &node, &format!("v{n}"), &image).await;
        }
        node.stop().await;
    });
}

#[test]
fn a_store_that_runs_low_takes_the_base_back() {
    let (world, objects, image) = world(7);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options(1)).await.expect("start");
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        let used = (1 << 40) - world.disk_free_bytes();
        world.set_disk_capacity(Some(used + 4096));
        world.platform().sleep(Duration::from_secs(2)).await;
        let shared = sharing(&node).await;
        assert_eq!((shared.base_bytes, shared.base_chunks), (0, 0));
        assert_holds(&world, &node, "v0", &image).await;
        world.set_disk_capacity(None);
        world.platform().sleep(Duration::from_secs(2)).await;
        create_more(&node, &image).await;
        assert_eq!(sharing(&node).await.base_chunks, STORED);
        node.stop().await;
    });
}

async fn create_more(node: &Node, image: &Image) {
    node.create(node.spec("more", image, HydrationRate::Unlimited)).await.expect("created");
    node.wait_hydrated("more").await.expect("hydrated");
}

#[test]
fn only_the_first_copy_is_charged_to_the_share_of_the_store() {
    let (world, objects, image) = world(8);
    world.block_on(async {
        let bandwidth = Some(256 << 10);
        let options = Options { hydration_bandwidth: bandwidth, ..options(1) };
        let node = Node::start(world.platform(), &objects, &options).await.expect("start");
        let begun = world.now();
        create(&node, &image, 1, HydrationRate::Unlimited).await;
        node.wait_hydrated("v0").await.expect("hydrated");
        let first = world.now().since(begun);
        let begun = world.now();
        for n in 0..8 {
            node.create(node.spec(&format!("w{n}"), &image, HydrationRate::Unlimited)).await.expect("created");
        }
        for n in 0..8 {
            node.wait_hydrated(&format!("w{n}")).await.expect("hydrated");
        }
        let eight = world.now().since(begun);
        assert!(eight < first + Duration::from_secs(6), "one by a copy: {first:?}, eight by clones: {eight:?}");
        node.stop().await;
    });
}

#[test]
fn without_shared_extents_or_a_budget_there_is_no_base() {
    for (shares, base_bytes) in [(false, 64 << 20), (true, 0)] {
        let (world, objects, image) = world(9);
        world.share_extents(shares);
        world.block_on(async {
            let node = Node::start(world.platform(), &objects, &Options { base_bytes, ..options(1) }).await.unwrap();
            create(&node, &image, 2, HydrationRate::Unlimited).await;
            for name in ["v0", "v1"] {
                node.wait_hydrated(name).await.expect("hydrated");
                assert_holds(&world, &node, name, &image).await;
            }
            assert_eq!(sharing(&node).await, StoreSharing::default());
            assert_eq!(counters(&node, "filled_chunks_total").await, 2 * STORED);
            node.stop().await;
        });
    }
}

#[test]
fn a_restart_removes_the_base_and_every_crash_leaves_the_image() {
    for seed in 10..40 {
        let (world, objects, image) = world(seed);
        let shards = 1 + seed as usize % 3;
        world.crash_after_steps(Some(500 + seed * 180));
        let _ = world.run(async {
            let node = Node::start(world.platform(), &objects, &options(shards)).await.expect("start");
            create(&node, &image, 4, HydrationRate::Unlimited).await;
            for n in 0..4 {
                node.wait_hydrated(&format!("v{n}")).await.expect("hydrated");
            }
            std::future::pending::<()>().await;
        });
        world.crash_after_steps(None);
        world.block_on(async {
            let node = Node::start(world.platform(), &objects, &options(1 + shards % 3)).await.expect("start again");
            let shared = sharing(&node).await;
            assert!(shared.shares_extents);
            let there: Vec<String> = node.shards.iter().enumerate().map(|(n, _)| format!("{n}.chunks")).collect();
            let files = world.platform().list_dir(&PathBuf::from(STORE).join("base")).await.expect("the base");
            assert!(files.iter().all(|file| there.contains(&file.name)), "seed {seed}: {files:?}");
            for n in 0..4 {
                let name = format!("v{n}");
                let known = node.status(&name).await.is_ok();
                if !known {
                    node.create(node.spec(&name, &image, HydrationRate::Unlimited)).await.expect("created");
                }
                node.wait_hydrated(&name).await.expect("hydrated");
                assert_holds(&world, &node, &name, &image).await;
            }
            node.stop().await;
        });
    }
}
