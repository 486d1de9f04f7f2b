//! Batches through the command line: kill -9 in the middle, cancellation, stores that fail or fill up, an object store
//! that goes away, estimates. Afterwards nothing is left on the disk that belongs to nobody.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::disk::{Disk, FileSystem};
use crate::faults::eventually;
use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{CHUNK, MIB, write_image};

const IMAGE: u64 = 16 * MIB;

fn site() -> Site {
    let site = Site::new();
    write_image(&site.path("image.raw"), IMAGE, 1);
    site.import(&site.path("image.raw"), "debian-12");
    site
}

fn create<'a>(count: &'a str, prefix: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["batch", "create", "--snapshot", "debian-12", "--count", count, "--name-prefix", prefix];
    [&args[..], more].concat()
}

fn id(batch: &Value) -> String {
    batch["id"].as_str().unwrap_or_else(|| panic!("no id: {batch}")).to_owned()
}

fn show(node: &Node, site: &Site, id: &str) -> Value {
    node.json(site, &["batch", "show", id])
}

/// Files of volumes in a store.
fn files(store: &Path) -> usize {
    std::fs::read_dir(store.join("volumes")).expect("volumes").count()
}

/// A node with stores of these labels and paths.
fn with_stores(stores: &[(&str, &Path)]) -> NodeOptions {
    let table = |(label, path): &(&str, &Path)| format!("[[store]]\nlabel = {label:?}\npath = {path:?}\n");
    NodeOptions { config: stores.iter().map(table).collect(), ..NodeOptions::default() }
}

/// A node whose only store hydrates at so much per second.
fn with_bandwidth(path: &Path, bandwidth: &str) -> NodeOptions {
    let store = format!("[[store]]\nlabel = \"s\"\nhydration_bandwidth = {bandwidth:?}\npath = {path:?}\n");
    NodeOptions { config: store, default_rate: "unlimited", ..NodeOptions::default() }
}

fn is_clean(site: &Site) {
    let data = site.data().display().to_string();
    let report = site.volley(&["check", &data, "--json"]);
    assert_eq!(report.code, 0, "{report:?}");
    let report: Value = serde_json::from_str(&report.stdout).expect("JSON");
    let odd = |finding: &&Value| finding["severity"] != "note" || finding["kind"] == "creation_unfinished";
    let findings = report["findings"].as_array().expect("findings");
    assert_eq!(findings.iter().find(odd), None, "{report}");
}

#[test]
fn a_batch_goes_on_after_kill_9_and_leaves_nothing_when_it_is_cancelled() {
    let site = site();
    let node = site.start_default();
    node.create(&site, "debian-12", 3, "other-");
    let asked = create("6000", "vm-", &["--token", "rollout-1"]);
    let batch = id(&node.json(&site, &asked));
    eventually("the first volumes", || number(&show(&node, &site, &batch), "volumes") > 0);
    let before = number(&show(&node, &site, &batch), "volumes");
    node.kill();
    println!("killed with about {before} of 6000 volumes");
    let node = site.start_default();
    let watched = node.volley(&site, &["batch", "watch", &batch, "--until", "created", "--timeout", "120s"]).success();
    assert!(watched.contains("created 6000/6000"), "{watched}");
    // The client asks once more, because it never saw an answer.
    assert_eq!(id(&node.json(&site, &asked)), batch);
    assert_eq!((files(&site.data().join("store")), number(&show(&node, &site, &batch), "volumes_failed")), (6003, 0));
    // Killed again while it is cancelled.
    node.volley(&site, &["batch", "cancel", &batch, "--no-wait"]).success();
    node.kill();
    is_clean(&site);
    let node = site.start_default();
    node.volley(&site, &["batch", "cancel", &batch]).success();
    let cancelled = show(&node, &site, &batch);
    assert_eq!((&cancelled["state"], number(&cancelled, "volumes")), (&"cancelled".into(), 0));
    assert_eq!(files(&site.data().join("store")), 3);
    assert_eq!(node.json(&site, &["volume", "list"]).as_array().expect("a list").len(), 3);
    node.stop();
    is_clean(&site);
}

#[test]
fn a_batch_is_predicted_hydrated_and_compared_and_another_is_cancelled_meanwhile() {
    let site = site();
    let path = site.data().join("store");
    let node = site.start(&with_bandwidth(&path, "200MiB/s"));
    let refused = create("600", "no-", &["--deadline", "5s", "--require-deadline"]);
    node.volley(&site, &refused).fails_naming(&["not within 5 s", "store \"s\" at its hydration share of 200 MiB/s"]);
    let slow = id(&node.json(&site, &create("50", "slow-", &["--rate", "1MiB/s"])));
    let batch = id(&node.json(&site, &create("12", "vm-", &["--deadline", "60s"])));
    let predicted = &show(&node, &site, &batch)["predicted"];
    assert!(predicted["hydrated_seconds"].as_f64().expect("seconds") > 0.5, "{predicted}");
    node.volley(&site, &["batch", "watch", &slow, "--until", "created"]).success();
    node.volley(&site, &["batch", "cancel", &slow]).success();
    let events = node.volley(&site, &["batch", "watch", &batch, "--json", "--timeout", "60s"]).success();
    let last: Value = serde_json::from_str(events.lines().last().expect("events")).expect("JSON");
    assert_eq!((&last["state"], &last["deadline_met"]), (&"hydrated".into(), &true.into()), "{last}");
    assert!(last["actual"]["hydrated_off_percent"].is_number(), "{last}");
    let told = node.volley(&site, &["batch", "show", &batch]).success();
    assert!(told.contains("deadline          met") && told.contains("hydrated          12 of 12"), "{told}");
    let listed = node.volley(&site, &["batch", "list"]).success();
    assert!(listed.contains("hydrated") && listed.contains("cancelled"), "{listed}");
    assert_eq!(files(&path), 12);
    let volume = node.volume(&site, "vm-3");
    assert!(volume["placement"].as_str().expect("a reason").contains("s"), "{volume}");
    node.volley(&site, &["batch", "retry", &batch]).fails_naming(&["not stalled"]);
    node.volley(&site, &["batch", "show", "0123456789abcdef"]).fails_naming(&["no batch"]);
    node.volley(&site, &["batch", "watch", &slow]).fails_naming(&["is cancelled"]);
}

#[test]
fn a_batch_that_is_due_overtakes_one_that_is_not() {
    let site = site();
    let node = site.start(&with_bandwidth(&site.path("s"), "16MiB/s"));
    let whenever = id(&node.json(&site, &create("40", "slow-", &[])));
    eventually("it has begun", || number(&show(&node, &site, &whenever), "resident_bytes") > MIB);
    let due = id(&node.json(&site, &create("2", "vm-", &["--deadline", "60s"])));
    node.volley(&site, &["batch", "watch", &due, "--timeout", "60s"]).success();
    let (due, whenever) = (show(&node, &site, &due), show(&node, &site, &whenever));
    assert_eq!(due["deadline_met"], true, "{due}");
    assert_eq!((&whenever["state"], number(&whenever, "volumes_hydrated")), (&"created".into(), 0), "{whenever}");
}

#[test]
fn a_batch_attached_by_a_host_is_cancelled_by_force_only() {
    let site = site();
    let node = site.start_default();
    let batch = id(&node.json(&site, &create("4", "vm-", &[])));
    node.volley(&site, &["batch", "watch", &batch, "--until", "created"]).success();
    let agent = site.agent("agent", &[]);
    let mut guest = crate::crash::Guest::connect(&agent, "vm-2");
    guest.does("write -P 0xaa 0 4k");
    node.volley(&site, &["batch", "cancel", &batch]).fails_naming(&["1 volumes", "attached", "force"]);
    guest.does("read -P 0xaa 0 4k");
    node.volley(&site, &["batch", "cancel", &batch, "--force"]).success();
    assert_eq!(files(&site.data().join("store")), 0);
}

#[test]
fn what_does_not_fit_into_a_store_that_fills_up_goes_to_another() {
    // Room for the data of many volumes, and for few files.
    let Some(small) = Disk::with(FileSystem::Ext4, 64 << 20, &["-N", "400"]) else { return };
    let site = site();
    let (a, b) = (small.mount().join("a"), site.path("b"));
    let stores = with_stores(&[("a", &a), ("b", &b)]);
    let node = site.start(&NodeOptions { namespace: Some(small.pid()), ..stores });
    let batch = id(&node.json(&site, &create("1200", "vm-", &["--spread", "domain"])));
    node.volley(&site, &["batch", "watch", &batch, "--until", "created", "--timeout", "60s"]).success();
    let created = show(&node, &site, &batch);
    let stores = created["stores"].as_array().expect("stores");
    let volumes = |label: &str| stores.iter().find(|s| s["label"] == label).map_or(0, |store| number(store, "volumes"));
    println!("{} volumes in the small store, {} in the other", volumes("a"), volumes("b"));
    assert_eq!((number(&created, "volumes"), volumes("a") + volumes("b")), (1200, 1200), "{created}");
    assert!(volumes("a") > 0 && volumes("b") > 600, "half of them were meant for each: {created}");
    assert_eq!(files(&b) as u64, volumes("b"));
    node.volley(&site, &["batch", "cancel", &batch]).success();
    assert_eq!(files(&b), 0);

    // Only the small store: as many as there are files for, and the rest when there is room again.
    let single = create("600", "only-", &["--store", "a"]);
    let batch = id(&node.json(&site, &single));
    let stalled = node.volley(&site, &["batch", "watch", &batch, "--until", "created"]);
    stalled.fails_naming(&["is stalled", "could not be made", "store \"a\""]);
    let stalled = show(&node, &site, &batch);
    assert_eq!(number(&stalled, "volumes") + number(&stalled, "volumes_failed"), 600, "{stalled}");
    node.volley(&site, &["batch", "retry", &batch]).success();
    node.volley(&site, &["batch", "watch", &batch, "--until", "created"]).fails_naming(&["is stalled"]);
    node.volley(&site, &["batch", "cancel", &batch]).success();
    let left = small.run("ls", &[&a.join("volumes").display().to_string()]).success();
    assert_eq!(left, "");
}

#[test]
fn a_store_that_became_read_only_is_passed_over_and_its_batch_stalls_alone() {
    let Some(disk) = Disk::new(FileSystem::Ext4, 64 << 20) else { return };
    let site = site();
    let (a, b) = (disk.mount().join("a"), site.path("b"));
    let stores = with_stores(&[("a", &a), ("b", &b)]);
    let node = site.start(&NodeOptions { namespace: Some(disk.pid()), ..stores });
    disk.run("mount", &["-o", "remount,ro", &disk.mount().display().to_string()]).success();
    let batch = id(&node.json(&site, &create("20", "vm-", &[])));
    node.volley(&site, &["batch", "watch", &batch, "--until", "created", "--timeout", "60s"]).success();
    assert_eq!(files(&b), 20);
    node.volley(&site, &create("20", "ro-", &["--store", "a"])).fails_naming(&["a (failing", "read-only"]);
    let listed = node.json(&site, &["batch", "list"]);
    assert_eq!(listed.as_array().expect("a list").len(), 1, "{listed}");
}

#[test]
fn a_store_that_is_taken_away_between_two_batches_is_passed_over_until_it_is_back() {
    let site = site();
    let (a, b, gone) = (site.path("a"), site.path("b"), site.path("gone"));
    let node = site.start(&with_stores(&[("a", &a), ("b", &b)]));
    let made = |count: &str, prefix: &str| {
        let batch = id(&node.json(&site, &create(count, prefix, &["--spread", "domain"])));
        node.volley(&site, &["batch", "watch", &batch, "--until", "created", "--timeout", "120s"]).success();
        batch
    };
    let first = made("100", "vm-");
    assert_eq!((files(&a), files(&b)), (50, 50));
    std::fs::rename(&a, &gone).expect("take the store away");
    let second = made("60", "db-");
    assert_eq!((files(&gone), files(&b)), (50, 110));
    let placed = node.volley(&site, &["place", "--dry-run", "--snapshot", "debian-12", "--count", "1"]).success();
    assert!(placed.contains("No such file"), "{placed}");
    node.volley(&site, &create("10", "a-", &["--store", "a"])).fails_naming(&["a (failing", "No such file"]);
    std::fs::rename(&gone, &a).expect("bring the store back");
    for batch in [first, second] {
        node.volley(&site, &["batch", "cancel", &batch]).success();
    }
    assert_eq!((files(&a), files(&b)), (0, 0));
    node.stop();
    is_clean(&site);
}

#[test]
fn a_batch_waits_for_an_object_store_that_goes_away_in_the_middle() {
    let site = site();
    let node = site.start_default();
    let batch = id(&node.json(&site, &create("8", "vm-", &["--rate", "4MiB/s"])));
    eventually("hydration has begun", || number(&show(&node, &site, &batch), "resident_bytes") > CHUNK);
    let gone: PathBuf = site.path("objects.away");
    std::fs::rename(site.objects(), &gone).expect("take the object store away");
    node.volley(&site, &["cache", "drop", "debian-12"]);
    node.volley(&site, &create("3", "late-", &[])).fails_naming(&["object store"]);
    std::thread::sleep(Duration::from_secs(1));
    std::fs::rename(&gone, site.objects()).expect("bring the object store back");
    node.volley(&site, &["batch", "watch", &batch, "--timeout", "60s"]).success();
    assert_eq!(number(&show(&node, &site, &batch), "volumes_hydrated"), 8);
}
