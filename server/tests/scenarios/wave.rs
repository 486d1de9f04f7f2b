//! What the guests of a wave ask for stays in the RAM cache while the wave asks for it, whatever else passes through: on
//! the real shards and the simulated platform, with exact counts of GETs; and is given at once to those who come next.

use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::platform::sim::{SimObjects, SimWorld};
use volley_server::shard::api::{AttachInfo, Command, ConnectionId, FetchUntil, Handler, Reply, Request};
use volley_server::types::HydrationRate;

use crate::support::{self, CHUNK, Image, Node, Options, image, pack_gets, prefetch};

/// Chunks that a boot reads: three of eight parts of the cache.
const BOOT: u32 = 24;
const CACHE: usize = 64 * CHUNK as usize;
const SPAN: Duration = Duration::from_secs(60);

struct Lab {
    world: SimWorld,
    objects: SimObjects,
    boot: Image,
    other: Image,
}

impl Lab {
    fn new(seed: u64) -> Lab {
        let (world, objects, boot) = support::world("boot", BOOT, 0, 0, seed);
        let other = image(&objects, "other", 256, 0, 0, seed + 1000);
        Lab { world, objects, boot, other }
    }

    async fn node(&self, shards: usize, pin_waves: Duration) -> Node {
        let options = Options { shards, pin_waves, cache_bytes: CACHE, ..Options::default() };
        Node::start(self.world.platform(), &self.objects, &options).await.expect("started")
    }

    /// Volumes of one batch, as few or many as there are names.
    async fn batch(&self, node: &Node, names: &[&str]) -> Vec<AttachInfo> {
        let mut volumes = Vec::new();
        for name in names {
            let mut spec = node.spec(name, &self.boot, HydrationRate::None);
            spec.batch = Some(7);
            node.create(spec).await.expect("created");
            volumes.push(node.attach(name).await.expect("attached"));
        }
        volumes
    }

    /// Reads the whole image.
    async fn boot(&self, node: &Node, volume: &AttachInfo) {
        for chunk in 0..BOOT {
            let at = u64::from(chunk) * u64::from(CHUNK);
            let got = node.read(volume, at, CHUNK).await.expect("read");
            assert!(got[..] == self.boot.content[at as usize..][..got.len()]);
        }
    }

    /// Hydrates an image of four times the cache.
    async fn scan(&self, node: &Node, name: &str) {
        node.create(node.spec(name, &self.other, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated(name).await.expect("hydrated");
    }
}

async fn pinned(node: &Node) -> (u64, u64) {
    let (mut for_waves, mut all) = (0, 0);
    for shard in 0..node.shards.len() {
        node.shards[shard].check_invariants().expect("a sound shard");
        let status = node.command(shard, |reply| Command::ShowCache { reply }).await;
        assert_eq!(status.ram.wave_pinned_bytes, node.gauge(shard, "cache_wave_pinned_bytes").await);
        for_waves += status.ram.wave_pinned_bytes;
        all += status.ram.pinned_bytes;
    }
    (for_waves, all)
}

/// GETs of the second half of a wave between whose halves an image passes that is larger than the cache.
fn gets_after_a_scan(shards: usize, pin_waves: Duration) -> u64 {
    let lab = Lab::new(1);
    lab.world.block_on(async {
        let node = lab.node(shards, pin_waves).await;
        let volumes = lab.batch(&node, &["a-0", "a-1", "a-2", "a-3", "a-4", "a-5"]).await;
        lab.boot(&node, &volumes[0]).await;
        lab.scan(&node, "scan").await;
        let before = lab.objects.stats().gets;
        for volume in &volumes[1..] {
            lab.boot(&node, volume).await;
        }
        lab.objects.stats().gets - before
    })
}

#[test]
fn a_scan_in_the_middle_of_a_wave_costs_its_second_half_no_get() {
    assert!(gets_after_a_scan(1, Duration::ZERO) >= 12, "without pins the scan evicts the wave's chunks");
    assert_eq!(gets_after_a_scan(1, SPAN), 0);
    assert_eq!(gets_after_a_scan(3, SPAN), 0, "also where the chunks are other shards'");
}

#[test]
fn when_no_guest_of_the_wave_has_asked_for_a_while_its_chunks_are_released() {
    let lab = Lab::new(2);
    lab.world.block_on(async {
        let node = lab.node(1, SPAN).await;
        let volumes = lab.batch(&node, &["a-0", "a-1", "a-2"]).await;
        let boot_bytes = u64::from(BOOT * CHUNK);
        lab.boot(&node, &volumes[0]).await;
        assert_eq!(pinned(&node).await, (boot_bytes, boot_bytes));
        node.platform.sleep(SPAN / 2).await;
        lab.boot(&node, &volumes[1]).await;
        node.platform.sleep(SPAN / 2 + SPAN / 4).await;
        assert_eq!(pinned(&node).await, (boot_bytes, boot_bytes), "the second volume asked later");
        node.platform.sleep(SPAN / 2).await;
        assert_eq!(pinned(&node).await, (0, 0));
        let before = lab.objects.stats().gets;
        lab.boot(&node, &volumes[2]).await;
        assert_eq!(lab.objects.stats().gets, before, "released is not evicted");
    });
}

#[test]
fn an_operators_pins_take_the_place_of_a_waves_and_outlast_them() {
    let lab = Lab::new(3);
    lab.world.block_on(async {
        let node = lab.node(1, SPAN).await;
        let warm = async |image: &Image| {
            let snapshot = image.snapshot.clone();
            node.command(0, |reply| Command::WarmCache { snapshot, pin: true, reply }).await.expect("warming");
            node.platform.sleep(Duration::from_secs(5)).await;
        };
        let half = CACHE as u64 / 2;
        let volumes = lab.batch(&node, &["a-0", "a-1"]).await;
        warm(&lab.boot).await;
        let boot_bytes = u64::from(BOOT * CHUNK);
        assert_eq!(pinned(&node).await, (0, boot_bytes));
        lab.boot(&node, &volumes[0]).await;
        assert_eq!(pinned(&node).await, (boot_bytes, boot_bytes), "the same chunks");
        node.platform.sleep(SPAN * 2).await;
        assert_eq!(pinned(&node).await, (0, boot_bytes), "the operator's pins are not undone");

        node.command(0, |reply| Command::UnpinCache { image: "boot".into(), reply }).await;
        lab.boot(&node, &volumes[1]).await;
        assert_eq!(pinned(&node).await, (boot_bytes, boot_bytes));
        warm(&lab.other).await;
        assert_eq!(pinned(&node).await, (0, half), "the operator has all that may be pinned");
    });
}

#[test]
fn a_volume_alone_is_no_wave_and_neither_is_the_last_one_left() {
    let lab = Lab::new(4);
    lab.world.block_on(async {
        let node = lab.node(1, SPAN).await;
        let alone = lab.batch(&node, &["a-0"]).await;
        lab.boot(&node, &alone[0]).await;
        assert_eq!(pinned(&node).await, (0, 0));
        let second = lab.batch(&node, &["a-1"]).await;
        let delete = |reply| Command::DeleteVolume { name: "a-0".into(), force: true, reply };
        node.command(0, delete).await.expect("deleted");
        lab.boot(&node, &second[0]).await;
        assert_eq!(pinned(&node).await, (0, 0));
    });
}

#[test]
fn a_chunk_used_a_moment_ago_is_given_at_once_to_other_volumes_and_never_hides_what_a_guest_wrote() {
    let (world, objects, img) = support::world("img", 9, 512 * 3, 5, 31);
    let options = Options { shards: 3, ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        let names: Vec<String> = (0..40).map(|i| format!("web-{i}")).collect();
        for name in &names {
            node.create(node.spec(name, &img, HydrationRate::None)).await.unwrap();
        }
        let (at, from) = (u64::from(CHUNK) + 512, ConnectionId::new(0, 0));
        let want = &img.content[at as usize..at as usize + 2048];
        let (mut read_at_once, mut fetched_at_once) = (0, 0);
        for name in &names {
            let volume = node.attach(name).await.unwrap();
            let shard = &node.shards[volume.volume.owner(3)];
            // A volume's first request finds its manifest.
            shard.handle(prefetch(&volume, 2 * u64::from(CHUNK), 512, FetchUntil::Readable), from).await.unwrap();
            let fetch = prefetch(&volume, at, 2048, FetchUntil::Readable);
            fetched_at_once += usize::from(shard.try_now(&fetch, from).is_some());
            shard.handle(fetch, from).await.unwrap();
            let (id, generation) = (volume.volume, volume.generation);
            let read = |from: u64, len| Request::Read { volume: id, generation, offset: from, len };
            if let Some(Ok(Reply::Data(data))) = shard.try_now(&read(at, 2048), from) {
                assert_eq!(&data[..], want);
                read_at_once += 1;
            }
            // Another connection, an older generation, two chunks, or past the end: not at once, whatever the answer is.
            assert!(shard.try_now(&read(at, 2048), ConnectionId::new(0, 9)).is_none());
            let old = Request::Read { volume: id, generation: generation - 1, offset: at, len: 512 };
            assert!(shard.try_now(&old, from).is_none());
            assert!(shard.try_now(&read(u64::from(CHUNK) * 2 - 512, 1024), from).is_none());
            assert!(shard.try_now(&read(u64::MAX - 511, 512), from).is_none());
            node.write(&volume, at, vec![0xee; 512], false).await.unwrap();
            assert!(shard.try_now(&read(at, 2048), from).is_none(), "part of it is the guest's");
            let read = node.read(&volume, at, 2048).await.unwrap();
            assert_eq!((&read[..512], &read[512..]), (&[0xee; 512][..], &want[512..]));
        }
        // Each shard asks the owner once, then now and then.
        assert!(fetched_at_once >= 30 && read_at_once >= 30, "{fetched_at_once} fetches, {read_at_once} reads");
        assert!(pack_gets(&objects) <= 2, "each chunk once: {}", pack_gets(&objects));
    });
}
