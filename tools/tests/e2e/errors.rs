//! Bad input: each a one-line error that names the thing and what to do, an exit code that is not 0, and nothing
//! half-made.

use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::foreign::served;
use crate::harness::{NodeOptions, Site, run, volleyd};
use crate::image_file::{MIB, write_image};

fn with_image() -> Site {
    let site = Site::new();
    write_image(&site.path("image.raw"), 8 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    site
}

#[test]
fn volumes_that_cannot_be_made_are_not_made() {
    let (site, node, _agent) = served(1);
    let refused = |args: &[&str], parts: &[&str]| {
        node.volley(&site, &[&["volume", "create"], args].concat()).fails_naming(parts);
    };
    refused(&["--snapshot", "nope", "--name", "a"], &["nope"]);
    refused(&["--snapshot", "debian-12", "--name", "web-0"], &["web-0"]);
    refused(&["--snapshot", "debian-12", "--name", "a", "--size", "4MiB"], &["4"]);
    refused(&["--snapshot", "debian-12", "--name", "../a"], &["../a"]);
    refused(&["--name", "a", "--size", "1000"], &["1000"]);
    refused(&["--snapshot", "debian-12", "--name", "a", "--rate", "fast"], &["fast"]);
    let list = node.json(&site, &["volume", "list"]);
    assert_eq!(list.as_array().expect("a list").len(), 1, "{list}");
    for args in [&["show", "a"][..], &["delete", "a"], &["wait", "a", "--hydrated"], &["set", "a", "--rate", "none"]] {
        node.volley(&site, &[&["volume"], args].concat()).fails_naming(&["a"]);
    }
}

#[test]
fn problems_of_the_api_are_problem_json_with_a_stable_code() {
    let (_site, node, _agent) = served(1);
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut response = agent.get(format!("http://{}/v1/volumes/nope", node.http)).call().expect("answer");
    assert_eq!(response.status(), 404);
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let problem: serde_json::Value =
        serde_json::from_str(&response.body_mut().read_to_string().expect("body")).expect("JSON");
    assert_eq!(problem["code"], "unknown_volume", "{problem}");
}

#[test]
fn images_that_cannot_be_imported_leave_no_snapshot() {
    let site = with_image();
    let import = |file: &str, name: &str, parts: &[&str]| {
        site.volley(&["image", "import", &site.path(file).display().to_string(), "--name", name]).fails_naming(parts);
    };
    import("missing.raw", "a", &["missing.raw"]);
    std::fs::write(site.path("empty.raw"), b"").expect("write");
    import("empty.raw", "a", &["empty.raw"]);
    std::fs::write(site.path("broken.qcow2"), [b"QFI\xfb\0\0\0\x03".to_vec(), vec![0xff; 4096]].concat())
        .expect("write");
    import("broken.qcow2", "a", &["broken.qcow2"]);
    import("image.raw", "bad/name", &["bad/name"]);
    // The name is taken by another image.
    write_image(&site.path("other.raw"), 8 * MIB, 2);
    import("other.raw", "debian-12", &["debian-12"]);
    let list: serde_json::Value =
        serde_json::from_str(&site.volley(&["image", "list", "--json"]).success()).expect("JSON");
    assert_eq!(list.as_array().expect("a list").len(), 1, "{list}");
    for command in ["show", "verify", "delete"] {
        site.volley(&["image", command, "nope"]).fails_naming(&["nope"]);
    }
    site.volley(&["image", "export", "nope", &site.path("out").display().to_string()]).fails_naming(&["nope"]);
}

#[test]
fn a_manifest_of_a_future_version_says_so() {
    let site = with_image();
    let manifest = site.objects().join("snapshots/debian-12");
    let file = std::fs::OpenOptions::new().write(true).open(&manifest).expect("open the manifest");
    file.write_all_at(&9u32.to_le_bytes(), 8).expect("write");
    site.volley(&["image", "show", "debian-12"]).fails_naming(&["debian-12", "version", "9"]);
    let node = site.start_default();
    node.volley(&site, &["volume", "create", "--snapshot", "debian-12", "--name", "a"]).fails_naming(&[
        "debian-12",
        "version",
        "9",
    ]);
    node.volley(&site, &["volume", "show", "a"]).fails_naming(&["a"]);
}

#[test]
fn a_damaged_manifest_says_so() {
    let site = with_image();
    let manifest = site.objects().join("snapshots/debian-12");
    let mut bytes = std::fs::read(&manifest).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&manifest, bytes).expect("write");
    site.volley(&["image", "show", "debian-12"]).fails_naming(&["debian-12"]);
    let node = site.start_default();
    node.volley(&site, &["volume", "create", "--snapshot", "debian-12", "--name", "a"]).fails_naming(&["debian-12"]);
}

#[test]
fn a_server_that_cannot_start_says_why_in_one_line() {
    let site = with_image();
    let node = site.start_default();
    let refused = |options: &NodeOptions, parts: &[&str]| {
        let mut command = site.node_command(options);
        command.args(["--log", "error"]);
        run(command).fails_naming(parts);
    };
    let default = NodeOptions::default();
    let elsewhere = |data: &str| NodeOptions { data: Some(site.path(data)), ..default.clone() };

    // Locked by the running server.
    let data = site.data().display().to_string();
    refused(&default, &[&data]);
    // The port is taken: ours, in a data folder of its own.
    refused(&NodeOptions { listen: Some(node.http.clone()), ..elsewhere("second") }, &[&node.http]);
    // A folder that holds something else.
    std::fs::create_dir(site.path("photos")).expect("folder");
    std::fs::write(site.path("photos/cat.jpg"), b"cat").expect("write");
    refused(&elsewhere("photos"), &["photos"]);
    assert_eq!(std::fs::read_dir(site.path("photos")).expect("list").count(), 1, "nothing was added to the folder");
    // The store of this node, given to another one.
    let store = format!("[[store]]\nlabel = \"default\"\npath = \"{data}/store\"\n");
    let thief = NodeOptions { config: store, ..elsewhere("third") };
    refused(&thief, &[&format!("{data}/store")]);
    // Typing errors of the configuration.
    refused(
        &NodeOptions { config: "[deadlines]\nguest_raed = \"2s\"\n".into(), ..elsewhere("fourth") },
        &["guest_raed"],
    );
    refused(&NodeOptions { cores: 100_000, ..elsewhere("fifth") }, &["100000"]);
    // An object store that is not there.
    let mut command = std::process::Command::new(volleyd());
    command.args(["--http", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--data"]).arg(site.path("sixth"));
    command.args(["--object-store", "ftp:somewhere"]);
    run(command).fails_naming(&["ftp:somewhere"]);

    // The running server noticed nothing.
    node.create(&site, "debian-12", 1, "web-");
}

#[test]
fn tools_without_a_server_say_so() {
    let site = with_image();
    let mut command = site.volley_command(&["volume", "list"]);
    // A port of this machine where nobody listens: bound here, never accepted as HTTP, closed at once.
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    command.env("VOLLEY_SERVER", port.to_string());
    run(command).fails_naming(&[&port.to_string()]);
}

#[test]
fn a_log_that_can_not_be_written_does_not_end_the_server() {
    let site = Site::new();
    write_image(&site.path("image.raw"), 2 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let plain = site.node_command(&NodeOptions::default());
    let mut command = Command::new("sh");
    // Every write to this device says that the disk is full.
    command.args(["-c", "exec \"$@\" 2>/dev/full", "sh"]).arg(plain.get_program()).args(plain.get_args());
    let node = Site::start_command(command);
    node.create(&site, "debian-12", 2, "vm-");
    node.volley(&site, &["volume", "delete", "vm-0"]).success();
    assert_eq!(node.json(&site, &["volume", "list"]).as_array().map(Vec::len), Some(1));
    assert!(node.stop().0.success());
}
