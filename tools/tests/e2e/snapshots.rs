//! Snapshots of volumes by the real programs: a guest writes all the while, the server is killed, snapshots are deleted, and what is left of
//! them is restored and held against what the guest wrote.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use volley_client::{Client, Options};

use crate::disk::{Disk, flip};
use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{MIB, write_image};

mod chain;

const IMAGE_BYTES: u64 = 24 * MIB;
const BLOCK: u64 = 4096;

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
fn place(number: u64, blocks: u64) -> u64 {
    let mixed = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 20;
    if number.is_multiple_of(2) { mixed % (blocks / 8) } else { mixed % blocks }
}

fn block(number: u64) -> Vec<u8> {
    let mut data = number.to_le_bytes().repeat(BLOCK as usize / 8);
    data[BLOCK as usize - 8..].copy_from_slice(&(!number).to_le_bytes());
    data
}

impl Writer {
    /// Writes to a volume of so many blocks at the node at `server`, also after its restarts.
    fn start(server: String, volume: &'static str, blocks: u64) -> Writer {
        let (begun, flushed): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, at, covered) = (stop.clone(), begun.clone(), flushed.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                let options = Options { deadline: Duration::from_secs(100), ..Options::default() };
                let client = Client::connect(&server, options).await.expect("connect");
                let volume = client.attach(volume).await.expect("attach");
                let mut number = 0;
                while !stopped.load(Ordering::Relaxed) {
                    number += 1;
                    at.store(number, Ordering::SeqCst);
                    volume.write(place(number, blocks) * BLOCK, block(number).into(), false).await.expect("write");
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
    fn blocks(&self) -> u64 {
        self.image.len() as u64 / BLOCK
    }

    /// After which write the content is this one. Panics where it is after none.
    fn find(&self, content: &[u8], what: &str) -> u64 {
        assert_eq!(content.len(), self.image.len(), "{what}");
        let numbers = content.chunks(BLOCK as usize).enumerate().filter_map(|(at, block)| self.number(at, block, what));
        let last = numbers.max().unwrap_or(0);
        // The last write to each block; 0: none.
        let mut expected = vec![0; self.blocks() as usize];
        (1..=last).for_each(|number| expected[place(number, self.blocks()) as usize] = number);
        for (at, found) in content.chunks(BLOCK as usize).enumerate() {
            let original = &self.image[at * BLOCK as usize..][..BLOCK as usize];
            match expected[at] {
                0 => assert!(found == original, "{what}: block {at} is not the image's"),
                number => assert!(found == block(number), "{what}: block {at} is not of write {number} of {last}"),
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
    disk: Option<Disk>,
}

impl Lab {
    fn new(disk: Option<Disk>) -> Lab {
        Lab::with(disk, IMAGE_BYTES)
    }

    /// With an image of so many bytes; the node's data lie on the disk, if there is one.
    fn with(disk: Option<Disk>, image_bytes: u64) -> Lab {
        let site = Site::new();
        let path = site.path("image.raw");
        write_image(&path, image_bytes, 5);
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
        Lab { site, options, history: History { image }, disk }
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
    fn restored(&self, node: &Node, snapshot: &str) -> Vec<u8> {
        restored(&self.site, &node.http, &node.data, snapshot, self.history.image.len() as u64)
    }

    fn read(&self, node: &Node, volume: &str) -> Vec<u8> {
        read_volume(node, volume, self.history.image.len() as u64)
    }

    /// `volley check` of the node's data, which has been stopped.
    fn check(&self) {
        let (data, store) = (self.options.data.clone().unwrap_or_else(|| self.site.data()), self.site.objects_url());
        let args = ["check", &data.display().to_string(), "--object-store", &store];
        let outcome = match &self.disk {
            Some(disk) => disk.run(env!("CARGO_BIN_EXE_volley"), &args),
            None => self.site.volley(&args),
        };
        outcome.success();
    }
}

/// The content of a volume that is made of a snapshot, and deleted.
fn restored(site: &Site, http: &str, data: &str, snapshot: &str, bytes: u64) -> Vec<u8> {
    let volume = format!("from-{snapshot}");
    site.volley(&["--server", http, "volume", "create", &volume, "--snapshot", snapshot]).success();
    let content = read(data, &volume, bytes);
    site.volley(&["--server", http, "volume", "delete", &volume]).success();
    content
}

/// What a guest reads of a volume, whole MiBs.
pub(crate) fn read_volume(node: &Node, volume: &str, bytes: u64) -> Vec<u8> {
    read(&node.data, volume, bytes)
}

fn read(server: &str, volume: &str, bytes: u64) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let client = Client::connect(server, Options::default()).await.expect("connect");
        let volume = client.attach(volume).await.expect("attach");
        let mut content = Vec::new();
        while (content.len() as u64) < bytes {
            content.extend_from_slice(&volume.read(content.len() as u64, MIB as usize).await.expect("read"));
        }
        volume.detach().await.expect("detach");
        content
    })
}

/// Killed at any time, while a snapshot is taken or not: those that exist are whole, those that do not can be taken again, and the volume has
/// all that was flushed.
#[test]
fn a_node_killed_while_snapshots_are_taken_has_whole_ones_only() {
    let lab = Lab::new(None);
    let mut node = lab.start();
    assert_eq!(node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let writer = Writer::start(node.data.clone(), "vm", lab.history.blocks());
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
    let writer = Writer::start(node.data.clone(), "vm", lab.history.blocks());
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
    let writer = Writer::start(node.data.clone(), "vm", lab.history.blocks());
    std::thread::sleep(Duration::from_millis(150));
    let end = writer.end();
    lab.take(&node, "backup");
    node.kill();
    std::fs::remove_dir_all(lab.site.data()).expect("lost");
    let node = lab.start();
    let images = node.get("/v1/snapshots");
    assert!(images.contains("\"backup\"") && images.contains("\"debian\""), "{images}");
    assert_eq!(lab.history.find(&lab.restored(&node, "backup"), "again"), end);
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
