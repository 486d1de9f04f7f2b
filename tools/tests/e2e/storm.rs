//! `volley-load storm` against a real node: what it counts, what it checks, and what it refuses.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::harness::{Outcome, Site, run};
use crate::image_file::{MIB, write_image};

const VOLUMES: u64 = 60;
/// Three reads of two chunks of 512 KiB, a write and a flush that a storm leaves out, and a read in between.
const TRACE: &str =
    "us,op,offset,length\n0,R,0,4096\n1000,R,8192,65536\n2000,W,0,512\n3000,F,0,0\n9000,R,524288,4096\n";

fn storm(site: &Site, words: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley-load"));
    command.args(["--server", &site.data_address(), "--prefix", "vm-", "--json", "storm", "--trace"]);
    command.arg(site.path("trace.csv")).args(words);
    run(command)
}

fn report(text: &str) -> Value {
    serde_json::from_str(text).expect("a report")
}

fn requests(report: &Value, series: &str) -> u64 {
    report["series"][series]["requests"].as_u64().expect("a number")
}

fn site_with_volumes() -> (Site, crate::harness::Node) {
    let site = Site::new();
    write_image(&site.path("image.raw"), 4 * MIB, 1);
    write_image(&site.path("other.raw"), 4 * MIB, 2);
    std::fs::write(site.path("trace.csv"), TRACE).expect("trace");
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start_default();
    node.create(&site, "debian-12", VOLUMES as u32, "vm-");
    (site, node)
}

#[test]
fn every_volume_is_asked_for_every_read_and_every_byte_is_checked() {
    let (site, node) = site_with_volumes();
    let shown = |path: &Path| path.display().to_string();
    let (image, other) = (shown(&site.path("image.raw")), shown(&site.path("other.raw")));
    let words = ["--connections", "3", "--threads", "2", "--arrivals", "ramp:200ms", "--verify", &image];
    let whole = report(&storm(&site, &words).success());
    assert_eq!((whole["volumes"].as_u64(), whole["volumes_finished"].as_u64()), (Some(VOLUMES), Some(VOLUMES)));
    assert_eq!((whole["errors"].as_u64(), whole["mismatches"].as_u64()), (Some(0), Some(0)));
    assert_eq!(requests(&whole, "attach"), VOLUMES);
    assert_eq!((requests(&whole, "first-touch"), requests(&whole, "later")), (2 * VOLUMES, VOLUMES));
    assert_eq!((requests(&whole, "boots"), requests(&whole, "since-due")), (VOLUMES, 3 * VOLUMES));
    // The last volume starts 200 ms after the first, and its last read is due 9 ms later.
    assert!(whole["seconds"].as_f64().expect("seconds") >= 0.209, "{whole}");
    let boots = &whole["series"]["boots"]["latency_us"];
    assert!(boots["p50"].as_f64().expect("a latency") >= 9000.0, "no read before it is due: {whole}");
    // Another image's bytes are not what the volumes hold, and a storm that finds that out fails.
    let wrong = storm(&site, &["--speed", "max", "--verify", &other]);
    assert_eq!(wrong.code, 1, "{wrong:?}");
    let wrong = report(&wrong.stdout);
    assert_eq!(wrong["mismatches"].as_u64(), Some(3 * VOLUMES), "{wrong}");
    assert_eq!(wrong["volumes_finished"].as_u64(), Some(0));
    node.stop();
}

#[test]
fn priority_fetches_bring_the_data_and_a_bounded_storm_ends() {
    let (site, node) = site_with_volumes();
    let words = ["--connections", "2", "--fetch", "resident", "--arrivals", "poisson:1000", "--speed", "max"];
    let whole = report(&storm(&site, &words).success());
    assert_eq!((whole["errors"].as_u64(), requests(&whole, "boots")), (Some(0), VOLUMES));
    for name in ["vm-0", "vm-59"] {
        let volume = node.volume(&site, name);
        assert_eq!(
            volume["resident_bytes"].as_u64(),
            Some(2 * MIB),
            "two chunks that it brought and two that are zero: {volume}"
        );
    }
    // Slowed down it does not get far in a tenth of a second, and says what it left out.
    let cut = report(&storm(&site, &["--duration", "100ms", "--speed", "0.01"]).success());
    assert_eq!(cut["requests_skipped"].as_u64(), Some(2 * VOLUMES), "{cut}");
    assert_eq!((requests(&cut, "first-touch"), requests(&cut, "boots")), (VOLUMES, 0));
    node.stop();
}

#[test]
fn a_storm_that_makes_no_sense_is_refused_by_name() {
    let (site, node) = site_with_volumes();
    storm(&site, &["--arrivals", "sometimes"]).fails_naming(&["arrival pattern", "poisson"]);
    storm(&site, &["--threads", "4"]).fails_naming(&["--threads", "connections"]);
    storm(&site, &["--fetch", "readable", "--verify", "image.raw"]).fails_naming(&["--verify"]);
    std::fs::write(site.path("trace.csv"), "us,op,offset,length\n0,W,0,512\n").expect("trace");
    storm(&site, &[]).fails_naming(&["reads nothing"]);
    node.stop();
}

#[test]
fn through_an_agent_the_same_bytes_arrive_and_a_host_that_remembers_asks_once_for_each_chunk() {
    let (site, node) = site_with_volumes();
    let agent = site.agent("agent", &[]);
    let nbd = format!("unix:{}", agent.socket().display());
    let shown = |name: &str| site.path(name).display().to_string();
    let (image, other) = (shown("image.raw"), shown("other.raw"));
    let words = ["--connections", "3", "--nbd", &nbd, "--speed", "max", "--verify", &image];
    let whole = report(&storm(&site, &words).success());
    assert_eq!((whole["errors"].as_u64(), whole["mismatches"].as_u64()), (Some(0), Some(0)));
    assert_eq!((requests(&whole, "first-touch"), requests(&whole, "later")), (2 * VOLUMES, VOLUMES));
    assert_eq!(requests(&whole, "boots"), VOLUMES);
    let wrong = storm(&site, &["--nbd", &nbd, "--speed", "max", "--verify", &other]);
    assert_eq!((wrong.code, report(&wrong.stdout)["mismatches"].as_u64()), (1, Some(3 * VOLUMES)), "{wrong:?}");
    storm(&site, &["--nbd", &nbd, "--fetch", "readable"]).fails_naming(&["--nbd", "--fetch"]);
    storm(&site, &["--nbd", "nowhere"]).fails_naming(&["nowhere", "address"]);

    let once = ["--fetch", "readable", "--first-touches", "--speed", "max"];
    let once = report(&storm(&site, &once).success());
    assert_eq!((requests(&once, "first-touch"), requests(&once, "later")), (2 * VOLUMES, 0));
    assert_eq!((once["errors"].as_u64(), requests(&once, "boots")), (Some(0), VOLUMES));
    agent.stop();
    node.stop();
}
