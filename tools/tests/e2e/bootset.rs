//! Boot sets with real processes: learned from a machine that boots, shown, inherited, recorded from a trace, dropped.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Node, NodeOptions, Site, number, run};
use crate::image_file::{CHUNK, MIB, write_image};

/// Chunks 0, 1, 3 and 5 of an image of 4 MiB: data, all of it different.
const TRACE: &str = "us,op,offset,length\n0,R,0,4096\n1000,R,2621440,4096\n2000,R,524288,8192\n3000,R,1572864,512\n";

fn site() -> (Site, Node) {
    let site = Site::new();
    write_image(&site.path("image.raw"), 4 * MIB, 1);
    std::fs::write(site.path("trace.csv"), TRACE).expect("trace");
    site.import(&site.path("image.raw"), "v1");
    let node = start(&site);
    (site, node)
}

fn start(site: &Site) -> Node {
    site.start(&NodeOptions { config: "hydration.boot_window = \"1s\"".to_owned(), ..NodeOptions::default() })
}

fn boot(site: &Site, prefix: &str) -> Value {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_volley-load"));
    command.args(["--server", &site.data_address(), "--prefix", prefix, "--json", "storm", "--speed", "max"]);
    command.arg("--trace").arg(site.path("trace.csv")).arg("--verify").arg(site.path("image.raw"));
    serde_json::from_str(&run(command).success()).expect("a report")
}

fn create(node: &Node, site: &Site, snapshot: &str, prefix: &str) {
    let words = ["volume", "create", "--snapshot", snapshot, "--rate", "none", "--count", "3", "--name-prefix", prefix];
    node.volley(site, &words).success();
}

fn gets(node: &Node, site: &Site) -> u64 {
    number(&node.json(site, &["ledger"])["node"], "gets")
}

fn shown(node: &Node, site: &Site, image: &str) -> (u64, u64) {
    let set = node.json(site, &["bootset", "show", image]);
    (number(&set, "boots"), number(&set, "chunks"))
}

/// Chunks that all shards fetched before anybody asked.
fn prefetched(node: &Node) -> u64 {
    let metrics = node.get("/metrics");
    let samples = metrics.lines().filter(|line| line.starts_with("volley_boot_chunks_prefetched_total"));
    samples.map(|line| line.rsplit(' ').next().and_then(|n| n.parse::<u64>().ok()).expect("a number")).sum()
}

/// Waits until the node has learned from so many boots.
fn wait_learned(node: &Node, site: &Site, boots: u64) {
    let begun = Instant::now();
    while shown(node, site, "v1").0 < boots {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", shown(node, site, "v1"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn what_one_batch_boots_the_next_finds_in_memory_also_of_the_next_version_and_after_a_restart() {
    let (site, node) = site();
    assert_eq!(shown(&node, &site, "v1"), (0, 0));
    create(&node, &site, "v1", "a-");
    boot(&site, "a-");
    wait_learned(&node, &site, 3);
    assert_eq!(shown(&node, &site, "v1").1, 4, "the chunks that the trace reads");
    node.stop();

    // Another life with an empty cache: the batch's own guests find everything there.
    let node = start(&site);
    create(&node, &site, "v1", "b-");
    let begun = Instant::now();
    while prefetched(&node) < 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} prefetched", prefetched(&node));
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = gets(&node, &site);
    assert!((1..=4).contains(&before), "{before} GETs for the set");
    assert_eq!(boot(&site, "b-")["mismatches"].as_u64(), Some(0));
    assert_eq!(gets(&node, &site), before, "no guest of the batch waited for the object store");

    // Version 2 differs in one chunk that the boot reads: it inherits the others without any boot.
    let mut image = std::fs::read(site.path("image.raw")).expect("image");
    image[CHUNK as usize..2 * CHUNK as usize].fill(7);
    std::fs::write(site.path("v2.raw"), image).expect("image");
    site.import(&site.path("v2.raw"), "v2");
    assert_eq!(shown(&node, &site, "v2"), (0, 3));
    let text = node.volley(&site, &["bootset", "show", "v2"]).success();
    assert!(text.contains("3 chunks") && text.contains("inherited"), "{text}");
    node.stop();
}

#[test]
fn a_set_is_recorded_from_a_trace_and_dropped_with_its_image() {
    let (site, node) = site();
    let trace = site.path("trace.csv").display().to_string();
    let text = node.volley(&site, &["bootset", "record", "v1", "--trace", &trace]).success();
    assert!(text.contains("4 chunks") && text.contains("1 boots"), "{text}");
    assert!(site.objects().join("bootsets/v1").exists(), "beside the image in the object store");
    node.volley(&site, &["bootset", "drop", "v1"]).success();
    assert_eq!(shown(&node, &site, "v1"), (0, 0));
    assert!(!site.objects().join("bootsets/v1").exists());
    node.volley(&site, &["bootset", "show", "nothing"]).fails_naming(&["nothing"]);
    std::fs::write(site.path("trace.csv"), "us,op,offset,length\n0,R,99999999,512\n").expect("trace");
    node.volley(&site, &["bootset", "record", "v1", "--trace", &trace]).fails_naming(&["line 2"]);
    // An image takes its set with it.
    std::fs::write(site.path("trace.csv"), TRACE).expect("trace");
    node.volley(&site, &["bootset", "record", "v1", "--trace", &trace]).success();
    site.volley(&["image", "delete", "v1"]).success();
    assert!(!site.objects().join("bootsets/v1").exists());
    node.stop();
}
