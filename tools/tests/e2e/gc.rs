//! Garbage collection by nodes themselves, with the real programs.

use std::path::PathBuf;

use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{CHUNK, MIB, noise, write_image};
use crate::scrub::metric;
use crate::snapshots::read_volume;

const IMAGE_BYTES: u64 = 8 * MIB;
const HOUR_MS: u64 = 3_600_000;

/// Objects of a kind in the site's object store.
fn objects(site: &Site, folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![site.objects().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for path in entries.map(|entry| entry.expect("entry").path()) {
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found
}

/// As if every condemnation had been sealed an hour earlier: the grace period is over.
fn an_hour_passes(site: &Site) {
    for path in objects(site, "gc") {
        // Carried out meanwhile, or not sealed yet.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let Some((head, rest)) = text.split_once("\nsealed ") else { continue };
        let (sealed, rest) = rest.split_once('\n').expect("a line");
        let (lines, _) = rest.rsplit_once("blake3 ").expect("its digest");
        let aged = sealed.parse::<u64>().expect("a time") - HOUR_MS;
        let body = format!("{head}\nsealed {aged}\n{lines}");
        let new = site.path("aged");
        std::fs::write(&new, format!("{body}blake3 {}\n", blake3::hash(body.as_bytes()).to_hex())).expect("written");
        std::fs::rename(&new, &path).expect("put in place");
    }
}

fn sum(nodes: &[Node], name: &str) -> u64 {
    nodes.iter().map(|node| metric(node, name)).sum()
}

#[test]
fn nodes_carry_out_a_deletion_when_its_last_volume_has_gone_and_remove_the_packs_after_the_grace_period() {
    let site = Site::new();
    write_image(&site.path("image.raw"), IMAGE_BYTES, 2);
    site.import(&site.path("image.raw"), "debian");
    let options = NodeOptions {
        default_rate: "256KiB/s",
        config: "[snapshots]\ngc_every = \"1s\"\n".to_owned(),
        ..NodeOptions::default()
    };
    let other =
        NodeOptions { data: Some(site.path("other")), listen: Some("127.0.0.1:0".to_owned()), ..options.clone() };
    let nodes = [site.start(&options), site.start(&other)];
    nodes[0].volley(&site, &["volume", "create", "vm", "--snapshot", "debian"]).success();
    let said = site.volley(&["snapshot", "delete", "debian", "--when-unused"]).success();
    assert!(said.contains("is needed by volumes"), "{said}");
    let runs = nodes.each_ref().map(|node| metric(node, "gc_runs_total"));
    eventually("collections on both nodes", || {
        nodes.iter().zip(runs).all(|(node, before)| metric(node, "gc_runs_total") >= before + 2)
    });
    assert_eq!(sum(&nodes, "gc_snapshots_deleted_total"), 0);
    site.volley(&["snapshot", "show", "debian"]).success();
    nodes[0].volley(&site, &["volume", "delete", "vm"]).success();
    eventually("the deletion", || sum(&nodes, "gc_snapshots_deleted_total") == 1);
    assert_eq!(site.volley(&["snapshot", "show", "debian"]).code, 1);
    assert!(!objects(&site, "packs").is_empty(), "within the grace period they stay");
    assert_eq!(sum(&nodes, "gc_packs_removed_total"), 0);
    let left = || ["packs", "gc", "deletions", "rewrites", "snapshots"].map(|folder| objects(&site, folder).len());
    eventually("the removal of the packs", || {
        an_hour_passes(&site);
        left() == [0; 5]
    });
    eventually("metrics", || sum(&nodes, "gc_packs_removed_total") >= 1 && sum(&nodes, "gc_removed_bytes_total") > MIB);
    assert_eq!(sum(&nodes, "gc_errors_total"), 0);
    let logs = nodes.each_ref().map(|node| node.process().log()).join("\n");
    for line in ["deleted, as was intended", "garbage collected"] {
        assert!(logs.contains(line), "no {line:?} in {logs}");
    }
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    for node in nodes {
        assert!((now - 60..=now + 1).contains(&metric(&node, "gc_last_run_time_seconds")));
        let (status, _) = node.stop();
        assert!(status.success());
    }
    site.volley(&["check", &site.data().display().to_string()]).success();
}

/// A boot that is being recorded keeps the manifest that it began with, also when nobody needs the snapshot any more and its packs have been
/// rewritten. The next volume must not be made by it.
#[test]
fn a_volume_that_is_made_after_a_rewrite_reads_the_packs_that_are_there() {
    const BYTES: u64 = 12 * MIB;
    let site = Site::new();
    let path = site.path("image.raw");
    write_image(&path, BYTES, 4);
    site.import(&path, "monday");
    let mut image = std::fs::read(&path).expect("the image");
    for chunk in (0..BYTES / CHUNK).step_by(2) {
        let at = (chunk * CHUNK) as usize;
        image[at..at + 4096].copy_from_slice(&noise(chunk + 50, 4096));
    }
    std::fs::write(&path, &image).expect("changed");
    site.import(&path, "tuesday");
    let node = site.start_default();
    node.volley(&site, &["volume", "create", "first", "--snapshot", "tuesday"]).success();
    assert!(read_volume(&node, "first", MIB) == image[..MIB as usize], "its boot begins");
    node.volley(&site, &["volume", "set", "first", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "first", "60s");
    eventually("the end of the reference", || objects(&site, "refs").is_empty());
    site.volley(&["image", "delete", "monday"]).success();
    let text = site.volley(&["image", "gc", "--grace", "0s", "--rewrite-below", "100%", "--json"]).success();
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["rewritten"]["snapshots"], serde_json::json!(["tuesday"]), "{report}");
    assert!(number(&report, "packs_removed") > 0 && number(&report, "packs_waiting") == 0, "{report}");
    node.volley(&site, &["cache", "drop", "tuesday"]).success();
    node.volley(&site, &["volume", "create", "second", "--snapshot", "tuesday"]).success();
    assert!(read_volume(&node, "second", BYTES) == image, "not the image");
    let (status, _) = node.stop();
    assert!(status.success());
}
