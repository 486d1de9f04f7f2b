//! A real Debian in QEMU until it says that it has booted: from a cold volume without and with a boot set, beside the same machine
//! on a local file, and beside what one would do without us: download it first, or read it over HTTP behind an overlay.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use volley_benches::figure::{Figure, Pair};
use volley_benches::process::{Result, Server, run};

use super::Bench;
use super::nbdkit::{self, Nbdkit};

/// The guest's last word on its serial console.
const BOOTED: &str = "BOOT-OK";
/// The snapshot of the Debian, beside the made-up image of the other parts.
const SNAPSHOT: &str = "debian-12";

impl Bench<'_> {
    pub(super) fn boot(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let image = &self.args.image;
        if !image.exists() {
            return Err(format!("{} is missing: make it with tools/make-debian-image, or name one", image.display()));
        }
        self.site.answer(None);
        let copy = self.site.dir().join("debian.raw");
        copy_file(image, &copy)?;
        self.site.import(&copy, SNAPSHOT)?;
        self.site.answer(Some(&self.args.site));
        let url = nbdkit::publish(self.site, image)?;
        let (mut cold, mut known, mut others) = (Vec::new(), Vec::new(), [const { Vec::new() }; 3]);
        for number in 0..self.args.long_runs {
            eprintln!("boot: run {} of {}: local, cold, with a boot set, others", number + 1, self.args.long_runs);
            let local = self.boot_local(&copy)?;
            let ours = self.boot_ours(&["bootset", "drop", SNAPSHOT])?;
            cold.push(Pair { ours, peer: local });
            // What the machine before read is known now; the recorded boot says the same of any such image.
            let record = ["bootset", "record", SNAPSHOT, "--trace", volley_benches::BOOT_TRACE];
            known.push(Pair { ours: self.boot_ours(&record)?, peer: local });
            let peers = [boot_downloaded(&url, &copy)?, self.boot_nbdkit(&url)?, self.boot_qcow2(&url)?];
            for (pairs, peer) in others.iter_mut().zip(peers) {
                pairs.push(Pair { ours, peer });
            }
        }
        let peer = "the same machine on a local raw file, cache=none; QEMU's software emulation, one CPU";
        figures.push(Figure::cost("boot_cold_vs_local", "s", peer, &cold));
        figures.push(Figure::cost("boot_cold_bootset_vs_local", "s", peer, &known));
        let what = [
            ("boot_cold_vs_download", "curl of the raw image over one connection, then a boot from it"),
            ("boot_cold_vs_nbdkit", nbdkit::PLAIN),
            ("boot_cold_vs_qcow2", "a qcow2 overlay with copy-on-read on the raw image over HTTP, by QEMU itself"),
        ];
        for ((name, peer), pairs) in what.into_iter().zip(&others) {
            figures.push(Figure::time(name, "s", peer, pairs));
        }
        Ok(())
    }

    fn boot_nbdkit(&self, url: &str) -> Result<f64> {
        let nbdkit = Nbdkit::plain(self.site, url, 1)?;
        boot(&format!("file=nbd:{},format=raw", nbdkit.address().replace("%s", "vm-0")))
    }

    fn boot_qcow2(&self, url: &str) -> Result<f64> {
        let overlay = self.site.dir().join("overlay.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", url]).arg(&overlay);
        run(&mut create)?;
        let seconds = boot(&format!("file={},format=qcow2,copy-on-read=on", overlay.display()));
        std::fs::remove_file(overlay).map_err(|e| e.to_string())?;
        seconds
    }

    fn boot_local(&self, copy: &Path) -> Result<f64> {
        copy_file(&self.args.image, copy)?;
        let seconds = boot(&format!("file={},format=raw", copy.display()))?;
        std::fs::remove_file(copy).map_err(|e| e.to_string())?;
        Ok(seconds)
    }

    /// On a node of its own, after a command about the boot set.
    fn boot_ours(&self, prepare: &[&str]) -> Result<f64> {
        self.site.node("", |server| {
            run(&mut self.site.volley(Some(server), prepare)?)?;
            let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
            let socket = sockets.path().join("nbd.sock");
            let agent = self.site.agent(server, &socket)?;
            run(&mut self.site.volley(Some(server), &["volume", "create", "web-0", "--snapshot", SNAPSHOT])?)?;
            let seconds = boot(&format!("file=nbd:unix:{}:exportname=web-0,format=raw", socket.display()))?;
            agent.stop()?;
            Ok(seconds)
        })
    }
}

/// Seconds of the download and the boot.
fn boot_downloaded(url: &str, to: &Path) -> Result<f64> {
    let begun = Instant::now();
    run(Command::new("curl").args(["--silent", "--fail", "--output"]).arg(to).arg(url))?;
    let download = begun.elapsed().as_secs_f64();
    let seconds = boot(&format!("file={},format=raw", to.display()))?;
    std::fs::remove_file(to).map_err(|e| e.to_string())?;
    Ok(download + seconds)
}

/// Seconds until the machine on this drive has booted; it is then switched off.
fn boot(drive: &str) -> Result<f64> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-nographic", "-no-reboot", "-nic", "none"]);
    qemu.args(["-monitor", "none", "-serial", "stdio", "-smbios", "type=1,product=stay"]);
    qemu.arg("-drive").arg(format!("{drive},if=virtio,cache=none"));
    let begun = Instant::now();
    let machine = Server::start(qemu, BOOTED)?;
    let seconds = begun.elapsed().as_secs_f64();
    drop(machine);
    Ok(seconds)
}

/// A copy with holes where the original has them.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").args(["--sparse=always"]).arg(from).arg(to)).map(drop)
}
