//! The storage server's program: parse, wire, run, stop.
#![allow(clippy::disallowed_methods)] // The main thread is the control thread, outside of the platform seam.

use std::io::{IsTerminal, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use volley_server::bootstrap::{self, Node, NodeConfig};
use volley_server::config::{Config, Overrides};
use volley_server::control::{self, Control, Settings};
use volley_server::datadir::DataDir;
use volley_server::notify;
use volley_server::units::parse_duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Volley storage server: serves volumes to hypervisor hosts and hydrates them from the object store.
#[derive(Debug, Parser)]
#[command(name = "volleyd", version)]
struct Args {
    /// Configuration file (TOML). Options override what it says.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data directory: identity, journals and volumes of this node.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Object store with the snapshots: file:/var/lib/volley/objects or s3://BUCKET/PREFIX.
    #[arg(long, env = "VOLLEY_OBJECT_STORE", value_name = "URL")]
    object_store: Option<String>,
    /// Data port of shard 0: host:port or unix:PATH. Shard k listens on port + k. Port 0 picks free ports.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// HTTP API: host:port. Port 0 picks a free port.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Number of shards; 0 for one per core.
    #[arg(long, value_name = "N")]
    cores: Option<usize>,
    /// Volume store; may be repeated, and then replaces the stores of the configuration.
    #[arg(long = "store", value_name = "LABEL=PATH")]
    stores: Vec<String>,
    /// Log filter: error, warn, info, debug, trace, or per module.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Log guest reads of absent data that take longer, with their stages: queue, transfer, verification.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    trace_slow: Option<Duration>,
    /// Print the configuration that would be used, with every default and what it means, and exit.
    #[arg(long)]
    print_config: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(std::io::stderr(), "volleyd: error: {line}");
            ExitCode::FAILURE
        }
    }
}

/// A shard that panicked would answer nobody, and its volumes' guests would wait: the process ends instead, and the next start
/// finds everything that was acknowledged.
fn end_with_any_shard() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        if std::thread::current().name().is_some_and(|name| name.starts_with("volley-")) {
            std::process::abort();
        }
    }));
}

fn run(args: Args) -> Result<(), String> {
    let Args { config, data, object_store, listen, http, cores, stores, log, trace_slow, print_config } = args;
    let overrides = Overrides { data, object_store, listen, http, cores, log, trace_slow, stores };
    let config = Config::load(config.as_deref(), &overrides).map_err(|e| e.to_string())?;
    if print_config {
        return say(&config.to_toml());
    }
    start_log(&config.log)?;
    end_with_any_shard();
    let missing = "no object store: give --object-store file:DIR or s3://BUCKET/PREFIX, set VOLLEY_OBJECT_STORE, or object_store in --config";
    let object_store = config.object_store.clone().ok_or(missing)?;
    bootstrap::raise_open_files();
    let mut data = DataDir::open(&config.data, &config.stores()).map_err(|e| e.to_string())?;
    let http = TcpListener::bind(&config.http).map_err(|e| format!("can't listen on http {}: {e}", config.http))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("can't start the control thread: {e}"))?;
    let mut signals = Signals::install(&runtime)?;
    let node = NodeConfig::new(&config, &data).map_err(|e| e.to_string())?;
    let object_store_choice = Some(node.object_store.clone());
    let node = bootstrap::start(node).map_err(|e| e.to_string())?;
    data.remember_journal().map_err(|e| e.to_string())?;
    let control = Control::new(Settings {
        node_id: data.node_id,
        data: data.path.clone(),
        object_store,
        object_store_choice,
        snapshot_bandwidth: config.snapshots.bandwidth.0,
        scrub_bandwidth: Some(config.snapshots.scrub_bandwidth.0).filter(|bytes| *bytes > 0),
        scrub_pause: Some(config.snapshots.scrub_pause.0),
        gc_every: Some(config.snapshots.gc_every.0).filter(|every| !every.is_zero()),
        stores: data.stores.clone(),
        default_rate: config.hydration.default_rate,
        overcommit: config.placement.overcommit,
        measure: Arc::new(control::measure),
        price_per_million_gets: config.transfer.price_per_million_gets,
        commands: node.commands.clone(),
        addresses: node.addresses.clone(),
    });
    announce(&node, &http)?;
    let served = runtime.block_on(control.serve(http, signals.next()));
    notify::state("STOPPING=1");
    tracing::info!("stopping");
    let stopped = runtime.block_on(async {
        tokio::select! {
            stopped = control.stop_shards(config.deadlines.stop.0) => stopped,
            () = signals.next() => Err("stopped by a second signal before the shards had finished".to_string()),
        }
    });
    served.map_err(|e| format!("the HTTP API failed: {e}"))?;
    stopped?;
    node.join().map_err(|e| e.to_string())?;
    tracing::info!("stopped");
    Ok(())
}

/// Said once everything listens; scripts wait for this line and read the chosen ports from it.
fn announce(node: &Node, http: &TcpListener) -> Result<(), String> {
    let http = http.local_addr().map_err(|e| format!("can't listen on http: {e}"))?;
    let data = node.addresses.first().map(String::as_str).unwrap_or_default();
    say(&format!("volleyd: ready: data {data}, http {http}, shards {}\n", node.addresses.len()))?;
    tracing::info!(data, %http, shards = node.addresses.len(), "ready");
    notify::state("READY=1");
    Ok(())
}

/// A reader of stdout that has gone away must not stop a server.
fn say(text: &str) -> Result<(), String> {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(format!("can't write to stdout: {e}")),
        _ => Ok(()),
    }
}

fn start_log(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log: {filter:?} is not a log filter: {e}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // A log that can't be written must not end the server: the complaint would panic.
        .log_internal_errors(false)
        .init();
    Ok(())
}

/// The signals that mean: stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install(runtime: &Runtime) -> Result<Signals, String> {
        let _context = runtime.enter();
        let install = |kind| signal(kind).map_err(|e| format!("can't handle signals: {e}"));
        Ok(Signals { terminate: install(SignalKind::terminate())?, interrupt: install(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
