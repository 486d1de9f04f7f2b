//! Images: what can be imported, that it comes out as it went in, and what protects it.

use std::path::Path;

use serde_json::Value;

use crate::faults::eventually;
use crate::harness::{Site, available, number, run_in};
use crate::image_file::{CHUNK, MIB, assert_same, assert_same_padded, noise, write_image};

/// Imports a file, exports the snapshot, and gives the exported file.
fn round_trip(site: &Site, file: &Path, name: &str) -> std::path::PathBuf {
    site.import(file, name);
    site.volley(&["image", "verify", name]).success();
    let out = site.path(&format!("{name}.export"));
    site.volley(&["image", "export", name, &out.display().to_string()]).success();
    out
}

fn qemu_img(site: &Site, args: &[&str]) {
    run_in(&site.path(""), "qemu-img", args).success();
}

#[test]
fn raw_images_of_any_size_come_out_as_they_went_in() {
    let site = Site::new();
    // Whole chunks, a whole 4096, a whole 512, none of them, less than a sector.
    for (n, size) in [8 * CHUNK, 8 * CHUNK + 4096, 3 * CHUNK + 512, 5 * CHUNK + 4097, 100].into_iter().enumerate() {
        let (file, name) = (site.path(&format!("{n}.raw")), format!("raw-{n}"));
        write_image(&file, size, 3 + n as u64);
        let out = round_trip(&site, &file, &name);
        assert_eq!(std::fs::metadata(&out).expect("size").len(), size.next_multiple_of(512));
        assert_same_padded(&file, &out);
    }
}

#[test]
fn a_sparse_image_stays_sparse() {
    let site = Site::new();
    let file = site.path("sparse.raw");
    std::fs::write(&file, noise(5, CHUNK)).expect("write");
    std::fs::OpenOptions::new().write(true).open(&file).expect("open").set_len(4 << 30).expect("grow");
    let out = round_trip(&site, &file, "sparse");
    assert_eq!(std::fs::metadata(&out).expect("size").len(), 4 << 30);
    let stored = disk_bytes(&site.objects());
    assert!(stored < 2 * MIB, "{stored} bytes stored for one chunk of data");
    assert!(disk_bytes(&out) < 2 * MIB, "the exported file is not sparse");
}

#[test]
fn chunks_that_repeat_are_stored_once() {
    let site = Site::new();
    let chunk = noise(11, CHUNK);
    std::fs::write(site.path("same.raw"), chunk.repeat(64)).expect("write");
    site.import(&site.path("same.raw"), "same");
    let stored = disk_bytes(&site.objects());
    assert!(stored < 2 * CHUNK, "{stored} bytes stored for 64 equal chunks");
}

#[test]
fn qcow2_with_compressed_clusters_and_a_backing_file_equals_what_qemu_reads() {
    if !available(&["qemu-img", "qemu-io"]) {
        return;
    }
    let site = Site::new();
    write_image(&site.path("base.raw"), 20 * MIB + 4096, 21);
    qemu_img(&site, &["convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "base.qcow2"]);
    let out = round_trip(&site, &site.path("base.qcow2"), "compressed");
    assert_same(&site.path("base.raw"), &out);

    // An overlay larger than its backing file, with clusters of its own in both parts.
    qemu_img(&site, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "24M"]);
    let writes = ["-c", "write -P 0x77 1M 300k", "-c", "write -z 5M 1M", "-c", "write -P 0x33 22M 64k"];
    run_in(&site.path(""), "qemu-io", &[&writes[..], &["-f", "qcow2", "top.qcow2"]].concat()).success();
    qemu_img(&site, &["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "flat.raw"]);
    let out = round_trip(&site, &site.path("top.qcow2"), "overlay");
    assert_same(&site.path("flat.raw"), &out);
}

#[test]
fn images_are_listed_shown_and_deleted() {
    let site = Site::new();
    for (n, name) in ["debian-12", "alpine"].into_iter().enumerate() {
        let file = site.path(name);
        write_image(&file, 4 * MIB, n as u64);
        site.import(&file, name);
    }
    let list: Value = serde_json::from_str(&site.volley(&["image", "list", "--json"]).success()).expect("JSON");
    let mut names: Vec<_> =
        list.as_array().expect("a list").iter().map(|i| i["name"].as_str().expect("name").to_string()).collect();
    names.sort();
    assert_eq!(names, ["alpine", "debian-12"]);
    let shown: Value =
        serde_json::from_str(&site.volley(&["image", "show", "alpine", "--json"]).success()).expect("JSON");
    assert_eq!(number(&shown, "size_bytes"), 4 * MIB);
    assert_eq!(number(&shown, "chunk_bytes"), CHUNK);

    site.volley(&["image", "delete", "alpine"]).success();
    site.volley(&["image", "delete", "debian-12"]).success();
    site.volley(&["image", "gc", "--grace", "0s"]).success();
    assert!(disk_bytes(&site.objects()) < MIB, "packs of deleted images are left");
}

#[test]
fn an_import_that_is_killed_leaves_no_snapshot_and_can_be_run_again() {
    let site = Site::new();
    let file = site.path("big.raw");
    std::fs::write(&file, noise(31, 192 * MIB)).expect("write");
    let mut command = site.volley_command(&["image", "import", &file.display().to_string(), "--name", "big"]);
    let mut import =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("start");
    // The first pack on its way tells that the import is under way: no clock decides.
    while disk_bytes_or_zero(&site.objects()) < MIB && import.try_wait().expect("wait").is_none() {
        std::thread::yield_now();
    }
    import.kill().expect("kill");
    let finished = import.wait().expect("wait").success();
    if !finished {
        site.volley(&["image", "show", "big"]).fails_naming(&["big"]);
        site.import(&file, "big");
    }
    site.volley(&["image", "verify", "big"]).success();
}

#[test]
fn an_image_is_protected_while_a_volume_needs_it() {
    let site = Site::new();
    write_image(&site.path("image.raw"), 8 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start_default();
    node.create(&site, "debian-12", 1, "web-");
    site.volley(&["image", "delete", "debian-12"]).fails_naming(&["debian-12"]);
    site.volley(&["image", "verify", "debian-12"]).success();

    // Announced: no new volumes, and the ones that are there go on.
    site.volley(&["image", "delete", "debian-12", "--when-unused"]).success();
    node.volley(&site, &["volume", "create", "--snapshot", "debian-12", "--name", "web-9"])
        .fails_naming(&["debian-12", "to be deleted"]);
    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    // The node drops its reference on its own, some seconds after the last volume that needed it.
    eventually("the deletion of the image", || {
        site.volley(&["image", "gc"]).success();
        site.volley(&["image", "show", "debian-12"]).code != 0
    });
}

/// Bytes that a file, or a folder with all in it, occupies on disk.
fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path).expect("stat");
    if !meta.is_dir() {
        return meta.blocks() * 512;
    }
    std::fs::read_dir(path).expect("list").map(|e| disk_bytes(&e.expect("folder entry").path())).sum()
}

/// The same while another process makes and removes files below.
fn disk_bytes_or_zero(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::metadata(path) else { return 0 };
    if !meta.is_dir() {
        return meta.blocks() * 512;
    }
    std::fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|e| disk_bytes_or_zero(&e.path())).sum())
}
