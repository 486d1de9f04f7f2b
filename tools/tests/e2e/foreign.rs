//! What NBD clients we did not write see of the volumes: libnbd's tools, QEMU's, fio. docs/nbd.md lists them.

mod copies;
mod filesystems;
mod maps;
mod patterns;
mod stress;
mod verify;

use std::path::Path;

use serde_json::Value;

use crate::harness::{Agent, Node, NodeOptions, Site, available, number, run_in};
use crate::image_file::{CHUNK, MIB, assert_same, noise, write_image};

/// Several chunks of each kind, and an end that is no multiple of a chunk or of 4096.
pub(crate) const IMAGE_BYTES: u64 = 33 * MIB + 3 * 512;

/// A site with an imported image, a node without background hydration, `count` volumes `web-0…`, and an agent.
pub(crate) fn served(count: u32) -> (Site, Node, Agent) {
    served_with(&NodeOptions::default(), count)
}

/// [`served`] by a node with these options.
pub(crate) fn served_with(options: &NodeOptions, count: u32) -> (Site, Node, Agent) {
    let site = Site::new();
    write_image(&site.path("image.raw"), IMAGE_BYTES, 7);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start(options);
    node.create(&site, "debian-12", count, "web-");
    let agent = site.agent("agent", &[]);
    (site, node, agent)
}

/// Lets hydration begin, slow enough for clients to be faster.
fn hydrate(site: &Site, node: &Node, volume: &str) {
    node.volley(site, &["volume", "set", volume, "--rate", "4MiB/s"]).success();
    assert_eq!(node.volume(site, volume)["hydrated"], false);
}

/// Copies a volume, or a file, with nbdcopy.
fn nbdcopy(site: &Site, options: &[&str], from: &str, to: &str) {
    run_in(&site.path(""), "nbdcopy", &[options, &[from, to]].concat()).success();
}

/// Bytes of `volley:resident` that are resident, as `nbdinfo --map` sees them.
fn mapped_resident_bytes(site: &Site, uri: &str) -> u64 {
    let text = run_in(&site.path(""), "nbdinfo", &["--json", "--map=volley:resident", uri]).success();
    let map: Value = serde_json::from_str(&text).expect("nbdinfo prints JSON");
    let extents = map.as_array().expect("a list of extents");
    extents.iter().filter(|e| number(e, "type") & 1 == 1).map(|e| number(e, "length")).sum()
}

#[test]
fn nbdinfo_lists_every_volume_with_its_size() {
    if !available(&["nbdinfo"]) {
        return;
    }
    let (site, _node, agent) = served(20);
    let text = run_in(&site.path(""), "nbdinfo", &["--json", "--list", &agent.uri("")]).success();
    let list: Value = serde_json::from_str(&text).expect("nbdinfo prints JSON");
    let exports = list["exports"].as_array().expect("exports");
    let mut names: Vec<_> = exports.iter().map(|e| e["export-name"].as_str().expect("name").to_string()).collect();
    names.sort();
    let mut wanted: Vec<_> = (0..20).map(|n| format!("web-{n}")).collect();
    wanted.sort();
    assert_eq!(names, wanted);
    for export in exports {
        assert_eq!(number(export, "export-size"), IMAGE_BYTES);
        for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
            assert_eq!(export[can], true, "{can} of {export}");
        }
    }
}

#[test]
fn a_new_volume_reads_as_the_image_and_the_map_tells_what_is_there() {
    if !available(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let (site, node, agent) = served(2);
    let (before, uri) = (node.volume(&site, "web-0"), agent.uri("web-0"));
    assert_eq!(before["hydrated"], false);
    // Chunks of zeroes are resident by nature; everything else is not there.
    assert!(number(&before, "resident_bytes") < IMAGE_BYTES / 3, "{before}");
    assert!(mapped_resident_bytes(&site, &uri) < IMAGE_BYTES / 3);

    nbdcopy(&site, &[], &uri, "copy.raw");
    assert_same(&site.path("image.raw"), &site.path("copy.raw"));

    node.wait_hydrated(&site, "web-0", "60s");
    assert_eq!(mapped_resident_bytes(&site, &uri), IMAGE_BYTES);
    assert_eq!(node.volume(&site, "web-1")["hydrated"], false, "the untouched volume stays as it was");
}

#[test]
fn what_nbdcopy_writes_reads_back_and_stays_in_its_volume() {
    if !available(&["nbdcopy", "qemu-img"]) {
        return;
    }
    let (site, _node, agent) = served(2);
    std::fs::write(site.path("other.raw"), noise(99, IMAGE_BYTES)).expect("write");
    nbdcopy(&site, &[], "other.raw", &agent.uri("web-0"));
    nbdcopy(&site, &[], &agent.uri("web-0"), "back.raw");
    assert_same(&site.path("other.raw"), &site.path("back.raw"));
    qemu_compare(&site, "image.raw", &agent.qemu_file("web-1"));
}

#[test]
fn a_hydrated_volume_is_a_raw_image_that_needs_no_object_store() {
    if !available(&["qemu-img", "nbdcopy"]) {
        return;
    }
    let (site, node, agent) = served(2);
    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    let shown = node.volume(&site, "web-0");
    assert_eq!(number(&shown, "resident_bytes"), IMAGE_BYTES);
    assert_eq!(number(&shown, "remaining_bytes"), 0);

    std::fs::rename(site.objects(), site.path("gone")).expect("take the object store away");
    nbdcopy(&site, &[], &agent.uri("web-0"), "copy.raw");
    assert_same(&site.path("image.raw"), &site.path("copy.raw"));

    assert!(agent.stop().success());
    assert!(node.stop().0.success());
    let file = volume_file(&site, shown["id"].as_str().expect("id"));
    qemu_compare(&site, "image.raw", &file);
}

#[test]
fn zeroes_and_discards_of_qemu_io_read_back_as_zeroes_without_a_fetch() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, _node, agent) = served(1);
    std::fs::rename(site.objects(), site.path("gone")).expect("take the object store away");
    let chunk = CHUNK.to_string();
    let zeroes = format!("write -z 0 {chunk}");
    let discard = format!("discard {chunk} {chunk}");
    let inside = format!("write -P 0x5a {} 64k", 3 * CHUNK + 8192);
    let reads = [
        format!("read -P 0 0 {chunk}"),
        format!("read -P 0 {chunk} {chunk}"),
        format!("read -P 0x5a {} 64k", 3 * CHUNK + 8192),
    ];
    qemu_io(&site, &agent, "web-0", &[&zeroes, &discard, &inside, "flush", &reads[0], &reads[1], &reads[2]]);
}

#[test]
fn fio_verifies_what_it_wrote_at_random() {
    if !available(&["fio"]) {
        return;
    }
    let (site, _node, agent) = served(1);
    let uri = format!("--uri={}", agent.uri("web-0"));
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=16",
        "--size=32M",
        "--io_size=16M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randseed=7",
        "--fsync=64",
    ];
    let text = run_in(&site.path(""), "fio", &args).success();
    assert!(text.contains("err= 0"), "{text}");
}

/// Runs qemu-io commands on a volume; every `read -P` must find its pattern.
pub(crate) fn qemu_io(site: &Site, agent: &Agent, volume: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    let uri = agent.uri(volume);
    args.push(&uri);
    let outcome = run_in(&site.path(""), "qemu-io", &args);
    let text = format!("{}{}", outcome.stdout, outcome.stderr);
    outcome.success();
    assert!(!text.contains("failed") && !text.contains("error"), "qemu-io {commands:?}:\n{text}");
}

/// Asserts that QEMU reads the same bytes from both.
pub(crate) fn qemu_compare(site: &Site, a: &str, b: &str) {
    run_in(&site.path(""), "qemu-img", &["compare", "-f", "raw", "-F", "raw", a, b]).success();
}

/// The file of a volume in the node's default store.
pub(crate) fn volume_file(site: &Site, id: &str) -> String {
    find(&site.data(), id).unwrap_or_else(|| panic!("no file of volume {id} under {}", site.data().display()))
}

/// A file below `dir` whose name holds `id`.
pub(crate) fn find(dir: &Path, id: &str) -> Option<String> {
    for entry in std::fs::read_dir(dir).expect("list the data folder") {
        let entry = entry.expect("folder entry");
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, id) {
                return Some(found);
            }
        } else if entry.file_name().to_string_lossy().contains(id) {
            return Some(path.display().to_string());
        }
    }
    None
}
