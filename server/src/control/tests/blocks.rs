//! Lists of blocks, and blocks themselves.

use serde_json::{Value, json};

use super::code;
use super::fake::{Fault, Node};
use crate::snapshot::{ChunkEntry, Manifest, PackBuilder, SnapshotInfo, encode_chunk, manifest_key, pack_key};

pub(super) const BLOCK: usize = 64 << 10;

/// The content of a block: zeroes, or noise of the seed.
pub(super) fn content(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    if seed != 0 {
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    }
    bytes
}

pub(super) fn hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Puts a snapshot with a pack of its own; the last block has 512 bytes only.
pub(super) fn put_blocks(node: &Node, name: &str, id: u128, seeds: &[u8]) -> Vec<Vec<u8>> {
    let last = seeds.len() - 1;
    let len = |index: usize| if index == last { 512 } else { BLOCK };
    let blocks: Vec<Vec<u8>> = seeds.iter().enumerate().map(|(index, seed)| content(*seed, len(index))).collect();
    let mut pack = PackBuilder::new(id, 0);
    let mut entry = |(block, seed): (&Vec<u8>, &u8)| match seed {
        0 => ChunkEntry::Zero,
        _ => {
            let chunk = encode_chunk(block, 3);
            let (stored_len, offset) = (chunk.stored.len() as u32, u64::from(pack.push(&chunk)));
            ChunkEntry::Stored { pack: 0, offset, stored_len, encoding: chunk.encoding, digest: chunk.digest }
        }
    };
    let entries: Vec<ChunkEntry> = blocks.iter().zip(seeds).map(&mut entry).collect();
    let info = SnapshotInfo {
        id,
        name: name.to_owned(),
        size_bytes: (last * BLOCK + 512) as u64,
        chunk_bytes: BLOCK as u32,
        parent: None,
        created_unix_ms: 1,
    };
    let manifest = Manifest::new(info, vec![pack_key(id, 0)], &entries).unwrap();
    node.put_object(&pack_key(id, 0), &pack.finish());
    node.put_object(&manifest_key(name), &manifest.encode());
    blocks
}

/// The items of all pages of a list.
fn all_pages(node: &Node, path: &str, field: &str, max: usize) -> Vec<Value> {
    let (mut all, mut more) = (Vec::new(), String::new());
    loop {
        let (status, page) = node.get(&format!("{path}max={max}{more}"));
        assert_eq!(status, 200, "{page}");
        let items = page[field].as_array().unwrap();
        assert!(items.len() == max || page["next"].is_null(), "{page}");
        all.extend(items.iter().cloned());
        match page["next"].as_str() {
            Some(token) => more = format!("&token={token}"),
            None => return all,
        }
    }
}

#[test]
fn blocks_with_data_are_listed_in_pages() {
    let node = Node::start(2);
    let blocks = put_blocks(&node, "a", 1, &[1, 0, 2, 1, 0, 0, 3]);
    let (_, whole) = node.get("/v1/snapshots/a/blocks");
    assert_eq!((&whole["id"], &whole["block_bytes"]), (&json!(format!("{:032x}", 1)), &json!(BLOCK)));
    assert_eq!((&whole["size_bytes"], &whole["next"]), (&json!(6 * BLOCK + 512), &Value::Null));
    let expected: Vec<Value> = [0, 2, 3, 6]
        .map(|index| json!({"index": index, "length": blocks[index].len(), "digest": hex(&blocks[index])}))
        .into();
    assert_eq!(whole["blocks"], json!(expected));
    for max in 1..6 {
        assert_eq!(all_pages(&node, "/v1/snapshots/a/blocks?", "blocks", max), expected, "{max}");
    }
    let (_, rest) = node.get("/v1/snapshots/a/blocks?starting=3");
    assert_eq!(rest["blocks"], json!(expected[2..]));
    assert_eq!(node.get("/v1/snapshots/a/blocks?starting=99").1["blocks"], json!([]));
}

#[test]
fn changed_blocks_say_which_side_has_data() {
    let node = Node::start(1);
    let old = put_blocks(&node, "old", 1, &[1, 0, 2, 1, 0, 3]);
    let new = put_blocks(&node, "new", 2, &[1, 4, 0, 5, 0, 3]);
    let whole = all_pages(&node, "/v1/snapshots/new/changed?since=old&", "changes", 100);
    let side = |blocks: &[Vec<u8>], at: usize| match blocks[at].iter().any(|byte| *byte != 0) {
        true => json!(hex(&blocks[at])),
        false => Value::Null,
    };
    let change = |at| json!({"index": at, "length": BLOCK, "digest": side(&new, at), "since_digest": side(&old, at)});
    assert_eq!(whole, [1, 2, 3].map(change));
    for max in 1..4 {
        assert_eq!(all_pages(&node, "/v1/snapshots/new/changed?since=old&", "changes", max), whole);
    }
    assert!(all_pages(&node, "/v1/snapshots/old/changed?since=old&", "changes", 9).is_empty());

    put_blocks(&node, "short", 3, &[1, 0, 2]);
    let refused = node.get("/v1/snapshots/new/changed?since=short");
    assert_eq!(code(&refused), (400, "invalid"));
    let detail = refused.1["detail"].as_str().unwrap();
    assert!(detail.contains("328192 bytes in blocks of 65536, and 131584"), "{detail}");
    assert_eq!(code(&node.get("/v1/snapshots/new/changed?since=none")), (404, "unknown_snapshot"));
    assert_eq!(code(&node.get("/v1/snapshots/new/changed")), (400, "invalid"));
}

#[test]
fn tokens_belong_to_one_list_of_one_snapshot() {
    let node = Node::start(1);
    put_blocks(&node, "a", 1, &[1, 2, 3]);
    put_blocks(&node, "b", 2, &[4, 5, 6]);
    let token = |path: &str| node.get(path).1["next"].as_str().unwrap().to_owned();
    let of_a = token("/v1/snapshots/a/blocks?max=1");
    let of_changes = token("/v1/snapshots/a/changed?since=b&max=1");
    for (path, says) in [
        (format!("/v1/snapshots/b/blocks?token={of_a}"), "another list"),
        (format!("/v1/snapshots/a/changed?since=b&token={of_a}"), "another list"),
        (format!("/v1/snapshots/a/blocks?token={of_changes}"), "another list"),
        (format!("/v1/snapshots/b/changed?since=a&token={of_changes}"), "another list"),
        ("/v1/snapshots/a/blocks?token=nonsense".to_owned(), "not a token"),
        (format!("/v1/snapshots/a/blocks?starting=0&token={of_a}"), "exclude"),
        ("/v1/snapshots/a/blocks?max=0".to_owned(), "max"),
        ("/v1/snapshots/a/blocks?max=10001".to_owned(), "max"),
        ("/v1/snapshots/a/blocks?from=1".to_owned(), "unknown field"),
    ] {
        let answer = node.get(&path);
        assert_eq!(code(&answer), (400, "invalid"), "{path}: {}", answer.1);
        assert!(answer.1["detail"].as_str().unwrap().contains(says), "{path}: {}", answer.1);
    }
    // Made anew under its name, it is another snapshot.
    put_blocks(&node, "a", 9, &[1, 2, 3]);
    assert_eq!(code(&node.get(&format!("/v1/snapshots/a/blocks?token={of_a}"))), (400, "invalid"));
    assert_eq!(node.get("/v1/snapshots/a/blocks").1["id"], format!("{:032x}", 9));
    node.remove_object("snapshots/a");
    assert_eq!(code(&node.get("/v1/snapshots/a/blocks")), (404, "unknown_snapshot"));
}

#[test]
fn a_block_comes_with_its_digests() {
    let node = Node::start(1);
    let blocks = put_blocks(&node, "a", 1, &[1, 0, 2]);
    for (index, block) in blocks.iter().enumerate() {
        let (status, headers, body) = node.bytes(&format!("/v1/snapshots/a/blocks/{index}?checksum=sha256"));
        assert_eq!(status, 200);
        assert!(body == *block, "block {index}");
        let header = |name: &str| headers[name].to_str().unwrap();
        assert_eq!(header("volley-checksum"), hex(block));
        assert_eq!(header("volley-checksum-algorithm"), "BLAKE3");
        assert_eq!(header("volley-block-zero"), if index == 1 { "true" } else { "false" });
        assert_eq!(header("content-length"), block.len().to_string());
        if index == 1 {
            // SHA-256 of 64 KiB of zeroes.
            let known = "de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31";
            assert_eq!(header("volley-checksum-sha256"), known);
        }
    }
    assert!(!node.bytes("/v1/snapshots/a/blocks/0").1.contains_key("volley-checksum-sha256"));
    for (path, answer) in [
        ("/v1/snapshots/a/blocks/3", (400, "invalid")),
        ("/v1/snapshots/a/blocks/x", (400, "invalid")),
        ("/v1/snapshots/a/blocks/-1", (400, "invalid")),
        ("/v1/snapshots/a/blocks/0?checksum=md5", (400, "invalid")),
        ("/v1/snapshots/none/blocks/0", (404, "unknown_snapshot")),
        ("/v1/snapshots/..%2fa/blocks/0", (404, "unknown_snapshot")),
    ] {
        assert_eq!(code(&node.get(path)), answer, "{path}");
    }
}

#[test]
fn nothing_of_a_damaged_block_is_sent() {
    let node = Node::start(1);
    put_blocks(&node, "a", 1, &[1, 2]);
    let key = pack_key(1, 0);
    let pack = node.object(&key).unwrap();
    let mut flipped = pack.clone();
    flipped[1000] ^= 1;
    node.put_object(&key, &flipped);
    let (status, problem) = node.get("/v1/snapshots/a/blocks/0");
    assert_eq!((status, &problem["code"]), (500, &json!("corrupt")));
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("block 0") && detail.contains(&key) && detail.contains("BLAKE3"), "{detail}");
    node.put_object(&key, &pack[..1000]);
    assert_eq!(code(&node.get("/v1/snapshots/a/blocks/0")), (500, "corrupt"));
    node.remove_object(&key);
    assert_eq!(code(&node.get("/v1/snapshots/a/blocks/0")), (500, "corrupt"));
    node.fault(Fault::ObjectStore);
    assert_eq!(code(&node.get("/v1/snapshots/a/blocks/0")), (503, "object_store"));
    assert_eq!(code(&node.get("/v1/snapshots/a/blocks")), (503, "object_store"));
    node.mend();
    node.put_object(&key, &pack);
    assert_eq!(node.bytes("/v1/snapshots/a/blocks/0").0, 200);
}
