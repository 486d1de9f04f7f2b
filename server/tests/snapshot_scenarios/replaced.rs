//! Volumes that go back or grow, and what proves what they hold.

use std::time::Duration;

use volley_server::error::{Result, Status};
use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, SimRng};
use volley_server::shard::api::{Command, FetchUntil, Request};
use volley_server::shard::changes::ChunkSet;
use volley_server::snapshot::{Manifest, manifest_key};
use volley_server::types::{HydrationRate, SnapshotRef, VolumeId};

use crate::support::{self, CHUNK, Lab, Node, Options, status_of};
use crate::{CHUNKS, Guest, capture, cut, end, lineage, whole};

/// The volume's digest-wise difference to a snapshot, as the control thread sees it.
fn differs(lab: &Lab, a: Option<&str>, b: &str) -> ChunkSet {
    let load =
        |name: &str| Manifest::decode(&lab.objects.peek(&manifest_key(name)).expect("a manifest")).expect("a manifest");
    let (a, b) = (a.map(load), load(b));
    let digest =
        |manifest: &Manifest, chunk| (chunk < manifest.chunk_count()).then(|| manifest.digest(chunk)).flatten();
    (0..CHUNKS).filter(|chunk| a.as_ref().and_then(|a| digest(a, *chunk)) != digest(&b, *chunk)).collect()
}

async fn roll_back(lab: &Lab, node: &Node, base: Option<&str>, to: &SnapshotRef, force: bool) -> Result<()> {
    let known = lineage(node, "vm").await;
    let command = |reply| Command::RollBack {
        name: "vm".to_owned(),
        snapshot: to.clone(),
        base: known.lineage.base.clone(),
        differs: differs(lab, base, &to.name),
        force,
        reply,
    };
    node.command(node.owner("vm"), command).await
}

/// A guest writes, a snapshot is taken, it writes on, and the volume goes back to the snapshot or to the image, while it hydrates, across a crash
/// at any moment: it is the volume from before, or the snapshot's, as a whole.
#[test]
fn a_rollback_is_whole_or_not_at_all_and_fills_from_before_do_not_come_through() {
    let rolled_back: u32 = (0..60).map(a_rollback).sum();
    assert!(rolled_back > 25, "{rolled_back} were not cut short");
}

fn a_rollback(seed: u64) -> u32 {
    {
        let lab = Lab::new(seed);
        let mut rng = SimRng::stream(seed, "rollback");
        let (to_image, detour, pause) = (rng.coin(), rng.coin(), rng.below(40));
        let options = Options {
            shards: 1 + rng.index(2),
            hydration_bandwidth: rng.coin().then_some(1 << 20),
            ..Options::default()
        };
        let crash = rng.coin().then(|| rng.below(3000));
        let mut contents: Option<(Vec<Vec<u8>>, Vec<u8>)> = None;
        let mut done = false;
        let outcome = lab.world.run(async {
            let node = lab.node(&options).await;
            node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
            let volume = node.attach("vm").await.expect("attached");
            let guest = Guest::new(&lab.image.content);
            let mut writes = SimRng::stream(seed, "guest");
            let first = async {
                node.platform.sleep(Duration::from_millis(60)).await;
                guest.stop.set(true);
            };
            futures::future::join(guest.run(&node, &volume, &mut writes), first).await;
            let made = cut(&node, "vm", 1, false).await.expect("cut");
            let snapshotted = capture(&node, "vm", &made, 1, &lab.image.content).await.expect("captured");
            assert!(snapshotted == guest.contents()[0]);
            let snapshot = lab.publish("s1", &snapshotted, 1);
            end(&node, "vm", &made, 1, Some(snapshot.clone())).await;
            guest.stop.set(false);
            let second = async {
                node.platform.sleep(Duration::from_millis(40)).await;
                guest.stop.set(true);
            };
            futures::future::join(guest.run(&node, &volume, &mut writes), second).await;
            node.flush(&volume).await.expect("flushed");
            let mut ends = [(lab.image.snapshot.clone(), lab.image.content.clone()), (snapshot, snapshotted)];
            if !to_image {
                ends.reverse();
            }
            let [(target, goal), (other, otherwise)] = ends;
            assert_eq!(
                status_of(roll_back(&lab, &node, Some("s1"), &target, false).await),
                Status::Conflict,
                "attached"
            );
            contents = Some((vec![guest.contents()[0].clone(), otherwise], goal.clone()));
            if let Some(steps) = crash {
                lab.world.crash_after_steps(Some(steps));
            }
            // By way of the other one, whose chunks are still on their way then.
            let mut base = "s1";
            if detour {
                lab.world.slow_disk(
                    "/node/store/volumes",
                    DiskOp::Write,
                    Duration::from_millis(1)..Duration::from_millis(60),
                );
                roll_back(&lab, &node, Some(base), &other, true).await.expect("rolled back");
                node.platform.sleep(Duration::from_millis(pause)).await;
                base = &other.name;
            }
            roll_back(&lab, &node, Some(base), &target, true).await.expect("rolled back");
            done = true;
            assert!(node.write(&volume, 0, vec![9; 4096], false).await.is_err(), "the host is fenced");
            let again = node.attach("vm").await.expect("attached");
            assert!(whole(&node, &again).await == goal, "seed {seed}: not what the snapshot holds");
            node.wait_hydrated("vm").await.expect("hydrated");
            assert!(whole(&node, &again).await == goal, "seed {seed}: not what the snapshot holds, once hydrated");
            node.stop().await;
        });
        lab.world.crash_after_steps(None);
        if outcome.is_err() && crash.is_none() {
            panic!("seed {seed}: {outcome:?}");
        }
        let Some((before, goal)) = contents else { return 0 };
        lab.world.block_on(async {
            let node = lab.node(&options).await;
            let volume = node.attach("vm").await.expect("attached");
            let now = whole(&node, &volume).await;
            assert!(now == goal || (!done && before.contains(&now)), "seed {seed}: neither the one nor the other");
            node.wait_hydrated("vm").await.expect("hydrated");
            assert!(whole(&node, &volume).await == now, "seed {seed}: hydration changed it");
        });
        u32::from(done)
    }
}

#[test]
fn a_rollback_brings_only_what_differs() {
    let lab = Lab::new(11);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        for chunk in [2, 7, 8] {
            node.write(&volume, u64::from(chunk * CHUNK), vec![1; 4096], true).await.expect("written");
        }
        roll_back(&lab, &node, Some("debian"), &lab.image.snapshot, true).await.expect("rolled back");
        let status = node.status("vm").await.expect("a volume");
        assert_eq!(status.remaining_bytes.div_ceil(u64::from(CHUNK)), 3);
        let known = lineage(&node, "vm").await;
        assert_eq!(known.lineage.base.as_ref(), Some(&lab.image.snapshot));
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        assert!(whole(&node, &volume).await == lab.image.content);
    });
}

#[test]
fn a_volume_grows_with_zeroes_and_never_shrinks() {
    for (seed, hydrate) in [(1, true), (2, false), (3, true), (4, false)] {
        let lab = Lab::new(seed);
        let old = lab.image.content.len() as u64;
        let new = old + 1024 + 3 * u64::from(CHUNK);
        let mut expected = lab.image.content.clone();
        expected.resize(new as usize, 0);
        expected[4096..8192].fill(1);
        lab.world.block_on(async {
            let node = lab.node(&Options::default()).await;
            let rate = if hydrate { HydrationRate::Unlimited } else { HydrationRate::None };
            node.create(node.spec("vm", &lab.image, rate)).await.expect("created");
            let volume = node.attach("vm").await.expect("attached");
            node.write(&volume, 4096, vec![1; 4096], true).await.expect("written");
            if hydrate {
                node.wait_hydrated("vm").await.expect("hydrated");
            } else {
                // Up to the end of the device, which is inside a sector.
                let last = Request::PriorityFetch {
                    volume: volume.volume,
                    offset: old - 512,
                    len: 512,
                    until: FetchUntil::Durable,
                };
                node.request(0, last).await.expect("fetched");
            }
            let grow = |size_bytes| {
                node.command(node.owner("vm"), move |reply| Command::Grow { name: "vm".to_owned(), size_bytes, reply })
            };
            assert_eq!(status_of(grow(new).await), Status::Conflict, "attached");
            let (volume, generation) = (volume.volume, volume.generation);
            node.request(0, Request::Detach { volume, generation }).await.expect("detached");
            assert_eq!(status_of(grow(old - 512).await), Status::Invalid);
            grow(old).await.expect("nothing to do");
            grow(new).await.expect("grown");
            let volume = node.attach("vm").await.expect("attached");
            assert_eq!(volume.size_bytes, new);
            assert!(whole(&node, &volume).await == expected, "seed {seed}");
            node.write(&volume, new - 4096, vec![3; 4096], true).await.expect("written");
            expected[(new - 4096) as usize..].fill(3);
        });
        lab.world.crash();
        lab.world.block_on(async {
            let node = lab.node(&Options::default()).await;
            let volume = node.attach("vm").await.expect("attached");
            assert!(whole(&node, &volume).await == expected, "seed {seed}, after a crash");
            let rate = |reply| Command::SetRate { name: "vm".to_owned(), rate: HydrationRate::Unlimited, reply };
            node.command(node.owner("vm"), rate).await.expect("set");
            let hydrated = node.wait_hydrated("vm").await;
            assert!(hydrated.is_ok(), "seed {seed}: {:?} {:?}", node.status("vm").await, node.events(0).await);
            assert!(whole(&node, &volume).await == expected, "seed {seed}, hydrated");
        });
    }
}

#[test]
fn a_chunk_that_rotted_on_the_disk_is_found_and_put_back() {
    let lab = Lab::new(12);
    let (id, path): (VolumeId, _) = lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        node.write(&volume, u64::from(3 * CHUNK), vec![1; 4096], true).await.expect("written");
        let path = std::path::Path::new(support::STORE).join("volumes").join(format!("{}.raw", volume.volume));
        node.stop().await;
        (volume.volume, path)
    });
    lab.world.flip_file_byte(&path, u64::from(8 * CHUNK) + 5).expect("flipped");
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        let digest = |chunk: u32| {
            let from = (chunk * CHUNK) as usize;
            *blake3::hash(&lab.image.content[from..(from + CHUNK as usize).min(lab.image.content.len())]).as_bytes()
        };
        let base = Some(lab.image.snapshot.clone());
        let check = |chunk, base: Option<SnapshotRef>| {
            let check = move |reply| Command::CheckChunk { volume: id, chunk, len: CHUNK, base, reply };
            node.command(node.owner("vm"), check)
        };
        for chunk in 0..CHUNKS {
            let checked = check(chunk, base.clone()).await.expect("checked");
            assert_eq!(checked.changed, Some(chunk == 3));
            assert_eq!(checked.digest == Some(digest(chunk)), ![3, 8].contains(&chunk), "chunk {chunk}");
        }
        let content = lab.image.content.as_slice();
        let repair = |chunk: u32, base: Option<SnapshotRef>| {
            let content = content[(chunk * CHUNK) as usize..][..CHUNK as usize].to_vec();
            let repair = move |reply| Command::RepairChunk { volume: id, chunk, base, content, reply };
            node.command(node.owner("vm"), repair)
        };
        assert_eq!(repair(3, base.clone()).await, Ok(false), "what a guest wrote is left alone");
        assert_eq!(repair(8, base.clone()).await, Ok(true));
        assert_eq!(check(8, base.clone()).await.expect("checked").digest, Some(digest(8)));
        // With a snapshot that was taken meanwhile chunk 3 counts as unchanged: what it held before it must not come back.
        let made = cut(&node, "vm", 1, false).await.expect("cut");
        let captured = capture(&node, "vm", &made, 1, content).await.expect("captured");
        let snapshot = lab.publish("s1", &captured, 1);
        end(&node, "vm", &made, 1, Some(snapshot.clone())).await;
        assert_eq!(status_of(repair(3, base.clone()).await), Status::Conflict);
        assert_eq!(status_of(check(3, base).await), Status::Conflict);
        let checked = check(3, Some(snapshot)).await.expect("checked");
        let now = *blake3::hash(&captured[(3 * CHUNK) as usize..][..CHUNK as usize]).as_bytes();
        assert_eq!((checked.digest, checked.changed), (Some(now), Some(false)));
    });
}
