//! Reads that are answered from the image cache in memory: of volumes in which nothing is yet. What is read is filled behind
//! the guest, so each volume is good for a short load only, and there are many.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use volley_benches::figure::{Figure, Pair};
use volley_benches::process::{Result, Server, on_core, run};
use volley_tools::load::cpu::pin;

use super::{Bench, CLIENT_CORE, Node, SERVER_CORE, number};

/// Volumes of each run.
const VOLUMES: u32 = 8;
/// Reads of each volume.
const SMALL_READS: u32 = 16_384;
const LARGE_READS: u32 = 256;
const LARGE_BYTES: usize = 512 << 10;
const READS: &str = "volley_guest_reads_total";
const MISSES: &str = "volley_guest_read_misses_total";
/// Less than this part of the reads from memory, and the figure would be one of the disk.
const FROM_RAM_MIN: f64 = 0.9;

impl Bench<'_> {
    pub(super) fn ram(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let node = self.node(&self.unix("data"), 1)?;
        let mut fresh = (0..).map(|number| format!("fresh{number}"));

        let socket = self.sockets.join("memory.sock");
        let mut command = on_core(Some(SERVER_CORE), "nbdkit");
        command.args(["--foreground", "--unix", &socket.display().to_string(), "--exportname", "v0", "memory"]);
        command.arg(format!("{}M", self.args.image_mib));
        let memory = Server::start_silent(command, &socket)?;
        let (count, mut pairs) = (SMALL_READS.to_string(), Vec::new());
        for _ in self.args.publication.runs("ram_read4k_qd32_vs_nbdkit_memory") {
            let ours = self.reads_from_ram(&node, &mut fresh, &["--depth", "32", "--count", &count])?;
            pairs.push(Pair { ours, peer: self.fio_nbd(&socket, "v0", "read", 32)? });
        }
        drop(memory);
        let peer = "nbdkit memory, fio's nbd engine";
        figures.push(Figure::against("ram_read4k_qd32_vs_nbdkit_memory", "IOPS", peer, &pairs));

        let (count, mut pairs) = (LARGE_READS.to_string(), Vec::new());
        let large = ["--block", "512KiB", "--addresses", "sequential", "--depth", "4", "--count", &count];
        for _ in self.args.publication.runs("ram_read512k_vs_stream") {
            let ours = self.reads_from_ram(&node, &mut fresh, &large)? * LARGE_BYTES as f64 / f64::from(1 << 20);
            pairs.push(Pair { ours, peer: plain_stream(Duration::from_secs(self.args.seconds.into()))? });
        }
        let peer = "one thread that writes as much at a time into a unix socket, one that reads it";
        figures.push(Figure::against("ram_read512k_vs_stream", "MiB/s", peer, &pairs));
        node.stop()
    }

    /// Reads per second of fresh volumes, one after the other.
    fn reads_from_ram(&self, node: &Node, fresh: &mut impl Iterator<Item = String>, words: &[&str]) -> Result<f64> {
        let (mut requests, mut seconds) = (0.0, 0.0);
        let counted = || Ok::<_, String>((node.server.counter(READS)?, node.server.counter(MISSES)?));
        let before = counted()?;
        for name in fresh.take(VOLUMES as usize) {
            let create = ["volume", "create", &name, "--snapshot", "bench", "--rate", "none"];
            run(&mut self.volley(Some(&node.server), &create)?)?;
            let mut load = vec!["read", "--generator", "wire", "--volume", &name];
            load.extend(words);
            let said = self.load(&node.server, &load)?;
            requests += number(&said["series"]["read"]["requests"])?;
            seconds += number(&said["seconds"])?;
            run(&mut self.volley(Some(&node.server), &["volume", "delete", &name])?)?;
        }
        let after = counted()?;
        let part = (after.1 - before.1) as f64 / (after.0 - before.0) as f64;
        if part < FROM_RAM_MIN {
            return Err(format!("only {:.0} % of the reads were answered from memory", part * 100.0));
        }
        Ok(requests / seconds)
    }
}

/// MiB per second through a unix socket, from the server's core to the clients'.
fn plain_stream(duration: Duration) -> Result<f64> {
    let said = |e: std::io::Error| format!("plain stream: {e}");
    let (mut from, mut to) = UnixStream::pair().map_err(said)?;
    let sender = std::thread::spawn(move || {
        pin(Some(SERVER_CORE))?;
        let bytes = vec![7; LARGE_BYTES];
        // Ends when the other end is closed.
        while from.write_all(&bytes).is_ok() {}
        Ok::<_, String>(())
    });
    let receiver = std::thread::spawn(move || {
        pin(Some(CLIENT_CORE))?;
        let (mut bytes, mut total, begun) = (vec![0; LARGE_BYTES], 0, Instant::now());
        while begun.elapsed() < duration {
            total += to.read(&mut bytes).map_err(said)?;
        }
        Ok::<_, String>(total as f64 / f64::from(1 << 20) / begun.elapsed().as_secs_f64())
    });
    let rate = receiver.join().expect("the receiver does not panic")?;
    sender.join().expect("the sender does not panic")?;
    Ok(rate)
}
