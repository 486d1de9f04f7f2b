//! What a node that was stopped or killed leaves on its disks, seen by `volley check`; and starts that must be refused
//! or must work: a lost journal, a full disk.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::crash::Guest;
use crate::disk::{Disk, FileSystem};
use crate::foreign::served;
use crate::harness::{NodeOptions, Outcome, Site, available, number, run};
use crate::image_file::{CHUNK, MIB, write_image};

fn check(site: &Site, args: &[&str]) -> Outcome {
    let data = site.data().display().to_string();
    site.volley(&[&["check", &data], args].concat())
}

/// `volley check --json`, which must have ended with `code`.
fn report(site: &Site, args: &[&str], code: i32) -> Value {
    let outcome = check(site, &[args, &["--json"]].concat());
    assert_eq!(outcome.code, code, "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {outcome:?}"))
}

fn kinds(report: &Value) -> Vec<&str> {
    let findings = report["findings"].as_array().expect("findings");
    findings.iter().map(|finding| finding["kind"].as_str().expect("kind")).collect()
}

fn volume_file(site: &Site, id: &Value) -> PathBuf {
    site.data().join(format!("store/volumes/{}.raw", id.as_str().expect("id")))
}

/// Killed while it hydrates and while guests write: everything on the disk agrees, before and after the next start.
#[test]
fn a_killed_node_is_clean_and_its_damage_is_found() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, node, agent) = served(3);
    let data = site.data().display().to_string();
    let refused = site.volley(&["check", &data]);
    assert_eq!(refused.code, 2, "a server runs: {refused:?}");
    assert!(refused.stderr.contains("is locked by a running volleyd"), "{refused:?}");

    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    let id = node.volume(&site, "web-0")["id"].clone();
    let mut guest = Guest::connect(&agent, "web-1");
    guest.does("write -f -P 0xaa 4096 64k");
    guest.does("discard 2M 1M");
    node.volley(&site, &["volume", "set", "web-1", "--rate", "unlimited"]).success();
    node.volley(&site, &["volume", "set", "web-2", "--rate", "unlimited"]).success();
    guest.does("write -f -P 0xbb 5M 64k");
    node.kill();
    guest.leave();

    let clean = report(&site, &[], 0);
    assert_eq!((&clean["clean"], &clean["volumes"]), (&Value::Bool(true), &Value::from(3)), "{clean}");
    assert!(kinds(&clean).contains(&"not_closed"), "{clean}");
    assert!(check(&site, &[]).success().ends_with("clean: 0 damaged, 0 to look at, 1 notes\n"));

    // A file that lost a chunk, and one that was never attached with a flipped bit: both named, with the volume.
    let file = OpenOptions::new().write(true).open(volume_file(&site, &id)).expect("volume file");
    file.write_all_at(&[0x55; 512], 4 * CHUNK + 512).expect("write");
    drop(file);
    let damaged = report(&site, &[], 1);
    let worst = &damaged["findings"][0];
    assert_eq!((&worst["severity"], &worst["kind"]), (&"damage".into(), &"chunk_differs".into()), "{damaged}");
    assert!(worst["message"].as_str().expect("message").contains("\"web-0\""), "{damaged}");
    std::fs::remove_file(volume_file(&site, &id)).expect("remove");
    let text = check(&site, &[]);
    assert_eq!(text.code, 1, "{text:?}");
    let line = text.stdout.lines().next().expect("a finding");
    assert!(line.starts_with("damage ") && line.contains("\"web-0\" is missing"), "{line}");
    assert!(line.contains("Restore the file from a backup"), "{line}");
}

#[test]
fn what_is_no_node_can_not_be_checked() {
    let site = Site::new();
    for (dir, words) in [("nothing-here", "can't read"), ("empty", "holds no node of Volley")] {
        std::fs::create_dir_all(site.path("empty")).expect("mkdir");
        let outcome = site.volley(&["check", &site.path(dir).display().to_string()]);
        assert_eq!(outcome.code, 2, "{outcome:?}");
        assert!(outcome.stderr.contains(words) && outcome.stderr.lines().count() == 1, "{outcome:?}");
    }
}

#[test]
fn a_cache_that_lies_elsewhere_is_checked_where_it_lies() {
    let site = Site::new();
    let ssd = site.path("ssd");
    write_image(&site.path("image.raw"), 8 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let config = format!("cache.disk_bytes = \"64MiB\"\ncache.dir = \"{}\"\n", ssd.display());
    let node = site.start(&NodeOptions { config, ..NodeOptions::default() });
    node.volley(&site, &["cache", "warm", "debian-12"]).success();
    assert!(node.stop().0.success());

    assert_eq!(number(&report(&site, &[], 0), "cache_chunks"), 0, "it can't know");
    let (config, ssd_dir) = (site.path("volley.toml").display().to_string(), ssd.display().to_string());
    let [by_config, by_option] = [["--config", &config], ["--cache-dir", &ssd_dir]].map(|args| {
        let report = report(&site, &args, 0);
        (number(&report, "cache_chunks"), number(&report, "cache_chunks_corrupt"))
    });
    assert!(by_config.0 > 0 && by_config.1 == 0, "{by_config:?}");
    assert_eq!(by_config, by_option);

    // The first slot of a shard that has some: its record is valid, its content is not.
    let slots = (0..2).map(|shard| ssd.join(format!("shard-{shard}.slots")));
    let files = slots.map(|path| OpenOptions::new().read(true).write(true).open(path).expect("slot file"));
    let mut byte = [0];
    let at = 5000;
    let file = files.into_iter().find(|file| file.read_exact_at(&mut byte, at).is_ok() && byte != [0]);
    file.expect("a used slot").write_all_at(&[!byte[0]], at).expect("write");
    for args in [["--config", &config], ["--cache-dir", &ssd_dir]] {
        let report = report(&site, &args, 0);
        assert_eq!(number(&report, "cache_chunks_corrupt"), 1, "{report}");
        assert_eq!(kinds(&report), ["cache_corrupt"]);
        assert!(report["findings"][0]["path"].as_str().expect("path").starts_with(&ssd_dir), "{report}");
    }
    let nowhere = site.path("nowhere").display().to_string();
    assert_eq!(kinds(&report(&site, &["--config", &config, "--cache-dir", &nowhere], 0)), ["cache_unusable"]);
}

/// The journal's filesystem is not mounted, or somebody removed it: the node must not start as if it were new.
#[test]
fn a_lost_journal_is_a_clear_error_and_not_an_empty_node() {
    let site = Site::new();
    std::fs::create_dir_all(site.objects()).expect("object store");
    let node = site.start_default();
    node.volley(&site, &["volume", "create", "--name", "a", "--size", "1MiB"]).success();
    assert!(node.stop().0.success());
    let (journal, away) = (site.data().join("journal"), site.path("away"));
    std::fs::rename(&journal, &away).expect("rename");
    let start = || run(site.node_command(&NodeOptions::default()));
    for made_again in [false, true] {
        if made_again {
            std::fs::create_dir(&journal).expect("mkdir");
        }
        start().fails_naming(&["the journal of this node is gone", "restore it from a backup", "journal = true"]);
        assert_eq!(journal.exists(), made_again, "nothing was made");
    }
    std::fs::remove_dir(&journal).expect("remove");
    std::fs::rename(&away, &journal).expect("rename");
    let node = site.start_default();
    node.volume(&site, "a");
}

/// Data and volumes on one filesystem, which is filled to the last block: the node starts with the space it held back.
/// Where somebody took that too, it says what to do.
#[test]
fn a_node_starts_on_a_full_disk_or_says_what_to_do() {
    let Some(disk) = Disk::new(FileSystem::Ext4, 64 << 20) else { return };
    let site = Site::new();
    std::fs::create_dir_all(site.objects()).expect("object store");
    let data = Some(disk.mount().join("node"));
    let options = NodeOptions { data, namespace: Some(disk.pid()), ..NodeOptions::default() };

    let node = site.start(&options);
    node.volley(&site, &["volume", "create", "--name", "a", "--size", "1GiB"]).success();
    node.kill();
    fill_for_good(&disk);
    let node = site.start(&options);
    node.volume(&site, "a");
    node.kill();
    // There if it could be allocated again behind the start.
    std::fs::remove_file(disk.outside(&disk.mount().join("node/journal/RESERVE"))).ok();
    let filler = fill_for_good(&disk);
    run(site.node_command(&options)).fails_naming(&["No space left", "free some space on the filesystem of"]);
    std::fs::remove_file(filler).expect("remove the filler");
    let node = site.start(&options);
    node.volume(&site, "a");
    assert!(node.stop().0.success());
}

/// Fills the disk, and fills what the files of a process that was killed just now give back when the kernel lets go of them.
fn fill_for_good(disk: &Disk) -> PathBuf {
    for _ in 0..5 {
        disk.fill(0);
        std::thread::sleep(Duration::from_millis(200));
    }
    disk.fill(0)
}
