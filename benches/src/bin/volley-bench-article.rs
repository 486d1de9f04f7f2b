//! The published experiment, side by side: many volumes of one image boot in a wave, (a) every volume fetches for itself,
//! (b) one fetch for all, cold, (c) the next wave, warm, and (d) on another cold node that knows what the image boots. Start it with `tools/bench article`, which builds everything it runs.
//!
//! Each volume is read as the recorded boot of Debian reads its disk, at the recorded pace times `--speed`; the wave arrives at
//! `--arrivals` volumes per second. The object store is an S3 server of ours (`origin`) in this process, with a delay before
//! each answer and a bandwidth for each connection; it counts what leaves it. The trace's writes are left out.
//!
//! At the end one volume of a full image is hydrated from that server, which then answers as fast as it can, beside
//! `curl` of the same packs and beside fio writing as much as the image.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use volley_benches::figure::{Figure, Pair, conclude, ms};
use volley_benches::fio;
use volley_benches::process::{Result, Server, machine, run, timed};
use volley_benches::site::{Site, SiteArgs};
use volley_benches::{BOOT_TRACE, IMAGE_BYTES, boot_image, creation};
use volley_tools::load::Target;
use volley_tools::load::histogram::Histogram;
use volley_tools::load::replay::Speed;
use volley_tools::load::report::Report;
use volley_tools::load::storm::{self, Arrivals, Ask, Progress};
use volley_tools::load::trace::{self, Event, Op};

/// The image that is hydrated as a whole, and another one before it, so that the node's memory is its own by then.
const FULL_IMAGE_MIB: u32 = 1024;
const OTHER_IMAGE_MIB: u32 = 640;
/// Clients of the node: hypervisor hosts.
const HOSTS: u32 = 4;

/// Measures what sharing saves when a batch of volumes boots from one image.
#[derive(Debug, Parser)]
#[command(name = "tools/bench article")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Volumes of a wave.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=6000))]
    volumes: u32,
    /// Volumes that arrive in a second: 6,000 in a minute.
    #[arg(long, default_value_t = 100)]
    arrivals: u32,
    /// The recorded boot, so many times faster.
    #[arg(long, default_value_t = 1)]
    speed: u32,
    #[command(flatten)]
    site: SiteArgs,
    /// Runs of the hydration of one volume.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("article", measure(&args), args.json.as_deref())
}

/// What one wave cost.
struct Wave {
    seconds: f64,
    gets: u64,
    bytes: u64,
    /// Latency of reads that touched a chunk for the first time in their volume.
    first_touch: Histogram,
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let site = Site::new(&args.site)?;
    let reads: Vec<Event> =
        trace::load(Path::new(BOOT_TRACE), IMAGE_BYTES)?.into_iter().filter(|event| event.op == Op::Read).collect();
    println!("{}", machine());
    println!(
        "{} volumes, {} arrive in a second, boot {} times faster; object store: {} ms, {} MiB/s a connection",
        args.volumes, args.arrivals, args.speed, args.site.first_byte_ms, args.site.connection_mib
    );
    let image = site.dir().join("image.raw");
    boot_image(&image, &reads)?;
    site.import(&image, "debian")?;
    site.answer(Some(&args.site));
    let bench = Bench { args, site: &site, reads };
    eprintln!("article: each volume for itself");
    let alone =
        site.node("transfer.share = false\nhydration.boot_window = \"0s\"\n", |server| bench.wave(server, "a-"))?;
    eprintln!("article: one fetch for all, cold and warm");
    let (cold, warm) = site.node("hydration.boot_window = \"0s\"\n", |server| {
        Ok((bench.wave(server, "b-")?, bench.wave(server, "c-")?))
    })?;
    eprintln!("article: cold, with a boot set");
    let known = site.node("", |server| {
        let record = ["bootset", "record", "debian", "--trace", BOOT_TRACE];
        run(&mut site.volley(Some(server), &record)?)?;
        bench.wave(server, "d-")
    })?;
    let mut figures = figures(&alone, &cold, &warm, &known);
    bench.hydrate(&mut figures)?;
    Ok(figures)
}

struct Bench<'a> {
    args: &'a Args,
    site: &'a Site,
    reads: Vec<Event>,
}

impl Bench<'_> {
    /// From the request for a volume of a full image to its last chunk durable in it.
    fn hydrate(&self, figures: &mut Vec<Figure>) -> Result<()> {
        self.site.answer(None);
        let image = self.site.dir().join("image.raw");
        volley_benches::full_image(&image, OTHER_IMAGE_MIB, 1 << 32)?;
        self.site.import(&image, "other")?;
        let before = self.site.origin().packs();
        volley_benches::full_image(&image, FULL_IMAGE_MIB, 1 << 33)?;
        self.site.import(&image, "full")?;
        let mut packs = self.site.origin().packs();
        packs.retain(|pack| !before.contains(pack));
        let (mut beside_curl, mut beside_fio, mut gets_per_mib) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.args.runs {
            let (seconds, gets, bytes) = self.site.node("", |server| {
                self.hydrate_volume(server, "other")?;
                let _ = self.site.origin().take_counts();
                let seconds = self.hydrate_volume(server, "full")?;
                let (gets, bytes) = self.site.origin().take_counts();
                Ok((seconds, gets as f64, bytes as f64))
            })?;
            let mut curl = Command::new("curl");
            curl.args(["--silent", "--show-error", "--fail"]);
            curl.args(packs.iter().flat_map(|pack| ["--output", "/dev/null", pack]));
            let curl_seconds = timed(&mut curl)?;
            beside_curl.push(Pair { ours: bytes / seconds / 1e6, peer: bytes / curl_seconds / 1e6 });
            let ours = f64::from(FULL_IMAGE_MIB) * f64::from(1 << 20) / seconds / 1e6;
            beside_fio.push(Pair { ours, peer: fio::sequential_write(self.site.dir(), FULL_IMAGE_MIB, None)? });
            gets_per_mib.push(gets / (bytes / f64::from(1 << 20)));
        }
        figures.push(Figure::alone("article_gets_per_mib", "1/MiB", &gets_per_mib));
        let peer = "curl of the same packs, one after the other, to /dev/null";
        figures.push(Figure::against("s3_hydrate_vs_curl", "MB/s", peer, &beside_curl));
        figures.push(Figure::against("s3_hydrate_vs_fio", "MB/s", fio::SEQUENTIAL_WRITE, &beside_fio));
        Ok(())
    }

    fn hydrate_volume(&self, server: &Server, image: &str) -> Result<f64> {
        let begun = Instant::now();
        run(&mut self
            .site
            .volley(Some(server), &["volume", "create", image, "--snapshot", image, "--rate", "unlimited"])?)?;
        run(&mut self.site.volley(Some(server), &["volume", "wait", image, "--hydrated"])?)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Creates the volumes of one request and boots them.
    fn wave(&self, server: &Server, prefix: &str) -> Result<Wave> {
        let count = self.args.volumes.to_string();
        let _ = self.site.origin().take_counts();
        run(self.site.volley(Some(server), &creation("debian", prefix, &count))?.args(["--rate", "none"]))?;
        let begun = Instant::now();
        let report = self.boot_all(&server.ready_word("data")?, prefix)?;
        let (gets, bytes) = self.site.origin().take_counts();
        let seconds = begun.elapsed().as_secs_f64();
        // The next wave finds the disk as this one did.
        let names: Vec<String> = (0..self.args.volumes).map(|number| format!("{prefix}{number}")).collect();
        run(self.site.volley(Some(server), &["volume", "delete", "--force"])?.args(names))?;
        if let Some(error) = report.first_error() {
            return Err(error.to_owned());
        }
        Ok(Wave { seconds, gets, bytes, first_touch: report.of("first-touch").latency })
    }

    fn boot_all(&self, address: &str, prefix: &str) -> Result<Report> {
        let plan = storm::Plan {
            target: Target { server: address.to_owned(), deadline: Duration::from_secs(60), depth: 16 },
            nbd: None,
            volumes: (0..self.args.volumes).map(|number| format!("{prefix}{number}")).collect(),
            connections: HOSTS,
            threads: 1,
            events: self.reads.clone(),
            ask: Ask::Read,
            first_touches_only: false,
            arrivals: Arrivals::Ramp(Duration::from_secs(1) * self.args.volumes / self.args.arrivals.max(1)),
            speed: Speed::Times(f64::from(self.args.speed.max(1))),
            depth: 1,
            duration: Duration::from_secs(3600),
            verify: None,
            seed: 1,
        };
        storm::run(&plan, &Progress::default())
    }
}

fn figures(alone: &Wave, cold: &Wave, warm: &Wave, known: &Wave) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (name, wave) in [("alone", alone), ("cold", cold), ("warm", warm), ("cold_bootset", known)] {
        let mut figure = |what: &str, unit: &'static str, value: f64| {
            figures.push(Figure::alone(&format!("article_{name}_{what}"), unit, &[value]));
        };
        figure("seconds", "s", wave.seconds);
        figure("object_bytes", "B", wave.bytes as f64);
        figure("gets", "", wave.gets as f64);
        figure("first_touch_mean_ms", "ms", ms(wave.first_touch.mean()));
        for (percentile, share) in [("p50", 0.5), ("p99", 0.99), ("p99_9", 0.999)] {
            figure(&format!("first_touch_{percentile}_ms"), "ms", ms(wave.first_touch.quantile(share)));
        }
    }
    let reduction = |less: f64, more: f64| 100.0 * (1.0 - less / more);
    let p99 = |wave: &Wave| ms(wave.first_touch.quantile(0.99));
    let mean = |wave: &Wave| ms(wave.first_touch.mean());
    let mib = cold.bytes.max(1) as f64 / f64::from(1 << 20);
    for (name, unit, value) in [
        ("article_bytes_reduction", "%", reduction(cold.bytes as f64, alone.bytes as f64)),
        ("article_priority_gets_per_mib", "1/MiB", cold.gets as f64 / mib),
        ("article_p99_reduction_warm", "%", reduction(p99(warm), p99(alone))),
        ("article_p99_reduction_cold", "%", reduction(p99(cold), p99(alone))),
        ("article_p99_reduction_cold_bootset", "%", reduction(p99(known), p99(alone))),
        ("article_mean_reduction_warm", "%", reduction(mean(warm), mean(alone))),
        ("article_mean_reduction_cold", "%", reduction(mean(cold), mean(alone))),
        ("article_mean_reduction_cold_bootset", "%", reduction(mean(known), mean(alone))),
    ] {
        figures.push(Figure::alone(name, unit, &[value]));
    }
    figures
}
