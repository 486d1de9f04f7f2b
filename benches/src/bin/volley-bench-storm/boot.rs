//! A real Debian in QEMU until it says that it has booted: from a cold volume without and with a boot set, beside the same machine
//! on a local file.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use volley_benches::figure::{Figure, Pair};
use volley_benches::process::{Result, Server, run};

use super::Bench;

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
        let (mut cold, mut known, mut full) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..self.args.long_runs {
            eprintln!("boot: run {} of {}: local, cold, with a boot set", number + 1, self.args.long_runs);
            let local = self.boot_local(&copy)?;
            cold.push(Pair { ours: self.boot_ours(&["bootset", "drop", SNAPSHOT])?, peer: local });
            // What the machine before read is known now; the recorded boot says the same of any such image.
            let record = ["bootset", "record", SNAPSHOT, "--trace", volley_benches::BOOT_TRACE];
            known.push(Pair { ours: self.boot_ours(&record)?, peer: local });
            full.push(local);
        }
        let peer = "the same machine on a local raw file, cache=none; QEMU's software emulation, one CPU";
        figures.push(Figure::cost("boot_cold_vs_local", "s", peer, &cold));
        figures.push(Figure::cost("boot_cold_bootset_vs_local", "s", peer, &known));
        figures.push(Figure::alone("boot_local_seconds", "s", &full));
        Ok(())
    }

    fn boot_local(&self, copy: &Path) -> Result<f64> {
        copy_file(&self.args.image, copy)?;
        let seconds = boot(&copy.display().to_string())?;
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
            let seconds = boot(&format!("nbd:unix:{}:exportname=web-0", socket.display()))?;
            agent.stop()?;
            Ok(seconds)
        })
    }
}

/// Seconds until the machine on this disk has booted; it is then switched off.
fn boot(file: &str) -> Result<f64> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-nographic", "-no-reboot", "-nic", "none"]);
    qemu.args(["-monitor", "none", "-serial", "stdio", "-smbios", "type=1,product=stay"]);
    qemu.arg("-drive").arg(format!("file={file},format=raw,if=virtio,cache=none"));
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
