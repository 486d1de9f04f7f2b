//! What `nbdinfo` says of an export is exact: its map, sector by sector, and every promise of its flags.

use serde_json::Value;

use super::{IMAGE_BYTES, qemu_io, served};
use crate::harness::{Agent, NodeOptions, Site, available, number, run_in};
use crate::image_file::{CHUNK, MIB};

const SECTOR: u64 = 4096;

/// Extents of a context: offset, length and flags, neighbours of equal flags merged.
pub(super) fn map(site: &Site, uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let text = run_in(&site.path(""), "nbdinfo", &["--json", &format!("--map={context}"), uri]).success();
    let map: Value = serde_json::from_str(&text).expect("nbdinfo prints JSON");
    let extents = map.as_array().expect("a list of extents");
    merged(extents.iter().map(|e| (number(e, "offset"), number(e, "length"), number(e, "type"))))
}

/// Extents that follow each other without a gap from the start of the device, with neighbours of equal flags made one.
pub(super) fn merged(extents: impl IntoIterator<Item = (u64, u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut merged: Vec<(u64, u64, u64)> = Vec::new();
    for (offset, len, flags) in extents {
        assert_eq!(offset, merged.last().map_or(0, |(at, len, _)| at + len), "extents follow each other");
        match merged.last_mut() {
            Some(last) if last.2 == flags => last.1 += len,
            _ => merged.push((offset, len, flags)),
        }
    }
    merged
}

/// What a volume's map must say: one entry for each sector.
struct Expected {
    size: u64,
    hole: Vec<bool>,
    resident: Vec<bool>,
}

impl Expected {
    /// A new volume of [`served`]'s image: every fifth chunk is zeroes, and nothing else is there.
    fn of_image() -> Expected {
        let sectors = IMAGE_BYTES.div_ceil(SECTOR);
        let hole: Vec<_> = (0..sectors).map(|sector| sector * SECTOR / CHUNK % 5 == 2).collect();
        Expected { size: IMAGE_BYTES, resident: hole.clone(), hole }
    }

    fn set(&mut self, offset: u64, len: u64, hole: bool) {
        for sector in offset / SECTOR..(offset + len).div_ceil(SECTOR) {
            self.hole[sector as usize] = hole;
            self.resident[sector as usize] = true;
        }
    }

    fn assert_is_the_map(&self, site: &Site, agent: &Agent, volume: &str) {
        let runs = |flags: &dyn Fn(usize) -> u64| {
            let sectors = 0..self.hole.len() as u64;
            let extent = |s: u64| (s * SECTOR, (self.size - s * SECTOR).min(SECTOR), flags(s as usize));
            merged(sectors.map(extent))
        };
        let uri = agent.uri(volume);
        // A hole that reads as zeroes (3), or data (0).
        assert_eq!(map(site, &uri, "base:allocation"), runs(&|s| if self.hole[s] { 3 } else { 0 }));
        assert_eq!(map(site, &uri, "volley:resident"), runs(&|s| u64::from(self.resident[s])));
    }
}

#[test]
fn the_map_is_what_was_imported_written_zeroed_and_discarded() {
    if !available(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let (site, node, agent) = served(1);
    let mut expected = Expected::of_image();
    expected.assert_is_the_map(&site, &agent, "web-0");

    let chunk = |n: u64| n * CHUNK;
    let last = IMAGE_BYTES / CHUNK * CHUNK;
    let commands = [
        // Into absent chunks: sectors, across an edge of chunks, and the bytes after the last whole sector.
        format!("write -P 1 {} 64k", chunk(0) + 8 * SECTOR),
        format!("write -P 2 {} 8k", chunk(4) - SECTOR),
        format!("write -P 3 {last} {}", IMAGE_BYTES - last),
        // Into a chunk of zeroes.
        format!("write -P 4 {} 4k", chunk(2) + 16 * SECTOR),
        // Whole chunks become holes, present or not, and parts of them; sectors that are covered in part stay as they are.
        format!("discard {} 1M", chunk(5)),
        format!("write -z -u {} 512k", chunk(8)),
        format!("discard {} 256k", chunk(10)),
        format!("discard {} 8k", chunk(11) + 512),
        format!("write -z -u {} 8k", chunk(14) + 512),
        // Zeroes that must stay allocated are data.
        format!("write -z {} 512k", chunk(13)),
        "flush".to_owned(),
    ];
    qemu_io(&site, &agent, "web-0", &commands.each_ref().map(String::as_str));
    for (offset, len, hole) in [
        (chunk(0) + 8 * SECTOR, 16 * SECTOR, false),
        (chunk(4) - SECTOR, 2 * SECTOR, false),
        (last, IMAGE_BYTES - last, false),
        (chunk(2) + 16 * SECTOR, SECTOR, false),
        (chunk(5), 2 * CHUNK, true),
        (chunk(8), CHUNK, true),
        (chunk(10), CHUNK / 2, true),
        (chunk(11) + SECTOR, SECTOR, true),
        (chunk(14), SECTOR, false),
        (chunk(14) + SECTOR, SECTOR, true),
        (chunk(14) + 2 * SECTOR, SECTOR, false),
        (chunk(13), CHUNK, false),
    ] {
        expected.set(offset, len, hole);
    }
    expected.assert_is_the_map(&site, &agent, "web-0");

    // Residency outlives the server; and what was said to be a hole is one.
    node.kill();
    let node = site.start_default();
    expected.assert_is_the_map(&site, &agent, "web-0");

    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    expected.resident.fill(true);
    expected.assert_is_the_map(&site, &agent, "web-0");
    assert!(node.stop().0.success());
    let node = site.start_default();
    expected.assert_is_the_map(&site, &agent, "web-0");
    drop(node);
}

#[test]
fn a_map_of_thousands_of_extents_is_whole() {
    if !available(&["nbdinfo", "qemu-img"]) {
        return;
    }
    let (site, _node, agent) = served(1);
    // Every second sector: more extents than one reply of the agent (4096), and of the server (8192), can hold.
    let count = IMAGE_BYTES / (2 * SECTOR);
    let count_text = count.to_string();
    let args = ["bench", "-w", "-f", "raw", "-t", "none", "-d", "64", "-s", "4096", "-S", "8192", "--pattern=7", "-c"];
    let uri = agent.uri("web-0");
    run_in(&site.path(""), "qemu-img", &[&args[..], &[&count_text, &uri]].concat()).success();
    let mut expected = Expected::of_image();
    (0..count).for_each(|n| expected.set(2 * n * SECTOR, SECTOR, false));
    expected.assert_is_the_map(&site, &agent, "web-0");
    assert!(map(&site, &uri, "volley:resident").len() > 4096);
}

#[test]
fn a_blank_volume_is_one_hole_until_it_is_written() {
    if !available(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let site = Site::new();
    std::fs::create_dir(site.objects()).expect("an empty object store");
    let node = site.start_default();
    let agent = site.agent("agent", &[]);
    // Longer than one descriptor of a BLOCK_STATUS reply can say.
    let size = 9 << 30;
    node.volley(&site, &["volume", "create", "blank", "--size", &size.to_string()]).success();
    let mut expected =
        Expected { size, hole: vec![true; (size / SECTOR) as usize], resident: vec![true; (size / SECTOR) as usize] };
    expected.assert_is_the_map(&site, &agent, "blank");
    qemu_io(&site, &agent, "blank", &["write -P 1 5G 4k", "write -P 2 9663672320 4k", "flush"]);
    expected.set(5 << 30, SECTOR, false);
    expected.set(size - SECTOR, SECTOR, false);
    expected.assert_is_the_map(&site, &agent, "blank");
    node.kill();
    let _node = site.start_default();
    expected.assert_is_the_map(&site, &agent, "blank");
}

#[test]
fn an_export_promises_what_it_keeps() {
    if !available(&["nbdinfo"]) {
        return;
    }
    let site = Site::new();
    std::fs::create_dir(site.objects()).expect("an empty object store");
    let node = site.start(&NodeOptions::default());
    let agent = site.agent("agent", &[]);
    node.volley(&site, &["volume", "create", "blank", "--size", &(3 * MIB + 512).to_string()]).success();
    let uri = agent.uri("blank");
    let nbdinfo = |args: &[&str]| run_in(&site.path(""), "nbdinfo", &[args, &[&uri]].concat());
    assert_eq!(nbdinfo(&["--size"]).success().trim(), (3 * MIB + 512).to_string());
    for can in ["write", "flush", "fua", "trim", "zero", "multi-conn", "cache", "df", "structured-reply"] {
        nbdinfo(&["--can", can]).success();
    }
    // nbdinfo says no by exit code 2; what is refused here is what docs/nbd.md says is not offered.
    for cannot in [["--can", "fast-zero"], ["--is", "read-only"], ["--is", "rotational"], ["--is", "tls"]] {
        assert_eq!(nbdinfo(&cannot).code, 2, "{cannot:?}");
    }
    let export: Value = serde_json::from_str(&nbdinfo(&["--json"]).success()).expect("nbdinfo prints JSON");
    let export = &export["exports"][0];
    assert_eq!(export["description"], "Volley volume blank, 3.0 MiB");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "volley:resident"]));
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|key| number(export, key));
    assert_eq!(sizes, [512, 4096, 32 * MIB]);
    // Contexts nobody has are no contexts; exports nobody has are no exports.
    assert!(run_in(&site.path(""), "nbdinfo", &["--map=qemu:dirty-bitmap:b", &uri]).code != 0);
    let nobody = run_in(&site.path(""), "nbdinfo", &[&agent.uri("nobody")]);
    assert!(nobody.code != 0 && nobody.stderr.contains("No such file or directory"), "{nobody:?}");
}
