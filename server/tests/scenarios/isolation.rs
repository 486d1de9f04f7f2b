//! Who hydrates first, and what guests feel of it: on the real shards and the simulated platform.

use std::cell::Cell;
use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, SimWorld};
use volley_server::shard::api::{AttachInfo, Command};
use volley_server::shard::harm::HarmConfig;
use volley_server::types::{HydrationRate, VolumeSpec};

use crate::support::{CHUNK, Lab, Node, Options};

/// Two runs of a volume and a bit.
const CHUNKS: u32 = 300;
/// What the store's share of the tests lets through: a run takes about two seconds.
const SHARE: u64 = 4 << 20;

fn lab(seed: u64) -> Lab {
    Lab::of(CHUNKS, 0, 0, seed)
}

/// The image fits twice into the cache.
fn cached(options: Options) -> Options {
    Options { cache_bytes: 2 * CHUNKS as usize * CHUNK as usize, ..options }
}

impl Lab {
    async fn create(&self, node: &Node, name: &str, batch: Option<u64>) {
        let spec = node.spec(name, &self.image, HydrationRate::Unlimited);
        node.create(VolumeSpec { batch, ..spec }).await.expect("created");
    }
}

async fn set_deadline(node: &Node, batch: u64, deadline_unix_ms: Option<u64>) {
    for shard in 0..node.shards.len() {
        node.command(shard, |reply| Command::SetDeadline { batch, deadline_unix_ms, reply }).await;
    }
}

async fn resident(node: &Node, name: &str) -> u64 {
    node.status(name).await.expect("a volume").resident_bytes
}

/// Waits until all of these are hydrated; what the others have by then, and the largest distance there was between two.
async fn hydrated(node: &Node, names: &[&str], others: &[&str]) -> (Vec<u64>, u64) {
    let mut apart = 0;
    loop {
        node.platform.sleep(Duration::from_millis(100)).await;
        let mut have = Vec::new();
        for name in names {
            have.push(resident(node, name).await);
        }
        let (least, most) = (have.iter().min().copied().unwrap_or(0), have.iter().max().copied().unwrap_or(0));
        apart = apart.max(most - least);
        if least == u64::from(CHUNKS * CHUNK) {
            let mut rest = Vec::new();
            for name in others {
                rest.push(resident(node, name).await);
            }
            return (rest, apart);
        }
    }
}

const RUN: u64 = 8 << 20;

#[test]
fn a_batch_with_an_early_deadline_overtakes_and_its_volumes_take_turns() {
    let lab = lab(1);
    lab.world.block_on(async {
        let node = lab.node(&cached(Options { hydration_bandwidth: Some(SHARE), ..Options::default() })).await;
        set_deadline(&node, 2, Some(1_000)).await;
        for name in ["none-0", "none-1"] {
            lab.create(&node, name, Some(1)).await;
        }
        for name in ["early-0", "early-1", "early-2"] {
            lab.create(&node, name, Some(2)).await;
        }
        let (rest, apart) = hydrated(&node, &["early-0", "early-1", "early-2"], &["none-0", "none-1"]).await;
        assert!(rest.iter().sum::<u64>() <= 2 * RUN, "no more than began before: {rest:?}");
        assert!(apart <= RUN + RUN / 2, "volumes of one deadline take turns: {apart} bytes apart");
        // The last deadline wins, also for volumes that are there; `None` forgets it.
        lab.create(&node, "late", Some(3)).await;
        set_deadline(&node, 3, Some(500)).await;
        set_deadline(&node, 2, None).await;
        let (rest, _) = hydrated(&node, &["late"], &["none-0", "none-1"]).await;
        assert!(rest.iter().sum::<u64>() <= 3 * RUN, "overtaken: {rest:?}");
        set_deadline(&node, 3, None).await;
        hydrated(&node, &["none-0", "none-1"], &[]).await;
        node.stop().await;
    });
}

#[test]
fn what_a_guest_missed_comes_before_any_deadline() {
    let lab = lab(2);
    lab.world.block_on(async {
        let node = lab.node(&cached(Options { hydration_bandwidth: Some(SHARE), ..Options::default() })).await;
        set_deadline(&node, 2, Some(1)).await;
        lab.create(&node, "early-0", Some(2)).await;
        lab.create(&node, "early-1", Some(2)).await;
        lab.create(&node, "alone", None).await;
        let volume = node.attach("alone").await.expect("attached");
        // The share is spent by now: the chunk is owed.
        node.platform.sleep(Duration::from_millis(300)).await;
        let at = u64::from(CHUNK) * 200;
        node.read(&volume, at, 4096).await.expect("read");
        let shard = &node.shards[0];
        assert_eq!(shard.is_resident(volume.volume, at, CHUNK.into()), Some(false), "it is owed");
        let mut waited = 0;
        while shard.is_resident(volume.volume, at, CHUNK.into()) != Some(true) {
            node.platform.sleep(Duration::from_millis(100)).await;
            waited += 1;
            let early = resident(&node, "early-0").await + resident(&node, "early-1").await;
            assert!(early <= 2 * RUN, "the others went on before it: {early} bytes after {waited} looks");
        }
        assert!(resident(&node, "alone").await <= 2 * u64::from(CHUNK), "only that of it");
        node.stop().await;
    });
}

/// A disk that guests feel fills on: above this many bytes per second of them reads take long. One in a hundred takes 50 times
/// as long as the others at all times, so it is longer than that.
const HARMLESS: u64 = 8 << 20;
const FLOOR: u64 = 2 << 20;
const BANDWIDTH: u64 = 24 << 20;
const LOOK: Duration = Duration::from_millis(5);

fn read_latency(world: &SimWorld, harmed: bool) {
    let us = if harmed { 25_000..27_500 } else { 300..330 };
    world.heal_disk();
    world.slow_disk("/node/store", DiskOp::Read, Duration::from_micros(us.start)..Duration::from_micros(us.end));
}

/// Reads one volume again and again until told to stop.
async fn guest(node: &Node, volume: &AttachInfo, stop: &Cell<bool>) {
    let mut at = 0;
    while !stop.get() {
        node.read(volume, at % (u64::from(CHUNK) * 64), 4096).await.expect("read");
        at += 4096;
    }
}

/// Makes reads slow while fills are fast, or at all times.
async fn disk(lab: &Lab, node: &Node, always: &Cell<bool>, stop: &Cell<bool>) {
    let mut filled = node.counter(0, "filled_bytes_total").await;
    let mut lately = std::collections::VecDeque::new();
    while !stop.get() {
        node.platform.sleep(LOOK).await;
        let now = node.counter(0, "filled_bytes_total").await;
        lately.push_back(now - std::mem::replace(&mut filled, now));
        if lately.len() > 10 {
            lately.pop_front();
        }
        let per_second = lately.iter().sum::<u64>() * 1000 / (lately.len() as u64 * LOOK.as_millis() as u64);
        read_latency(&lab.world, always.get() || per_second > HARMLESS);
    }
}

/// Bytes per second that hydration fills from the third to the thirteenth second of a guest's reads, with what it had to
/// slow down; and that everything is hydrated soon when the guest has left.
fn beside_a_guest(harm: HarmConfig, slow_by_itself: bool) -> (u64, u64) {
    let lab = lab(3);
    let (stop, slow, figures) = (Cell::new(false), Cell::new(false), Cell::new((0, 0)));
    lab.world.block_on(async {
        let node =
            lab.node(&cached(Options { harm, hydration_bandwidth: Some(BANDWIDTH), ..Options::default() })).await;
        read_latency(&lab.world, false);
        lab.create(&node, "guest", None).await;
        node.wait_hydrated("guest").await.expect("hydrated");
        let volume = node.attach("guest").await.expect("attached");
        let names: Vec<String> = (0..20).map(|n| format!("vm-{n}")).collect();
        let rest = async {
            // Until now the guest was alone: that is its baseline.
            node.platform.sleep(Duration::from_secs(2)).await;
            slow.set(slow_by_itself);
            for name in &names {
                lab.create(&node, name, None).await;
            }
            node.platform.sleep(Duration::from_secs(3)).await;
            let before = node.counter(0, "filled_bytes_total").await;
            node.platform.sleep(Duration::from_secs(10)).await;
            let filled = node.counter(0, "filled_bytes_total").await - before;
            assert!(
                node.status(&names[19]).await.expect("a volume").remaining_bytes > 0,
                "nothing was left to measure"
            );
            figures.set((filled / 10, node.of_store(0, "store_hydration_slow_downs_total").await));
            let limit = node.of_store(0, "store_hydration_limit_bytes_per_second").await;
            let floor = node.of_store(0, "store_hydration_floor_bytes_per_second").await;
            assert!(harm.bound_percent.is_none() || limit >= floor, "{limit} < {floor}");
            stop.set(true);
        };
        futures::join!(guest(&node, &volume, &stop), disk(&lab, &node, &slow, &stop), rest);
        let begun = node.platform.now();
        for name in &names {
            node.wait_hydrated(name).await.expect("hydrated");
        }
        let took = node.platform.now().since(begun);
        assert!(took < Duration::from_secs(30), "{took:?} after the guest has left, {:?}", figures.get());
        let background = node.of_store(0, "store_class_bytes_total{class=\"background\"}").await;
        assert_eq!(background, 21 * u64::from(CHUNKS * CHUNK), "every byte on its class's account");
        node.stop().await;
    });
    figures.get()
}

#[test]
fn hydration_keeps_below_what_guests_feel_and_above_its_floor() {
    let harm = |bound_percent| HarmConfig { bound_percent, floor: Some(FLOOR) };
    let (free, _) = beside_a_guest(harm(None), false);
    let (careful, slow_downs) = beside_a_guest(harm(Some(120)), false);
    println!("hydration beside a guest: {free} bytes/s without a bound, {careful} with one, {slow_downs} slow-downs");
    assert!(free > HARMLESS * 3 / 2, "the test's disk is too slow: {free}");
    assert!(slow_downs > 0);
    assert!(careful < HARMLESS * 3 / 2, "{careful} bytes per second");
    assert!(careful > FLOOR * 9 / 10, "{careful} bytes per second");
}

#[test]
fn a_disk_that_is_slow_by_itself_starves_nobody() {
    let (rate, _) = beside_a_guest(HarmConfig { bound_percent: Some(120), floor: Some(FLOOR) }, true);
    println!("hydration beside a slow disk: {rate} bytes/s");
    assert!(rate > FLOOR * 9 / 10, "{rate} bytes per second");
}
