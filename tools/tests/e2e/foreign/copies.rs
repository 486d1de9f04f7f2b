//! Whole devices copied by nbdcopy and qemu-img: with many requests on several connections, in both directions, between
//! formats, from volumes that are being hydrated meanwhile. Every copy is compared byte by byte.

use serde_json::Value;

use super::maps::{map, merged};
use super::{IMAGE_BYTES, hydrate, nbdcopy, qemu_compare, served};
use crate::harness::{Agent, Node, Site, available, number, run_in};
use crate::image_file::{CHUNK, MIB, assert_same, write_image};

/// As [`served`], with a blank volume beside the others.
fn served_with_blank(count: u32) -> (Site, Node, Agent) {
    let (site, node, agent) = served(count);
    node.volley(&site, &["volume", "create", "blank", "--size", &IMAGE_BYTES.to_string()]).success();
    (site, node, agent)
}

fn qemu_img(site: &Site, args: &[&str]) -> String {
    run_in(&site.path(""), "qemu-img", args).success()
}

/// Bytes of a volume that `base:allocation` calls data.
fn data_bytes(site: &Site, uri: &str) -> u64 {
    map(site, uri, "base:allocation").iter().filter(|extent| extent.2 == 0).map(|extent| extent.1).sum()
}

#[test]
fn nbdcopy_reads_a_hydrating_volume_in_every_way_it_knows() {
    if !available(&["nbdcopy"]) {
        return;
    }
    let (site, node, agent) = served(4);
    let ways: [&[&str]; 4] = [
        &["--connections=4", "--requests=64", "--threads=4"],
        &["--connections=1", "--requests=1", "--request-size=16384", "--no-extents", "--allocated"],
        &["--synchronous", "--request-size=33554432", "--queue-size=67108864"],
        &["--connections=8", "--requests=128", "--request-size=65536", "--sparse=512"],
    ];
    for (n, way) in ways.iter().enumerate() {
        let volume = format!("web-{n}");
        hydrate(&site, &node, &volume);
        nbdcopy(&site, way, &agent.uri(&volume), "copy.raw");
        assert_same(&site.path("image.raw"), &site.path("copy.raw"));
        std::fs::remove_file(site.path("copy.raw")).expect("remove the copy");
    }
}

#[test]
fn nbdcopy_writes_into_volumes_and_between_them() {
    if !available(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let (site, node, agent) = served_with_blank(2);
    hydrate(&site, &node, "web-0");
    hydrate(&site, &node, "web-1");
    write_image(&site.path("other.raw"), IMAGE_BYTES, 99);
    // Over the content of a snapshot that is on its way.
    let parallel = ["--connections=4", "--requests=64", "--flush"];
    nbdcopy(&site, &parallel, "other.raw", &agent.uri("web-0"));
    // Into a blank volume, whose zeroes nobody needs to write: they stay holes, everything else is data.
    nbdcopy(&site, &[&parallel[..], &["--destination-is-zero"]].concat(), "other.raw", &agent.uri("blank"));
    let zeroes = (0..IMAGE_BYTES / CHUNK).filter(|chunk| chunk % 5 == 2).count() as u64 * CHUNK;
    assert_eq!(data_bytes(&site, &agent.uri("blank")), IMAGE_BYTES - zeroes);
    // From volume to volume, with every byte of storage allocated: no hole is left.
    nbdcopy(&site, &["--connections=4", "--allocated", "--flush"], &agent.uri("web-0"), &agent.uri("web-1"));
    assert_eq!(data_bytes(&site, &agent.uri("web-1")), IMAGE_BYTES);
    // What was flushed by the copying client survives the server.
    node.kill();
    let _node = site.start_default();
    for volume in ["web-0", "blank", "web-1"] {
        nbdcopy(&site, &parallel[..2], &agent.uri(volume), "back.raw");
        assert_same(&site.path("other.raw"), &site.path("back.raw"));
        std::fs::remove_file(site.path("back.raw")).expect("remove the copy");
    }
}

#[test]
fn qemu_img_converts_from_and_to_volumes() {
    if !available(&["qemu-img"]) {
        return;
    }
    let (site, node, agent) = served_with_blank(3);
    (0..3).for_each(|n| hydrate(&site, &node, &format!("web-{n}")));
    let (source, target) = (agent.uri("web-0"), agent.uri("web-1"));
    qemu_compare(&site, "image.raw", &source);
    qemu_img(&site, &["compare", "-s", "-f", "raw", "-F", "raw", &source, &target]);

    // Out: into raw and qcow2, dense and sparse, compressed, in order and out of it.
    let outs: [&[&str]; 4] = [
        &["-O", "raw", "-S", "0"],
        &["-O", "raw", "-S", "64k", "-m", "16", "-W", "-t", "none"],
        &["-O", "qcow2", "-m", "16", "-W"],
        &["-O", "qcow2", "-c", "-m", "4"],
    ];
    for options in outs {
        let format = options[1];
        qemu_img(&site, &[&["convert", "-f", "raw"], options, &[&source, "out"]].concat());
        qemu_img(&site, &["compare", "-f", "raw", "-F", format, "image.raw", "out"]);
    }
    qemu_img(&site, &["check", "-f", "qcow2", "out"]);

    // In: raw over a snapshot's content, qcow2 with compressed clusters into a blank volume that is known to be zero.
    write_image(&site.path("other.raw"), IMAGE_BYTES, 99);
    let over = ["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", "-t", "none", "-S", "4k"];
    qemu_img(&site, &[&over[..], &["other.raw", &target]].concat());
    qemu_compare(&site, "other.raw", &target);
    let into_blank = ["convert", "-n", "--target-is-zero", "-f", "qcow2", "-O", "raw", "-m", "16", "-W"];
    qemu_img(&site, &[&into_blank[..], &["out", &agent.uri("blank")]].concat());
    qemu_compare(&site, "image.raw", &agent.uri("blank"));

    // A volume under a qcow2 overlay, written through it, and committed.
    let third = agent.uri("web-2");
    qemu_img(&site, &["create", "-f", "qcow2", "-b", &third, "-F", "raw", "overlay.qcow2"]);
    let write = ["-f", "qcow2", "-c", "write -P 0x77 1536 3M", "overlay.qcow2"];
    run_in(&site.path(""), "qemu-io", &write).success();
    qemu_compare(&site, "image.raw", &third);
    qemu_img(&site, &["commit", "-f", "qcow2", "overlay.qcow2"]);
    super::qemu_io(&site, &agent, "web-2", &["read -P 0x77 1536 3M"]);
}

#[test]
fn qemu_img_maps_copies_ranges_and_makes_load() {
    if !available(&["qemu-img", "nbdinfo"]) {
        return;
    }
    let (site, _node, agent) = served(1);
    let uri = agent.uri("web-0");
    // QEMU and libnbd are told the same.
    let text = qemu_img(&site, &["map", "-f", "raw", "--output=json", &uri]);
    let extents: Value = serde_json::from_str(&text).expect("qemu-img prints JSON");
    let flags = |extent: &Value| match (&extent["zero"], &extent["data"]) {
        (Value::Bool(true), Value::Bool(false)) => 3,
        (Value::Bool(false), Value::Bool(true)) => 0,
        other => panic!("{other:?}"),
    };
    let extents = extents.as_array().expect("extents");
    let seen = merged(extents.iter().map(|e| (number(e, "start"), number(e, "length"), flags(e))));
    assert_eq!(seen, map(&site, &uri, "base:allocation"));

    qemu_img(&site, &["dd", "-f", "raw", "-O", "raw", "bs=64k", "skip=300", &format!("if={uri}"), "of=range"]);
    let image = std::fs::read(site.path("image.raw")).expect("the image");
    let range = std::fs::read(site.path("range")).expect("the range");
    assert!(range == image[300 << 16..], "qemu-img dd reads other bytes");

    let bench = |options: &[&str]| {
        let text = qemu_img(&site, &[&["bench", "-f", "raw", "-t", "none"], options, &[&uri]].concat());
        assert!(text.contains("Run completed"), "{text}");
    };
    // None of them runs into the end of the device: qemu-img would send a request across it.
    bench(&["-c", "2800", "-d", "64", "-s", "4096", "-S", "12288"]);
    bench(&["-c", "16", "-d", "8", "-s", "2M"]);
    let written = 4000 * 8192;
    bench(&["-w", "-c", "4000", "-d", "128", "-s", "8192", "--pattern=90", "--flush-interval=500"]);
    let last = ["-s", "512", "-o", "33M", "--pattern=91", "--no-drain", "--flush-interval=2"];
    bench(&[&["-w", "-c", "3", "-d", "2"][..], &last].concat());
    let check = format!("read -P 90 0 {written}");
    super::qemu_io(&site, &agent, "web-0", &[&check, &format!("read -P 91 {} 1536", 33 * MIB)]);
}
