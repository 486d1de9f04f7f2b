//! Blocks of snapshots as a backup tool reads and writes them: over HTTP, with the real server.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::faults::eventually;
use crate::foreign::qemu_compare;
use crate::harness::{Node, Site, available, number};
use crate::image_file::{CHUNK, MIB, assert_same, noise, write_image};

const IMAGE_BYTES: u64 = 10 * MIB + 4096;

/// Status, headers and body of a request.
struct Reply {
    status: u16,
    headers: ureq::http::HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn of(sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Reply {
        let mut response = sent.expect("an answer");
        let body = response.body_mut().read_to_vec().expect("response body");
        Reply { status: response.status().as_u16(), headers: response.headers().clone(), body }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    /// The answer of a request that succeeded.
    fn ok(&self) -> Value {
        assert!(self.status < 300, "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

fn url(node: &Node, path: &str) -> String {
    format!("http://{}/v1/{path}", node.http)
}

fn get(node: &Node, path: &str) -> Reply {
    Reply::of(agent().get(url(node, path)).call())
}

fn post(node: &Node, path: &str, body: &Value) -> Reply {
    Reply::of(agent().post(url(node, path)).send_json(body))
}

fn put_block(node: &Node, upload: &str, index: u64, block: &[u8]) -> Reply {
    let request = agent().put(url(node, &format!("uploads/{upload}/blocks/{index}")));
    Reply::of(request.header("Volley-Checksum", blake3::hash(block).to_hex().as_str()).send(block))
}

/// The whole list, page by page.
fn all_pages(node: &Node, path: &str, field: &str) -> Vec<Value> {
    let (mut all, mut more) = (Vec::new(), String::new());
    loop {
        let page = get(node, &format!("{path}max=3{more}")).ok();
        all.extend(page[field].as_array().expect("a list").iter().cloned());
        match page["next"].as_str() {
            Some(token) => more = format!("&token={token}"),
            None => return all,
        }
    }
}

/// Writes a snapshot into a file from its blocks, as a backup does.
fn back_up(node: &Node, name: &str, out: &Path) {
    let file = std::fs::File::create(out).expect("create");
    file.set_len(number(&get(node, &format!("snapshots/{name}")).ok(), "size_bytes")).expect("set the length");
    for block in all_pages(node, &format!("snapshots/{name}/blocks?"), "blocks") {
        let index = number(&block, "index");
        let reply = get(node, &format!("snapshots/{name}/blocks/{index}"));
        assert_eq!((reply.status, reply.body.len() as u64), (200, number(&block, "length")));
        let digest = blake3::hash(&reply.body).to_hex();
        assert_eq!(block["digest"], digest.as_str());
        assert_eq!(reply.headers["volley-checksum"], digest.as_str());
        file.write_all_at(&reply.body, index * CHUNK).expect("write");
    }
}

#[test]
fn the_blocks_of_a_snapshot_are_its_image() {
    let site = Site::new();
    write_image(&site.path("image.raw"), IMAGE_BYTES, 1);
    site.import(&site.path("image.raw"), "monday");
    let node = site.start_default();
    back_up(&node, "monday", &site.path("backup.raw"));
    assert_same(&site.path("image.raw"), &site.path("backup.raw"));
    let zero = get(&node, "snapshots/monday/blocks/2");
    assert!(zero.headers["volley-block-zero"] == "true" && zero.body == vec![0; CHUNK as usize]);
    assert_eq!(get(&node, "snapshots/monday/blocks/21").json()["code"], "invalid");
}

#[test]
fn an_uploaded_snapshot_becomes_a_volume() {
    if !available(&["qemu-img"]) {
        return;
    }
    let site = Site::new();
    let image = site.path("image.raw");
    write_image(&image, IMAGE_BYTES, 1);
    site.import(&image, "monday");
    let node = site.start_default();
    let started = post(&node, "snapshots/tuesday/upload", &json!({"parent": "monday"})).ok();
    let upload = started["upload"].as_str().expect("an id");
    // A zero block gets data, a data block zeroes, one changes, and so does the short one at the end.
    let file = std::fs::OpenOptions::new().write(true).open(&image).expect("open");
    let changes = [(2, noise(71, CHUNK)), (3, vec![0; CHUNK as usize]), (6, noise(72, CHUNK)), (20, noise(73, 4096))];
    for (index, block) in &changes {
        file.write_all_at(block, index * CHUNK).expect("write");
        put_block(&node, upload, *index, block).ok();
    }
    assert_eq!(put_block(&node, upload, 21, &changes[3].1).json()["code"], "invalid");
    site.volley(&["image", "gc"]).success();
    let made = post(&node, &format!("uploads/{upload}/complete"), &json!({"blocks_changed": 4})).ok();
    assert_eq!(made["parent"], "monday");

    site.volley(&["image", "verify", "tuesday"]).success();
    let listed = all_pages(&node, "snapshots/tuesday/changed?since=monday&", "changes");
    let indexes: Vec<u64> = listed.iter().map(|change| number(change, "index")).collect();
    assert_eq!(indexes, [2, 3, 6, 20]);
    assert!(listed[0]["since_digest"].is_null() && listed[1]["digest"].is_null());

    node.create(&site, "tuesday", 1, "web-");
    let agent = site.agent("agent", &[]);
    qemu_compare(&site, "image.raw", &agent.uri("web-0"));
    // The parent is not needed any more: its packs that are shared stay.
    site.volley(&["image", "delete", "monday"]).success();
    site.volley(&["image", "verify", "tuesday"]).success();
    back_up(&node, "tuesday", &site.path("backup.raw"));
    assert_same(&image, &site.path("backup.raw"));
}

#[test]
fn uploads_end_with_a_crash_of_the_node_and_the_name_is_free_again() {
    let site = Site::new();
    std::fs::create_dir(site.objects()).expect("the object store");
    let node = site.start_default();
    let start = |node: &Node| post(node, "snapshots/a/upload", &json!({"size_bytes": CHUNK})).ok();
    let upload = start(&node)["upload"].as_str().expect("an id").to_owned();
    put_block(&node, &upload, 0, &noise(1, CHUNK)).ok();
    node.kill();
    let node = site.start_default();
    let late = put_block(&node, &upload, 0, &noise(1, CHUNK));
    assert_eq!((late.status, &late.json()["code"]), (404, &json!("not_found")));
    assert!(late.json()["detail"].as_str().expect("a sentence").contains("restart"));
    eventually("the removal of the marker", || !site.objects().join("imports/a").exists());
    let upload = start(&node)["upload"].as_str().expect("an id").to_owned();
    put_block(&node, &upload, 0, &noise(2, CHUNK)).ok();
    post(&node, &format!("uploads/{upload}/complete"), &json!({"blocks_changed": 1})).ok();
    site.volley(&["image", "verify", "a"]).success();
    let (status, _) = node.stop();
    assert!(status.success());
    site.volley(&["check", &site.data().display().to_string()]).success();
}

#[test]
fn an_object_store_that_goes_away_stops_an_upload_for_that_time_only() {
    let site = Site::new();
    write_image(&site.path("image.raw"), IMAGE_BYTES, 1);
    site.import(&site.path("image.raw"), "monday");
    let node = site.start_default();
    let started = post(&node, "snapshots/a/upload", &json!({"parent": "monday"})).ok();
    let upload = started["upload"].as_str().expect("an id");
    put_block(&node, upload, 0, &noise(5, CHUNK)).ok();
    let gone = site.path("gone");
    std::fs::rename(site.objects(), &gone).expect("take the object store away");
    // Puts would make the directory again.
    std::fs::write(site.objects(), "in the way").expect("write");
    let complete = || post(&node, &format!("uploads/{upload}/complete"), &json!({"blocks_changed": 1}));
    assert_eq!(complete().json()["code"], "object_store");
    assert!(get(&node, "snapshots/monday/blocks/0").status >= 400);
    std::fs::remove_file(site.objects()).expect("remove");
    std::fs::rename(&gone, site.objects()).expect("bring it back");
    complete().ok();
    site.volley(&["image", "verify", "a"]).success();
}
