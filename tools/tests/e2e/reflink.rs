//! Volumes of a store on a filesystem that can share extents: one physical copy of the image, independent volumes, and
//! nothing lost when the server is killed in the middle.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::crash::Guest;
use crate::disk::{Disk, FileSystem};
use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, available, number};
use crate::image_file::{CHUNK, MIB, write_image};

const VOLUMES: u32 = 50;
/// Fifty copies of it would need more than twice the disk.
const IMAGE_BYTES: u64 = 48 * MIB;
const CHUNKS: u64 = IMAGE_BYTES / CHUNK;
/// Of five chunks of [`write_image`] one is zero and one repeats the first.
const ZERO: u64 = CHUNKS / 5;
const DIFFERENT: u64 = CHUNKS - 2 * ZERO;

/// A node whose data lie on an XFS of 1 GiB, and an image in its object store.
struct Lab {
    site: Site,
    disk: Disk,
    options: NodeOptions,
    image: Vec<u8>,
}

impl Lab {
    fn new(default_rate: &'static str) -> Option<Lab> {
        if !available(&["qemu-io"]) {
            return None;
        }
        let disk = Disk::new(FileSystem::Xfs, 1 << 30)?;
        let site = Site::new();
        let path = site.path("image.raw");
        write_image(&path, IMAGE_BYTES, 5);
        site.import(&path, "debian-12");
        let image = std::fs::read(&path).expect("the image");
        let (data, namespace) = (Some(disk.mount().join("node")), Some(disk.pid()));
        let options = NodeOptions { default_rate, data, namespace, ..NodeOptions::default() };
        Some(Lab { site, disk, options, image })
    }

    /// The store as others see it.
    fn store(&self) -> PathBuf {
        self.disk.outside(&self.disk.mount().join("node/store"))
    }

    fn content(&self, node: &Node, name: &str) -> Vec<u8> {
        let id = node.volume(&self.site, name)["id"].as_str().expect("id").to_owned();
        std::fs::read(self.store().join(format!("volumes/{id}.raw"))).expect("the volume's file")
    }

    fn used_bytes(&self) -> u64 {
        let mount = self.disk.mount().display().to_string();
        let line = self.disk.run("df", &["--output=used", "-B1", &mount]).success();
        line.lines().last().and_then(|used| used.trim().parse().ok()).unwrap_or_else(|| panic!("df said {line}"))
    }

    fn shown(&self, node: &Node) -> Value {
        node.json(&self.site, &["store", "show", "default"])
    }

    fn check(&self) {
        let data = self.disk.outside(&self.disk.mount().join("node")).display().to_string();
        let outcome = self.site.volley(&["check", &data, "--json"]);
        assert!(outcome.code == 0 && !outcome.stdout.contains("foreign"), "{outcome:?}");
    }
}

#[test]
fn fifty_volumes_take_the_space_of_one_image_and_each_is_its_own() {
    let Some(lab) = Lab::new("unlimited") else { return };
    let node = lab.site.start(&lab.options);
    let before = lab.used_bytes();
    node.create(&lab.site, "debian-12", VOLUMES, "web-");
    (0..VOLUMES).for_each(|n| node.wait_hydrated(&lab.site, &format!("web-{n}"), "120s"));
    let shown = lab.shown(&node);
    assert_eq!(shown["shares_extents"], true, "{shown}");
    assert_eq!(number(&shown, "base_written_bytes"), DIFFERENT * CHUNK, "{shown}");
    assert_eq!(number(&shown, "cloned_chunks"), u64::from(VOLUMES) * (CHUNKS - ZERO), "{shown}");
    assert_eq!(number(&shown, "clone_failures"), 0, "{shown}");
    let took = lab.used_bytes() - before;
    println!("reflink: {VOLUMES} volumes of {} MiB take {} MiB", IMAGE_BYTES / MIB, took / MIB);
    // Maps of shared extents and the journal take some, too.
    assert!(took < IMAGE_BYTES, "{took} bytes for {VOLUMES} volumes");
    for n in [0, 1, 17, VOLUMES - 1] {
        assert!(lab.content(&node, &format!("web-{n}")) == lab.image, "web-{n} differs from the image");
    }
    // One that comes later is born with the image, by fewer calls than chunks.
    node.create(&lab.site, "debian-12", 1, "late-");
    node.wait_hydrated(&lab.site, "late-0", "60s");
    let late = lab.shown(&node);
    let calls = number(&late, "clones") - number(&shown, "clones");
    println!("reflink: the next volume takes {calls} clones for {} chunks", CHUNKS - ZERO);
    assert_eq!(number(&late, "cloned_chunks") - number(&shown, "cloned_chunks"), CHUNKS - ZERO, "{late}");
    assert!(calls < (CHUNKS - ZERO) * 9 / 10, "{calls} clones: {late}");
    assert_eq!(number(&late, "base_written_bytes"), DIFFERENT * CHUNK, "{late}");
    assert!(lab.content(&node, "late-0") == lab.image, "late-0 differs from the image");
    let agent = lab.site.agent("agent", &[]);
    let mut guest = Guest::connect(&agent, "web-1");
    guest.does("write -f -P 0xaa 5M 64k");
    guest.does("discard 7M 1M");
    guest.leave();
    let mut expected = lab.image.clone();
    expected[5 << 20..(5 << 20) + (64 << 10)].fill(0xaa);
    expected[7 << 20..8 << 20].fill(0);
    assert!(lab.content(&node, "web-1") == expected, "web-1 has not what its guest wrote");
    assert!(lab.content(&node, "web-2") == lab.image, "a write to web-1 shows in web-2");
    let metrics = node.get("/metrics");
    assert!(metrics.contains("volley_store_shares_extents{store=\"default\"} 1"), "{metrics}");
    assert!(node.stop().0.success());
    lab.check();
}

#[test]
fn a_node_killed_while_volumes_share_loses_nothing() {
    let Some(lab) = Lab::new("none") else { return };
    let mut node = lab.site.start(&lab.options);
    node.create(&lab.site, "debian-12", 8, "web-");
    let agent = lab.site.agent("agent", &[]);
    let mut guest = Guest::connect(&agent, "web-0");
    guest.does("write -f -P 0xbb 1M 64k");
    for round in 0..4 {
        for n in 0..8 {
            node.volley(&lab.site, &["volume", "set", &format!("web-{n}"), "--rate", "6MiB/s"]).success();
        }
        eventually("sharing", || number(&lab.shown(&node), "cloned_chunks") > 16);
        // The guest's volume and what it wrote are there in every life.
        guest.does(&format!("write -f -P {} {}M 64k", 0xc0 + round, 8 + round));
        node.kill();
        node = lab.site.start(&lab.options);
        let left: Vec<_> = names(&lab.store().join("base"));
        assert!(left.iter().all(|name| name.ends_with(".chunks")), "{left:?}");
    }
    guest.leave();
    let mut expected = lab.image.clone();
    expected[1 << 20..(1 << 20) + (64 << 10)].fill(0xbb);
    for round in 0..4_usize {
        let at = (8 + round) << 20;
        expected[at..at + (64 << 10)].fill(0xc0 + round as u8);
    }
    for n in 0..8 {
        let name = format!("web-{n}");
        node.volley(&lab.site, &["volume", "set", &name, "--rate", "unlimited"]).success();
        node.wait_hydrated(&lab.site, &name, "60s");
        let wanted = if n == 0 { &expected } else { &lab.image };
        assert!(lab.content(&node, &name) == *wanted, "{name} is not what it should be");
    }
    assert!(node.stop().0.success());
    lab.check();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("the base");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}
