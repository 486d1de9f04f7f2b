//! A node's life: volumes by request, clean stops, one writer per volume, and what an operator can see.

use std::time::Duration;

use crate::foreign::{IMAGE_BYTES, qemu_compare, qemu_io, served};
use crate::harness::{NodeOptions, Site, available, number};
use crate::image_file::{MIB, write_image};

#[test]
fn sigterm_ends_the_server_cleanly_with_guests_connected_and_hydration_running() {
    let (site, node, agent) = served(8);
    for n in 0..8 {
        node.volley(&site, &["volume", "set", &format!("web-{n}"), "--rate", "4MiB/s"]).success();
    }
    let (status, took) = node.stop();
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(30), "a clean stop took {took:?}");
    assert!(agent.stop().success());
    let node = site.start_default();
    assert_eq!(node.json(&site, &["volume", "list"]).as_array().expect("a list").len(), 8);
}

#[test]
fn volumes_are_created_resized_up_listed_and_deleted() {
    let (site, node, _agent) = served(3);
    node.volley(&site, &["volume", "create", "--snapshot", "debian-12", "--name", "big", "--size", "64MiB"]).success();
    assert_eq!(number(&node.volume(&site, "big"), "size_bytes"), 64 * MIB);
    node.volley(&site, &["volume", "create", "--name", "blank", "--size", "16MiB"]).success();
    let blank = node.volume(&site, "blank");
    assert_eq!((blank["hydrated"].as_bool(), number(&blank, "resident_bytes")), (Some(true), 16 * MIB), "{blank}");

    node.volley(&site, &["volume", "delete", "web-1"]).success();
    node.volley(&site, &["volume", "show", "web-1"]).fails_naming(&["web-1"]);
    let list = node.json(&site, &["volume", "list"]);
    let mut names: Vec<_> =
        list.as_array().expect("a list").iter().map(|v| v["name"].as_str().expect("name").to_string()).collect();
    names.sort();
    assert_eq!(names, ["big", "blank", "web-0", "web-2"]);
    drop(node);
    let node = site.start_default();
    node.volley(&site, &["volume", "show", "web-1"]).fails_naming(&["web-1"]);
}

#[test]
fn the_tail_of_a_volume_larger_than_its_image_is_zero() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, node, agent) = served(1);
    node.volley(&site, &["volume", "create", "--snapshot", "debian-12", "--name", "big", "--size", "40MiB"]).success();
    let tail = format!("read -P 0 {IMAGE_BYTES} {}", 40 * MIB - IMAGE_BYTES);
    qemu_io(&site, &agent, "big", &[&tail]);
}

#[test]
fn the_agent_that_attached_last_is_the_writer() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, _node, first) = served(1);
    qemu_io(&site, &first, "web-0", &["write -P 1 0 64k", "flush"]);
    let second = site.agent("second", &[]);

    // A guest of the first agent stays connected while the second one attaches.
    let mut guest = crate::crash::Guest::connect(&first, "web-0");
    guest.does("read -P 1 0 64k");
    qemu_io(&site, &second, "web-0", &["read -P 1 0 64k", "write -P 2 0 64k", "flush"]);
    guest.fails("write -P 3 0 64k");
    qemu_io(&site, &second, "web-0", &["read -P 2 0 64k"]);
}

#[test]
fn tcp_ports_picked_by_the_system_are_printed_and_work() {
    if !available(&["qemu-img"]) {
        return;
    }
    let site = Site::new();
    write_image(&site.path("image.raw"), 8 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start(&NodeOptions { listen: Some("127.0.0.1:0".to_string()), ..NodeOptions::default() });
    node.create(&site, "debian-12", 4, "web-");
    let agent = site.agent_of(&node.data, "agent", &[]);
    for n in 0..4 {
        qemu_compare(&site, "image.raw", &agent.qemu_file(&format!("web-{n}")));
    }
}

#[test]
fn metrics_health_and_node_tell_what_happened() {
    let (site, node, agent) = served(2);
    if available(&["qemu-io"]) {
        qemu_io(&site, &agent, "web-0", &["read 0 1M", "write 1M 64k", "flush"]);
    }
    node.get("/healthz");
    let metrics = node.get("/metrics");
    for line in metrics.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("name and value");
        assert!(name.starts_with("volley_"), "{line}");
        value.parse::<f64>().unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    assert!(metrics.contains("# TYPE volley_guest_reads_total counter"), "{metrics}");
    let described: serde_json::Value = serde_json::from_str(&node.get("/v1/node")).expect("JSON");
    assert!(described.is_object(), "{described}");
    let volume: serde_json::Value = serde_json::from_str(&node.get("/v1/volumes/web-0")).expect("JSON");
    assert_eq!(number(&volume, "size_bytes"), IMAGE_BYTES);
}
