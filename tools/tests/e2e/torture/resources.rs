//! Disks that are full or fail, in the middle of hydration and of guest writes.
//!
//! The kernel of a test machine need not have device-mapper, so the failing disk is an nbdkit with its error filter, as a
//! file of nbdfuse, under a loop device.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Arena, Disk, FileSystem, all_well, seed};
use crate::faults::eventually;
use crate::harness::{NodeOptions, Site};

/// The server lives so long on a disk that is full or fails before it is killed.
const BAD_TIME: Duration = Duration::from_secs(2);

#[test]
fn a_full_store_costs_errors_and_no_data() {
    let Some(disk) = Disk::new(FileSystem::Ext4, 512 << 20) else { return };
    let mut arena = Arena::new(Some(disk), "4MiB/s", seed());
    // The journals lie elsewhere: only what guests write and what hydration brings finds no room.
    let store = format!("[[store]]\nlabel = \"small\"\npath = \"{}\"\n", arena.disk().mount().join("store").display());
    arena.options = NodeOptions { data: None, config: store, ..arena.options.clone() };
    fill_and_make_room(&mut arena);
}

#[test]
fn a_full_data_disk_costs_errors_and_no_data() {
    let Some(disk) = Disk::new(FileSystem::Xfs, 512 << 20) else { return };
    let mut arena = Arena::new(Some(disk), "4MiB/s", seed());
    fill_and_make_room(&mut arena);
}

/// Fills the disk under load, kills the server on it, makes room, and judges.
fn fill_and_make_room(arena: &mut Arena) {
    let mut node = arena.site.start(&arena.options);
    let agent = arena.site.agent("agent", &[]);
    let mut workers = arena.populate(&node, &agent, "web-", 2);
    let round = |arena: &mut Arena, workers: &mut Vec<_>, kill: bool, node: crate::harness::Node| {
        arena.some_time(Duration::from_millis(800));
        arena.tolerance.no_space.store(true, Ordering::SeqCst);
        arena.tolerance.io_errors.store(true, Ordering::SeqCst);
        let seen = arena.tolerance.seen.load(Ordering::SeqCst);
        let filler = arena.disk().fill(256 << 10);
        eventually("the guests find the disk full", || arena.tolerance.seen.load(Ordering::SeqCst) > seen + 3);
        all_well(workers);
        let node = match kill {
            false => node,
            true => {
                node.kill();
                std::fs::remove_file(&filler).expect("make room");
                arena.site.start(&arena.options)
            }
        };
        std::fs::remove_file(&filler).ok();
        node
    };
    node = round(arena, &mut workers, false, node);
    node.kill();
    node = arena.site.start(&arena.options);
    node = round(arena, &mut workers, true, node);
    arena.tolerance.no_space.store(false, Ordering::SeqCst);
    arena.tolerance.io_errors.store(false, Ordering::SeqCst);
    let before = arena.answered.load(Ordering::SeqCst);
    eventually("the guests go on", || arena.answered.load(Ordering::SeqCst) > before + 200);
    all_well(&mut workers);
    let errors = arena.tolerance.seen.load(Ordering::SeqCst);
    arena.judge(node, workers);
    println!("torture: a full disk, {errors} errors, {} requests judged", arena.answered.load(Ordering::SeqCst));
}

#[test]
fn a_failing_disk_costs_errors_and_no_data() {
    let Some((disk, failing)) = failing_disk(512 << 20) else { return };
    let mut arena = Arena::new(Some(disk), "4MiB/s", seed());
    let mut node = arena.site.start(&arena.options);
    let agent = arena.site.agent("agent", &[]);
    let mut workers = arena.populate(&node, &agent, "web-", 2);
    for _ in 0..2 {
        arena.some_time(Duration::from_millis(800));
        arena.tolerance.io_errors.store(true, Ordering::SeqCst);
        let seen = arena.tolerance.seen.load(Ordering::SeqCst);
        std::fs::write(&failing, "").expect("errors on");
        eventually("the guests see the disk fail", || arena.tolerance.seen.load(Ordering::SeqCst) > seen + 3);
        std::thread::sleep(BAD_TIME);
        std::fs::remove_file(&failing).expect("errors off");
        all_well(&mut workers);
        // A volume whose sync failed refuses its guests until the node is restarted.
        node.kill();
        // The kernel tells an error of a file that nobody has heard of to the next who syncs it: not to the new node.
        let volumes = arena.disk().mount().join("node/store/volumes");
        let hear = format!("for file in '{}'/*; do sync \"$file\"; done; true", volumes.display());
        arena.disk().run("sh", &["-c", &hear]).success();
        node = arena.site.start(&arena.options);
        arena.tolerance.io_errors.store(false, Ordering::SeqCst);
    }
    let errors = arena.tolerance.seen.load(Ordering::SeqCst);
    arena.judge(node, workers);
    println!("torture: a failing disk, {errors} errors, {} requests judged", arena.answered.load(Ordering::SeqCst));
}

/// A file system on a disk that fails one of a hundred reads and writes while the file exists that is returned with it.
fn failing_disk(size: u64) -> Option<(Disk, std::path::PathBuf)> {
    Disk::set_up(&["unshare", "mkfs.ext4", "nbdkit", "nbdfuse"])?;
    let site = Site::new();
    let (failing, fuse, mount) = (site.path("failing"), site.path("fuse"), site.path("mount"));
    std::fs::create_dir(&fuse).expect("mount point");
    let line = format!(
        "nbdfuse '{fuse}/disk' --command nbdkit -s --filter=error memory {size} \
           error-pread-rate=1% error-pwrite-rate=1% error-file='{failing}' & \
         for i in $(seq 300); do [ -e '{fuse}/disk' ] && break; sleep 0.1; done; \
         mkfs.ext4 -q -F -m 0 -O ^has_journal '{fuse}/disk'; \
         mount -o loop,errors=continue '{fuse}/disk' '{mount}'",
        fuse = fuse.display(),
        failing = failing.display(),
        mount = mount.display(),
    );
    let disk = Disk::mount_by(site, mount, &line);
    Some((disk, failing))
}
