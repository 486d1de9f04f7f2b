//! fio writes and verifies at random, at several depths, with blocks of many sizes, while the volume is being hydrated.

use std::process::Command;

use super::{hydrate, served};
use crate::harness::{Agent, Site, available, run, run_in};

/// One run of fio on a volume: random reads and writes, then every block that was written is read and verified.
fn fio(site: &Site, agent: &Agent, volume: &str, options: &[&str]) -> String {
    let uri = format!("--uri={}", agent.uri(volume));
    let mut args = vec!["--name=verify", "--ioengine=nbd", "--randseed=7", "--rw=randrw", "--size=33m"];
    args.extend(["--verify=crc32c", "--verify_fatal=1", &uri]);
    args.extend(options);
    let text = run_in(&site.path(""), "fio", &args).success();
    assert!(text.contains("err= 0"), "{text}");
    text
}

#[test]
fn fio_verifies_at_every_depth_on_hydrating_volumes() {
    if !available(&["fio"]) {
        return;
    }
    let (site, node, agent) = served(3);
    (0..3).for_each(|n| hydrate(&site, &node, &format!("web-{n}")));
    let mixed = "--bssplit=512/20:1536/10:4k/40:12k/20:128k/10";
    fio(&site, &agent, "web-0", &["--iodepth=1", "--bs=4k", "--io_size=12m", "--fsync=32"]);
    fio(&site, &agent, "web-1", &["--iodepth=32", mixed, "--fsync=100"]);
    // Verified soon after each write, in the middle of the load, and again at the end.
    let soon = ["--verify_backlog=256", "--verify_async=1"];
    fio(&site, &agent, "web-2", &[&["--iodepth=128", mixed, "--fsync=500"][..], &soon].concat());

    // Another process finds the same after the server was killed: fio's writes, laid out again from the same seed.
    node.kill();
    let _node = site.start_default();
    let again = ["--iodepth=32", mixed, "--fsync=100", "--verify_only"];
    fio(&site, &agent, "web-1", &again);
}

#[test]
fn fio_finds_zeroes_where_it_trimmed_and_what_it_wrote_after_trimming() {
    if !available(&["fio"]) {
        return;
    }
    let (site, node, agent) = served(2);
    (0..2).for_each(|n| hydrate(&site, &node, &format!("web-{n}")));
    // Deeper than one fio itself lets the write of a block overtake its trim.
    fio(&site, &agent, "web-0", &["--rw=randtrimwrite", "--iodepth=1", "--bs=64k"]);
    // Every block of the device (but the last three of 512 bytes), many at once; then each must read as zeroes.
    fio(&site, &agent, "web-1", &["--rw=randtrim", "--iodepth=128", "--bs=32k", "--verify=0"]);
    let zeroes =
        ["--rw=write", "--iodepth=32", "--bs=32k", "--verify=pattern", "--verify_pattern=0x00", "--verify_only"];
    fio(&site, &agent, "web-1", &zeroes);
}

#[test]
fn four_clients_of_one_volume_verify_their_own_stripes() {
    if !available(&["fio"]) {
        return;
    }
    let (site, node, agent) = served(1);
    hydrate(&site, &node, "web-0");
    // One connection for each job: they share the attachment, and the blocks at the edges of their stripes.
    let mut command = Command::new("fio");
    let uri = format!("--uri={}", agent.uri("web-0"));
    command.args(["--name=stripe", "--ioengine=nbd", "--thread", "--numjobs=4", "--randseed=7", "--rw=randrw", &uri]);
    command.args(["--size=8389120", "--offset_increment=8389120", "--bsrange=512-32k", "--blockalign=512"]);
    command.args(["--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--fsync=200"]);
    command.current_dir(site.path(""));
    let text = run(command).success();
    assert_eq!(text.matches("err= 0").count(), 4, "{text}");
}
