//! The headline: thousands of volumes made by one request and booted at once, on one node, with the load generator on the same
//! cores, and what the same machines would have without us. Start it with `tools/bench storm`, which builds everything it runs.
//!
//! - `storm` ([`wave`]): creation, and every priority fetch that a recorded boot of Debian needs, for all volumes;
//! - `shared` ([`wave`]): the same on a store that shares extents, until the data is in the volumes;
//! - `disk` ([`wave`]): hydration on a store of unbounded bandwidth while such a storm goes on, beside fio;
//! - `guest` ([`wave`]): a guest's own I/O during the storm, beside the same guest alone;
//! - `many`, `plain` and `one` ([`replay`]): the boot read with its data, cold, every byte compared with the image: many volumes
//!   at once and one alone, through the client crate and through volley-agent, beside nbdkit ([`nbdkit`]);
//! - `boot` ([`boot`]): a real Debian in QEMU, from a cold volume, beside the same machine on a local file.
//!
//! The object store is an S3 server of ours (`origin`) in this process, which also serves the raw image to nbdkit.

mod boot;
mod nbdkit;
mod replay;
mod wave;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use volley_benches::figure::{Figure, conclude};
use volley_benches::process::{Result, Server, machine, run};
use volley_benches::site::{Site, SiteArgs};
use volley_benches::{BOOT_TRACE, IMAGE_BYTES, boot_image, creation};
use volley_tools::load::Target;
use volley_tools::load::nbd::Servers;
use volley_tools::load::replay::Speed;
use volley_tools::load::report::Report;
use volley_tools::load::storm::{self, Arrivals, Ask, Progress};
use volley_tools::load::trace::{self, Event, Op};

// As in volley-load and volley-agent: the load is to be made as cheaply.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Clients of the node: hypervisor hosts.
const HOSTS: u32 = 8;

/// Measures how fast thousands of volumes of one image boot.
#[derive(Debug, Parser)]
#[command(name = "tools/bench storm")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these parts, e.g. --only storm,one [default: all].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    only: Vec<Part>,
    /// Volumes of the storm.
    #[arg(long, default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    volumes: u32,
    /// The storm asks for every read of the boot, also where it was answered before.
    #[arg(long)]
    every_read: bool,
    /// Volumes of the replay with data by many.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=6000))]
    replay_volumes: u32,
    /// Runs of what takes seconds: hydration during a storm, the guest, the replay by one volume.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Runs of what takes minutes: the replay by many, the boot of a machine.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    long_runs: u32,
    /// Threads of the load generator.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    threads: u32,
    /// Hydration during a storm is measured over so many GiB at most.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1024))]
    disk_gib: u64,
    /// The Debian that boots in QEMU; tools/bench makes one.
    #[arg(long, default_value = ".cache/debian.raw", value_name = "FILE")]
    image: PathBuf,
    #[command(flatten)]
    site: SiteArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The storm itself.
    Storm,
    /// The storm on a store that shares extents, until the data is in the volumes. Root only.
    Shared,
    /// Hydration during a storm beside fio.
    Disk,
    /// A guest during the storm.
    Guest,
    /// Many volumes replayed with data, beside one nbdkit cache for all.
    Many,
    /// Many volumes replayed with data, beside an nbdkit for each.
    Plain,
    /// One volume replayed with data, beside nbdkit.
    One,
    /// A machine in QEMU.
    Boot,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("storm", measure(&args), args.json.as_deref())
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let mut site = Site::new(&args.site)?;
    // As nbdkit's: all of it is on one machine.
    site.use_unix_sockets()?;
    let reads: Vec<Event> =
        trace::load(Path::new(BOOT_TRACE), IMAGE_BYTES)?.into_iter().filter(|event| event.op == Op::Read).collect();
    println!("{}", machine());
    println!(
        "{} reads in each boot; object store: {} ms, {} MiB/s a connection",
        reads.len(),
        args.site.first_byte_ms,
        args.site.connection_mib
    );
    let (image, kept) = (site.dir().join("import.raw"), site.dir().join("image.raw"));
    boot_image(&image, &reads)?;
    std::fs::hard_link(&image, &kept).map_err(|e| e.to_string())?;
    site.import(&image, "debian")?;
    site.answer(Some(&args.site));
    let bench = Bench { args, site: &site, reads, image: kept };
    let mut figures = Vec::new();
    let parts: [(Part, Measure<'_>); 8] = [
        (Part::Storm, Bench::storm),
        (Part::Shared, Bench::shared),
        (Part::Disk, Bench::disk),
        (Part::Guest, Bench::guest),
        (Part::One, Bench::one),
        (Part::Many, Bench::many),
        (Part::Plain, Bench::plain),
        (Part::Boot, Bench::boot),
    ];
    for (part, measure) in parts {
        if args.only.is_empty() || args.only.contains(&part) {
            measure(&bench, &mut figures)?;
        }
    }
    Ok(figures)
}

type Measure<'a> = fn(&Bench<'a>, &mut Vec<Figure>) -> Result<()>;

struct Bench<'a> {
    args: &'a Args,
    site: &'a Site,
    reads: Vec<Event>,
    /// What every byte that is read must equal.
    image: PathBuf,
}

/// What is asked of a number of volumes, `vm-0` and so on.
struct Asking {
    volumes: u32,
    ask: Ask,
    /// NBD servers to read from instead of the node.
    nbd: Option<Servers>,
    hosts: u32,
    arrivals: Arrivals,
}

impl Bench<'_> {
    /// A node of its own; the file system of its store takes as much hydration each second.
    fn node<T>(&self, hydration: &str, boots: &str, measure: impl FnOnce(&Server) -> Result<T>) -> Result<T> {
        self.node_on(&self.site.dir().join("node/store"), hydration, boots, measure)
    }

    fn node_on<T>(
        &self,
        store: &Path,
        hydration: &str,
        boots: &str,
        measure: impl FnOnce(&Server) -> Result<T>,
    ) -> Result<T> {
        let config = format!(
            "{boots}[[store]]\nlabel = \"store\"\npath = \"{}\"\nhydration_bandwidth = \"{hydration}\"\n",
            store.display()
        );
        self.site.node(&config, measure)
    }

    fn create(&self, server: &Server, volumes: u32, words: &[&str]) -> Result<()> {
        let count = volumes.to_string();
        run(self.site.volley(Some(server), &creation("debian", "vm-", &count))?.args(words))?;
        Ok(())
    }

    /// The boots of some volumes at once, as fast as answers come.
    fn ask(&self, server: &str, asking: Asking, progress: &Progress) -> Result<Report> {
        let reads = asking.ask == Ask::Read;
        let image = reads.then(|| std::fs::File::open(&self.image)).transpose();
        let plan = storm::Plan {
            target: Target { server: server.to_owned(), deadline: Duration::from_secs(300), depth: 1024 },
            nbd: asking.nbd,
            volumes: (0..asking.volumes).map(|number| format!("vm-{number}")).collect(),
            connections: asking.hosts.max(self.args.threads),
            threads: self.args.threads,
            events: self.reads.clone(),
            ask: asking.ask,
            first_touches_only: !reads && !self.args.every_read,
            arrivals: asking.arrivals,
            speed: Speed::Max,
            depth: 1,
            duration: Duration::from_secs(3600),
            verify: image.map_err(|e| format!("{}: {e}", self.image.display()))?,
            seed: 1,
        };
        let report = storm::run(&plan, progress)?;
        report.first_error().map_or(Ok(()), |error| Err(error.to_owned()))?;
        Ok(report)
    }
}
