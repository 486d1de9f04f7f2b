//! volley-agent: on a hypervisor host, every volume of a node as an NBD export of its name.
//!
//! This file only wires: arguments, logs, sockets, signals. The NBD server is `volley_tools::nbd`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::info;
use tracing_subscriber::EnvFilter;
use volley_client::{Client, Options};
use volley_tools::nbd::exports::Exports;
use volley_tools::nbd::listen::{Address, Listener};
use volley_tools::nbd::server;
use volley_tools::nbd::volumes::Volumes;
use volley_tools::units::parse_duration;

// Payloads come and go in sizes for which the C library's allocator asks the kernel anew each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long a stop waits for requests in flight (the server may be away) before it gives them up: below the 30 s after
/// which the systemd unit would kill the agent.
const STOP_WAIT: Duration = Duration::from_secs(20);

/// Serves every volume of a Volley node as an NBD export of its name.
#[derive(Debug, Parser)]
#[command(name = "volley-agent", version)]
struct Args {
    /// Data port of the node.
    #[arg(long, env = "VOLLEY_SERVER", default_value = "127.0.0.1:7400", value_name = "HOST:PORT|unix:PATH")]
    server: String,
    /// Where to serve NBD; may be repeated. Port 0 takes a free port and prints it.
    #[arg(long, required = true, value_name = "unix:PATH|HOST:PORT")]
    nbd: Vec<Address>,
    /// A request that the node has not answered by then fails with an I/O error; a node that restarts within it goes unnoticed.
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = parse_duration)]
    deadline: Duration,
    /// While the node owes an answer, look for it this long before sleeping, because waking up takes longer than a fast disk;
    /// whoever else wants the core has it meanwhile. 0us sleeps at once.
    #[arg(long, default_value = "100us", value_name = "DURATION", value_parser = parse_duration)]
    idle_poll: Duration,
    /// Print the ready message (stdout) and a fatal error (stderr) as JSON.
    #[arg(long)]
    json: bool,
    /// What to log to stderr: error, warn, info, debug, or a filter such as volley_client=debug,info.
    #[arg(long, env = "VOLLEY_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(|error| format!("can't start the I/O runtime: {error}")).and_then(|runtime| {
        let ended = runtime.block_on(run(args));
        // Requests given up at the end of `STOP_WAIT` don't hold the process.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            report(&message, json);
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), String> {
    start_logs(&args.log)?;
    // Before anything is announced: a signal after "ready" always finds its handler.
    let mut signals = Signals::new().map_err(|error| format!("can't handle signals: {error}"))?;
    if args.deadline.is_zero() {
        return Err("--deadline 0s would fail every request: give it at least 1s".to_owned());
    }
    let mut listeners = Vec::with_capacity(args.nbd.len());
    for address in &args.nbd {
        listeners.push(Listener::bind(address).await?);
    }
    let client_name = format!("volley-agent {}", env!("CARGO_PKG_VERSION"));
    let options = Options { client_name, deadline: args.deadline, idle_poll: args.idle_poll, ..Options::default() };
    let connect = Client::connect(&args.server, options);
    let client = tokio::select! {
        client = connect => client.map_err(|error| format!("can't reach the node at {}: {error}", args.server))?,
        () = signals.next() => return Ok(()),
    };
    announce(&args.server, &listeners, args.json);
    let (stop, stopped) = watch::channel(false);
    let serve = server::serve(listeners, Arc::new(Exports::new(Volumes::new(client))), stopped);
    serve_until_signal(serve, signals, &stop).await
}

/// Serves until the first signal, then stops in order within `STOP_WAIT`; a second signal ends the wait.
async fn serve_until_signal(
    serve: impl Future<Output = ()>,
    mut signals: Signals,
    stop: &watch::Sender<bool>,
) -> Result<(), String> {
    tokio::pin!(serve);
    tokio::select! {
        () = &mut serve => return Err("every listener failed".to_owned()),
        () = signals.next() => info!("stopping: finishing what is in flight"),
    }
    stop.send_replace(true);
    tokio::select! {
        () = &mut serve => {
            info!("stopped");
            Ok(())
        }
        () = tokio::time::sleep(STOP_WAIT) => {
            Err(format!("gave up requests that were still in flight after {} s", STOP_WAIT.as_secs()))
        }
        () = signals.next() => Err("gave up requests in flight on a second signal".to_owned()),
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn start_logs(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("--log {filter:?} is not a filter: {error}"))?;
    let stderr = std::io::stderr;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        // A log that can't be written must not end the agent: the complaint would panic.
        .log_internal_errors(false)
        .init();
    Ok(())
}

/// Tells people and scripts that connections are accepted, and where.
fn announce(server: &str, listeners: &[Listener], json: bool) {
    let uris: Vec<&str> = listeners.iter().map(Listener::uri).collect();
    let line = if json {
        serde_json::json!({ "event": "ready", "server": server, "nbd": uris }).to_string()
    } else {
        format!("volley-agent ready: volumes of {server} on {}", uris.join(" "))
    };
    // Whoever closed our stdout doesn't want to know.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn report(message: &str, json: bool) {
    if json {
        eprintln!("{}", serde_json::json!({ "error": { "code": "agent_failed", "message": message } }));
    } else {
        eprintln!("volley-agent: error: {message}");
    }
}
