//! The storm: all volumes made by one request and asked for what they boot from, what the disk does meanwhile, and what a guest
//! feels of it.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use volley_benches::figure::{Figure, Pair, ms};
use volley_benches::fio;
use volley_benches::mount::Xfs;
use volley_benches::process::{Result, Server, run};
use volley_client::FetchUntil;
use volley_tools::load::report::Report;
use volley_tools::load::storm::{Arrivals, Ask, Progress};

use super::{Asking, Bench, HOSTS};

/// What the background may write each second: a storm of minutes must not fill a disk.
const HYDRATION_BANDWIDTH: &str = "100MiB";
/// The file system that shares extents: sparse, so it takes what the volumes have of their own.
const XFS_BYTES: u64 = 64 << 30;
/// What fio writes to measure the disk.
const FIO_MIB: u32 = 2048;
/// How often the node is asked how much it has written.
const POLL: Duration = Duration::from_millis(50);
/// How long hydration is measured at most, on a disk too slow for the bound in bytes.
const DISK_SECONDS_MAX: Duration = Duration::from_secs(60);
/// How long the guest is measured without a storm.
const QUIET_SECONDS: u32 = 8;
/// When the machines of that storm start: it has a minute, and a hypervisor starts no thousand machines in one moment.
const RAMP: Duration = Duration::from_secs(42);
/// The guest's I/O ends when the storm does, or after this.
const GUEST_SECONDS_MAX: u32 = 600;

/// What a guest feels of a storm, beside what it felt before.
struct Felt {
    p99_ms: Pair,
    iops: Pair,
    storm_seconds: f64,
}

impl Bench<'_> {
    /// Creation of all volumes, and every priority fetch of their boots.
    pub(super) fn storm(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let store = self.site.dir().join("node/store");
        self.node_on(&store, HYDRATION_BANDWIDTH, "", |server| {
            self.storm_of(server, FetchUntil::Readable, "storm", &mut *figures)
        })
    }

    /// The same on a store that shares extents, where every fetch is answered when its data is in the volume.
    pub(super) fn shared(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let xfs = Xfs::new(self.site.dir(), XFS_BYTES)?;
        let store = xfs.path().join("store");
        self.node_on(&store, "unlimited", "", |server| {
            let before = used_bytes(xfs.path())?;
            self.storm_of(server, FetchUntil::Resident, "storm_shared", &mut *figures)?;
            let used = used_bytes(xfs.path())?.saturating_sub(before) as f64 / f64::from(1 << 20);
            figures.push(Figure::alone("storm_shared_disk_mib", "MiB", &[used]));
            Ok(())
        })
    }

    fn storm_of(&self, server: &Server, until: FetchUntil, prefix: &str, figures: &mut Vec<Figure>) -> Result<()> {
        let volumes = self.args.volumes;
        eprintln!("{prefix}: {volumes} volumes");
        let _ = self.site.origin().take_counts();
        let begun = Instant::now();
        self.create(server, volumes, &[])?;
        let created = begun.elapsed();
        let report = self.fetch_all(server, volumes, until, &Progress::default())?;
        // Not the detaching afterwards, which is no part of a boot.
        let whole = created + report.elapsed;
        let (_, bytes) = self.site.origin().take_counts();
        let (first, later) = (report.of("first-touch").latency, report.of("later").latency);
        let fetches = (first.count() + later.count()) as f64;
        for (name, unit, value) in [
            ("volumes", "", f64::from(volumes)),
            ("created_seconds", "s", created.as_secs_f64()),
            ("seconds", "s", whole.as_secs_f64()),
            ("fetches", "", fetches),
            ("fetches_per_second", "1/s", fetches / report.elapsed.as_secs_f64()),
            ("attach_p99_ms", "ms", ms(report.of("attach").latency.quantile(0.99))),
            ("first_touch_p99_ms", "ms", ms(first.quantile(0.99))),
            ("copies_from_object_store", "x", bytes as f64 / self.stored_bytes()?),
        ] {
            figures.push(Figure::alone(&format!("{prefix}_{name}"), unit, &[value]));
        }
        Ok(())
    }

    /// What hydration writes while a storm goes on, on a store without a bound, beside what fio writes to the same disk.
    pub(super) fn disk(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let mut pairs = Vec::new();
        for number in 0..self.args.runs {
            eprintln!("disk: run {} of {}", number + 1, self.args.runs);
            let peer = fio::sequential_write(self.site.dir(), FIO_MIB, None)?;
            let ours = self.node("unlimited", "", |server| self.hydration_rate(server))?;
            pairs.push(Pair { ours, peer });
        }
        let peer = format!("{}; the disk alone, our node beside the storm", fio::SEQUENTIAL_WRITE);
        figures.push(Figure::against("storm_vs_disk", "MB/s", &peer, &pairs));
        Ok(())
    }

    /// MB/s written into volumes from the first request of a storm to its last, or to the bound of what the disk shall hold.
    fn hydration_rate(&self, server: &Server) -> Result<f64> {
        let volumes = self.args.volumes.min(1000);
        self.create(server, volumes, &[])?;
        let most = self.args.disk_gib << 30;
        let progress = Progress::default();
        let written = "volley_filled_bytes_total";
        let (start, begun) = (server.counter(written)?, Instant::now());
        std::thread::scope(|scope| {
            let storm = scope.spawn(|| {
                // Those that were answered are asked again, so that the storm does not end before the disk has something to do.
                while !progress.stop.load(Ordering::Relaxed) {
                    self.fetch_all(server, volumes, FetchUntil::Readable, &progress)?;
                }
                Ok::<(), String>(())
            });
            let mut bytes = 0;
            while bytes < most && !storm.is_finished() && begun.elapsed() < DISK_SECONDS_MAX {
                std::thread::sleep(POLL);
                bytes = server.counter(written)? - start;
            }
            let rate = bytes as f64 / begun.elapsed().as_secs_f64() / 1e6;
            progress.stop.store(true, Ordering::Relaxed);
            storm.join().map_err(|_| "the storm panicked".to_owned())??;
            Ok(rate)
        })
    }

    /// The 99th percentile of a guest's I/O during the storm, beside the same guest alone on the node.
    pub(super) fn guest(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut latency, mut rate, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..self.args.runs {
            eprintln!("guest: run {} of {}", number + 1, self.args.runs);
            let felt = self.node(HYDRATION_BANDWIDTH, "idle_poll = \"0s\"\n", |server| self.guest_in_storm(server))?;
            latency.push(felt.p99_ms);
            rate.push(felt.iops);
            seconds.push(felt.storm_seconds);
        }
        let peer = "the same fio before the storm: 4 KiB random, 70 % reads, QD4, NBD through volley-agent";
        figures.push(Figure::cost("guest_p99_vs_quiet", "ms", peer, &latency));
        figures.push(Figure::against("guest_iops_vs_quiet", "IOPS", peer, &rate));
        figures.push(Figure::alone("guest_storm_seconds", "s", &seconds));
        Ok(())
    }

    fn guest_in_storm(&self, server: &Server) -> Result<Felt> {
        let create = ["volume", "create", "guest", "--snapshot", "debian", "--rate", "unlimited"];
        run(&mut self.site.volley(Some(server), &create)?)?;
        run(&mut self.site.volley(Some(server), &["volume", "wait", "guest", "--hydrated"])?)?;
        let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
        let socket = sockets.path().join("nbd.sock");
        let agent = self.site.agent(server, &socket)?;
        let quiet = fio::p99_ms_and_iops(&run(&mut fio::guest_mix(&socket, "guest", QUIET_SECONDS))?)?;
        let mut guest = fio::guest_mix(&socket, "guest", GUEST_SECONDS_MAX);
        let guest = guest.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(|e| format!("fio: {e}"))?;
        // Past its ramp, which fio does not count.
        std::thread::sleep(Duration::from_millis(1500));
        let begun = Instant::now();
        let stormed = self.create(server, self.args.volumes, &[]).and_then(|()| self.fetch_from_elsewhere(server));
        let storm_seconds = begun.elapsed().as_secs_f64();
        // SAFETY: a signal to a child that has not been waited for; fio then prints what it measured.
        unsafe { libc::kill(i32::try_from(guest.id()).expect("pids fit"), libc::SIGINT) };
        let printed = guest.wait_with_output().map_err(|e| format!("fio: {e}"))?;
        stormed?;
        let stormy = fio::p99_ms_and_iops(&String::from_utf8_lossy(&printed.stdout))?;
        agent.stop()?;
        let pair = |ours, peer| Pair { ours, peer };
        Ok(Felt { p99_ms: pair(stormy.0, quiet.0), iops: pair(stormy.1, quiet.1), storm_seconds })
    }

    fn fetch_all(&self, server: &Server, volumes: u32, until: FetchUntil, progress: &Progress) -> Result<Report> {
        let asking = Asking { volumes, ask: Ask::Fetch(until), nbd: None, hosts: HOSTS, arrivals: Arrivals::AtOnce };
        self.ask(&server.ready_word("data")?, asking, progress)
    }

    /// The storm of the guest's neighbours: they start over [`RAMP`], and what plays them gets the lowest rank on the cores, because the
    /// machines it stands for have cores of their own.
    fn fetch_from_elsewhere(&self, server: &Server) -> Result<Report> {
        let (ask, arrivals) = (Ask::Fetch(FetchUntil::Readable), Arrivals::Ramp(RAMP));
        let asking = Asking { volumes: self.args.volumes, ask, nbd: None, hosts: HOSTS, arrivals };
        let address = server.ready_word("data")?;
        std::thread::scope(|scope| {
            let storm = scope.spawn(|| {
                // SAFETY: changes the rank of this thread, and of those that it starts.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
                self.ask(&address, asking, &Progress::default())
            });
            storm.join().map_err(|_| "the storm panicked".to_owned())?
        })
    }

    /// What the image takes in the object store: what leaves it at most, when each chunk leaves it once.
    fn stored_bytes(&self) -> Result<f64> {
        let shown = run(&mut self.site.volley(None, &["image", "show", "debian", "--json"])?)?;
        let shown: serde_json::Value = serde_json::from_str(&shown).map_err(|e| format!("image show: {e}"))?;
        shown["stored_bytes"].as_f64().ok_or_else(|| "image show prints no stored_bytes".to_owned())
    }
}

/// What is used of a file system.
fn used_bytes(at: &Path) -> Result<u64> {
    let space = volley_server::metrics::space_of(at).map_err(|e| format!("{}: {e}", at.display()))?;
    Ok(space.total_bytes - space.free_bytes)
}
