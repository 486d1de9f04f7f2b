//! The HTTP API against fake shards: threads that answer commands from a map of volumes.
#![allow(clippy::disallowed_methods)] // Tests run outside of any shard.

mod batches;
mod blocks;
mod fake;
mod placement;
mod uploads;

use fake::{Fault, Node};
use serde_json::{Value, json};

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["code"].as_str().unwrap_or_default())
}

#[test]
fn a_batch_is_created_over_all_shards_and_listed() {
    let node = Node::start(3);
    node.put_snapshot("debian", 10 << 20);
    let (status, created) =
        node.post("/v1/volumes", &json!({"snapshot": "debian", "name_prefix": "web-", "count": 20, "rate": "1MiB/s"}));
    assert_eq!(status, 201, "{created}");
    assert_eq!(created["volumes"].as_array().unwrap().len(), 20);
    assert_eq!(created["size_bytes"], 10 << 20);
    let (_, page) = node.get("/v1/volumes?limit=7&prefix=web-");
    assert_eq!(page["volumes"].as_array().unwrap().len(), 7);
    let next = page["next"].as_str().unwrap();
    let (_, page) = node.get(&format!("/v1/volumes?after={next}"));
    assert_eq!((page["volumes"].as_array().unwrap().len(), &page["next"]), (13, &Value::Null));
    let (_, volume) = node.get("/v1/volumes/web-7");
    assert_eq!((&volume["rate"], &volume["snapshot"]), (&json!("1048576"), &json!("debian")));
    assert_eq!(volume["batch"], created["batch"]);
}

#[test]
fn equal_stores_are_filled_alike() {
    let node = Node::start(2);
    node.post("/v1/volumes", &json!({"size_bytes": 4096, "name_prefix": "v", "count": 10}));
    for (label, volumes) in [("a", 5), ("b", 5)] {
        let (_, store) = node.get(&format!("/v1/stores/{label}"));
        assert_eq!(store["volumes"], volumes, "{store}");
        assert!(store["free_bytes"].as_u64().unwrap() > 0);
    }
    let (_, page) = node.get("/v1/volumes?store=a");
    assert_eq!(page["volumes"].as_array().unwrap().len(), 5);
    assert_eq!(code(&node.get("/v1/stores/c")), (404, "not_found"));
}

#[test]
fn a_large_batch_is_created_by_one_request() {
    let node = Node::start(2);
    node.put_snapshot("debian", 10 << 30);
    let (status, _) = node.post("/v1/volumes", &json!({"snapshot": "debian", "name_prefix": "v", "count": 6000}));
    assert_eq!(status, 201);
    assert_eq!(node.names().len(), 6000);
}

#[test]
fn a_refusing_shard_leaves_no_volume_behind() {
    let node = Node::start(4);
    assert_eq!(node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "v7"})).0, 201);
    let answer = node.post("/v1/volumes", &json!({"size_bytes": 4096, "name_prefix": "v", "count": 40}));
    assert_eq!(code(&answer), (409, "name_taken"));
    assert!(answer.1["detail"].as_str().unwrap().contains("v7"), "{}", answer.1);
    assert_eq!(node.names(), ["v7"]);
    node.fault(Fault::StoreFull);
    let answer = node.post("/v1/volumes", &json!({"size_bytes": 4096, "name_prefix": "w", "count": 40}));
    assert_eq!(code(&answer), (507, "no_space"));
    assert_eq!(node.names(), ["v7"]);
}

#[test]
fn bad_creations_are_refused_by_field() {
    let node = Node::start(1);
    node.put_snapshot("debian", 1 << 20);
    for (request, says) in [
        (json!({"size_bytes": 4096}), "name or name_prefix"),
        (json!({"name": "a"}), "snapshot or size_bytes"),
        (json!({"name": "a", "name_prefix": "b", "size_bytes": 4096}), "exclude"),
        (json!({"name": "a", "count": 2, "size_bytes": 4096}), "count and start"),
        (json!({"name": "a/b", "size_bytes": 4096}), "a/b"),
        (json!({"name": "a", "size_bytes": 0}), "size_bytes"),
        (json!({"name": "a", "size_bytes": 513}), "multiple of 512"),
        (json!({"name": "a", "size_bytes": 1u64 << 50}), "size_bytes"),
        (json!({"name": "a", "size_bytes": "big"}), "size_bytes"),
        (json!({"name": "a", "size_bytes": 4096, "chunk_bytes": 1000}), "chunk_bytes"),
        (json!({"name": "a", "size_bytes": 4096, "store": "nowhere"}), "no volume store \"nowhere\""),
        (json!({"name": "a", "size_bytes": 4096, "rate": "fast"}), "rate"),
        (json!({"name": "a", "size_bytes": 4096, "rate": 0}), "rate"),
        (json!({"name": "a", "size": 4096}), "unknown field `size`"),
        (json!({"name_prefix": "a", "count": 0, "size_bytes": 4096}), "count"),
        (json!({"name_prefix": "a", "count": 100_001, "size_bytes": 4096}), "count"),
        (json!({"name_prefix": "a", "start": u64::MAX, "size_bytes": 4096}), "start"),
        (json!({"name": "a", "snapshot": "debian", "size_bytes": 512}), "is smaller than the image (1048576 bytes)"),
        (json!({"name": "a", "snapshot": "debian", "chunk_bytes": 65536}), "chunk_bytes"),
    ] {
        let answer = node.post("/v1/volumes", &request);
        assert_eq!(code(&answer), (400, "invalid"), "{request}: {}", answer.1);
        assert!(answer.1["detail"].as_str().unwrap().contains(says), "{request}: {}", answer.1);
    }
    assert_eq!(code(&node.post("/v1/volumes", &json!({"name": "a", "snapshot": "x"}))), (404, "unknown_snapshot"));
    assert_eq!(code(&node.post("/v1/volumes", &json!({"name": "a", "snapshot": "../x"}))), (404, "unknown_snapshot"));
    assert!(node.names().is_empty());
}

#[test]
fn a_volume_may_be_larger_than_its_image() {
    let node = Node::start(1);
    node.put_snapshot("debian", 1 << 20);
    let request = json!({"name": "a", "snapshot": "debian", "size_bytes": 4 << 20});
    assert_eq!(node.post("/v1/volumes", &request).0, 201);
    assert_eq!(node.get("/v1/volumes/a").1["size_bytes"], 4 << 20);
}

#[test]
fn http_errors_are_problems_too() {
    let node = Node::start(1);
    assert_eq!(code(&node.get("/v2/volumes")), (404, "not_found"));
    assert_eq!(code(&node.get("/v1/volumes/none")), (404, "unknown_volume"));
    assert_eq!(code(&node.get("/v1/volumes?limit=many")), (400, "invalid"));
    assert_eq!(code(&node.get("/v1/volumes?limit=0")), (400, "invalid"));
    assert_eq!(code(&node.get("/v1/volumes?colour=red")), (400, "invalid"));
    assert_eq!(code(&node.get("/v1/volumes/%ff")), (400, "invalid"));
    assert_eq!(code(&node.get("/v1/batches/none")), (404, "not_found"));
    assert_eq!(code(&node.post("/v1/node", &json!({}))), (405, "method_not_allowed"));
    assert_eq!(code(&node.post_raw("/v1/volumes", "application/json", "{")), (400, "invalid"));
    assert_eq!(code(&node.post_raw("/v1/volumes", "text/plain", "{}")), (415, "unsupported_media_type"));
    let huge = format!("{{\"name\": \"{}\"}}", "x".repeat(66 << 10));
    assert_eq!(code(&node.post_raw("/v1/volumes", "application/json", &huge)), (413, "too_large"));
    let (kind, answer) = node.content_type("/v1/volumes/none");
    assert_eq!(kind, "application/problem+json");
    assert_eq!((&answer["status"], &answer["title"]), (&json!(404), &json!("Not Found")));
    assert_eq!(answer["type"], "urn:volley:problem:unknown_volume");
}

#[test]
fn rate_wait_and_delete_reach_the_owner() {
    let node = Node::start(3);
    node.post("/v1/volumes", &json!({"name": "a", "size_bytes": 4096}));
    let (_, changed) = node.patch("/v1/volumes/a", &json!({"rate": "none"}));
    assert_eq!(changed["rate"], "none");
    assert_eq!(code(&node.patch("/v1/volumes/a", &json!({"rate": "x"}))), (400, "invalid"));
    assert_eq!(code(&node.patch("/v1/volumes/b", &json!({"rate": "none"}))), (404, "unknown_volume"));
    assert_eq!(code(&node.get("/v1/volumes/a/wait?timeout_s=0")), (504, "deadline_exceeded"));
    assert_eq!(code(&node.get("/v1/volumes/a/wait?timeout_s=999")), (400, "invalid"));
    node.hydrate("a");
    assert_eq!(node.get("/v1/volumes/a/wait").1["hydrated"], true);
    node.attach("a");
    assert_eq!(code(&node.delete("/v1/volumes/a")), (409, "conflict"));
    assert_eq!(node.delete("/v1/volumes/a?force=true").0, 204);
    assert_eq!(code(&node.delete("/v1/volumes/a")), (404, "unknown_volume"));
}

#[test]
fn batches_sum_their_volumes() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    let (_, created) = node.post("/v1/volumes", &json!({"snapshot": "debian", "name_prefix": "w", "count": 4}));
    node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "other"}));
    node.hydrate("w2");
    let (_, batch) = node.get(&format!("/v1/batches/{}", created["batch"].as_str().unwrap()));
    assert_eq!((&batch["volumes"], &batch["volumes_hydrated"]), (&json!(4), &json!(1)));
    assert_eq!((&batch["size_bytes"], &batch["resident_bytes"]), (&json!(4 << 20), &json!(1 << 20)));
    assert_eq!(batch["eta_seconds"], Value::Null);
    assert_eq!(node.get("/v1/batches").1["batches"].as_array().unwrap().len(), 2);
}

#[test]
fn snapshots_are_described() {
    let node = Node::start(2);
    node.put_snapshot("debian", 3 << 20);
    node.put_object("snapshots/broken", b"nonsense");
    node.post("/v1/volumes", &json!({"snapshot": "debian", "name": "a"}));
    for path in ["/v1/images", "/v1/snapshots"] {
        let (_, images) = node.get(path);
        assert_eq!(images["images"].as_array().unwrap().len(), 1, "{images}");
    }
    let (_, image) = node.get("/v1/images/debian");
    assert_eq!(
        (&image["size_bytes"], &image["chunks"], &image["zero_chunks"]),
        (&json!(3 << 20), &json!(6), &json!(6))
    );
    assert_eq!(image["referenced_by"].as_array().unwrap().len(), 1);
    assert_eq!(code(&node.get("/v1/images/none")), (404, "unknown_snapshot"));
    assert_eq!(code(&node.get("/v1/images/broken")), (500, "corrupt"));
    node.fault(Fault::ObjectStore);
    assert_eq!(code(&node.get("/v1/images")), (503, "object_store"));
}

#[test]
fn references_follow_the_volumes() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    node.post("/v1/volumes", &json!({"snapshot": "debian", "name": "a"}));
    assert_eq!(node.references().len(), 1);
    node.delete("/v1/volumes/a");
    node.until("the reference is dropped", || node.references().is_empty());
    node.post("/v1/volumes", &json!({"snapshot": "debian", "name": "b"}));
    assert_eq!(node.references().len(), 1);
}

#[test]
fn references_of_an_earlier_run_are_reconciled() {
    let node = Node::start_with(1, |objects, _| {
        objects.insert(format!("refs/old/{:032x}", fake::NODE_ID), Vec::new());
        objects.insert(format!("refs/old/{:032x}", 1), Vec::new());
    });
    node.until("only the other node's reference is left", || node.references().len() == 1);
    assert_eq!(node.references(), [format!("refs/old/{:032x}", 1)]);
}

#[test]
fn a_snapshot_deleted_during_creation_is_noticed() {
    let node = Node::start(1);
    node.put_snapshot("debian", 1 << 20);
    node.fault(Fault::ManifestVanishesOnReference);
    let answer = node.post("/v1/volumes", &json!({"snapshot": "debian", "name": "a"}));
    assert_eq!(code(&answer), (404, "unknown_snapshot"));
    assert!(node.names().is_empty());
}

#[test]
fn node_health_and_metrics() {
    let node = Node::start(2);
    node.post("/v1/volumes", &json!({"size_bytes": 4096, "name_prefix": "v", "count": 3}));
    let (_, shown) = node.get("/v1/node");
    assert_eq!((&shown["volumes"], shown["shards"].as_array().unwrap().len()), (&json!(3), 2));
    assert_eq!(shown["node_id"], format!("{:032x}", fake::NODE_ID));
    assert_eq!(node.text("/healthz"), (200, "ok\n".to_string()));
    let (_, metrics) = node.text("/metrics");
    assert!(metrics.contains("volley_volumes{shard=\"1\"}"), "{metrics}");
    assert!(metrics.contains("volley_store_free_bytes{store=\"b\"}"), "{metrics}");
    assert!(metrics.contains("\nvolley_bootset_boots_total 0\n"), "{metrics}");
    for kind in metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(|line| line.split(' ').nth(1)) {
        assert!(matches!(kind, Some("counter" | "gauge" | "histogram")), "{kind:?}");
    }
}

#[test]
fn a_stopped_shard_is_reported_as_shutting_down() {
    let node = Node::start(2);
    node.stop_shards();
    assert_eq!(code(&node.get("/healthz")), (503, "shutting_down"));
    assert_eq!(code(&node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "a"}))), (503, "shutting_down"));
}

#[test]
fn the_ledger_adds_up_shards_by_image_and_batch() {
    let node = Node::start(2);
    let (status, ledger) = node.get("/v1/ledger");
    assert_eq!(status, 200);
    let gets = |line: &Value| line["gets"].as_u64().expect("gets");
    assert_eq!((gets(&ledger["node"]), &ledger["node"]["cost"]), (14, &json!(7.0)));
    let images: Vec<_> = ledger["images"].as_array().expect("images").iter().map(|l| (&l["image"], gets(l))).collect();
    assert_eq!(images, [(&json!("debian"), 6), (&json!("image-0"), 4), (&json!("image-1"), 4)]);
    let batches = ledger["batches"].as_array().expect("batches");
    assert_eq!(batches.len(), 1);
    let batch = json!({ "image": "debian", "batch": "000000000000000b", "gets": 2, "object_bytes": 2000, "cost": 1.0 });
    for (key, value) in batch.as_object().expect("fields") {
        assert_eq!(&batches[0][key], value, "{key}");
    }
    let (_, metrics) = node.text("/metrics");
    assert!(metrics.contains("# TYPE volley_ledger_gets_total counter\nvolley_ledger_gets_total 14\n"), "{metrics}");
}

#[test]
fn the_cache_is_shown_warmed_unpinned_and_dropped_over_all_shards() {
    let node = Node::start(3);
    node.put_snapshot("debian", 10 << 20);
    let (status, cache) = node.get("/v1/cache");
    assert_eq!((status, cache["shards"].as_array().unwrap().len(), &cache["disk"]), (200, 3, &Value::Null));
    let warmed = node.post("/v1/cache/images/debian/warm", &json!({"pin": true}));
    assert_eq!(warmed, (202, json!({"image": "debian", "pin": true})));
    let unpinned = node.delete("/v1/cache/images/debian/pin");
    assert_eq!(unpinned, (200, json!({"image": "debian", "chunks_unpinned": 3})));
    let dropped = node.delete("/v1/cache/images/debian");
    assert_eq!(dropped, (200, json!({"image": "debian", "chunks_ram": 3, "chunks_disk": 6})));
    assert_eq!(code(&node.delete("/v1/cache/images/none")), (404, "unknown_snapshot"));
    assert_eq!(code(&node.post("/v1/cache/images/none/warm", &json!({}))), (404, "unknown_snapshot"));
    assert_eq!(code(&node.post("/v1/cache/images/debian/warm", &json!({"pins": true}))), (400, "invalid"));
}
