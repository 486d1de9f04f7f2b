//! The scrub by the real programs: what rots at rest is found and put right before a guest reads it.

use crate::disk::flip;
use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{MIB, write_image};
use crate::snapshots::read_volume;

const IMAGE_BYTES: u64 = 16 * MIB;
const CACHE: &str = "[cache]\ndisk_bytes = \"64MiB\"\n";

/// A metric without labels.
pub(crate) fn metric(node: &Node, name: &str) -> u64 {
    let text = node.get("/metrics");
    let line = text.lines().find(|line| line.starts_with(&format!("volley_{name} ")));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn the_scrub_finds_what_rotted_in_the_disk_cache_and_the_next_read_is_right() {
    let site = Site::new();
    let image = site.path("image.raw");
    write_image(&image, IMAGE_BYTES, 3);
    site.import(&image, "debian");
    let with = |config: String| site.start(&NodeOptions { config, cores: 1, ..NodeOptions::default() });
    let node = with(CACHE.to_owned());
    assert_eq!(node.volley(&site, &["cache", "warm", "debian"]).code, 0);
    let cached = |node: &Node| number(&node.json(&site, &["cache", "show"])["disk"], "chunks");
    eventually("the image in the cache", || {
        let shown = node.json(&site, &["cache", "show"]);
        shown["warming"].as_array().is_some_and(|all| all.iter().all(|one| one["running"] == false))
    });
    let (status, _) = node.stop();
    assert!(status.success());
    flip(&site.data().join("cache/shard-0.slots"), 30_000);

    let node = with(format!("{CACHE}[snapshots]\nscrub_bandwidth = \"1GiB\"\nscrub_pause = \"200ms\"\n"));
    let before = cached(&node);
    assert!(before > 10, "{before} chunks are cached");
    eventually("the scrub", || metric(&node, "scrub_cache_dropped_chunks_total") == 1);
    eventually("two rounds", || metric(&node, "scrub_rounds_total") >= 2);
    assert!(metric(&node, "scrub_cache_chunks_total") >= 2 * before - 1);
    assert_eq!((metric(&node, "scrub_cache_dropped_chunks_total"), cached(&node)), (1, before - 1), "once");
    let shown = node.get("/v1/node");
    assert!(shown.contains("shard-0.slots slot 0 is corrupt"), "{shown}");
    assert_eq!(node.volley(&site, &["volume", "create", "vm", "--snapshot", "debian"]).code, 0);
    let content = read_volume(&node, "vm", IMAGE_BYTES);
    assert!(content == std::fs::read(&image).expect("the image"), "not the image");
    let (status, _) = node.stop();
    assert!(status.success());
}
