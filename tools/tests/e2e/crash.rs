//! A killed server: what was acknowledged is there, and a guest that was connected sees no error.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::foreign::{qemu_compare, qemu_io, served};
use crate::harness::{Agent, NodeOptions, available, die_with_the_test, number, run_in};
use crate::image_file::CHUNK;

/// A guest: one qemu-io that stays connected and does what it is told, one command after the other (it would leave a
/// second one that comes with the first in its buffer until a third arrives).
pub(crate) struct Guest {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    pub(crate) fn connect(agent: &Agent, volume: &str) -> Guest {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", &agent.uri(volume)]).stdin(Stdio::piped()).stdout(Stdio::piped());
        die_with_the_test(&mut command);
        let mut child = command.spawn().expect("start qemu-io");
        let commands = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Guest { child, commands, answers }
    }

    fn send(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("write to qemu-io");
    }

    /// Sends a read or write and asserts that it succeeds.
    pub(crate) fn does(&mut self, command: &str) {
        self.send(command);
        self.succeeded(command);
    }

    /// The answer to a read or write sent before, which succeeded.
    pub(crate) fn succeeded(&mut self, command: &str) {
        if let Err(line) = self.answer(command) {
            panic!("{command}: {line}");
        }
    }

    /// Sends a read or write and asserts that the guest gets an I/O error.
    pub(crate) fn fails(&mut self, command: &str) {
        assert!(!self.try_do(command), "{command} should have failed");
    }

    /// Sends a read or write; whether it succeeded.
    pub(crate) fn try_do(&mut self, command: &str) -> bool {
        self.send(command);
        self.answer(command).is_ok()
    }

    /// A request that succeeded is answered by two lines of which the second holds its times; an error by one.
    fn answer(&mut self, command: &str) -> Result<(), String> {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).expect("read from qemu-io"), 0, "{command}: qemu-io ended");
            if line.contains("failed") || line.contains("rror") {
                return Err(line);
            }
            if line.contains("ops;") {
                return Ok(());
            }
        }
    }

    /// Ends the guest as when its user leaves: connection closed, nothing in flight.
    pub(crate) fn leave(mut self) {
        drop(self.commands);
        // Its exit code tells only whether any of its requests ever failed.
        self.child.wait().expect("wait");
    }
}

#[test]
fn a_guest_sees_no_error_when_the_server_is_killed_and_comes_back() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, mut node, agent) = served(1);
    // Two connections of one guest, so that a read and a write are in flight together.
    let (mut reader, mut writer) = (Guest::connect(&agent, "web-0"), Guest::connect(&agent, "web-0"));
    let read = format!("read -P 0xaa 4096 {CHUNK}");
    writer.does(&format!("write -f -P 0xaa 4096 {CHUNK}"));
    reader.does(&read);

    for round in 1..=3 {
        let pattern = 0xb0 + round;
        node.kill();
        // Asked while nobody is there: the agent keeps both until the server is back.
        let write = format!("write -f -P {pattern} {round}M 64k");
        reader.send(&read);
        writer.send(&write);
        node = site.start_default();
        reader.succeeded(&read);
        writer.succeeded(&write);
    }
    reader.leave();
    writer.leave();
    node.kill();
    let _node = site.start_default();
    qemu_io(&site, &agent, "web-0", &[&read, "read -P 0xb1 1M 64k", "read -P 0xb2 2M 64k", "read -P 0xb3 3M 64k"]);
}

#[test]
fn flushed_writes_and_unwritten_sectors_survive_kill_9() {
    if !available(&["qemu-io", "qemu-img"]) {
        return;
    }
    let (site, node, agent) = served(2);
    // Parts of chunks that are not there, across chunk borders, below a sector, and the last bytes of the device.
    let writes =
        ["write -P 0x11 500k 200k", "write -P 0x22 5000000 512", "write -z 9M 700k", "write -P 0x33 34603520 1k"];
    qemu_io(&site, &agent, "web-0", &[&writes[..], &["flush"]].concat());
    node.kill();

    let node = site.start_default();
    let expected = site.path("expected.raw");
    std::fs::copy(site.path("image.raw"), &expected).expect("copy");
    let mut args = vec!["-f", "raw"];
    for write in writes {
        args.extend(["-c", write]);
    }
    let file = expected.display().to_string();
    args.push(&file);
    run_in(&site.path(""), "qemu-io", &args).success();
    qemu_compare(&site, &file, &agent.qemu_file("web-0"));
    qemu_compare(&site, "image.raw", &agent.qemu_file("web-1"));

    // Hydration goes on behind the guest's writes and overwrites none of them, also when it is killed half-way.
    node.volley(&site, &["volume", "set", "web-0", "--rate", "8MiB/s"]).success();
    node.kill();
    let node = site.start_default();
    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    qemu_compare(&site, &file, &agent.qemu_file("web-0"));
}

#[test]
fn a_restart_with_another_number_of_cores_keeps_everything() {
    if !available(&["qemu-io", "qemu-img"]) {
        return;
    }
    let (site, node, agent) = served(8);
    for n in 0..8 {
        qemu_io(&site, &agent, &format!("web-{n}"), &[&format!("write -P {} {n}M 300k", n + 1), "flush"]);
    }
    node.volley(&site, &["volume", "set", "web-3", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-3", "60s");
    let before: Vec<_> = (0..8).map(|n| node.volume(&site, &format!("web-{n}"))).collect();
    node.kill();

    let mut last = None;
    for cores in [1, 2, 1] {
        drop(last.take());
        let node = site.start(&NodeOptions { cores, ..NodeOptions::default() });
        for (n, old) in before.iter().enumerate() {
            let new = node.volume(&site, &format!("web-{n}"));
            for key in ["id", "size_bytes", "hydrated", "snapshot", "created_unix_ms"] {
                assert_eq!(new[key], old[key], "{key} of web-{n} with {cores} cores");
            }
            assert!(number(&new, "resident_bytes") >= 300 << 10, "what the guest wrote is resident: {new}");
        }
        for n in 0..8 {
            qemu_io(&site, &agent, &format!("web-{n}"), &[&format!("read -P {} {n}M 300k", n + 1)]);
        }
        last = Some(node);
    }
}
