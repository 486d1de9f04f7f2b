//! volley-load: measures the data port of a node under load of a known shape, always bounded in time and number.
//!
//! This file only understands the command line; the loads are `volley_tools::load`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use volley_client::FetchUntil;
use volley_tools::load::addresses::Order;
use volley_tools::load::nbd::{self, Servers};
use volley_tools::load::replay::{self, Speed};
use volley_tools::load::report::Report;
use volley_tools::load::storm::{self, Arrivals, Ask, Progress};
use volley_tools::load::workload::{self, Kind};
use volley_tools::load::{Target, create, curves, trace, wire};
use volley_tools::units::{format_size, parse_duration, parse_size};

// Payloads come and go in sizes for which the C library's allocator asks the kernel anew each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Duration where neither --duration nor --count is given.
const DURATION_DEFAULT: Duration = Duration::from_secs(10);
/// Even a load bounded by its count ends after this.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// Measures the data port of a Volley node. Attaches the volumes it uses: whoever has them attached is fenced off.
#[derive(Debug, Parser)]
#[command(name = "volley-load", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Args)]
struct Globals {
    /// Data port of the node.
    #[arg(
        long,
        global = true,
        env = "VOLLEY_SERVER",
        default_value = "127.0.0.1:7400",
        value_name = "HOST:PORT|unix:PATH"
    )]
    server: String,
    /// Volume to use; may be repeated.
    #[arg(long, global = true, value_name = "NAME")]
    volume: Vec<String>,
    /// Use every volume whose name starts so.
    #[arg(long, global = true, value_name = "PREFIX", conflicts_with = "volume")]
    prefix: Option<String>,
    /// Clients with connections of their own; each needs a volume of its own.
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    connections: u32,
    /// Requests in flight on each connection.
    #[arg(long, global = true, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    depth: u32,
    /// Threads that generate the load [default: one for each of --cores].
    #[arg(long, global = true, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Option<u32>,
    /// Cores of these threads.
    #[arg(long, global = true, value_name = "CORE,...", value_delimiter = ',')]
    cores: Vec<usize>,
    /// Who makes the requests: the client that agents use, or a generator that speaks the wire protocol itself and costs
    /// little (priority-fetch, read, write, mixed).
    #[arg(long, global = true, value_enum, default_value_t = Generator::Client)]
    generator: Generator,
    /// Open loop: so many requests per second, with latencies from the time each was due. Needs --generator wire; --depth
    /// bounds what is in flight on a connection.
    #[arg(long, global = true, value_name = "PER_SECOND", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Ask any shard for any volume instead of the one that owns it. Needs --generator wire.
    #[arg(long, global = true)]
    any_shard: bool,
    /// Which blocks: uniform, sequential, or zipf:THETA.
    #[arg(long, global = true, default_value = "uniform", value_name = "ORDER")]
    addresses: Order,
    /// Tell the processor time that this process, the server's, spends on each request.
    #[arg(long, global = true, value_name = "PID")]
    server_pid: Option<u32>,
    /// Bytes of each request (not of replay and storm).
    #[arg(long, global = true, default_value = "4KiB", value_name = "SIZE", value_parser = parse_block)]
    block: u32,
    /// Start no request later than this [default: 10s, or unlimited with --count, for replay and storm].
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse_duration)]
    duration: Option<Duration>,
    /// Make at most so many requests (not of replay and storm).
    #[arg(long, global = true, value_name = "N")]
    count: Option<u64>,
    /// A request without an answer by then counts as failed.
    #[arg(long, global = true, default_value = "60s", value_name = "DURATION", value_parser = parse_duration)]
    deadline: Duration,
    /// Choose other blocks.
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    /// Print the result (stdout) and a fatal error (stderr) as JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Write the result as an HTML page with latency curves into FILE, too.
    #[arg(long, global = true, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Priority fetches of blocks.
    PriorityFetch {
        /// When a fetch is answered.
        #[arg(long, value_enum, default_value_t = Until::Resident)]
        until: Until,
    },
    /// Reads of blocks.
    Read,
    /// Writes of blocks. OVERWRITES the volumes with patterns.
    Write {
        /// Each write is durable before it is answered.
        #[arg(long)]
        fua: bool,
    },
    /// Reads and writes of blocks. OVERWRITES the volumes with patterns.
    Mixed {
        /// So many percent are reads.
        #[arg(long, default_value_t = 70, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
        reads: u8,
    },
    /// Connect and greet, again and again, on each volume's behalf one at a time.
    Connect,
    /// Volumes made by single requests to the HTTP API, --depth at a time, and deleted afterwards.
    Create(CreateArgs),
    /// Connect, attach, read a block, detach; again and again, one at a time on each volume.
    Churn,
    /// Replays a trace through one volume. OVERWRITES the volume where the trace writes.
    Replay {
        /// CSV with the head us,op,offset,length.
        #[arg(long, value_name = "FILE.csv")]
        trace: PathBuf,
        /// Recorded times are divided by this; max does not wait at all.
        #[arg(long, default_value = "1", value_name = "X|max")]
        speed: Speed,
        /// Compare every read with this raw image.
        #[arg(long, value_name = "IMAGE.raw")]
        verify: Option<PathBuf>,
    },
    /// Boots many volumes: each is asked for what a recorded boot reads. Writes nothing.
    Storm(StormArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// HTTP address of the node.
    #[arg(long, default_value = "127.0.0.1:7480", value_name = "HOST[:PORT]")]
    http: String,
    /// Snapshot with the content; without one the volumes are blank.
    #[arg(long)]
    snapshot: Option<String>,
    /// Size of blank volumes.
    #[arg(long, default_value = "1GiB", value_name = "SIZE", value_parser = parse_size)]
    size: u64,
    /// What the volumes' names start with; no volume may have such a name.
    #[arg(long, default_value = "load-")]
    name_prefix: String,
    /// Leave the volumes there.
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
struct StormArgs {
    /// CSV with the head us,op,offset,length; only its reads are asked for.
    #[arg(long, value_name = "FILE.csv")]
    trace: PathBuf,
    /// Priority fetches, answered when the data is so far, instead of reads.
    #[arg(long, value_enum, value_name = "UNTIL", conflicts_with = "verify")]
    fetch: Option<Until>,
    /// Read from these NBD servers, each volume from the export of its name; %s in the address stands for that name.
    #[arg(long, value_name = "unix:PATH|HOST:PORT", conflicts_with_all = ["fetch", "volume_depth"])]
    nbd: Option<Servers>,
    /// Ask only for what touches a chunk that was not asked for before, as a host does that remembers what was answered.
    #[arg(long)]
    first_touches: bool,
    /// When the volumes start: at-once, ramp:DURATION, or poisson:PER_SECOND.
    #[arg(long, default_value = "at-once", value_name = "PATTERN")]
    arrivals: Arrivals,
    /// Recorded times are divided by this; max does not wait at all.
    #[arg(long, default_value = "1", value_name = "X|max")]
    speed: Speed,
    /// Requests in flight of each volume.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    volume_depth: u32,
    /// Compare every read with this raw image.
    #[arg(long, value_name = "IMAGE.raw")]
    verify: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Generator {
    Client,
    Wire,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Until {
    Readable,
    Resident,
    Durable,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.globals.json;
    match run(&cli).and_then(|report| write_page(&cli, report)) {
        Ok(report) => finish(&report, json),
        Err(message) if json => {
            eprintln!("{}", serde_json::json!({ "error": { "code": "load_failed", "message": message } }));
            ExitCode::FAILURE
        }
        Err(message) => {
            eprintln!("volley-load: error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn write_page(cli: &Cli, report: Report) -> Result<Report, String> {
    if let Some(path) = &cli.globals.report {
        std::fs::write(path, curves::html(&report)).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(report)
}

fn run(cli: &Cli) -> Result<Report, String> {
    let kind = match &cli.workload {
        Workload::PriorityFetch { until } => Kind::PriorityFetch(fetch_until(*until)),
        Workload::Read => Kind::Read,
        Workload::Write { fua } => Kind::Write { fua: *fua },
        Workload::Mixed { reads } => Kind::Mixed { read_percent: *reads },
        Workload::Churn => Kind::Churn,
        Workload::Create(args) => return run_create(&cli.globals, args),
        Workload::Connect => Kind::Connect,
        Workload::Replay { trace, speed, verify } => {
            return block_on(run_replay(&cli.globals, trace, *speed, verify.as_deref()))?;
        }
        Workload::Storm(storm) => return run_storm(&cli.globals, storm),
    };
    let globals = &cli.globals;
    let volumes = block_on(volumes(globals))??;
    let plan = workload::Plan {
        target: target(globals),
        kind,
        volumes,
        connections: globals.connections,
        threads: threads(globals),
        block_bytes: globals.block,
        order: globals.addresses,
        duration: duration(globals),
        count: globals.count.unwrap_or(u64::MAX),
        seed: globals.seed,
        rate: globals.rate,
        any_shard: globals.any_shard,
        cores: globals.cores.clone(),
        server_pid: globals.server_pid,
    };
    match globals.generator {
        Generator::Wire => wire::run(&plan),
        Generator::Client if plan.rate.is_some() || plan.any_shard => {
            Err("--rate and --any-shard need --generator wire".to_owned())
        }
        Generator::Client => workload::run(&plan),
    }
}

fn run_create(globals: &Globals, args: &CreateArgs) -> Result<Report, String> {
    create::run(&create::Plan {
        http: args.http.clone(),
        snapshot: args.snapshot.clone(),
        size_bytes: args.size,
        prefix: args.name_prefix.clone(),
        depth: globals.depth,
        duration: duration(globals),
        count: globals.count.unwrap_or(u64::MAX),
        keep: args.keep,
        server_pid: globals.server_pid,
    })
}

fn duration(globals: &Globals) -> Duration {
    let limit = if globals.count.is_some() { DURATION_MAX } else { DURATION_DEFAULT };
    globals.duration.unwrap_or(limit).min(DURATION_MAX)
}

fn threads(globals: &Globals) -> u32 {
    globals.threads.unwrap_or(globals.cores.len().max(1) as u32)
}

async fn run_replay(
    globals: &Globals,
    path: &std::path::Path,
    speed: Speed,
    verify: Option<&std::path::Path>,
) -> Result<Report, String> {
    let names = volumes(globals).await?;
    let [name] = &names[..] else {
        return Err(format!("replay works on one volume, not {}: name it with --volume", names.len()));
    };
    let failed = |error: volley_client::Error| format!("volume {name}: {error}");
    let client = target(globals).connect().await?;
    let size_bytes = client.lookup(name).await.map_err(failed)?.size_bytes;
    // Bad input is refused before anybody is fenced.
    let events = trace::load(path, size_bytes)?;
    let image = verify.map(|path| replay::open_image(path, size_bytes)).transpose()?;
    let volume = client.attach(name).await.map_err(failed)?;
    let duration = globals.duration.unwrap_or(DURATION_MAX).min(DURATION_MAX);
    let depth = globals.depth as usize;
    let plan = replay::Plan { events: &events, speed, depth, duration, verify: image.as_ref() };
    let report = replay::run(&volume, &plan).await;
    volume.detach().await.map_err(failed)?;
    Ok(report)
}

fn run_storm(globals: &Globals, args: &StormArgs) -> Result<Report, String> {
    let (names, size_bytes) = block_on(async {
        let names = volumes(globals).await?;
        let first = &names[0];
        let size = match &args.nbd {
            Some(servers) => nbd::Disk::open(&servers.of(first)?, first, globals.deadline).await?.size_bytes(),
            None => {
                let found = target(globals).connect().await?.lookup(first).await;
                found.map_err(|error| format!("volume {first}: {error}"))?.size_bytes
            }
        };
        Ok::<_, String>((names, size))
    })??;
    let plan = storm::Plan {
        target: target(globals),
        nbd: args.nbd.clone(),
        volumes: names,
        connections: globals.connections,
        threads: threads(globals),
        events: trace::load(&args.trace, size_bytes)?,
        ask: args.fetch.map_or(Ask::Read, |until| Ask::Fetch(fetch_until(until))),
        first_touches_only: args.first_touches,
        arrivals: args.arrivals,
        speed: args.speed,
        depth: args.volume_depth as usize,
        duration: globals.duration.unwrap_or(DURATION_MAX).min(DURATION_MAX),
        verify: args.verify.as_deref().map(|path| replay::open_image(path, size_bytes)).transpose()?,
        seed: globals.seed,
    };
    let progress = Arc::new(Progress::default());
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let shown = (std::io::stderr().is_terminal() && !globals.json).then(|| {
        let (progress, count) = (Arc::clone(&progress), plan.volumes.len() as u64);
        std::thread::spawn(move || show(&progress, count, &ended))
    });
    let report = storm::run(&plan, &progress);
    drop(end);
    // It ends by itself, and shows nothing that matters.
    let _ = shown.map(std::thread::JoinHandle::join);
    report
}

/// Shows a storm's progress on a terminal until it ends.
fn show(progress: &Progress, volumes: u64, ended: &std::sync::mpsc::Receiver<()>) {
    let style = ProgressStyle::with_template("{elapsed_precise} {bar:30} {pos}/{len} booted  {msg}");
    let bar = ProgressBar::new(volumes).with_style(style.expect("a valid template"));
    let begun = Instant::now();
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(Duration::from_millis(250)) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = begun.elapsed().as_secs_f64();
        let (requests, bytes) = (count(&progress.requests) as f64 / seconds, count(&progress.bytes) as f64 / seconds);
        let (attached, errors) = (count(&progress.attached), count(&progress.errors));
        let rate = format_size(bytes as u64);
        bar.set_message(format!("{attached} attached  {requests:.0} requests/s  {rate}/s  {errors} errors"));
        bar.set_position(count(&progress.finished));
    }
    bar.finish_and_clear();
}

/// Names of the volumes to use.
async fn volumes(globals: &Globals) -> Result<Vec<String>, String> {
    let Some(prefix) = &globals.prefix else {
        if globals.volume.is_empty() {
            return Err("no volume given: name one with --volume, or several with --prefix".to_owned());
        }
        return Ok(globals.volume.clone());
    };
    let client = target(globals).connect().await?;
    let mut names = client.volumes().await.map_err(|error| format!("listing the volumes failed: {error}"))?;
    names.retain(|name| name.starts_with(prefix.as_str()));
    if names.is_empty() { Err(format!("no volume's name starts with {prefix:?}")) } else { Ok(names) }
}

fn target(globals: &Globals) -> Target {
    Target { server: globals.server.clone(), deadline: globals.deadline, depth: globals.depth }
}

fn fetch_until(until: Until) -> FetchUntil {
    match until {
        Until::Readable => FetchUntil::Readable,
        Until::Resident => FetchUntil::Resident,
        Until::Durable => FetchUntil::Durable,
    }
}

fn parse_block(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text)?;
    match u32::try_from(bytes) {
        Ok(block) if block.is_multiple_of(512) && (512..=32 << 20).contains(&block) => Ok(block),
        _ => Err(format!("{text:?} is not a block size: a multiple of 512 B, at most 32 MiB")),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| format!("{text:?} is not a number of requests per second"))
}

fn block_on<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| format!("can't start a runtime: {error}"))?.block_on(future))
}

/// Prints the report; a load with failed requests is a failure.
fn finish(report: &Report, json: bool) -> ExitCode {
    let text = if json { format!("{}\n", report.to_json()) } else { report.to_string() };
    // Whoever closed our stdout doesn't want to know.
    let _ = std::io::stdout().write_all(text.as_bytes());
    if report.errors() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
