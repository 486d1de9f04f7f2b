//! Batches against fake shards: admission as a whole, tokens, failing stores, cancellation, restarts.

use serde_json::{Value, json};

use super::code;
use super::fake::{Fault, Node, manifest};
use crate::batch::{self, Common, Record, Request, State};
use crate::snapshot::{ChunkEntry, manifest_key};
use crate::types::{HydrationRate, SnapshotRef};

fn request(prefix: &str, count: u64) -> Value {
    json!({"snapshot": "debian", "name_prefix": prefix, "count": count})
}

/// Follows the batch to a state.
fn until(node: &Node, id: &str, state: &str) -> Value {
    let mut last = Value::Null;
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while last["state"] != state {
        assert!(std::time::Instant::now() < end, "not {state}: {last}");
        last = node.get(&format!("/v1/batches/{id}")).1;
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    last
}

fn id(answer: &(u16, Value)) -> String {
    answer.1["id"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_string()
}

#[test]
fn a_batch_is_admitted_made_and_followed() {
    let node = Node::start(3);
    node.put_snapshot("debian", 4 << 20);
    let answer = node.post(
        "/v1/batches",
        &json!({"snapshot": "debian", "name_prefix": "web-", "count": 1000, "start": 5, "deadline_seconds": 3600}),
    );
    assert_eq!(answer.0, 201, "{}", answer.1);
    assert!(answer.1["predicted"]["created_seconds"].as_f64().unwrap() > 0.0, "{}", answer.1);
    let id = id(&answer);
    let created = until(&node, &id, "created");
    assert_eq!(
        (&created["volumes"], &created["count"], &created["volumes_failed"]),
        (&json!(1000), &json!(1000), &json!(0))
    );
    assert_eq!(created["volumes_boot_set_resident"], 0);
    assert!(created["actual"]["created_seconds"].is_number() && created["deadline_met"].is_null(), "{created}");
    let due = answer.1["deadline_unix_ms"].as_u64();
    assert_eq!((node.deadlines(), due.is_some()), (vec![due; 3], true));
    let names = node.names();
    assert_eq!(names.len(), 1000);
    assert!(names.contains(&"web-5".to_string()) && names.contains(&"web-1004".to_string()));
    assert_eq!(node.references().len(), 1);
    let (_, volume) = node.get("/v1/volumes/web-5");
    assert_eq!(volume["batch"], id.as_str());
    assert!(!volume["placement"].as_str().unwrap().contains("restart"), "{volume}");
    for name in &names {
        node.hydrate(name);
    }
    let hydrated = until(&node, &id, "hydrated");
    assert_eq!((&hydrated["deadline_met"], &hydrated["volumes_boot_set_resident"]), (&json!(true), &json!(1000)));
    assert!(hydrated["actual"]["boot_set_seconds"].is_number(), "{hydrated}");
    node.until("it is due no more", || node.deadlines() == [None; 3]);
    let (_, list) = node.get("/v1/batches");
    assert_eq!(list["batches"].as_array().unwrap().len(), 1);
    let events = node.text(&format!("/v1/batches/{id}/events")).1;
    assert!(events.starts_with("event: progress\ndata: {\"id\":") && events.ends_with("\n\n"), "{events}");
    for name in &names {
        node.delete(&format!("/v1/volumes/{name}"));
    }
    until(&node, &id, "deleted");
}

#[test]
fn a_token_makes_one_batch_however_often_it_is_sent() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    let mut request = request("v", 20);
    request["token"] = json!("deploy-7");
    let first = node.post("/v1/batches", &request);
    assert_eq!(first.0, 201);
    until(&node, &id(&first), "created");
    for _ in 0..3 {
        let again = node.post("/v1/batches", &request);
        assert_eq!((again.0, &again.1["id"]), (200, &first.1["id"]));
    }
    assert_eq!(node.names().len(), 20);
    request["count"] = json!(21);
    assert_eq!(code(&node.post("/v1/batches", &request)), (409, "conflict"));
    request["token"] = json!("");
    assert_eq!(code(&node.post("/v1/batches", &request)), (400, "invalid"));
}

#[test]
fn a_batch_that_does_not_fit_as_a_whole_leaves_nothing() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 30);
    assert_eq!(node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "v7"})).0, 201);
    for (asked, says) in [
        (request("v", 10), (409, "name_taken")),
        (request("w", 0), (400, "invalid")),
        (request("w", 100_001), (400, "invalid")),
        (json!({"snapshot": "none", "name_prefix": "w", "count": 2}), (404, "unknown_snapshot")),
        (json!({"snapshot": "debian", "name_prefix": "w", "count": 2, "require_deadline": true}), (400, "invalid")),
        (json!({"snapshot": "debian", "name_prefix": "w/", "count": 2}), (400, "invalid")),
        (json!({"snapshot": "debian", "name_prefix": "w", "count": 2, "surprise": 1}), (400, "invalid")),
        (json!({"snapshot": "debian", "name_prefix": "w", "count": 2, "start": u64::MAX}), (400, "invalid")),
    ] {
        assert_eq!(code(&node.post("/v1/batches", &asked)), says, "{asked}");
    }
    node.free_gib("a", 10);
    node.free_gib("b", 10);
    let answer = node.post("/v1/batches", &request("w", 100));
    assert_eq!(code(&answer), (507, "no_space"));
    assert_eq!(node.names(), ["v7"]);
    assert_eq!(node.get("/v1/batches").1["batches"].as_array().unwrap().len(), 1, "the single volume");
    assert_eq!(code(&node.get("/v1/batches/00000000000000ff")), (404, "not_found"));
    assert_eq!(code(&node.post("/v1/batches/../cancel", &json!({}))).0, 404);
}

#[test]
fn a_required_deadline_that_can_not_be_met_is_refused_with_the_reason() {
    let node = Node::start(2);
    node.put_data_snapshot("debian", 1 << 30);
    let mut asked = request("v", 5000);
    asked["deadline_seconds"] = json!(60);
    asked["require_deadline"] = json!(true);
    let answer = node.post("/v1/batches", &asked);
    assert_eq!(code(&answer), (409, "conflict"));
    assert!(answer.1["detail"].as_str().unwrap().contains("because of store"), "{}", answer.1);
    assert!(node.names().is_empty());
    asked["require_deadline"] = json!(false);
    let answer = node.post("/v1/batches", &asked);
    assert_eq!(answer.0, 201);
    assert!(answer.1["predicted"]["hydrated_seconds"].as_f64().unwrap() > 60.0, "{}", answer.1);
    until(&node, &id(&answer), "created");
}

#[test]
fn volumes_of_a_store_that_fails_meanwhile_go_to_another() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    node.fault(Fault::StoreFails("a"));
    let answer = node.post("/v1/batches", &request("v", 600));
    let created = until(&node, &id(&answer), "created");
    assert_eq!((&created["volumes"], created["stores"].as_array().unwrap().len()), (&json!(600), 1), "{created}");
    assert_eq!(created["stores"][0]["label"], "b");
    assert_eq!(code(&node.post(&format!("/v1/batches/{}/retry", id(&answer)), &json!({}))), (409, "conflict"));
}

#[test]
fn a_batch_that_no_store_takes_stalls_and_goes_on_when_asked() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    node.fault(Fault::StoreFull);
    let answer = node.post("/v1/batches", &request("v", 600));
    assert_eq!(answer.0, 201);
    let id = id(&answer);
    let stalled = until(&node, &id, "stalled");
    let (volumes, failed) = (stalled["volumes"].as_u64().unwrap(), stalled["volumes_failed"].as_u64().unwrap());
    assert_eq!(volumes + failed, 600, "{stalled}");
    assert!(failed > 0 && stalled["problem"].as_str().unwrap().contains("store is full"), "{stalled}");
    assert!(node.text("/metrics").1.contains("\nvolley_batches_stalled 1\n"), "to be alerted by");
    // Nobody takes its names or deletes what it has meanwhile.
    let missing = (0..600).map(|n| format!("v{n}")).find(|name| !node.names().contains(name)).unwrap();
    assert_eq!(code(&node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": missing}))), (409, "name_taken"));
    let there = node.names().remove(0);
    assert_eq!(code(&node.delete(&format!("/v1/volumes/{there}"))), (409, "conflict"));
    node.mend();
    assert_eq!(node.post(&format!("/v1/batches/{id}/retry"), &json!({})).0, 202);
    let created = until(&node, &id, "created");
    assert_eq!((&created["volumes"], &created["problem"]), (&json!(600), &Value::Null));
    assert_eq!(node.names().len(), 600);
}

#[test]
fn a_cancelled_batch_leaves_nothing_behind() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 20);
    assert_eq!(node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "other"})).0, 201);
    let first = id(&node.post("/v1/batches", &request("v", 900)));
    // In the middle of its creation, or just after it.
    assert_eq!(node.post(&format!("/v1/batches/{first}/cancel"), &json!({})).0, 202);
    until(&node, &first, "cancelled");
    assert_eq!(node.names(), ["other"]);
    node.until("the reference is released", || node.references().is_empty());
    let second = id(&node.post("/v1/batches", &request("v", 10)));
    until(&node, &second, "created");
    node.attach("v3");
    let refused = node.post(&format!("/v1/batches/{second}/cancel"), &json!({}));
    assert_eq!(code(&refused), (409, "conflict"));
    assert!(refused.1["detail"].as_str().unwrap().starts_with("1 volumes"), "{}", refused.1);
    assert_eq!(node.names().len(), 11);
    assert_eq!(node.post(&format!("/v1/batches/{second}/cancel?force=true"), &json!({})).0, 202);
    until(&node, &second, "cancelled");
    assert_eq!(node.names(), ["other"]);
}

#[test]
fn two_batches_at_once_are_both_complete() {
    let node = Node::start(3);
    node.put_snapshot("debian", 1 << 20);
    let ids: Vec<String> = std::thread::scope(|scope| {
        let ask = |prefix: &'static str| scope.spawn(|| id(&node.post("/v1/batches", &request(prefix, 700))));
        [ask("a"), ask("b"), ask("c")].map(|asked| asked.join().unwrap()).into()
    });
    for id in &ids {
        assert_eq!(until(&node, id, "created")["volumes"], 700);
    }
    assert_eq!(node.names().len(), 2100);
    let (_, stores) = node.get("/v1/stores");
    let volumes = |at: usize| stores["stores"][at]["volumes"].as_u64().unwrap();
    assert_eq!((volumes(0) + volumes(1), volumes(0).abs_diff(volumes(1)) <= 3), (2100, true), "{stores}");
}

#[test]
fn a_batch_that_was_interrupted_is_completed_and_a_cancelled_one_stays_gone() {
    let record = |prefix: &str, id: u64, state: State| {
        let request = Request {
            name_prefix: prefix.to_string(),
            count: 300,
            snapshot: Some("debian".to_string()),
            deadline_seconds: Some(1 << 40),
            ..Request::default()
        };
        let common = Common {
            snapshot: Some(SnapshotRef { name: "debian".into(), id: 7 }),
            size_bytes: 1 << 20,
            chunk_bytes: 512 << 10,
            data_bytes: 0,
            rate: HydrationRate::Unlimited,
        };
        let stores = vec!["a".to_string(), "b".to_string()];
        let mut record = Record::new(request, &common, stores, (0..300).map(|n| n % 2).collect(), [id, 5], 1_000);
        record.state = state;
        record
    };
    let node = Node::start_with(2, |objects, data| {
        objects.insert(manifest_key("debian"), manifest("debian", 1 << 20, |_| ChunkEntry::Zero).encode());
        batch::write(data, &record("v", 1, State::Creating)).unwrap();
        batch::write(data, &record("gone", 2, State::Cancelling)).unwrap();
        batch::write(data, &record("waits", 3, State::Stalled)).unwrap();
        std::fs::write(data.join("batches/0000000000000004.toml"), "format = 1\nhalf a fi").unwrap();
    });
    let created = until(&node, "0000000000000001", "created");
    assert!(node.deadlines().contains(&created["deadline_unix_ms"].as_u64()), "told again after the start");
    assert_eq!(created["volumes"], 300);
    until(&node, "0000000000000002", "cancelled");
    assert_eq!(until(&node, "0000000000000003", "stalled")["volumes_failed"], 300);
    assert_eq!(node.names().len(), 300);
    assert_eq!(node.post("/v1/batches/0000000000000003/retry", &json!({})).0, 202);
    until(&node, "0000000000000003", "created");
    assert_eq!(node.names().len(), 600);
}
