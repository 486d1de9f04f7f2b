//! Where volumes of a request go, what is refused, and what is said about it.

use serde_json::json;

use super::code;
use super::fake::Node;

#[test]
fn each_volume_of_a_request_is_placed_by_free_space_and_says_why() {
    let node = Node::start(2);
    node.free_gib("b", 40 << 10);
    let (status, created) =
        node.post("/v1/volumes", &json!({"size_bytes": 1u64 << 40, "name_prefix": "v", "count": 60}));
    assert_eq!(status, 201, "{created}");
    let of_store = |label: &str| node.get(&format!("/v1/stores/{label}")).1["volumes"].as_u64().unwrap();
    assert!(of_store("a") > 2 * of_store("b") && of_store("b") > 0, "{} {}", of_store("a"), of_store("b"));
    let (_, shown) = node.get("/v1/volumes/v0");
    let reason = shown["placement"].as_str().unwrap();
    assert!(reason.starts_with("least loaded of 2 stores, got "), "{reason}");
    assert!(reason.contains(" of 60 volumes; load ") && reason.contains("guest writes"), "{reason}");
}

#[test]
fn what_does_not_fit_is_refused_as_a_whole() {
    let node = Node::start(2);
    node.free_gib("a", 1 + 10);
    node.free_gib("b", 1 + 20);
    let request = json!({"size_bytes": 1 << 30, "name_prefix": "v", "count": 31});
    let answer = node.post("/v1/volumes", &request);
    assert_eq!(code(&answer), (507, "no_space"));
    let says = "31 volumes of 1 GiB do not fit: there is room for 30 (a 10, b 20), 1 GiB are missing at overcommit 1";
    assert!(answer.1["detail"].as_str().unwrap().starts_with(says), "{}", answer.1);
    assert!(node.names().is_empty());
    // Promised is promised, although nothing was written yet.
    assert_eq!(node.post("/v1/volumes", &json!({"size_bytes": 1 << 30, "name_prefix": "w", "count": 30})).0, 201);
    assert_eq!(code(&node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "x"}))), (507, "no_space"));
    let more = json!({"size_bytes": 1 << 30, "name_prefix": "y", "count": 30, "overcommit": 2});
    assert_eq!(node.post("/v1/volumes", &more).0, 201);
    assert_eq!(node.get("/v1/stores/a").1["committed_bytes"], 20u64 << 30);
}

#[test]
fn a_failing_store_takes_nothing() {
    let node = Node::start(2);
    node.free_gib("a", 0);
    assert_eq!(node.post("/v1/volumes", &json!({"size_bytes": 4096, "name_prefix": "v", "count": 9})).0, 201);
    assert_eq!(node.get("/v1/stores/b").1["volumes"], 9);
    assert_eq!(node.get("/v1/stores/a").1["failure"], "its filesystem is mounted read-only");
    let reason = node.get("/v1/volumes/v3").1["placement"].as_str().unwrap().to_string();
    assert!(reason.ends_with("; not used: a (failing: its filesystem is mounted read-only)"), "{reason}");
    let answer = node.post("/v1/volumes", &json!({"size_bytes": 4096, "name": "x", "store": "a"}));
    assert_eq!(code(&answer), (409, "conflict"));
}

#[test]
fn what_if_answers_and_creates_nothing() {
    let node = Node::start(2);
    node.put_snapshot("debian", 1 << 30);
    let (status, placed) = node.post("/v1/place", &json!({"snapshot": "debian", "count": 10, "spread": "domain"}));
    assert_eq!((status, &placed["fits"], &placed["refusal"]), (200, &json!(true), &json!(null)), "{placed}");
    assert_eq!((&placed["stores"][0]["volumes"], &placed["stores"][1]["volumes"]), (&json!(5), &json!(5)));
    assert_eq!(placed["stores"][0]["room_before"], (100 << 10) - 1);
    let (status, placed) = node.post("/v1/place", &json!({"size_bytes": 1u64 << 43, "count": 100}));
    assert_eq!((status, &placed["fits"], &placed["stores"][0]["volumes"]), (200, &json!(false), &json!(0)));
    assert!(placed["refusal"].as_str().unwrap().contains("room for 24 (a 12, b 12)"), "{placed}");
    assert!(node.names().is_empty());
    for (request, says) in [
        (json!({"size_bytes": 4096, "count": 0}), "count: 0 is not between 1"),
        (json!({"size_bytes": 4096, "spread": "rack"}), "unknown variant `rack`"),
        (json!({"size_bytes": 4096, "overcommit": 0}), "is not an over-commit ratio"),
        (json!({"size_bytes": 4096, "name": "a"}), "unknown field `name`"),
        (json!({"size_bytes": 4096, "store": "c"}), "no volume store \"c\""),
    ] {
        let answer = node.post("/v1/place", &request);
        assert_eq!(code(&answer), (400, "invalid"), "{request}: {}", answer.1);
        assert!(answer.1["detail"].as_str().unwrap().contains(says), "{request}: {}", answer.1);
    }
    assert_eq!(code(&node.post("/v1/place", &json!({"snapshot": "none"}))), (404, "unknown_snapshot"));
}
