//! Boot sets on real shards and the simulated platform: what is recorded, what is brought first, what that saves.

use std::sync::Arc;
use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::shard::api::{AttachInfo, Command, RecordedBoot};
use volley_server::snapshot::{ChunkEntry, Manifest, manifest_key};
use volley_server::types::HydrationRate;

use crate::support::{self, CHUNK, Lab, Node, Options};

const CHUNKS: u32 = 64;
const WINDOW: Duration = Duration::from_secs(10);
/// What the guests of these tests read, in this order.
const BOOT: [u32; 6] = [40, 3, 41, 42, 7, 63];

fn lab(seed: u64) -> Lab {
    Lab::of(CHUNKS, 0, 0, seed)
}

fn options(shards: usize) -> Options {
    Options { shards, boot_window: WINDOW, cache_bytes: 128 * CHUNK as usize, ..Options::default() }
}

impl Lab {
    async fn attached(&self, node: &Node, name: &str, rate: HydrationRate) -> AttachInfo {
        node.create(node.spec(name, &self.image, rate)).await.expect("created");
        node.attach(name).await.expect("attached")
    }

    async fn read(&self, node: &Node, volume: &AttachInfo, chunk: u32) {
        let at = u64::from(chunk) * u64::from(CHUNK) + 4096;
        let got = node.read(volume, at, 4096).await.expect("read");
        assert!(got[..] == self.image.content[at as usize..][..4096], "chunk {chunk}");
    }

    fn digests(&self, chunks: &[u32]) -> Vec<[u8; 32]> {
        let manifest = self.objects.peek(&manifest_key("debian")).expect("a manifest");
        let manifest = Manifest::decode(&manifest).expect("a manifest");
        let digest = |chunk: &u32| match manifest.chunk(*chunk) {
            ChunkEntry::Stored { digest, .. } => digest,
            ChunkEntry::Zero => panic!("chunk {chunk} has no data"),
        };
        chunks.iter().map(digest).collect()
    }

    async fn recorded(&self, node: &Node) -> Vec<RecordedBoot> {
        let mut all = Vec::new();
        for shard in 0..node.shards.len() {
            all.extend(node.command(shard, |reply| Command::TakeBoots { reply }).await);
        }
        all
    }

    async fn use_set(&self, node: &Node, chunks: &[u32], prefetch: bool) {
        for shard in 0..node.shards.len() {
            let (snapshot, chunks) = (self.image.snapshot.clone(), Arc::from(chunks));
            let make = |reply| Command::UseBootSet { snapshot, chunks, prefetch, reply };
            node.command(shard, make).await.expect("used");
        }
    }
}

#[test]
fn a_boot_is_what_the_first_guest_touches_in_its_window_resident_or_not() {
    let lab = lab(1);
    lab.world.block_on(async {
        let node = lab.node(&options(2)).await;
        let volume = lab.attached(&node, "vm", HydrationRate::None).await;
        for chunk in BOOT {
            lab.read(&node, &volume, chunk).await;
            lab.read(&node, &volume, chunk).await;
        }
        assert_eq!(lab.recorded(&node).await, [], "not before the window has passed");
        node.platform.sleep(WINDOW + Duration::from_secs(2)).await;
        lab.read(&node, &volume, 20).await;
        let recorded = lab.recorded(&node).await;
        let expected = RecordedBoot { snapshot: lab.image.snapshot.clone(), touched: lab.digests(&BOOT) };
        assert_eq!(recorded, [expected], "in the order of the first touch, and nothing of later");
        assert_eq!(lab.recorded(&node).await, [], "taken once");
        // A guest that comes back does not boot.
        let volume = node.attach("vm").await.expect("attached");
        lab.read(&node, &volume, 30).await;
        node.platform.sleep(WINDOW + Duration::from_secs(2)).await;
        assert_eq!(lab.recorded(&node).await, []);
    });
}

#[test]
fn a_volume_that_is_hydrated_or_deleted_in_its_window_is_recorded_or_forgotten() {
    let lab = lab(2);
    lab.world.block_on(async {
        let node = lab.node(&options(1)).await;
        let volume = lab.attached(&node, "fast", HydrationRate::Unlimited).await;
        node.wait_hydrated("fast").await.expect("hydrated");
        for chunk in BOOT {
            lab.read(&node, &volume, chunk).await;
        }
        let gone = lab.attached(&node, "gone", HydrationRate::None).await;
        lab.read(&node, &gone, 1).await;
        let delete = |reply| Command::DeleteVolume { name: "gone".to_owned(), force: true, reply };
        node.command(0, delete).await.expect("deleted");
        node.platform.sleep(WINDOW + Duration::from_secs(2)).await;
        let recorded = lab.recorded(&node).await;
        assert_eq!(recorded.iter().map(|boot| &boot.touched).collect::<Vec<_>>(), [&lab.digests(&BOOT)]);
    });
}

/// Chunks of a new volume that are resident once so many are, in the order they became so.
async fn first_resident(lab: &Lab, node: &Node, name: &str, rate: u64) -> Vec<u32> {
    let volume = lab.attached(node, name, HydrationRate::BytesPerSecond(rate)).await;
    let shard = &node.shards[volume.volume.owner(node.shards.len())];
    let mut order = Vec::new();
    while order.len() < BOOT.len() {
        node.platform.sleep(Duration::from_millis(20)).await;
        for chunk in 0..CHUNKS {
            if !order.contains(&chunk)
                && shard.is_resident(volume.volume, u64::from(chunk * CHUNK), CHUNK.into()) == Some(true)
            {
                order.push(chunk);
            }
        }
    }
    order
}

#[test]
fn volumes_hydrate_their_boot_set_first_and_then_in_sector_order() {
    let lab = lab(3);
    lab.world.block_on(async {
        let node = lab.node(&options(2)).await;
        let rate = u64::from(CHUNK) * 5;
        let mut plain = first_resident(&lab, &node, "plain", rate).await;
        plain.sort_unstable();
        assert_eq!(plain[..6], [0, 1, 2, 3, 4, 5], "without a set in sector order");
        lab.use_set(&node, &BOOT, false).await;
        let mut first = first_resident(&lab, &node, "booting", rate).await;
        first.truncate(BOOT.len());
        first.sort_unstable();
        let mut set = BOOT;
        set.sort_unstable();
        assert_eq!(first, set);
        node.command(node.owner("booting"), |reply| Command::SetRate {
            name: "booting".to_owned(),
            rate: HydrationRate::Unlimited,
            reply,
        })
        .await
        .expect("set");
        let done = node.wait_hydrated("booting").await.expect("hydrated");
        assert_eq!((done.resident_bytes, done.remaining_bytes), (u64::from(CHUNKS * CHUNK), 0));
    });
}

#[test]
fn a_prefetched_set_answers_the_whole_wave_from_memory() {
    let lab = lab(4);
    lab.world.block_on(async {
        let node = lab.node(&options(3)).await;
        lab.use_set(&node, &BOOT, true).await;
        node.platform.sleep(Duration::from_secs(5)).await;
        let after_prefetch = node.ledger("debian", None).await.gets;
        assert!((1..=BOOT.len() as u64).contains(&after_prefetch), "{after_prefetch} GETs for {} chunks", BOOT.len());
        for number in 0..5 {
            let volume = lab.attached(&node, &format!("vm-{number}"), HydrationRate::None).await;
            for chunk in BOOT {
                lab.read(&node, &volume, chunk).await;
            }
        }
        assert_eq!(node.ledger("debian", None).await.gets, after_prefetch, "no guest waits for the object store");
        lab.use_set(&node, &BOOT, true).await;
        node.platform.sleep(Duration::from_secs(5)).await;
        assert_eq!(node.ledger("debian", None).await.gets, after_prefetch, "what is cached is not fetched again");
        let mut prefetched = 0;
        for shard in 0..3 {
            prefetched += node.counter(shard, "boot_chunks_prefetched_total").await;
            node.shards[shard].check_invariants().expect("a sound shard");
        }
        assert_eq!(prefetched, BOOT.len() as u64);
    });
}

#[test]
fn the_image_of_a_wave_is_fetched_once_ahead_of_its_guests_unless_it_is_too_large() {
    let lab = lab(9);
    lab.world.block_on(async {
        for (cache_chunks, ahead) in [(2 * CHUNKS, true), (CHUNKS, false)] {
            let cache_bytes = (cache_chunks * CHUNK) as usize;
            let options = Options { shards: 2, cache_bytes, ..Options::default() };
            let node = Node::start(lab.world.platform(), &lab.objects, &options).await.expect("started");
            for shard in 0..node.shards.len() {
                let make = |reply| Command::PrefetchImage { snapshot: lab.image.snapshot.clone(), reply };
                node.command(shard, make).await.expect("begun");
            }
            node.platform.sleep(Duration::from_secs(5)).await;
            let before = support::pack_gets(&lab.objects);
            let volume = lab.attached(&node, &format!("vm-{cache_chunks}"), HydrationRate::None).await;
            for chunk in BOOT {
                lab.read(&node, &volume, chunk).await;
            }
            assert_eq!(support::pack_gets(&lab.objects) == before, ahead, "{cache_chunks} chunks of cache");
            node.stop().await;
        }
    });
}
