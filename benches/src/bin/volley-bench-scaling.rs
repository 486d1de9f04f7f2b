//! How a node scales: shards, the way from one shard to another, and connections. Start it with `tools/bench scaling`. What
//! volumes cost is in `tools/bench basics` (memory) and `tools/bench recovery` (start and checkpoint).

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Parser;
use serde_json::Value;
use volley_benches::figure::{Figure, Pair, Publication};
use volley_benches::process::{Result, Server, machine, run, sibling, volley, work_folder};
use volley_protocol::limits::{VERSION_MAX, VERSION_MIN};
use volley_protocol::messages::Hello;
use volley_protocol::{encode, name_tag};

const CONNECTIONS: [u32; 5] = [1, 10, 100, 1000, 10_000];
/// Of those whose memory is measured.
const IDLE_CONNECTIONS: usize = 5000;

/// Measures what more shards, a hop between them, and more connections make of the rate of priority fetches.
#[derive(Debug, Parser)]
#[command(name = "tools/bench scaling")]
struct Args {
    #[command(flatten)]
    publication: Publication,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Most shards that are tried; 0: as many as there are cores.
    #[arg(long, default_value_t = 0)]
    shards: usize,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.publication.conclude("scaling", measure(&args))
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let (_files, dir) = work_folder(&args.dir)?;
    volley_server::bootstrap::raise_open_files();
    println!("{}", machine());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = if args.shards == 0 { cores } else { args.shards };
    std::fs::create_dir_all(dir.join("objects")).map_err(|e| format!("{}: {e}", dir.display()))?;
    let bench = Bench { args, dir };
    let mut figures = Vec::new();
    bench.shards(most, &mut figures)?;
    bench.hop(&mut figures)?;
    bench.connections(&mut figures)?;
    Ok(figures)
}

struct Bench<'a> {
    args: &'a Args,
    dir: PathBuf,
}

impl Bench<'_> {
    /// Measures on a new node with a blank volume for each shard, by their order: all of a blank volume is resident.
    fn on_node<T>(&self, shards: usize, measure: impl FnOnce(&Server, &[String]) -> Result<T>) -> Result<T> {
        let data = self.dir.join("node");
        let objects = self.dir.join("objects");
        let mut command = Command::new(sibling("volleyd")?);
        command.arg("--data").arg(&data).args(["--log", "warn"]);
        command.arg("--object-store").arg(format!("file:{}", objects.display()));
        command.args(["--cores", &shards.to_string(), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        let server = Server::start(command, "volleyd: ready")?;
        let names = (0..shards).map(|shard| {
            let mut names = (0..).map(|number| format!("v{number}"));
            names.find(|name| usize::from(name_tag(name)) % shards == shard).expect("there is no end of names")
        });
        let names: Vec<String> = names.collect();
        for name in &names {
            run(&mut volley(&objects, Some(&server), &["volume", "create", name, "--size", "1GiB"])?)?;
        }
        let measured = measure(&server, &names)?;
        server.stop()?;
        std::fs::remove_dir_all(&data).map_err(|e| e.to_string())?;
        Ok(measured)
    }

    fn fetches(
        &self,
        server: &Server,
        volumes: &[String],
        connections: u32,
        depth: u32,
        words: &[&str],
    ) -> Result<Value> {
        let mut command = Command::new(sibling("volley-load")?);
        command.args(["--server", &server.ready_word("data")?, "--json", "--generator", "wire", "priority-fetch"]);
        command.args(["--connections", &connections.to_string(), "--depth", &depth.to_string()]).args(words);
        command.args(["--duration", &format!("{}s", self.args.seconds)]);
        for name in volumes {
            command.args(["--volume", name]);
        }
        let said: Value = serde_json::from_str(&run(&mut command)?).map_err(|e| format!("volley-load: {e}"))?;
        Ok(said["series"]["priority-fetch"].clone())
    }

    /// The rate with 1, 2, 4, … shards; the generator has as many threads.
    fn shards(&self, most: usize, figures: &mut Vec<Figure>) -> Result<()> {
        let mut counts: Vec<usize> = (0..).map(|power| 1 << power).take_while(|count| *count < most).collect();
        counts.push(most);
        let mut rates = vec![Vec::new(); counts.len()];
        for _ in self.args.publication.runs("shards") {
            for (shards, rates) in counts.iter().zip(&mut rates) {
                let threads = shards.to_string();
                rates.push(self.on_node(*shards, |server, names| {
                    let said = self.fetches(server, names, 64, 64, &["--threads", &threads])?;
                    number(&said["requests_per_second"])
                })?);
            }
        }
        for (shards, ours) in counts.iter().zip(&rates) {
            let pairs: Vec<Pair> = ours.iter().zip(&rates[0]).map(|(&ours, &peer)| Pair { ours, peer }).collect();
            figures.push(Figure::against(&format!("fetch_{shards}_shards"), "1/s", "one shard", &pairs));
        }
        Ok(())
    }

    /// One request at a time, of a volume that another shard owns, beside one of the shard that is asked.
    fn hop(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut pairs, mut random) = (Vec::new(), Vec::new());
        for _ in self.args.publication.runs("hop") {
            self.on_node(2, |server, names| {
                let p50 = |volumes: &[String]| {
                    number(&self.fetches(server, volumes, 1, 1, &["--any-shard"])?["latency_us"]["p50"])
                };
                pairs.push(Pair { ours: p50(&names[1..])?, peer: p50(&names[..1])? });
                let rate = |words: &[&str]| number(&self.fetches(server, names, 50, 16, words)?["requests_per_second"]);
                random.push(Pair { ours: rate(&["--any-shard"])?, peer: rate(&[])? });
                Ok(())
            })?;
        }
        let peer = "the same of a volume of the shard that is asked";
        figures.push(Figure::cost("fetch_latency_other_shard", "us", peer, &pairs));
        let peer = "a client that asks the shard that owns the volume";
        figures.push(Figure::against("fetch_any_shard", "1/s", peer, &random));
        Ok(())
    }

    fn connections(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let mut measured = vec![(Vec::new(), Vec::new()); CONNECTIONS.len()];
        let mut bytes = Vec::new();
        for _ in self.args.publication.runs("connections") {
            self.on_node(1, |server, names| {
                for (count, (rates, p99)) in CONNECTIONS.iter().zip(&mut measured) {
                    let said = self.fetches(server, names, *count, 1, &[])?;
                    rates.push(number(&said["requests_per_second"])?);
                    p99.push(number(&said["latency_us"]["p99"])?);
                }
                Ok(())
            })?;
            bytes.push(self.on_node(1, |server, _| idle_connection_bytes(server))?);
        }
        for (count, (rates, p99)) in CONNECTIONS.iter().zip(&measured) {
            figures.push(Figure::alone(&format!("fetch_{count}_connections"), "1/s", rates));
            figures.push(Figure::alone(&format!("fetch_{count}_connections_p99"), "us", p99));
        }
        figures.push(Figure::alone("bytes_per_idle_connection", "B", &bytes));
        Ok(())
    }
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().ok_or_else(|| "volley-load's JSON lacks a number".to_owned())
}

/// What the server's memory grows by with each connection that has greeted and asks nothing.
fn idle_connection_bytes(server: &Server) -> Result<f64> {
    let address = server.ready_word("data")?;
    let mut hello = Vec::new();
    let body = Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, features: 0, client: "bench".into() };
    encode::request(&mut hello, 1, 0, &body, &[]);
    let connect = || {
        let mut stream = TcpStream::connect(&address)?;
        stream.write_all(&hello)?;
        // The first byte of the answer: it has greeted.
        stream.read_exact(&mut [0; 1])?;
        Ok::<_, std::io::Error>(stream)
    };
    let said = |e: std::io::Error| format!("connection: {e}");
    let _first: Vec<TcpStream> = (0..10).map(|_| connect()).collect::<std::io::Result<_>>().map_err(said)?;
    let before = server.resident_bytes()?;
    let _idle: Vec<TcpStream> =
        (0..IDLE_CONNECTIONS).map(|_| connect()).collect::<std::io::Result<_>>().map_err(said)?;
    Ok(server.resident_bytes()?.saturating_sub(before) as f64 / IDLE_CONNECTIONS as f64)
}
