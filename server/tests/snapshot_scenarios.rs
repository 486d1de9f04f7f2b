//! Snapshots of volumes, rollbacks and resizes on real shards and the simulated platform: guests write all the while, and what was captured
//! is held against what the volume was at the cut.

mod support;

use std::cell::{Cell, RefCell};
use std::time::Duration;

use support::{CHUNK, Image, Node, Options, status_of};
use volley_server::error::{Result, Status};
use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, SimObjects, SimRng, SimWorld};
use volley_server::shard::api::{AttachInfo, Command, CutVolume, CutWanted, FetchUntil, Request, VolumeLineage};
use volley_server::shard::changes::ChunkSet;
use volley_server::snapshot::{Manifest, manifest_key};
use volley_server::types::{Changed, HydrationRate, SnapshotRef, VolumeId};

const CHUNKS: u32 = 24;

struct Lab {
    world: SimWorld,
    objects: SimObjects,
    image: Image,
}

impl Lab {
    /// The image ends inside a chunk and a sector.
    fn new(seed: u64) -> Lab {
        let (world, objects, image) = support::world("debian", CHUNKS, 1536, 5, seed);
        Lab { world, objects, image }
    }

    async fn node(&self, options: &Options) -> Node {
        Node::start(self.world.platform(), &self.objects, options).await.expect("started")
    }

    /// Makes a snapshot of this content, as an upload would.
    fn publish(&self, name: &str, content: &[u8], number: u64) -> SnapshotRef {
        let image = support::image_of(&self.objects, name, content, u128::from(number) << 64);
        image.snapshot
    }
}

/// A guest that writes one thing after the other, and what the volume holds for it. While a write is on its way both contents are right.
struct Guest {
    before: RefCell<Vec<u8>>,
    after: RefCell<Vec<u8>>,
    stop: Cell<bool>,
    writes: Cell<u64>,
}

impl Guest {
    fn new(content: &[u8]) -> Guest {
        Guest {
            before: RefCell::new(content.to_vec()),
            after: RefCell::new(content.to_vec()),
            stop: Cell::new(false),
            writes: Cell::new(0),
        }
    }

    async fn run(&self, node: &Node, volume: &AttachInfo, rng: &mut SimRng) {
        let size = self.before.borrow().len() as u64;
        while !self.stop.get() {
            let offset = rng.below(size / 512) * 512;
            let most = if rng.below(8) == 0 { 300 } else { 20 };
            let len = (1 + rng.below(most)).min((size - offset) / 512) * 512;
            let kind = rng.below(8);
            let data: Vec<u8> = match kind {
                0 => vec![0; len as usize],
                _ => {
                    let mut data = vec![0; len as usize];
                    rng.fill(&mut data);
                    data
                }
            };
            self.after.borrow_mut()[offset as usize..][..data.len()].copy_from_slice(&data);
            let (id, generation) = (volume.volume, volume.generation);
            if kind == 0 {
                let zero = Request::WriteZeroes { volume: id, generation, offset, len, fua: false };
                node.request(0, zero).await.expect("zeroed");
            } else {
                node.write(volume, offset, data, false).await.expect("written");
            }
            *self.before.borrow_mut() = self.after.borrow().clone();
            self.writes.set(self.writes.get() + 1);
            if rng.below(6) == 0 {
                node.flush(volume).await.expect("flushed");
            }
            if rng.below(10) == 0 {
                node.platform.sleep(Duration::from_millis(rng.below(5))).await;
            }
        }
    }

    fn contents(&self) -> [Vec<u8>; 2] {
        [self.before.borrow().clone(), self.after.borrow().clone()]
    }
}

async fn lineage(node: &Node, name: &str) -> VolumeLineage {
    node.command(node.owner(name), |reply| Command::Lineage { name: name.to_owned(), reply }).await.expect("a volume")
}

/// Both halves of a cut of one volume.
async fn cut(node: &Node, name: &str, cut: u64, all: bool) -> Result<CutVolume> {
    freeze(node, name, cut).await?;
    cut_frozen(node, name, cut, all).await
}

async fn freeze(node: &Node, name: &str, cut: u64) -> Result<()> {
    node.command(node.owner(name), |reply| Command::Freeze { names: vec![name.to_owned()], cut, reply }).await
}

async fn cut_frozen(node: &Node, name: &str, cut: u64, all: bool) -> Result<CutVolume> {
    let owner = node.owner(name);
    let wanted = vec![CutWanted { name: name.to_owned(), all, also: None }];
    let mut cuts = node.command(owner, |reply| Command::Cut { wanted, cut, reply }).await?;
    Ok(cuts.remove(0))
}

/// What the volume was at the cut: what is captured over what it builds on.
async fn capture(node: &Node, name: &str, made: &CutVolume, id: u64, base: &[u8]) -> Result<Vec<u8>> {
    let mut content = base.to_vec();
    for chunk in &made.chunks {
        let (volume, chunk) = (made.volume, *chunk);
        let capture = |reply| Command::Capture { volume, cut: id, chunk, reply };
        let captured = node.command(node.owner(name), capture).await?;
        content[(chunk * CHUNK) as usize..][..captured.len()].copy_from_slice(&captured);
    }
    Ok(content)
}

async fn end(node: &Node, name: &str, made: &CutVolume, cut: u64, snapshot: Option<SnapshotRef>) {
    let volume = made.volume;
    let end = |reply| Command::EndCut { volume, cut, snapshot, reply };
    node.command(node.owner(name), end).await.expect("ended");
}

async fn whole(node: &Node, volume: &AttachInfo) -> Vec<u8> {
    let mut content = Vec::new();
    while (content.len() as u64) < volume.size_bytes {
        let at = content.len() as u64;
        let len = (volume.size_bytes - at).min(u64::from(CHUNK));
        content.extend(node.read(volume, at, len as u32).await.expect("read"));
    }
    content
}

fn staging_files(world: &SimWorld) -> usize {
    let platform = world.platform();
    let staging = std::path::Path::new(support::STORE).join("staging");
    world.block_on(async { platform.list_dir(&staging).await.map_or(0, |entries| entries.len()) })
}

/// Snapshots of a volume whose guest writes all the time, hydrating or not, on stores that share extents or not. Each builds on the one before.
fn snapshots_of_a_busy_volume(seed: u64) -> u64 {
    let lab = Lab::new(seed);
    let mut rng = SimRng::stream(seed, "scenario");
    let shares = rng.coin();
    lab.world.share_extents(shares);
    let options = Options {
        shards: 1 + rng.index(2),
        hydration_bandwidth: rng.coin().then_some(2 << 20),
        base_bytes: if shares { 1 << 30 } else { 0 },
        ..Options::default()
    };
    let rate = if rng.coin() { HydrationRate::Unlimited } else { HydrationRate::None };
    let staged = lab.world.block_on(async {
        let node = lab.node(&options).await;
        node.create(node.spec("vm", &lab.image, rate)).await.expect("created");
        let volume = node.attach("vm").await.expect("attached");
        let guest = Guest::new(&lab.image.content);
        let mut writes = SimRng::stream(seed, "guest");
        let snapshots = async {
            let mut base = lab.image.content.clone();
            for number in 1..6 {
                node.platform.sleep(Duration::from_millis(rng.below(200))).await;
                let known = lineage(&node, "vm").await;
                freeze(&node, "vm", number).await.expect("frozen");
                let right = guest.contents();
                let made = cut_frozen(&node, "vm", number, false).await.expect("cut");
                assert!(made.known && made.base == known.lineage.base, "seed {seed}");
                let content = capture(&node, "vm", &made, number, &base).await.expect("captured");
                // Of a request that was on its way each sector is old or new, as after a power cut.
                let [before, after] = &right;
                let mut wrong = content.chunks(512).zip(before.chunks(512).zip(after.chunks(512)));
                let wrong = wrong.position(|(now, (old, new))| now != old && now != new);
                assert_eq!(wrong, None, "seed {seed}: snapshot {number} is not the volume at its cut");
                if rng.below(4) == 0 {
                    end(&node, "vm", &made, number, None).await;
                    continue;
                }
                let snapshot = lab.publish(&format!("s{number}"), &content, number);
                end(&node, "vm", &made, number, Some(snapshot)).await;
                base = content;
            }
            guest.stop.set(true);
        };
        futures::future::join(guest.run(&node, &volume, &mut writes), snapshots).await;
        assert!(whole(&node, &volume).await == guest.contents()[0], "seed {seed}");
        let mut staged = 0;
        for shard in 0..node.shards.len() {
            staged += node.counter(shard, "staged_chunks_total").await;
        }
        node.stop().await;
        staged
    });
    assert_eq!(staging_files(&lab.world), 0, "seed {seed}");
    staged
}

#[test]
fn a_snapshot_is_the_volume_at_its_cut_whatever_guests_write_meanwhile() {
    let staged: u64 = (0..60).map(snapshots_of_a_busy_volume).sum();
    assert!(staged > 50, "{staged} chunks were put aside in all: guests hardly came in the way");
}

#[test]
fn after_a_clean_stop_only_what_changed_is_read_and_after_a_crash_everything_is() {
    across_restarts();
}

fn across_restarts() {
    let lab = Lab::new(3);
    let mut rng = SimRng::new(3);
    let mut content = lab.image.content.clone();
    for (life, crash) in [(1, false), (2, true), (3, false)] {
        lab.world.block_on(async {
            let node = lab.node(&Options::default()).await;
            if life == 1 {
                node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
                node.wait_hydrated("vm").await.expect("hydrated");
            }
            let known = lineage(&node, "vm").await;
            assert_eq!(known.lineage.changed == Changed::Unknown, life == 3, "life {life}");
            let made = cut(&node, "vm", life, false).await.expect("cut");
            assert_eq!(made.known, life != 3);
            let expected = match life {
                1 => vec![],
                2 => vec![4, 9],
                _ => (0..CHUNKS).collect(),
            };
            assert_eq!(made.chunks, expected, "life {life}");
            let captured = capture(&node, "vm", &made, life, &content).await.expect("captured");
            let volume = node.attach("vm").await.expect("attached");
            assert!(captured == whole(&node, &volume).await, "life {life}");
            let snapshot = lab.publish(&format!("s{life}"), &captured, life);
            end(&node, "vm", &made, life, Some(snapshot)).await;
            content = captured;
            let volume = node.attach("vm").await.expect("attached");
            for chunk in [4, 9] {
                let mut data = vec![0; 4096];
                rng.fill(&mut data);
                node.write(&volume, u64::from(chunk * CHUNK) + 8192, data, false).await.expect("written");
            }
            if !crash {
                node.stop().await;
            }
        });
        if crash {
            lab.world.crash();
        }
    }
}

#[test]
fn one_snapshot_of_a_volume_at_a_time_and_a_volume_without_its_cut_thaws() {
    let lab = Lab::new(5);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::None)).await.expect("created");
        let volume = node.attach("vm").await.expect("attached");
        let made = cut(&node, "vm", 1, false).await.expect("cut");
        assert_eq!(status_of(cut(&node, "vm", 2, false).await), Status::Conflict);
        let (id, chunk) = (made.volume, 0);
        let capture = |reply| Command::Capture { volume: id, cut: 2, chunk, reply };
        assert_eq!(status_of(node.command(0, capture).await), Status::Conflict, "of another cut");
        end(&node, "vm", &made, 2, None).await;
        assert_eq!(
            status_of(cut(&node, "vm", 2, false).await),
            Status::Conflict,
            "the end of another cut ends nothing"
        );
        end(&node, "vm", &made, 1, None).await;
        let names = vec!["vm".to_owned()];
        node.command(0, |reply| Command::Freeze { names, cut: 3, reply }).await.expect("frozen");
        let begun = node.platform.now();
        node.write(&volume, 0, vec![7; 4096], false).await.expect("goes on by itself");
        assert!(node.platform.now().since(begun) >= Duration::from_millis(900));
        let wanted = vec![CutWanted { name: "vm".to_owned(), all: false, also: None }];
        let late = node.command(0, |reply| Command::Cut { wanted, cut: 3, reply }).await;
        assert_eq!(status_of(late), Status::Busy);
        assert_eq!(status_of(cut(&node, "nobody", 4, false).await), Status::UnknownVolume);
    });
}

#[test]
fn volumes_of_a_group_are_cut_at_one_moment() {
    (0..20).for_each(a_group);
}

fn a_group(seed: u64) {
    {
        let lab = Lab::new(seed);
        lab.world.block_on(async {
            let node = lab.node(&Options { shards: 2, ..Options::default() }).await;
            let names = ["data", "log"];
            let mut volumes = Vec::new();
            for name in names {
                node.create(node.spec(name, &lab.image, HydrationRate::None)).await.expect("created");
                volumes.push(node.attach(name).await.expect("attached"));
            }
            // First the log, then the data: no data without its log.
            let stop = Cell::new(false);
            let guest = async {
                let mut number = 0_u64;
                while !stop.get() {
                    number += 1;
                    for volume in [1, 0] {
                        let mut data = vec![0; 4096];
                        data[..8].copy_from_slice(&number.to_le_bytes());
                        node.write(&volumes[volume], 4096, data, false).await.expect("written");
                    }
                }
            };
            let group = async {
                node.platform.sleep(Duration::from_millis(20 + seed)).await;
                for name in names {
                    let frozen = vec![name.to_owned()];
                    node.command(node.owner(name), |reply| Command::Freeze { names: frozen, cut: 1, reply })
                        .await
                        .expect("frozen");
                }
                let mut found = Vec::new();
                for name in names {
                    let wanted = vec![CutWanted { name: name.to_owned(), all: false, also: None }];
                    let made = node
                        .command(node.owner(name), |reply| Command::Cut { wanted, cut: 1, reply })
                        .await
                        .expect("cut");
                    node.platform.sleep(Duration::from_millis(5)).await;
                    found.push(made[0].clone());
                }
                let mut numbers = Vec::new();
                for (name, made) in names.iter().zip(&found) {
                    let content = capture(&node, name, made, 1, &lab.image.content).await.expect("captured");
                    numbers.push(u64::from_le_bytes(content[4096..4104].try_into().expect("8 bytes")));
                }
                stop.set(true);
                numbers
            };
            let ((), numbers) = futures::future::join(guest, group).await;
            assert!(numbers[0] <= numbers[1] && numbers[1] <= numbers[0] + 1, "seed {seed}: {numbers:?}");
        });
    }
}

#[test]
fn a_full_staging_area_or_a_failing_one_ends_the_snapshot_and_no_write() {
    for full in [true, false] {
        let lab = Lab::new(6);
        lab.world.block_on(async {
            let staging_bytes = if full { 3 * u64::from(CHUNK) } else { 1 << 30 };
            let node = lab.node(&Options { staging_bytes, ..Options::default() }).await;
            node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
            node.wait_hydrated("vm").await.expect("hydrated");
            let volume = node.attach("vm").await.expect("attached");
            let write = |chunk: u32, byte: u8| node.write(&volume, u64::from(chunk * CHUNK), vec![byte; 4096], false);
            for chunk in 0..8 {
                write(chunk, 1).await.expect("written");
            }
            let made = cut(&node, "vm", 1, false).await.expect("cut");
            assert_eq!(made.chunks, (0..8).collect::<Vec<_>>());
            if !full {
                lab.world.fail_disk("/node/store/staging", DiskOp::Write, 1_000_000);
            }
            for chunk in 0..8 {
                write(chunk, 2).await.expect("guests go on");
            }
            let failed = capture(&node, "vm", &made, 1, &lab.image.content).await;
            assert_eq!(status_of(failed), Status::Conflict);
            end(&node, "vm", &made, 1, None).await;
            lab.world.heal_disk();
            // Nothing was forgotten, and the next one works.
            let made = cut(&node, "vm", 2, false).await.expect("cut");
            let content = capture(&node, "vm", &made, 2, &lab.image.content).await.expect("captured");
            assert!(content == whole(&node, &volume).await);
            end(&node, "vm", &made, 2, None).await;
            assert!(node.events(0).await.iter().any(|event| event.contains("was given up")));
            node.stop().await;
        });
        assert_eq!(staging_files(&lab.world), 0);
    }
}

#[test]
fn what_a_crash_leaves_of_a_snapshot_is_removed() {
    let lab = Lab::new(7);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        node.write(&volume, 0, vec![1; 4096], true).await.expect("written");
        cut(&node, "vm", 1, false).await.expect("cut");
        node.write(&volume, 0, vec![2; 4096], true).await.expect("written");
    });
    assert_eq!(staging_files(&lab.world), 1);
    lab.world.kill();
    lab.world.block_on(async { lab.node(&Options::default()).await.stop().await });
    assert_eq!(staging_files(&lab.world), 0);
}

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
        let check =
            |chunk| node.command(node.owner("vm"), move |reply| Command::CheckChunk { volume: id, chunk, reply });
        for chunk in 0..CHUNKS {
            let checked = check(chunk).await.expect("checked");
            assert_eq!(checked.changed, Some(chunk == 3));
            assert_eq!(checked.digest == Some(digest(chunk)), ![3, 8].contains(&chunk), "chunk {chunk}");
        }
        for (chunk, repaired) in [(3, false), (8, true)] {
            let content = lab.image.content[(chunk * CHUNK) as usize..][..CHUNK as usize].to_vec();
            let repair = |reply| Command::RepairChunk { volume: id, chunk, content, reply };
            assert_eq!(node.command(node.owner("vm"), repair).await, Ok(repaired), "what a guest wrote is left alone");
        }
        assert_eq!(check(8).await.expect("checked").digest, Some(digest(8)));
    });
}

/// Deliberate bugs: each must be caught by the scenarios that pass without it.
#[cfg(feature = "mutations")]
mod mutations {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use volley_server::mutation::{self, Mutation};

    use super::{a_group, a_rollback, across_restarts, snapshots_of_a_busy_volume};

    const SEEDS: u64 = 60;

    #[test]
    fn every_bug_of_snapshots_is_caught() {
        for bug in Mutation::OF_SNAPSHOTS {
            let fails = |run: &dyn Fn()| catch_unwind(AssertUnwindSafe(|| mutation::with(bug, run))).is_err();
            let seed = (0..SEEDS).find(|seed| {
                fails(&|| assert!(snapshots_of_a_busy_volume(*seed) < u64::MAX))
                    || fails(&|| assert!(a_rollback(*seed) <= 1))
                    || fails(&|| a_group(*seed))
                    || (*seed == 0 && fails(&across_restarts))
            });
            let seed = seed.unwrap_or_else(|| panic!("{bug:?} is not caught by {SEEDS} seeds"));
            println!("mutation {bug:?}: caught by seed {seed}");
        }
    }
}
