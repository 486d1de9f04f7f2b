//! Long seeded lists of qemu-io commands, each read checked by its pattern, and the volume at the end by a model.

use std::fmt::Write;
use std::ops::Range;

use super::{IMAGE_BYTES, hydrate, nbdcopy, qemu_io, served};
use crate::harness::{Random, available, run_in};
use crate::image_file::{CHUNK, assert_same};

const BLOCK: u64 = 512;
const SECTOR: u64 = 4096;
/// Blocks as they were imported.
const IMAGE: u16 = 256;

/// What every block of the device holds: a pattern, or the image.
struct Model {
    blocks: Vec<u16>,
    rng: Random,
}

impl Model {
    fn new(seed: u64) -> Model {
        Model { blocks: vec![IMAGE; (IMAGE_BYTES / BLOCK) as usize], rng: Random::new(seed) }
    }

    fn fill(&mut self, start: u64, end: u64, pattern: u8) {
        self.blocks[(start / BLOCK) as usize..(end / BLOCK) as usize].fill(u16::from(pattern));
    }

    /// Offset and length in bytes: anywhere, across a chunk's edge, or up to the end of the device.
    fn place(&mut self, blocks_max: u64) -> (u64, u64) {
        let blocks = self.blocks.len() as u64;
        let len = 1 + self.rng.below(blocks_max);
        let start = match self.rng.below(3) {
            0 => self.rng.below(blocks - len),
            1 => (1 + self.rng.below(blocks / (CHUNK / BLOCK) - 1)) * (CHUNK / BLOCK) - self.rng.below(len + 1),
            _ => blocks - len,
        };
        (start.min(blocks - len) * BLOCK, len * BLOCK)
    }

    /// A command that changes the volume, and the model with it; and the bytes it is about.
    fn change(&mut self) -> (String, Range<u64>) {
        let large = self.rng.below(4) == 0;
        let (start, len) = self.place(if large { 3000 } else { 40 });
        let pattern = 1 + self.rng.below(255) as u8;
        let command = match self.rng.below(10) {
            kind @ 0..=2 => {
                self.fill(start, start + len, pattern);
                let command = ["write", "write -f", "aio_write -f"][kind as usize];
                format!("{command} -P {pattern} {start} {len}")
            }
            3 | 4 => {
                self.fill(start, start + len, pattern);
                format!("aio_write -P {pattern} {start} {len}")
            }
            5 => {
                // Several buffers of one request.
                self.fill(start, start + len, pattern);
                let mut command = format!("writev -P {pattern} {start}");
                for n in pieces(len) {
                    write!(command, " {n}").expect("write to memory");
                }
                command
            }
            kind @ 6..=8 => {
                self.fill(start, start + len, 0);
                let command = ["write -z", "write -z -u", "aio_write -z"][kind as usize - 6];
                format!("{command} {start} {len}")
            }
            _ => {
                // Whole sectors of 4 KiB; what is covered in part stays.
                let end = start + len;
                let last = if end == IMAGE_BYTES { end } else { end / SECTOR * SECTOR };
                if start.next_multiple_of(SECTOR) < last {
                    self.fill(start.next_multiple_of(SECTOR), last, 0);
                }
                format!("discard {start} {len}")
            }
        };
        (command, start..start + len)
    }

    /// A command that reads blocks of one pattern, if there are such near a random place.
    fn check(&mut self) -> Option<String> {
        let (start, _) = self.place(1);
        let first = (start / BLOCK) as usize;
        let pattern = self.blocks[first];
        if pattern == IMAGE {
            return None;
        }
        let alike = self.blocks[first..].iter().take(2000).take_while(|b| **b == pattern).count();
        let len = alike as u64 * BLOCK;
        Some(match self.rng.below(3) {
            0 => format!("read -P {pattern} {start} {len}"),
            1 => format!("aio_read -P {pattern} {start} {len}"),
            _ => {
                let mut command = format!("readv -P {pattern} {start}");
                pieces(len).iter().for_each(|n| write!(command, " {n}").expect("write to memory"));
                command
            }
        })
    }

    /// The device's content.
    fn bytes(&self, image: &[u8]) -> Vec<u8> {
        let mut bytes = image.to_vec();
        for (block, pattern) in bytes.chunks_mut(BLOCK as usize).zip(&self.blocks) {
            if let Ok(pattern) = u8::try_from(*pattern) {
                block.fill(pattern);
            }
        }
        bytes
    }
}

/// A length as several, multiples of 512.
fn pieces(len: u64) -> Vec<u64> {
    let first = len / 3 / BLOCK * BLOCK;
    [first, len / 2 / BLOCK * BLOCK - first, len - len / 2 / BLOCK * BLOCK].into_iter().filter(|n| *n > 0).collect()
}

#[test]
fn a_thousand_commands_of_qemu_io_find_every_pattern() {
    if !available(&["qemu-io", "nbdcopy"]) {
        return;
    }
    let (site, node, agent) = served(1);
    hydrate(&site, &node, "web-0");
    let mut model = Model::new(5);
    let mut checks = 0;
    for _ in 0..20 {
        let mut commands = Vec::new();
        let mut in_flight: Vec<Range<u64>> = Vec::new();
        for _ in 0..40 {
            let (command, range) = model.change();
            // Which of two overlapping requests in flight comes last is not defined.
            if in_flight.iter().any(|other| other.start < range.end && range.start < other.end) {
                commands.push("aio_flush".to_owned());
                in_flight.clear();
            }
            if command.starts_with("aio") {
                in_flight.push(range);
            }
            commands.push(command);
        }
        commands.push("aio_flush".to_owned());
        for _ in 0..40 {
            if let Some(check) = model.check() {
                commands.push(check);
                checks += 1;
            }
        }
        commands.push("aio_flush".to_owned());
        qemu_io(&site, &agent, "web-0", &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
    assert!(checks > 100, "only {checks} reads were checked");

    let image = std::fs::read(site.path("image.raw")).expect("the image");
    std::fs::write(site.path("expected.raw"), model.bytes(&image)).expect("write");
    nbdcopy(&site, &[], &agent.uri("web-0"), "copy.raw");
    assert_same(&site.path("expected.raw"), &site.path("copy.raw"));
    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    nbdcopy(&site, &[], &agent.uri("web-0"), "hydrated.raw");
    assert_same(&site.path("expected.raw"), &site.path("hydrated.raw"));
}

#[test]
fn wrong_patterns_and_requests_past_the_end_fail_and_nothing_else_does() {
    if !available(&["qemu-io"]) {
        return;
    }
    let (site, _node, agent) = served(1);
    let uri = agent.uri("web-0");
    let end = IMAGE_BYTES;
    let fails = |command: &str, sign: &str| {
        let outcome = run_in(&site.path(""), "qemu-io", &["-f", "raw", "-c", command, &uri]);
        let text = format!("{}{}", outcome.stdout, outcome.stderr);
        assert!(outcome.code != 0 && text.contains(sign), "{command}: {outcome:?}");
    };
    // That the checks of the other tests can fail.
    qemu_io(&site, &agent, "web-0", &["write -P 1 0 64k", "write -P 2 65024 512"]);
    fails("read -P 1 0 64k", "Pattern verification failed");
    for command in [
        format!("write -P 3 {} 1024", end - 512),
        format!("write -P 3 {end} 512"),
        format!("read {} 1024", end - 512),
        format!("write -z {} 1024", end - 512),
        format!("discard {} 1024", end - 512),
    ] {
        fails(&command, "failed");
    }
    let last = format!("write -P 9 {} 512", end - 512);
    qemu_io(&site, &agent, "web-0", &[&last, &format!("read -P 9 {} 512", end - 512)]);
}
