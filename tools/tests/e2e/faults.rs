//! Faults of the world outside: an object store that goes away, a damaged pack, a full disk.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::crash::Guest;
use crate::disk::{Disk, FileSystem};
use crate::foreign::{qemu_compare, qemu_io};
use crate::harness::{Node, NodeOptions, Site, available};
use crate::image_file::{CHUNK, MIB, noise, write_image};

/// Guest reads of this site's node give up after this long.
const READ_DEADLINE: Duration = Duration::from_secs(2);

fn impatient() -> NodeOptions {
    // Attempts follow each other closely enough for one to fall into the deadline of the next read.
    let retries = "[retries]\nbackoff_max = \"200ms\"\n";
    let config = format!("[deadlines]\nguest_read = \"{}s\"\n{retries}", READ_DEADLINE.as_secs());
    NodeOptions { config, ..NodeOptions::default() }
}

/// Waits for what the node does on its own (an event, an error of a background task), within a bound.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn events(node: &Node) -> String {
    node.get("/v1/node")
}

#[test]
fn without_the_object_store_a_read_fails_at_its_deadline_and_works_again_afterwards() {
    if !available(&["qemu-io", "qemu-img"]) {
        return;
    }
    let site = Site::new();
    write_image(&site.path("image.raw"), 16 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start(&impatient());
    node.create(&site, "debian-12", 1, "web-");
    let agent = site.agent("agent", &[]);
    let mut guest = Guest::connect(&agent, "web-0");
    guest.does("read 0 64k");

    let gone = site.path("gone");
    std::fs::rename(site.objects(), &gone).expect("take the object store away");
    let begun = Instant::now();
    guest.fails("read 8M 64k");
    let took = begun.elapsed();
    assert!(took >= READ_DEADLINE, "gave up after {took:?}, before the deadline of {READ_DEADLINE:?}");
    assert!(took < READ_DEADLINE * 5, "the read hung for {took:?}, its deadline is {READ_DEADLINE:?}");
    // What needs no object store goes on: resident reads, writes, and their flush.
    guest.does("read 0 64k");
    guest.does("write -f -P 0x44 4M 64k");
    eventually("an event that names the object store", || events(&node).contains("object store"));

    std::fs::rename(&gone, site.objects()).expect("bring the object store back");
    guest.does("read 8M 64k");
    guest.does("read -P 0x44 4M 64k");
    guest.leave();
    qemu_io(&site, &agent, "web-0", &["read 0 16M"]);
}

#[test]
fn a_damaged_chunk_is_never_served_and_the_others_are() {
    if !available(&["qemu-io", "qemu-img"]) {
        return;
    }
    let site = Site::new();
    // One chunk of noise in a field of zeroes, then one more: the first lies first in the pack.
    let (first, second) = (noise(1, CHUNK), noise(2, CHUNK));
    std::fs::write(site.path("image.raw"), [first, vec![0; 3 << 20], second].concat()).expect("write");
    site.import(&site.path("image.raw"), "debian-12");
    let pack = only_pack(&site.objects());
    flip_byte(&pack, 1000);
    site.volley(&["image", "verify", "debian-12"]).fails_naming(&["debian-12"]);

    let node = site.start(&impatient());
    node.create(&site, "debian-12", 1, "web-");
    let agent = site.agent("agent", &[]);
    let mut guest = Guest::connect(&agent, "web-0");
    guest.fails("read 0 64k");
    let after = 3 * MIB + CHUNK;
    guest.does(&format!("read {after} {CHUNK}"));
    eventually("an event that names the damage", || events(&node).contains("corrupt"));

    // Repaired, the volume works again without a restart.
    flip_byte(&pack, 1000);
    guest.does("read 0 64k");
    guest.leave();
    qemu_compare(&site, "image.raw", &agent.qemu_file("web-0"));
}

#[test]
fn a_truncated_pack_is_an_error_of_its_chunks_only() {
    if !available(&["qemu-io"]) {
        return;
    }
    let site = Site::new();
    std::fs::write(site.path("image.raw"), [noise(1, CHUNK), noise(2, CHUNK)].concat()).expect("write");
    site.import(&site.path("image.raw"), "debian-12");
    let pack = only_pack(&site.objects());
    let file = std::fs::OpenOptions::new().write(true).open(&pack).expect("open the pack");
    file.set_len(CHUNK + CHUNK / 2).expect("truncate");
    site.volley(&["image", "verify", "debian-12"]).fails_naming(&["debian-12"]);

    let node = site.start(&impatient());
    node.create(&site, "debian-12", 1, "web-");
    let agent = site.agent("agent", &[]);
    let mut guest = Guest::connect(&agent, "web-0");
    guest.does("read 0 64k");
    guest.fails(&format!("read {CHUNK} 64k"));
}

#[test]
fn a_full_disk_refuses_writes_and_loses_nothing_acknowledged() {
    if !available(&["qemu-io"]) {
        return;
    }
    let Some(disk) = Disk::new(FileSystem::Ext4, 48 * MIB) else { return };
    let site = Site::new();
    std::fs::write(site.path("image.raw"), noise(1, 64 * MIB)).expect("write");
    site.import(&site.path("image.raw"), "debian-12");
    // The journals are elsewhere, so that the node can start when the store is full.
    let config = format!("[[store]]\nlabel = \"default\"\npath = \"{}\"\n", disk.mount().join("store").display());
    let options = NodeOptions { config, namespace: Some(disk.pid()), ..NodeOptions::default() };
    let node = site.start(&options);
    node.create(&site, "debian-12", 2, "web-");
    let agent = site.agent("agent", &[]);

    // Written and acknowledged while there was room.
    qemu_io(&site, &agent, "web-0", &["write -P 0x61 0 8M", "write -P 0x62 20M 4k", "flush"]);
    let mut guest = Guest::connect(&agent, "web-0");
    let mut at = 24;
    // 40 MiB more don't fit: some write is refused, clearly, and none hangs.
    while guest.try_do(&format!("write -f -P 0x63 {at}M 1M")) {
        at += 1;
        assert!(at < 64, "64 MiB were written to a disk of 48 MiB");
    }
    // What is not there is still answered from memory, although it can't be kept.
    guest.does("read 60M 64k");
    guest.does("read -P 0x61 0 8M");
    node.volley(&site, &["volume", "show", "web-0"]).success();
    guest.leave();

    node.kill();
    let _node = site.start(&options);
    qemu_io(&site, &agent, "web-0", &["read -P 0x61 0 8M", "read -P 0x62 20M 4k"]);
    for done in 24..at {
        qemu_io(&site, &agent, "web-0", &[&format!("read -P 0x63 {done}M 1M")]);
    }
}

fn only_pack(objects: &Path) -> PathBuf {
    let mut found = Vec::new();
    for import in std::fs::read_dir(objects.join("packs")).expect("list the packs") {
        let import = import.expect("folder entry").path();
        found.extend(std::fs::read_dir(import).expect("list").map(|e| e.expect("folder entry").path()));
    }
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

fn flip_byte(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("open the pack");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], at).expect("write");
}
