//! Others come in between while a snapshot is taken: what it builds on is deleted and collected, or the volume is rolled
//! back; and while it is rolled back it is deleted. Seeds of the simulation do the same now and then; here every moment
//! has its turn.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use volley_server::platform::sim::{DiskOp, SimObjects, SimRng, SimWorld};

use crate::control::Control;
use crate::guest::{Guests, Session, VolumeRc};
use crate::judge::{judge_deleted, judge_names, judge_volume};
use crate::model::{After, VolumeModel};
use crate::node::{CHUNK_BYTES, Node, NodeSettings, make_directories, make_snapshot, volume_spec};
use crate::snapshots::Snapshots;

const SEEDS: u64 = 100;
const CHUNK: u64 = CHUNK_BYTES as u64;
/// A slow snapshot takes about as long.
const DELAY_MAX_US: u64 = 400_000;
const ROLLBACK_MAX_US: u64 = 40_000;

pub fn others_come_in_between() {
    for seed in 0..SEEDS {
        of_one_seed(seed);
        a_power_cut_after_a_snapshot(seed);
        a_deletion_during_a_rollback(seed);
    }
}

/// The volume is refused to be deleted, or is gone for good: no rollback brings it back.
fn a_deletion_during_a_rollback(seed: u64) {
    let (world, objects, guests, volume) = machine(seed);
    world.block_on(async {
        let node = start_with(&world, &objects, &guests, &volume).await;
        let control = Control::new(&world, &node, &objects, &guests);
        control.done("snapshot", control.take_one(&volume, false).await);
        write(&guests, &node, &volume, 0).await;
        // A rollback waits for the disk most of the time.
        world.slow_disk("/node", DiskOp::Sync, Duration::from_millis(1)..Duration::from_millis(20));
        let rolled = async { control.done("rollback", control.roll_back_to_any(&volume).await) };
        let deleted = async {
            control.pause(ROLLBACK_MAX_US).await;
            guests.delete_for_sure(&node, &Session::of(&volume)).await;
        };
        futures::join!(rolled, deleted);
    });
    world.kill();
    world.block_on(async {
        let node = start(&world, &objects).await;
        judge_names(&node, &guests).await;
        let deleted = guests.deleted.borrow().clone();
        for spec in &deleted {
            judge_deleted(&world.platform(), &node, spec).await;
        }
    });
}

/// What no flush has covered is in the snapshot, and may be gone from the volume: the next one knows.
fn a_power_cut_after_a_snapshot(seed: u64) {
    let (world, objects, guests, volume) = machine(seed);
    world.block_on(async {
        let node = start_with(&world, &objects, &guests, &volume).await;
        let control = Control::new(&world, &node, &objects, &guests);
        guests.attach(&node, &volume).await;
        guests.write_to(&node, &Session::of(&volume), (0, 2 * CHUNK)).await;
        control.done("snapshot", control.take_one(&volume, false).await);
    });
    world.crash();
    guests.forget_attachments();
    world.block_on(async {
        let node = start(&world, &objects).await;
        assert!(judge_volume(&node, &volume, After::PowerCut).await, "it was created");
        let control = Control::new(&world, &node, &objects, &guests);
        control.done("snapshot", control.take_one(&volume, false).await);
    });
    guests.snapshots_taken.judge(&objects);
}

fn machine(seed: u64) -> (SimWorld, SimObjects, Rc<Guests>, VolumeRc) {
    let world = SimWorld::new(seed);
    let objects = SimObjects::new(&world);
    let mut rng = SimRng::stream(seed, "races");
    let image = make_snapshot(&objects, &mut rng, "image-0", 6 * CHUNK);
    let guests = Guests::new(SimRng::stream(seed, "guests"), vec![image.clone()], Snapshots::new(seed));
    let spec = volume_spec(&mut rng, "vm", 6 * CHUNK, Some(&image));
    let volume = Rc::new(RefCell::new(VolumeModel::new(spec, Some(image.image.clone()))));
    (world, objects, Rc::new(guests), volume)
}

fn of_one_seed(seed: u64) {
    let (world, objects, guests, volume) = machine(seed);
    world.block_on(async {
        let node = start_with(&world, &objects, &guests, &volume).await;
        let control = Control::new(&world, &node, &objects, &guests);
        write(&guests, &node, &volume, 0).await;
        while guests.snapshots_taken.known().is_empty() {
            control.done("snapshot", control.take_one(&volume, false).await);
        }
        write(&guests, &node, &volume, 3 * CHUNK).await;
        let base = guests.snapshots_taken.known().remove(0).reference.name;
        control.before_commit.set(Some(Duration::from_micros(DELAY_MAX_US)));
        let others = async {
            control.pause(DELAY_MAX_US).await;
            control.done("deletion", control.delete(&base, false).await);
            // One condemns, the next would remove.
            for _ in 0..2 {
                control.done("collection", control.collect_after(Duration::ZERO, false).await);
            }
        };
        let taken = async { control.done("snapshot", control.take_one(&volume, true).await) };
        futures::join!(taken, others);
        guests.snapshots_taken.check_packs(&objects);
    });
    world.kill();
    guests.forget_attachments();
    world.block_on(async {
        let node = start(&world, &objects).await;
        let control = Control::new(&world, &node, &objects, &guests);
        control.done("snapshot", control.take_one(&volume, false).await);
        write(&guests, &node, &volume, CHUNK).await;
        control.done("snapshot", control.take_one(&volume, false).await);
        // Without its base nobody knows what has changed.
        let lineage = control.lineage("vm").await.expect("a volume");
        if let Some(base) = lineage.lineage.base {
            control.done("deletion", control.delete(&base.name, false).await);
        }
        let others = async {
            control.pause(DELAY_MAX_US).await;
            control.done("rollback", control.roll_back_to_any(&volume).await);
        };
        let taken = async { control.done("snapshot", control.take_one(&volume, true).await) };
        futures::join!(taken, others);
    });
    guests.snapshots_taken.judge(&objects);
}

async fn start(world: &SimWorld, objects: &SimObjects) -> Rc<Node> {
    make_directories(&world.platform()).await.expect("no faults");
    Rc::new(Node::start(&world.platform(), objects, NodeSettings::default()).await.expect("started"))
}

async fn start_with(world: &SimWorld, objects: &SimObjects, guests: &Guests, volume: &VolumeRc) -> Rc<Node> {
    let node = start(world, objects).await;
    let spec = volume.borrow().spec.clone();
    guests.create_all(&node, vec![spec], vec![volume.clone()]).await;
    node
}

/// Two chunks, durably.
async fn write(guests: &Guests, node: &Node, volume: &VolumeRc, offset: u64) {
    guests.attach(node, volume).await;
    let session = Session::of(volume);
    guests.write_to(node, &session, (offset, 2 * CHUNK)).await;
    guests.flush(node, &session).await;
}
