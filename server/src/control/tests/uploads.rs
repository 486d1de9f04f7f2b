//! Snapshots that are uploaded block by block.

use serde_json::{Value, json};

use super::blocks::{BLOCK, content, hex, put_blocks};
use super::code;
use super::fake::{Fault, Node};
use crate::snapshot::{import_key, manifest_key, marker};
use crate::upload::{self, Record};

fn start(node: &Node, name: &str, request: &Value) -> String {
    let (status, upload) = node.post(&format!("/v1/snapshots/{name}/upload"), request);
    assert_eq!(status, 201, "{upload}");
    upload["upload"].as_str().unwrap().to_owned()
}

fn put(node: &Node, upload: &str, index: usize, block: &[u8]) -> (u16, Value) {
    let path = format!("/v1/uploads/{upload}/blocks/{index}");
    node.put_bytes(&path, &[("Volley-Checksum", &hex(block))], block)
}

fn complete(node: &Node, upload: &str, blocks: u32) -> (u16, Value) {
    node.post(&format!("/v1/uploads/{upload}/complete"), &json!({"blocks_changed": blocks}))
}

fn block_of(node: &Node, name: &str, index: usize) -> Vec<u8> {
    let (status, _, body) = node.bytes(&format!("/v1/snapshots/{name}/blocks/{index}"));
    assert_eq!(status, 200);
    body
}

#[test]
fn what_is_not_put_is_the_parents_or_zero() {
    let node = Node::start(2);
    let mut expected = put_blocks(&node, "monday", 1, &[1, 2, 0, 3]);
    let upload = start(&node, "tuesday", &json!({"parent": "monday"}));
    expected[0] = content(7, BLOCK);
    expected[1] = content(0, BLOCK);
    expected[3] = content(8, 512);
    // The last of two counts, and counts once.
    assert_eq!(put(&node, &upload, 0, &content(6, BLOCK)).0, 200);
    for index in [0, 1, 3] {
        let (status, answer) = put(&node, &upload, index, &expected[index]);
        assert_eq!((status, &answer["digest"]), (200, &json!(hex(&expected[index]))), "{answer}");
    }
    assert_eq!(node.get("/v1/uploads").1["uploads"][0]["blocks"], 3);
    assert_eq!(code(&node.get("/v1/snapshots/tuesday")), (404, "unknown_snapshot"), "not before it is complete");
    assert_eq!(node.keys("imports/"), [import_key("tuesday")]);

    let wrong = complete(&node, &upload, 2);
    assert_eq!(code(&wrong), (400, "invalid"));
    assert!(wrong.1["detail"].as_str().unwrap().contains("3 blocks were put"), "{}", wrong.1);
    let (status, image) = complete(&node, &upload, 3);
    assert_eq!((status, &image["name"], &image["parent"]), (200, &json!("tuesday"), &json!("monday")), "{image}");
    assert_eq!(image["id"], json!(upload));
    for (index, block) in expected.iter().enumerate() {
        assert!(block_of(&node, "tuesday", index) == *block, "block {index}");
    }
    assert!(node.keys("imports/").is_empty());
    assert_eq!(node.get("/v1/uploads").1, json!({"uploads": []}));
    // An answer that was lost can be had again; nothing else of the upload.
    assert_eq!(complete(&node, &upload, 3), (status, image));
    let late = put(&node, &upload, 0, &expected[0]);
    assert_eq!(code(&late), (404, "not_found"));
    assert!(late.1["detail"].as_str().unwrap().contains("is complete"), "{}", late.1);
    let changes = node.get("/v1/snapshots/tuesday/changed?since=monday").1;
    assert_eq!(changes["changes"].as_array().unwrap().len(), 3);
}

#[test]
fn a_full_upload_spans_packs() {
    let node = Node::start(1);
    let blocks = 150;
    let request = json!({"size_bytes": blocks * BLOCK, "chunk_bytes": BLOCK});
    let upload = start(&node, "a", &request);
    for index in 0..blocks {
        assert_eq!(put(&node, &upload, index, &content(index as u8 + 1, BLOCK)).0, 200);
    }
    assert_eq!(node.keys("packs/").len(), 1, "a full pack does not wait for the end");
    let (status, image) = complete(&node, &upload, blocks as u32);
    assert_eq!((status, &image["packs"], &image["zero_chunks"]), (200, &json!(2), &json!(0)));
    for index in [0, 127, 128, 149] {
        assert!(block_of(&node, "a", index) == content(index as u8 + 1, BLOCK), "block {index}");
    }
}

#[test]
fn blocks_that_are_not_right_are_refused() {
    let node = Node::start(1);
    let upload = start(&node, "a", &json!({"size_bytes": 2 * BLOCK + 512, "chunk_bytes": BLOCK}));
    let path = format!("/v1/uploads/{upload}/blocks/0");
    let (block, sum) = (content(1, BLOCK), hex(&content(1, BLOCK)));
    let sha256 = "de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31";
    let (c, a) = ("Volley-Checksum", "Volley-Checksum-Algorithm");
    for (headers, body, answer) in [
        (vec![(c, sum.as_str())], content(2, BLOCK), (400, "checksum_mismatch")),
        (vec![(c, sum.as_str()), (a, "SHA256")], block.clone(), (400, "checksum_mismatch")),
        (vec![(c, sha256), (a, "SHA256")], content(0, BLOCK), (200, "")),
        (vec![], block.clone(), (400, "invalid")),
        (vec![(c, "12")], block.clone(), (400, "invalid")),
        (vec![(c, sum.as_str()), (a, "MD5")], block.clone(), (400, "invalid")),
        (vec![(c, sum.as_str())], block[..512].to_vec(), (400, "invalid")),
        (vec![(c, sum.as_str())], Vec::new(), (400, "invalid")),
        (vec![(c, sum.as_str())], vec![1; (4 << 20) + 1], (413, "too_large")),
    ] {
        let found = node.put_bytes(&path, &headers, &body);
        assert_eq!(code(&found), answer, "{headers:?}: {}", found.1);
    }
    assert_eq!(code(&put(&node, &upload, 3, &block)), (400, "invalid"), "past the end");
    assert_eq!(code(&put(&node, &upload, 2, &block)), (400, "invalid"), "longer than the last one");
    assert_eq!(put(&node, &upload, 2, &block[..512]).0, 200);
    assert_eq!(code(&put(&node, "nonsense", 0, &block)), (404, "not_found"));
    assert_eq!(code(&put(&node, &format!("{:032x}", 5), 0, &block)), (404, "not_found"));
    assert_eq!(complete(&node, &upload, 2).0, 200);
}

#[test]
fn uploads_that_can_not_be_are_refused() {
    let node = Node::start(1);
    put_blocks(&node, "monday", 1, &[1, 2, 0, 3]);
    for (name, request, answer) in [
        ("monday", json!({"size_bytes": 4096}), (409, "name_taken")),
        ("-x", json!({"size_bytes": 4096}), (400, "invalid")),
        ("a", json!({}), (400, "invalid")),
        ("a", json!({"size_bytes": 100}), (400, "invalid")),
        ("a", json!({"size_bytes": 4096, "chunk_bytes": 1000}), (400, "invalid")),
        ("a", json!({"size_bytes": 1u64 << 50, "chunk_bytes": BLOCK}), (400, "invalid")),
        ("a", json!({"parent": "none"}), (404, "unknown_snapshot")),
        ("a", json!({"parent": "monday", "size_bytes": 4096}), (400, "invalid")),
        ("a", json!({"parent": "monday", "chunk_bytes": 4 << 20}), (400, "invalid")),
        ("a", json!({"size_bytes": 4096, "color": "red"}), (400, "invalid")),
    ] {
        let found = node.post(&format!("/v1/snapshots/{name}/upload"), &request);
        assert_eq!(code(&found), answer, "{name} {request}: {}", found.1);
    }
    assert!(node.keys("imports/").is_empty(), "nothing refused leaves a marker");

    node.put_object(&import_key("taken"), &marker::encode(77));
    let found = node.post("/v1/snapshots/taken/upload", &json!({"size_bytes": 4096}));
    assert_eq!(code(&found), (409, "conflict"));
    assert!(found.1["detail"].as_str().unwrap().contains("--incomplete taken"), "{}", found.1);
    assert_eq!(node.object(&import_key("taken")), Some(marker::encode(77)), "another's marker stays");

    for n in 0..8 {
        start(&node, &format!("n{n}"), &json!({"size_bytes": 4096}));
    }
    assert_eq!(code(&node.post("/v1/snapshots/n8/upload", &json!({"size_bytes": 4096}))), (503, "busy"));
}

#[test]
fn an_abandoned_upload_leaves_nothing() {
    let node = Node::start(1);
    let upload = start(&node, "a", &json!({"size_bytes": 200 * BLOCK, "chunk_bytes": BLOCK}));
    for index in 0..130 {
        assert_eq!(put(&node, &upload, index, &content(index as u8 + 1, BLOCK)).0, 200);
    }
    assert_eq!(node.keys("packs/").len(), 1);
    assert_eq!(node.delete(&format!("/v1/uploads/{upload}")).0, 204);
    assert_eq!((node.keys("packs/"), node.keys("imports/")), (Vec::new(), Vec::new()));
    let late = complete(&node, &upload, 130);
    assert_eq!(code(&late), (404, "not_found"));
    assert!(late.1["detail"].as_str().unwrap().contains("was abandoned"), "{}", late.1);
    start(&node, "a", &json!({"size_bytes": 4096}));
}

#[test]
fn an_object_store_that_goes_away_costs_repetitions_only() {
    let node = Node::start(1);
    let upload = start(&node, "a", &json!({"size_bytes": 200 * BLOCK, "chunk_bytes": BLOCK}));
    let block = |index: usize| content(index as u8 + 1, BLOCK);
    let mut refused = 0;
    for index in 0..150 {
        if index == 100 {
            node.fault(Fault::ObjectStore);
        }
        let answer = put(&node, &upload, index, &block(index));
        if answer.0 != 200 {
            assert_eq!(code(&answer), (503, "object_store"));
            refused += 1;
            node.fault(Fault::LostAnswers);
            assert_eq!(code(&put(&node, &upload, index, &block(index))), (503, "object_store"));
            node.mend();
            assert_eq!(put(&node, &upload, index, &block(index)).0, 200);
        }
    }
    assert_eq!(refused, 1, "the pack that was full");
    node.fault(Fault::ObjectStore);
    assert_eq!(code(&complete(&node, &upload, 150)), (503, "object_store"));
    // First the pack's answer is lost, then the manifest's.
    node.fault(Fault::LostAnswers);
    assert_eq!(code(&complete(&node, &upload, 150)), (503, "object_store"));
    assert_eq!(code(&complete(&node, &upload, 150)), (503, "object_store"));
    assert!(node.object(&manifest_key("a")).is_some());
    node.mend();
    assert_eq!(complete(&node, &upload, 150).0, 200);
    assert!((0..150).all(|index| block_of(&node, "a", index) == block(index)));
    assert!(node.keys("imports/").is_empty());
}

#[test]
fn an_upload_whose_marker_was_taken_makes_no_snapshot() {
    let node = Node::start(1);
    let upload = start(&node, "a", &json!({"size_bytes": 4096}));
    assert_eq!(put(&node, &upload, 0, &content(1, 4096)).0, 200);
    node.remove_object(&import_key("a"));
    assert_eq!(code(&complete(&node, &upload, 1)), (409, "conflict"));
    assert!(node.object(&manifest_key("a")).is_none());
    assert_eq!(node.delete(&format!("/v1/uploads/{upload}")).0, 204);

    let upload = start(&node, "b", &json!({"size_bytes": 4096}));
    put_blocks(&node, "b", 9, &[1]);
    assert_eq!(code(&complete(&node, &upload, 0)), (409, "name_taken"));
}

#[test]
fn an_upload_that_lost_a_pack_makes_no_snapshot() {
    let node = Node::start(1);
    let upload = start(&node, "a", &json!({"size_bytes": 200 * BLOCK, "chunk_bytes": BLOCK}));
    for index in 0..130 {
        assert_eq!(put(&node, &upload, index, &content(index as u8 + 1, BLOCK)).0, 200);
    }
    let pack = node.keys("packs/").remove(0);
    let bytes = node.object(&pack).unwrap();
    node.remove_object(&pack);
    let answer = complete(&node, &upload, 130);
    assert_eq!(code(&answer), (409, "conflict"));
    assert!(answer.1["detail"].as_str().unwrap().contains(&pack), "{}", answer.1);
    assert!(node.object(&manifest_key("a")).is_none());
    node.put_object(&pack, &bytes);
    assert_eq!(complete(&node, &upload, 130).0, 200);
}

#[test]
fn a_restart_ends_uploads_and_removes_their_markers() {
    let (ours, other) = (Record { id: 5, snapshot: "a".to_owned() }, Record { id: 6, snapshot: "b".to_owned() });
    let node = Node::start_with(1, |objects, data| {
        upload::write(data, &ours).unwrap();
        upload::write(data, &other).unwrap();
        objects.insert(import_key("a"), marker::encode(5));
        // Of somebody who began after ours was dropped.
        objects.insert(import_key("b"), marker::encode(7));
    });
    node.until("the marker is removed", || node.object(&import_key("a")).is_none());
    let late = put(&node, &format!("{:032x}", 5), 0, &content(1, BLOCK));
    assert_eq!(code(&late), (404, "not_found"));
    assert!(late.1["detail"].as_str().unwrap().contains("restart"), "{}", late.1);
    start(&node, "a", &json!({"size_bytes": 4096}));
    assert_eq!(node.object(&import_key("b")), Some(marker::encode(7)));
}

#[test]
fn requests_blocks_and_uploads_are_counted() {
    let node = Node::start(1);
    put_blocks(&node, "monday", 1, &[1, 2, 0, 3]);
    let metric = |name: &str| -> u64 {
        let (_, _, body) = node.bytes("/metrics");
        let text = String::from_utf8(body).unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("volley_{name} ")));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    let requests = |operation: &str| {
        let of = |name: &str| metric(&format!("block_requests_{name}{{operation=\"{operation}\"}}"));
        (of("total"), of("failed_total"))
    };
    node.get("/v1/snapshots/monday/blocks");
    node.get("/v1/snapshots/nobody/blocks");
    node.get("/v1/snapshots/monday/changed?since=monday");
    block_of(&node, "monday", 0);
    block_of(&node, "monday", 3);
    let (first, second) =
        (start(&node, "a", &json!({"parent": "monday"})), start(&node, "b", &json!({"size_bytes": BLOCK})));
    assert_eq!(metric("uploads_open"), 2);
    assert_eq!(put(&node, &first, 0, &content(7, BLOCK)).0, 200);
    assert_eq!(put(&node, &first, 9, &content(7, BLOCK)).0, 400);
    assert_eq!(complete(&node, &first, 1).0, 200);
    assert_eq!(node.delete(&format!("/v1/uploads/{second}")).0, 204);
    for (operation, counts) in [
        ("list", (2, 1)),
        ("changed", (1, 0)),
        ("read", (2, 0)),
        ("start", (2, 0)),
        ("put", (2, 1)),
        ("complete", (1, 0)),
        ("abandon", (1, 0)),
    ] {
        assert_eq!(requests(operation), counts, "{operation}");
    }
    let bytes = (metric("block_read_bytes_total"), metric("block_put_bytes_total"));
    assert_eq!(bytes, ((BLOCK + 512) as u64, BLOCK as u64));
    let ends = ["open", "started_total", "completed_total", "abandoned_total", "expired_total"]
        .map(|name| metric(&format!("uploads_{name}")));
    assert_eq!(ends, [0, 2, 1, 1, 0]);
}
