//! `volley-load` against a real node: what it asks for, what it counts, and that an open loop is honest about a server that
//! stands still.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Node, Outcome, Site, number, run};
use crate::image_file::{MIB, write_image};

fn load(site: &Site, words: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley-load"));
    command.args(["--server", &site.data_address(), "--json"]).args(words);
    run(command)
}

fn report(outcome: Outcome) -> Value {
    serde_json::from_str(&outcome.success()).expect("a report")
}

fn requests(report: &Value, series: &str) -> u64 {
    report["series"][series]["requests"].as_u64().unwrap_or_else(|| panic!("no series {series}: {report}"))
}

/// With hydrated volumes vm-0 to vm-5.
fn site_with_volumes() -> (Site, Node) {
    let site = Site::new();
    write_image(&site.path("image.raw"), 4 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start_default();
    let volumes = ["volume", "create", "--snapshot", "debian-12", "--name-prefix", "vm-", "--count", "6"];
    node.volley(&site, &[&volumes[..], &["--rate", "unlimited"]].concat()).success();
    (0..6).for_each(|number| node.wait_hydrated(&site, &format!("vm-{number}"), "60s"));
    (site, node)
}

fn of_all(node: &Node, site: &Site, counter: &str) -> u64 {
    (0..6).map(|volume| number(&node.volume(site, &format!("vm-{volume}")), counter)).sum()
}

#[test]
fn both_generators_make_the_requests_they_are_asked_for() {
    let (site, node) = site_with_volumes();
    for generator in ["client", "wire"] {
        let words = |workload: &'static str| {
            let shape = ["--connections", "2", "--depth", "4", "--threads", "2", "--count", "600", "--prefix", "vm-"];
            [&["--generator", generator][..], &shape, &[workload]].concat()
        };
        let before = ["priority_fetches", "reads", "writes"].map(|counter| of_all(&node, &site, counter));
        let fetched = report(load(&site, &words("priority-fetch")));
        assert_eq!((requests(&fetched, "priority-fetch"), fetched["errors"].as_u64()), (600, Some(0)), "{generator}");
        assert!(number(&fetched, "generator_cpu_ns_per_request") > 0);
        let read = report(load(&site, &[&words("read")[..], &["--addresses", "zipf"]].concat()));
        assert_eq!(requests(&read, "read"), 600);
        let mixed = report(load(&site, &[&words("mixed")[..], &["--reads", "50"]].concat()));
        let (reads, writes) = (requests(&mixed, "read"), requests(&mixed, "write"));
        assert!(reads + writes == 600 && reads > 200 && writes > 200, "{mixed}");
        let written = report(load(&site, &[&words("write")[..], &["--fua"]].concat()));
        assert_eq!(requests(&written, "write"), 600);
        let after = ["priority_fetches", "reads", "writes"].map(|counter| of_all(&node, &site, counter));
        let more: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        assert_eq!(more, [600, 600 + reads, 600 + writes], "what the node counted, {generator}");
    }
}

#[test]
fn an_open_loop_charges_a_standstill_for_what_was_due_meanwhile() {
    let (site, node) = site_with_volumes();
    let shape = ["--generator", "wire", "--rate", "1000", "--duration", "2s", "--prefix", "vm-", "priority-fetch"];
    let said = std::thread::scope(|scope| {
        let loading = scope.spawn(|| report(load(&site, &shape)));
        std::thread::sleep(Duration::from_millis(700));
        node.process().signal(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(600));
        node.process().signal(libc::SIGCONT);
        loading.join().expect("a load")
    });
    let made = requests(&said, "priority-fetch");
    assert!((1990..=2001).contains(&made), "2 s of 1000/s, whatever the server does: {made}");
    // Of 600 that were due while it stood still, half waited more than 300 ms; a closed loop would have seen 16.
    let latency = &said["series"]["priority-fetch"]["latency_us"];
    assert!(latency["p99"].as_f64().expect("p99") > 400_000.0, "{said}");
    assert!(latency["mean"].as_f64().expect("mean") > 50_000.0, "{said}");
}

#[test]
fn volumes_are_created_and_go_away_and_connections_are_made() {
    let (site, node) = site_with_volumes();
    let http = node.http.clone();
    let create = ["--depth", "3", "--count", "20", "create", "--http", &http, "--snapshot", "debian-12"];
    let page = site.path("report.html");
    let page_word = page.display().to_string();
    let created = report(load(&site, &[&create[..], &["--report", &page_word]].concat()));
    assert_eq!((requests(&created, "create"), requests(&created, "delete")), (20, 20));
    let page = std::fs::read_to_string(page).expect("a page");
    assert!(page.matches("<polyline").count() == 2 && page.contains(">create</text>"), "{page}");
    let kept = ["--depth", "2", "--count", "4", "create", "--http", &http, "--size", "1MiB", "--keep"];
    report(load(&site, &kept));
    assert_eq!(number(&node.volume(&site, "load-3"), "size_bytes"), MIB);
    let connected = report(load(&site, &["--count", "30", "--volume", "vm-0", "connect"]));
    assert_eq!(requests(&connected, "connect"), 30);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    let (site, _node) = site_with_volumes();
    for (words, reason) in [
        (&["--rate", "100", "--volume", "vm-0", "read"][..], "--generator wire"),
        (&["--generator", "wire", "--volume", "nobody", "read"], "nobody"),
        (&["--generator", "wire", "--connections", "2", "--any-shard", "--volume", "vm-0", "write"], "of its own"),
        (&["--cores", "9999", "--volume", "vm-0", "read"], "core 9999"),
        (&["--server-pid", "4294967295", "--volume", "vm-0", "read"], "process 4294967295"),
        (&["create", "--http", "127.0.0.1:1"], "127.0.0.1:1"),
    ] {
        load(&site, words).fails_naming(&[reason]);
    }
}
