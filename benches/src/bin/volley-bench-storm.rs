//! The headline: thousands of volumes made by one request and booted at once, on one node, with the load generator on the same
//! cores. Start it with `tools/bench storm`, which builds everything it runs.
//!
//! The storm asks, for each volume, for everything that a recorded boot of Debian reads, by priority fetches that are answered
//! when the data can be read. The replays read it, with the data, cold: one volume alone, and many at once, each one read after
//! another as fast as answers come. The object store is an S3 server of ours (`origin`) in this process. Volumes are filled in the
//! background meanwhile, at a fixed share, so that the disk is not filled up.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use volley_benches::figure::{Figure, conclude, ms};
use volley_benches::process::{Result, Server, machine, run};
use volley_benches::site::{Site, SiteArgs};
use volley_benches::{BOOT_TRACE, IMAGE_BYTES, boot_image};
use volley_client::FetchUntil;
use volley_tools::load::Target;
use volley_tools::load::replay::Speed;
use volley_tools::load::report::Report;
use volley_tools::load::storm::{self, Arrivals, Ask, Progress};
use volley_tools::load::trace::{self, Event, Op};

/// Clients of the node: hypervisor hosts.
const HOSTS: u32 = 8;
/// What the background may write each second: a storm of minutes must not fill a disk.
const HYDRATION_BANDWIDTH: &str = "100MiB";

/// Measures how fast thousands of volumes of one image boot.
#[derive(Debug, Parser)]
#[command(name = "tools/bench storm")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Volumes of the storm.
    #[arg(long, default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    volumes: u32,
    /// Volumes of the replay with data.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=6000))]
    replays: u32,
    /// Threads of the load generator.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    threads: u32,
    #[command(flatten)]
    site: SiteArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("storm", measure(&args), args.json.as_deref())
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let site = Site::new(&args.site)?;
    let events = trace::load(Path::new(BOOT_TRACE), IMAGE_BYTES)?;
    let events: Vec<Event> = events.into_iter().filter(|event| event.op == Op::Read).collect();
    println!("{}", machine());
    println!(
        "{} requests for each volume; object store: {} ms, {} MiB/s a connection",
        events.len(),
        args.site.first_byte_ms,
        args.site.connection_mib
    );
    let image = site.dir().join("image.raw");
    boot_image(&image, &events)?;
    site.import(&image, "debian")?;
    site.answer(Some(&args.site));
    let bench = Bench { args, site: &site, events };
    let mut figures = Vec::new();
    let store = site.dir().join("node/store");
    let config = format!(
        "[[store]]\nlabel = \"store\"\npath = \"{}\"\nhydration_bandwidth = \"{HYDRATION_BANDWIDTH}\"\n",
        store.display()
    );
    site.node(&config, |server| bench.storm(server, &mut figures))?;
    for volumes in [1, args.replays] {
        site.node(&config, |server| bench.replay(server, volumes, &mut figures))?;
    }
    Ok(figures)
}

struct Bench<'a> {
    args: &'a Args,
    site: &'a Site,
    events: Vec<Event>,
}

impl Bench<'_> {
    /// Creation of all volumes, and every priority fetch of their boots.
    fn storm(&self, server: &Server, figures: &mut Vec<Figure>) -> Result<()> {
        let volumes = self.args.volumes;
        eprintln!("storm: {volumes} volumes");
        let begun = Instant::now();
        self.create(server, volumes)?;
        let created = begun.elapsed();
        let _ = self.site.origin().take_counts();
        let report = self.boot(server, volumes, Ask::Fetch(FetchUntil::Readable))?;
        let whole = begun.elapsed();
        let (_, bytes) = self.site.origin().take_counts();
        let fetches = report.of("first-touch").latency.count() + report.of("later").latency.count();
        let mut figure = |name: &str, unit: &'static str, value: f64| {
            figures.push(Figure::alone(&format!("storm_{name}"), unit, &[value]));
        };
        figure("created_seconds", "s", created.as_secs_f64());
        figure("seconds", "s", whole.as_secs_f64());
        figure("fetches_per_second", "1/s", fetches as f64 / report.elapsed.as_secs_f64());
        figure("first_touch_p99_ms", "ms", ms(report.of("first-touch").latency.quantile(0.99)));
        figure("copies_from_object_store", "x", bytes as f64 / self.stored_bytes()?);
        Ok(())
    }

    /// The whole boot of some volumes, with the data, on a cold node.
    fn replay(&self, server: &Server, volumes: u32, figures: &mut Vec<Figure>) -> Result<()> {
        eprintln!("storm: replay of {volumes} volumes");
        self.create(server, volumes)?;
        let report = self.boot(server, volumes, Ask::Read)?;
        let mut figure = |name: &str, unit: &'static str, value: f64| {
            figures.push(Figure::alone(&format!("replay{volumes}_{name}"), unit, &[value]));
        };
        let (first, later) = (report.of("first-touch"), report.of("later"));
        figure("seconds", "s", report.elapsed.as_secs_f64());
        figure("mb_per_second", "MB/s", (first.bytes + later.bytes) as f64 / report.elapsed.as_secs_f64() / 1e6);
        figure("first_touch_p99_ms", "ms", ms(first.latency.quantile(0.99)));
        figure("later_p99_ms", "ms", ms(later.latency.quantile(0.99)));
        Ok(())
    }

    fn create(&self, server: &Server, volumes: u32) -> Result<()> {
        let create = [
            "volume",
            "create",
            "--overcommit",
            "unlimited",
            "--snapshot",
            "debian",
            "--name-prefix",
            "vm-",
            "--count",
        ];
        run(self.site.volley(Some(server), &create)?.arg(volumes.to_string()))?;
        Ok(())
    }

    fn boot(&self, server: &Server, volumes: u32, ask: Ask) -> Result<Report> {
        let plan = storm::Plan {
            target: Target { server: server.ready_word("data")?, deadline: Duration::from_secs(120), depth: 1024 },
            volumes: (0..volumes).map(|number| format!("vm-{number}")).collect(),
            connections: HOSTS.max(self.args.threads),
            threads: self.args.threads,
            events: self.events.clone(),
            ask,
            arrivals: Arrivals::AtOnce,
            speed: Speed::Max,
            depth: 1,
            duration: Duration::from_secs(3600),
            verify: None,
            seed: 1,
        };
        let report = storm::run(&plan, &Progress::default())?;
        report.first_error().map_or(Ok(()), |error| Err(error.to_owned()))?;
        Ok(report)
    }

    /// What the image takes in the object store: what leaves it at most, when each chunk leaves it once.
    fn stored_bytes(&self) -> Result<f64> {
        let shown = run(&mut self.site.volley(None, &["image", "show", "debian", "--json"])?)?;
        let shown: serde_json::Value = serde_json::from_str(&shown).map_err(|e| format!("image show: {e}"))?;
        shown["stored_bytes"].as_f64().ok_or_else(|| "image show prints no stored_bytes".to_owned())
    }
}
