//! Who hydrates first, and what guests feel of it: on the real shards and the simulated platform.

mod support;

use std::time::Duration;

use support::{CHUNK, Image, Node, Options, image};
use volley_server::platform::Platform;
use volley_server::platform::sim::{SimObjects, SimWorld};
use volley_server::shard::api::Command;
use volley_server::types::{HydrationRate, VolumeSpec};

/// Two runs of a volume and a bit.
const CHUNKS: u32 = 300;
/// What the store's share of the tests lets through: a run takes about two seconds.
const SHARE: u64 = 4 << 20;

struct Lab {
    world: SimWorld,
    objects: SimObjects,
    image: Image,
}

impl Lab {
    fn new(seed: u64) -> Lab {
        let world = SimWorld::new(seed);
        let objects = SimObjects::new(&world);
        let image = image(&objects, "debian", CHUNKS, 0, 0, seed);
        Lab { world, objects, image }
    }

    async fn node(&self, options: Options) -> Node {
        let options = Options { cache_bytes: 2 * CHUNKS as usize * CHUNK as usize, ..options };
        Node::start(self.world.platform(), &self.objects, &options).await.expect("started")
    }

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
    let lab = Lab::new(1);
    lab.world.block_on(async {
        let node = lab.node(Options { hydration_bandwidth: Some(SHARE), ..Options::default() }).await;
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
    let lab = Lab::new(2);
    lab.world.block_on(async {
        let node = lab.node(Options { hydration_bandwidth: Some(SHARE), ..Options::default() }).await;
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
