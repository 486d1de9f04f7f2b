//! Snapshots of volumes by the real programs: a guest writes all the while, the server is killed, snapshots are deleted, and what is left of
//! them is restored and held against what the guest wrote.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use volley_client::{Client, Options};

use crate::disk::{Disk, FileSystem, flip};
use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{MIB, write_image};

const IMAGE_BYTES: u64 = 24 * MIB;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = IMAGE_BYTES / BLOCK;

/// A guest that writes blocks one after the other, each with its number: write `n` goes to block [`place`] of `n`. So the content after any
/// write is known from its number alone.
struct Writer {
    stop: Arc<AtomicBool>,
    /// The last write that was begun, and the last one that a flush has covered.
    begun: Arc<AtomicU64>,
    flushed: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

/// Half of the writes go to an eighth of the blocks.
fn place(number: u64) -> u64 {
    let mixed = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 20;
    if number.is_multiple_of(2) { mixed % (BLOCKS / 8) } else { mixed % BLOCKS }
}

fn block(number: u64) -> Vec<u8> {
    let mut data = number.to_le_bytes().repeat(BLOCK as usize / 8);
    data[BLOCK as usize - 8..].copy_from_slice(&(!number).to_le_bytes());
    data
}

impl Writer {
    /// Goes on after `number`, with the node at `server`, also after its restarts.
    fn start(server: String, volume: &'static str, number: u64) -> Writer {
        let (stop, begun, flushed) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(number)), Arc::new(AtomicU64::new(number)));
        let (stopped, at, covered) = (stop.clone(), begun.clone(), flushed.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                let options = Options { deadline: Duration::from_secs(100), ..Options::default() };
                let client = Client::connect(&server, options).await.expect("connect");
                let volume = client.attach(volume).await.expect("attach");
                let mut number = number;
                while !stopped.load(Ordering::Relaxed) {
                    number += 1;
                    at.store(number, Ordering::SeqCst);
                    volume.write(place(number) * BLOCK, block(number).into(), false).await.expect("write");
                    if number.is_multiple_of(16) {
                        volume.flush().await.expect("flush");
                        covered.store(number, Ordering::SeqCst);
                    }
                }
                volume.flush().await.expect("flush");
                covered.store(number, Ordering::SeqCst);
                volume.detach().await.expect("detach");
            });
        });
        Writer { stop, begun, flushed, thread }
    }

    /// The number of the last write, durable.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the guest saw no error");
        self.flushed.load(Ordering::SeqCst)
    }
}

/// The volume's content after each write, by the image it began with.
struct History {
    image: Vec<u8>,
}

impl History {
    /// After which write the content is this one. Panics where it is after none.
    fn find(&self, content: &[u8], what: &str) -> u64 {
        let numbers = content.chunks(BLOCK as usize).enumerate().filter_map(|(at, block)| self.number(at, block, what));
        let last = numbers.max().unwrap_or(0);
        let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
        expected.extend((1..=last).map(|number| (place(number), number)));
        for (at, found) in content.chunks(BLOCK as usize).enumerate() {
            let original = &self.image[at * BLOCK as usize..][..BLOCK as usize];
            match expected.get(&(at as u64)) {
                Some(number) => {
                    assert!(found == block(*number), "{what}: block {at} is not of write {number} of {last}")
                }
                None => assert!(found == original, "{what}: block {at} is not the image's"),
            }
        }
        last
    }

    fn number(&self, at: usize, found: &[u8], what: &str) -> Option<u64> {
        if *found == self.image[at * BLOCK as usize..][..BLOCK as usize] {
            return None;
        }
        let number = u64::from_le_bytes(found[..8].try_into().expect("8 bytes"));
        assert!(found == block(number), "{what}: block {at} is torn");
        Some(number)
    }
}

struct Lab {
    site: Site,
    options: NodeOptions,
    history: History,
    _disk: Option<Disk>,
}

impl Lab {
    fn new(disk: Option<Disk>) -> Lab {
        let site = Site::new();
        let path = site.path("image.raw");
        write_image(&path, IMAGE_BYTES, 5);
        site.import(&path, "debian");
        let image = std::fs::read(&path).expect("the image");
        // Reading for snapshots is not slowed down for the guest: that is measured elsewhere.
        let config = "hydration.guest_p99_bound = \"none\"\n".to_owned();
        let options = match &disk {
            None => NodeOptions { default_rate: "unlimited", config, ..NodeOptions::default() },
            Some(disk) => NodeOptions {
                default_rate: "unlimited",
                config,
                data: Some(disk.mount().join("node")),
                namespace: Some(disk.pid()),
                ..NodeOptions::default()
            },
        };
        Lab { site, options, history: History { image }, _disk: disk }
    }

    fn start(&self) -> Node {
        self.site.start(&self.options)
    }

    fn take(&self, node: &Node, name: &str) -> Value {
        let task = node.json(&self.site, &["snapshot", "create", "vm", "--name", name, "--wait"]);
        task["snapshots"][0].clone()
    }

    /// The content of a snapshot, by way of the object store alone.
    fn exported(&self, name: &str) -> Vec<u8> {
        let out = self.site.path("exported.raw");
        let outcome = self.site.volley(&["image", "export", name, &out.display().to_string(), "--force"]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        std::fs::read(out).expect("the export")
    }

    /// The content of a volume that was made of a snapshot.
    fn restored(&self, node: &Node, snapshot: &str, volume: &str) -> Vec<u8> {
        let created = node.volley(&self.site, &["volume", "create", volume, "--snapshot", snapshot]);
        assert_eq!(created.code, 0, "{created:?}");
        let content = self.read(node, volume);
        assert_eq!(node.volley(&self.site, &["volume", "delete", volume]).code, 0);
        content
    }

    fn read(&self, node: &Node, volume: &str) -> Vec<u8> {
        read_volume(node, volume, IMAGE_BYTES)
    }
}

/// What a guest reads of a volume, whole MiBs.
pub(crate) fn read_volume(node: &Node, volume: &str, bytes: u64) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let client = Client::connect(&node.data, Options::default()).await.expect("connect");
        let volume = client.attach(volume).await.expect("attach");
        let mut content = Vec::new();
        while (content.len() as u64) < bytes {
            content.extend_from_slice(&volume.read(content.len() as u64, MIB as usize).await.expect("read"));
        }
        volume.detach().await.expect("detach");
        content
    })
}

/// Snapshots of a volume whose guest writes all the time, each of which is the volume at one moment; half are deleted, and the others
/// are still what they were.
fn a_chain_of_snapshots(lab: &Lab) {
    const SNAPSHOTS: usize = 24;
    let node = lab.start();
    assert_eq!(node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let writer = Writer::start(node.data.clone(), "vm", 0);
    let mut taken = Vec::new();
    for at in 0..SNAPSHOTS {
        let (flushed, name) = (writer.flushed.load(Ordering::SeqCst), format!("s{at}"));
        let shown = lab.take(&node, &name);
        taken.push((name, flushed, writer.begun.load(Ordering::SeqCst), number(&shown, "stall_us")));
    }
    let end = writer.end();
    let longest = taken.iter().map(|(.., stall, _)| *stall).max().expect("some");
    println!("snapshots: {SNAPSHOTS} while a guest made {end} writes; it was held back for {longest} us at most");
    for (name, ..) in taken.iter().step_by(2) {
        let outcome = lab.site.volley(&["snapshot", "delete", name]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    assert_eq!(lab.site.volley(&["snapshot", "gc", "--grace", "0s"]).code, 0);
    let mut last = 0;
    for (at, (name, flushed, begun, ..)) in taken.iter().enumerate().skip(1).step_by(2) {
        let content = lab.exported(name);
        let found = lab.history.find(&content, name);
        assert!((*flushed..=*begun).contains(&found), "{name}: write {found}, not {flushed} to {begun}");
        assert!(found >= last, "{name} is older than the one before");
        last = found;
        if at % 6 == 1 {
            assert!(
                lab.restored(&node, name, &format!("r{at}")) == content,
                "{name}: its volume differs from its export"
            );
        }
    }
    // With nothing written since, nothing is read or stored.
    lab.take(&node, "quiet-1");
    let quiet = lab.take(&node, "quiet-2");
    assert_eq!((number(&quiet, "captured_chunks"), number(&quiet, "stored_bytes")), (0, 0), "{quiet}");
    assert_eq!(lab.history.find(&lab.exported("quiet-2"), "quiet-2"), end);
    assert!(node.stop().0.success());
}

#[test]
fn a_chain_of_snapshots_is_the_volume_at_each_moment_and_outlives_its_links() {
    a_chain_of_snapshots(&Lab::new(None));
}

#[test]
fn so_it_is_on_a_store_that_shares_extents() {
    let Some(disk) = Disk::new(FileSystem::Xfs, 1 << 30) else { return };
    a_chain_of_snapshots(&Lab::new(Some(disk)));
}

/// Killed at any time, while a snapshot is taken or not: those that exist are whole, those that do not can be taken again, and the volume has
/// all that was flushed.
#[test]
fn a_node_killed_while_snapshots_are_taken_has_whole_ones_only() {
    let lab = Lab::new(None);
    let mut node = lab.start();
    assert_eq!(node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let writer = Writer::start(node.data.clone(), "vm", 0);
    for round in 0..6_u64 {
        let name = format!("k{round}");
        let mut taking =
            lab.site.volley_command(&["--server", &node.http, "snapshot", "create", "vm", "--name", &name, "--wait"]);
        let mut taking =
            taking.stderr(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn().expect("volley");
        std::thread::sleep(Duration::from_millis(40 + round * 45));
        node.kill();
        taking.wait().expect("volley ends");
        node = lab.start();
        // What was not flushed is sent again, in any order, before the guest goes on.
        let before = writer.begun.load(Ordering::SeqCst);
        eventually("another flush", || writer.flushed.load(Ordering::SeqCst) > before + 16);
        let exists = lab.site.volley(&["snapshot", "show", &name]).code == 0;
        println!("round {round}: killed, the snapshot {}", if exists { "exists" } else { "does not exist" });
        if !exists {
            lab.take(&node, &name);
        }
        let found = lab.history.find(&lab.exported(&name), &name);
        let taken = if exists { 0..=before } else { before..=writer.begun.load(Ordering::SeqCst) };
        assert!(taken.contains(&found), "{name}: write {found}, not of {taken:?}");
    }
    let end = writer.end();
    assert_eq!(lab.history.find(&lab.read(&node, "vm"), "the volume"), end);
    lab.take(&node, "last");
    assert_eq!(lab.history.find(&lab.exported("last"), "last"), end);
    assert!(node.stop().0.success());
    let data = lab.site.data().display().to_string();
    assert_eq!(lab.site.volley(&["check", &data]).code, 0);
}

#[test]
fn a_volume_goes_back_is_cloned_grows_and_proves_what_it_is() {
    let lab = Lab::new(None);
    let node = lab.start();
    let volley = |args: &[&str]| node.volley(&lab.site, args);
    assert_eq!(volley(&["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let writer = Writer::start(node.data.clone(), "vm", 0);
    std::thread::sleep(Duration::from_millis(200));
    let end = writer.end();
    let proof = node.json(&lab.site, &["volume", "verify", "vm"])["report"].clone();
    assert_eq!(number(&proof, "chunks_damaged"), 0, "{proof}");
    assert!(number(&proof, "chunks_changed") > 0, "{proof}");
    // A clone of it now, and back to the image, keeping what it was.
    assert_eq!(volley(&["volume", "clone", "vm", "twin"]).code, 0);
    assert_eq!(volley(&["volume", "rollback", "vm", "--to", "nothing"]).code, 1);
    let back = node.json(&lab.site, &["volume", "rollback", "vm", "--to", "debian", "--keep-as", "kept"]);
    assert_eq!(back["kept_as"], "kept", "{back}");
    assert!(lab.read(&node, "vm") == lab.history.image, "not the image");
    assert_eq!(lab.history.find(&lab.read(&node, "twin"), "twin"), end);
    node.wait_hydrated(&lab.site, "vm", "60s");
    let proof = node.json(&lab.site, &["volume", "verify", "vm"])["report"].clone();
    assert_eq!(number(&proof, "chunks_equal"), number(&proof, "chunks"), "{proof}");
    // And forward again to what was kept.
    assert_eq!(volley(&["volume", "rollback", "vm", "--to", "kept", "--discard"]).code, 0);
    assert_eq!(lab.history.find(&lab.read(&node, "vm"), "vm"), end);
    assert_eq!(volley(&["volume", "resize", "vm", "16MiB"]).code, 1, "it does not shrink");
    assert_eq!(volley(&["volume", "resize", "vm", "32MiB"]).code, 0);
    let shown = node.volume(&lab.site, "vm");
    assert_eq!(number(&shown, "size_bytes"), 32 * MIB);
    assert_eq!(lab.history.find(&lab.read(&node, "vm"), "vm"), end);
    node.wait_hydrated(&lab.site, "vm", "60s");
    // What rots on the disk is found and put back.
    lab.take(&node, "before-rot");
    let id = shown["id"].as_str().expect("an id").to_owned();
    assert!(node.stop().0.success());
    let file = lab.site.data().join(format!("store/volumes/{id}.raw"));
    flip(&file, 5 * MIB + 77);
    let node = lab.start();
    let outcome = node.volley(&lab.site, &["volume", "verify", "vm"]);
    assert!(outcome.code == 1 && outcome.stderr.contains("damaged on its disk: [10]"), "{outcome:?}");
    let repaired = node.volley(&lab.site, &["volume", "verify", "vm", "--repair"]);
    assert_eq!(repaired.code, 0, "{repaired:?}");
    assert!(node.stop().0.success());
    // The scrub does so by itself.
    flip(&file, 5 * MIB + 78);
    let config = format!("{}[snapshots]\nscrub_bandwidth = \"1GiB\"\nscrub_pause = \"1s\"\n", lab.options.config);
    let node = lab.site.start(&NodeOptions { config, ..lab.options.clone() });
    eventually("the scrub", || node.get("/metrics").contains("volley_scrub_repaired_chunks_total 1"));
    assert_eq!(lab.history.find(&lab.read(&node, "vm"), "vm"), end);
    assert!(node.stop().0.success());
}

/// The node's whole data directory is lost: a fresh node with the same object store has every snapshot, and volumes from them.
#[test]
fn a_fresh_node_restores_what_a_lost_one_had_in_its_snapshots() {
    let lab = Lab::new(None);
    let node = lab.start();
    assert_eq!(node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let writer = Writer::start(node.data.clone(), "vm", 0);
    std::thread::sleep(Duration::from_millis(150));
    let end = writer.end();
    lab.take(&node, "backup");
    node.kill();
    std::fs::remove_dir_all(lab.site.data()).expect("lost");
    let node = lab.start();
    let images = node.get("/v1/snapshots");
    assert!(images.contains("\"backup\"") && images.contains("\"debian\""), "{images}");
    assert_eq!(lab.history.find(&lab.restored(&node, "backup", "again"), "again"), end);
    assert!(node.stop().0.success());
}

#[test]
fn what_can_not_be_is_refused_and_nothing_is_half_done() {
    let lab = Lab::new(None);
    let node = lab.start();
    let refused = |args: &[&str], words: &str| {
        let outcome = node.volley(&lab.site, args);
        assert!(outcome.code == 1 && outcome.stderr.contains(words), "{args:?}: {outcome:?}");
    };
    assert_eq!(node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    refused(&["snapshot", "create", "vm", "--name", "debian", "--wait"], "exists already");
    refused(&["snapshot", "create", "nobody", "--name", "s", "--wait"], "no volume");
    refused(&["snapshot", "create", "vm", "vm", "--name", "s", "--wait"], "twice");
    refused(&["snapshot", "create", "vm", "--name", "../s", "--wait"], "name");
    refused(&["volume", "rollback", "vm", "--to", "s"], "no snapshot");
    refused(&["volume", "resize", "vm", "1000"], "multiple");
    let group = node.json(&lab.site, &["snapshot", "create", "vm", "--name", "alone", "--wait"]);
    assert_eq!(group["snapshots"][0]["captured_chunks"], 0, "nothing was written: {group}");
    // What only the object store has is told.
    let slow = ["volume", "create", "slow", "--snapshot", "debian", "--rate", "none"];
    assert_eq!(node.volley(&lab.site, &slow).code, 0);
    let risk = node.json(&lab.site, &["volume", "at-risk", "slow"]);
    let ranges = risk["ranges"].as_array().expect("ranges");
    assert_eq!(ranges.iter().map(|range| number(range, "bytes")).sum::<u64>(), number(&risk, "bytes"), "{risk}");
    assert!(number(&risk, "bytes") > 0 && ranges.len() > 2, "zero chunks lie between: {risk}");
    // The object store is gone: a clear error, and afterwards all is as before.
    let away = lab.site.path("away");
    std::fs::rename(lab.site.objects(), &away).expect("taken away");
    let outcome = node.volley(&lab.site, &["snapshot", "create", "vm", "--name", "s", "--wait"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    std::fs::rename(&away, lab.site.objects()).expect("brought back");
    lab.take(&node, "s");
    assert!(lab.exported("s") == lab.history.image);
    assert!(node.stop().0.success());
}
