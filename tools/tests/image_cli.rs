//! `volley image` as an operator meets it: the real binary, its exit codes, and what it says.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        Lab { dir: tempfile::tempdir().expect("scratch directory") }
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).expect("write");
        path
    }

    fn volley(&self, args: &[&str]) -> Output {
        let url = format!("file:{}", self.dir.path().join("objects").display());
        self.volley_at(Some(&url), args)
    }

    fn volley_at(&self, url: Option<&str>, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command.args(args).current_dir(self.dir.path()).env_remove("VOLLEY_OBJECT_STORE");
        if let Some(url) = url {
            command.env("VOLLEY_OBJECT_STORE", url);
        }
        command.output().expect("run volley")
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.volley(args);
        assert!(out.status.success(), "{args:?}: {}", stderr(&out));
        String::from_utf8(out.stdout).expect("text")
    }

    /// Runs a command that must fail with one line that contains all of `why`.
    fn fails(&self, args: &[&str], why: &[&str]) {
        refused(&self.volley(args), why);
    }
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn refused(out: &Output, why: &[&str]) {
    let text = stderr(out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.starts_with("volley: error: ") && text.lines().count() == 1, "{text:?}");
    for part in why {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

fn content() -> Vec<u8> {
    (0..1_500_000u32).flat_map(|i| (i / 3 * 7).to_le_bytes()).collect()
}

#[test]
fn an_image_goes_in_and_comes_out_again() {
    let lab = Lab::new();
    lab.file("image", &content());
    let text = lab.ok(&["image", "import", "image", "--name", "a", "--chunk-size", "64KiB", "--parallel", "2"]);
    for part in ["imported \"a\" from a raw image", "zero", "duplicate", "stored", "time"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let report = lab.ok(&["--json", "image", "import", "image", "--name", "b", "--chunk-size", "64K"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["stored_chunks"], 0);
    assert_eq!(report["size_bytes"], 6_000_128);
    assert_eq!(report["image_bytes"], 6_000_000);
    assert!(report["notes"][0].as_str().expect("a note").contains("padded with 128 zero bytes"), "{report}");

    let list: serde_json::Value = serde_json::from_str(&lab.ok(&["image", "list", "--json"])).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    assert_eq!(list[0]["name"], "a");
    assert!(lab.ok(&["image", "list"]).contains("NAME"));
    assert!(lab.ok(&["image", "show", "a"]).contains("6000128 bytes"));
    assert!(lab.ok(&["image", "verify", "a"]).contains("is good"));

    lab.ok(&["image", "export", "a", "out.raw"]);
    let mut expected = content();
    expected.resize(6_000_128, 0);
    assert!(fs::read(lab.dir.path().join("out.raw")).expect("read") == expected);
    lab.fails(&["image", "export", "a", "out.raw"], &["out.raw", "--force"]);
    lab.ok(&["image", "export", "a", "out.raw", "--force"]);
    let piped = lab.volley(&["image", "export", "b", "-"]);
    assert!(piped.status.success() && piped.stdout == expected);

    assert!(lab.ok(&["image", "delete", "a"]).contains("; 0 packs"), "b still needs it");
    assert!(lab.ok(&["snapshot", "delete", "b"]).contains("; 1 packs"));
    let text = lab.ok(&["image", "gc"]);
    assert!(text.contains("removed 0 packs") && text.contains("kept 1 packs"), "{text}");
    assert!(lab.ok(&["image", "gc", "--dry-run"]).contains("of grace left"));
    assert!(lab.ok(&["image", "gc", "--grace", "0s", "--dry-run"]).contains("would have removed 1 packs"));
    assert!(lab.ok(&["snapshot", "gc", "--grace", "0s"]).contains("removed 1 packs"));
    assert!(lab.ok(&["image", "gc"]).contains("removed 0 packs"));
    assert_eq!(lab.ok(&["image", "list", "--json"]).trim(), "[]");
    let left: Vec<_> = fs::read_dir(lab.dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left.len(), 3, "image, out.raw and objects: no temporary file stays, {left:?}");
}

#[test]
fn bad_input_gets_one_line_that_names_it() {
    let lab = Lab::new();
    lab.file("image", &content());
    lab.fails(&["image", "import", "missing.raw", "--name", "a"], &["missing.raw", "No such file"]);
    lab.fails(&["image", "list"], &["objects", "does not exist"]);
    refused(&lab.volley_at(None, &["image", "list"]), &["--object-store", "VOLLEY_OBJECT_STORE"]);
    refused(&lab.volley_at(Some("s3:bucket"), &["image", "list"]), &["or s3://BUCKET/PREFIX"]);
    refused(&lab.volley_at(Some("file:objects"), &["image", "list"]), &["absolute"]);

    lab.ok(&["image", "import", "image", "--name", "a"]);
    lab.fails(&["image", "import", "image", "--name", "a"], &["\"a\" exists already"]);
    lab.fails(&["image", "import", "image", "--name", "x/y"], &["x/y", "letters"]);
    lab.file("bad.qcow2", b"QFI\xfb\0\0\0\x03 and no more");
    lab.fails(&["image", "import", "bad.qcow2", "--name", "b"], &["bad.qcow2", "truncated"]);
    lab.file("empty", b"");
    lab.fails(&["image", "import", "empty", "--name", "b"], &["empty"]);
    for command in ["show", "verify", "delete"] {
        lab.fails(&["image", command, "nosuch"], &["no snapshot \"nosuch\""]);
    }
    lab.fails(&["image", "export", "nosuch", "o.raw"], &["no snapshot \"nosuch\""]);
    lab.fails(&["image", "export", "a", "no/such/dir/o.raw"], &["no/such/dir/o.raw"]);
    lab.fails(&["image", "gc", "--incomplete", "b"], &["no interrupted import of \"b\""]);
    assert_eq!(lab.volley(&["image", "import", "image", "--name", "c", "--chunk-size", "3"]).status.code(), Some(2));
    assert_eq!(lab.volley(&["image", "frobnicate"]).status.code(), Some(2));

    let out = lab.volley(&["image", "show", "nosuch", "--json"]);
    let error: serde_json::Value = serde_json::from_str(&stderr(&out)).expect("JSON");
    assert_eq!(error["error"]["code"], "unknown_snapshot");
    assert_eq!(out.status.code(), Some(1));
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn the_root_is_that_of_the_content() {
    let lab = Lab::new();
    lab.file("image", &content());
    lab.ok(&["image", "import", "image", "--name", "a"]);
    lab.ok(&["image", "import", "image", "--name", "b"]);
    lab.ok(&["image", "import", "image", "--name", "c", "--chunk-size", "64KiB"]);
    let root = |name: &str| json(&lab.ok(&["image", "show", name, "--json"]))["merkle_root"].clone();
    assert_eq!(root("a"), root("b"));
    assert_ne!(root("a"), root("c"), "the chunk size is part of it");
    let verified = json(&lab.ok(&["snapshot", "verify", "a", "--json"]));
    assert_eq!((&verified["merkle_root"], &verified["good"]), (&root("a"), &serde_json::Value::Bool(true)));
    let root = root("a").as_str().expect("text").to_owned();
    assert!(root.len() == 64 && lab.ok(&["image", "verify", "a"]).contains(&root));
    assert!(lab.ok(&["image", "show", "a"]).contains(&root));
}

#[test]
fn usage_and_rewriting_agree_on_what_is_dead() {
    let lab = Lab::new();
    let content = content();
    lab.file("all", &content);
    lab.file("half", &content[..3_000_000]);
    lab.ok(&["image", "import", "all", "--name", "all", "--chunk-size", "64KiB"]);
    lab.ok(&["image", "import", "half", "--name", "half", "--chunk-size", "64KiB"]);
    let usage = || json(&lab.ok(&["object-store", "usage", "--json"]));
    let number = |value: &serde_json::Value| value.as_u64().expect("a number");
    let before = usage();
    assert_eq!(before["snapshots"][0]["name"], "all");
    assert_eq!(number(&before["total"]["dead_bytes"]), 0);
    lab.ok(&["image", "delete", "all"]);
    let dead = number(&usage()["total"]["dead_bytes"]);
    assert!(dead > number(&before["total"]["bytes"]) / 4, "{dead} of {before}");
    assert!(lab.ok(&["object-store", "usage"]).contains("OWN IN SHARED PACKS"));
    let dry = json(&lab.ok(&["image", "gc", "--rewrite-below", "90%", "--dry-run", "--json"]));
    assert_eq!((number(&dry["rewritten"]["packs"]), number(&dry["rewritten"]["packs_written"])), (1, 0));
    let report = json(&lab.ok(&["image", "gc", "--rewrite-below", "90%", "--grace", "0s", "--json"]));
    assert_eq!(report["rewritten"]["snapshots"], serde_json::json!(["half"]));
    assert_eq!(report["rewritten"]["bytes_written"], dry["rewritten"]["live_bytes"]);
    let after = usage();
    assert_eq!(number(&after["total"]["dead_bytes"]) + number(&after["total"]["condemned_bytes"]), 0, "{after}");
    lab.ok(&["image", "verify", "half"]);
    lab.fails(&["image", "gc", "--incomplete", "x"], &["no interrupted import"]);
    for bad in [&["image", "gc", "--grace", "3"][..], &["image", "gc", "--rewrite-below", "0%"]] {
        assert_eq!(lab.volley(bad).status.code(), Some(2), "{bad:?}");
    }
}

#[test]
fn a_snapshot_in_use_is_deleted_when_it_is_unused() {
    let lab = Lab::new();
    lab.file("image", &content());
    lab.ok(&["image", "import", "image", "--name", "a"]);
    fs::create_dir_all(lab.dir.path().join("objects/refs/a")).expect("create");
    let reference = lab.file("objects/refs/a/node-1", b"node-1\n");
    lab.fails(&["image", "delete", "a"], &["node-1", "--when-unused"]);
    assert!(lab.ok(&["image", "delete", "a", "--when-unused"]).contains("node-1"));
    assert!(lab.ok(&["image", "gc", "--grace", "0s"]).contains("once node node-1"));
    lab.ok(&["image", "verify", "a"]);
    assert_eq!(json(&lab.ok(&["image", "show", "a", "--json"]))["to_be_deleted"], true);
    fs::remove_file(reference).expect("remove");
    let report = json(&lab.ok(&["image", "gc", "--grace", "0s", "--json"]));
    assert_eq!((&report["snapshots_deleted"][0], &report["packs_removed"]), (&"a".into(), &1.into()));
    lab.fails(&["image", "show", "a"], &["no snapshot"]);
}

#[test]
fn damage_in_the_store_is_found_and_named() {
    let lab = Lab::new();
    lab.file("image", &content());
    lab.ok(&["image", "import", "image", "--name", "a"]);
    let objects = lab.dir.path().join("objects");
    let import = fs::read_dir(objects.join("packs")).expect("packs").next().expect("one").expect("entry").path();
    let pack = import.join("000000");
    let whole = fs::read(&pack).expect("read");
    let mut flipped = whole.clone();
    flipped[1000] ^= 4;
    fs::write(&pack, &flipped).expect("write");
    lab.fails(&["image", "verify", "a"], &["\"a\" is damaged", "chunk 0", "packs/", "offset 32"]);
    lab.fails(&["image", "export", "a", "o.raw"], &["chunk 0", "packs/"]);
    assert!(!lab.dir.path().join("o.raw").exists());
    fs::write(&pack, &whole[..whole.len() / 2]).expect("write");
    lab.fails(&["image", "verify", "a"], &["truncated"]);

    let manifest = objects.join("snapshots/a");
    let mut bytes = fs::read(&manifest).expect("read");
    bytes[8] = 7;
    fs::write(&manifest, &bytes).expect("write");
    lab.fails(&["image", "show", "a"], &["\"a\"", "format version 7", "upgrade"]);
    lab.fails(&["image", "list"], &["format version 7"]);
    bytes.truncate(70);
    bytes[8] = 1;
    fs::write(&manifest, &bytes).expect("write");
    lab.fails(&["image", "show", "a"], &["truncated"]);
}

/// Imports `old`, and `new` of which one chunk differs and one is zero.
fn two_versions(lab: &Lab) -> (Vec<u8>, Vec<u8>) {
    let old = content();
    let mut new = old.clone();
    new[70_000] ^= 1;
    new[131_072..196_608].fill(0);
    for (name, bytes) in [("old", &old), ("new", &new)] {
        let file = format!("{name}.img");
        lab.file(&file, bytes);
        lab.ok(&["image", "import", &file, "--name", name, "--chunk-size", "64K"]);
    }
    (old, new)
}

#[test]
fn blocks_and_differences_are_listed() {
    let lab = Lab::new();
    let (old, new) = two_versions(&lab);
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&lab.ok(args)).expect("JSON") };
    let blocks = json(&["image", "blocks", "new", "--json"]);
    assert_eq!((&blocks["block_bytes"], &blocks["size_bytes"]), (&65536.into(), &6_000_128.into()));
    let indexes: Vec<_> = blocks["blocks"].as_array().expect("blocks").iter().map(|b| &b["index"]).collect();
    assert_eq!((indexes.len(), indexes[1], indexes[2]), (91, &1.into(), &3.into()));
    assert_eq!(blocks["blocks"][0]["digest"], blake3::hash(&new[..65536]).to_hex().as_str());
    assert!(lab.ok(&["image", "blocks", "new"]).contains("91 of 92 blocks have data"));

    let changes = json(&["image", "diff", "old", "new", "--json"]);
    let changes = changes["changes"].as_array().expect("changes");
    assert_eq!(changes.len(), 2);
    assert_eq!((&changes[0]["index"], &changes[1]["index"]), (&1.into(), &2.into()));
    assert!(changes[1]["digest"].is_null() && changes[1]["since_digest"].is_string());
    let text = lab.ok(&["image", "diff", "old", "new"]);
    for part in ["65536   65536   changed", "zeroed", "2 of 92 blocks of \"new\" differ from \"old\""] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert!(lab.ok(&["image", "diff", "new", "old"]).contains("added"));
    lab.file("short", &old[..1000]);
    lab.ok(&["image", "import", "short", "--name", "short", "--chunk-size", "64K"]);
    lab.fails(&["image", "diff", "old", "short"], &["can't be compared", "6000128 bytes"]);
    lab.fails(&["image", "blocks", "nosuch"], &["no snapshot \"nosuch\""]);
}

#[test]
fn an_overlay_over_the_older_export_is_the_newer_one() {
    let lab = Lab::new();
    two_versions(&lab);
    let qemu_img = |args: &[&str]| {
        let out = Command::new("qemu-img").args(args).current_dir(lab.dir.path()).output().expect("install qemu-utils");
        assert!(out.status.success(), "qemu-img {args:?}: {}", stderr(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    lab.ok(&["image", "export", "old", "old.raw"]);
    lab.ok(&["image", "export", "new", "new.raw"]);
    lab.ok(&["image", "export", "old", "old.qcow2", "--format", "qcow2"]);
    let expected = fs::read(lab.dir.path().join("new.raw")).expect("read");
    for (backing, format) in [("old.raw", "raw"), ("old.qcow2", "qcow2")] {
        let overlay = format!("over-{format}.qcow2");
        let since = ["--since", "old", "--backing-file", backing, "--backing-format", format];
        lab.ok(&[&["image", "export", "new", &overlay, "--format", "qcow2"][..], &since].concat());
        assert!(qemu_img(&["check", &overlay]).contains("No errors were found"));
        let info: serde_json::Value =
            serde_json::from_str(&qemu_img(&["info", "--output", "json", &overlay])).expect("JSON");
        assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&backing.into(), &format.into()));
        qemu_img(&["convert", "-O", "raw", &overlay, "flat.raw"]);
        assert!(fs::read(lab.dir.path().join("flat.raw")).expect("read") == expected, "{format}");
        let len = fs::metadata(lab.dir.path().join(&overlay)).expect("stat").len();
        assert_eq!(len / 65536, 1 + 1 + 1 + 1 + 2, "one data cluster, and what every file has");
    }
    lab.fails(&["image", "export", "new", "-", "--format", "qcow2"], &["give a file"]);
    lab.fails(&["image", "export", "new", "old.qcow2", "--format", "qcow2"], &["old.qcow2", "--force"]);
    let since = ["--since", "old", "--backing-file", "old.raw"];
    lab.fails(&[&["image", "export", "new", "x.raw"][..], &since].concat(), &["--format qcow2"]);
    assert_eq!(
        lab.volley(&["image", "export", "new", "x", "--format", "qcow2", "--since", "old"]).status.code(),
        Some(2)
    );
}

#[test]
fn a_snapshot_is_copied_between_object_stores() {
    let lab = Lab::new();
    lab.file("image", &content());
    lab.ok(&["image", "import", "image", "--name", "a", "--chunk-size", "64K"]);
    let there = format!("file:{}", lab.dir.path().join("there").display());
    assert!(lab.ok(&["image", "copy", "a", "--to", &there]).contains("copied \"a\""));
    let report = lab.ok(&["--json", "image", "copy", "a", "--to", &there, "--as", "b"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((&report["stored_chunks"], &report["name"]), (&0.into(), &"b".into()));
    let at = |args: &[&str]| lab.volley_at(Some(&there), args);
    for name in ["a", "b"] {
        assert!(at(&["image", "verify", name]).status.success());
        let out = at(&["image", "export", name, "-"]);
        assert!(out.status.success() && out.stdout[..6_000_000] == content()[..]);
    }
    lab.fails(&["image", "copy", "a", "--to", &there], &["target", "\"a\" exists already"]);
    lab.fails(&["image", "copy", "nosuch", "--to", &there], &["no snapshot \"nosuch\""]);
    lab.fails(&["image", "copy", "a", "--to", "ftp:x"], &["file:"]);
}
