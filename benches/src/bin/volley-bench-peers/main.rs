//! A node beside what one would use instead, in the same run: Redis, the floor, fio, qemu-nbd, qemu-storage-daemon, nbdkit,
//! and the tools that do what hydration does. Start it with `tools/bench peers`, which builds everything it runs.
//!
//! The server has one core and whoever asks it the other, and so have the peers: who works on a file itself, as a server does, has the
//! server's.

mod ram;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use serde_json::Value;
use volley_benches::figure::{Figure, Pair, Publication};
use volley_benches::fio;
use volley_benches::process::{Result, Server, machine, on_core, only_volume_file, run, sibling, volley, work_folder};

/// Core of every server, and of every client.
const SERVER_CORE: usize = 0;
const CLIENT_CORE: usize = 1;
const CONNECTIONS: u32 = 50;
/// Of the figure with as many connections as hosts.
const MANY_CONNECTIONS: u32 = 6000;
const VOLUMES: u32 = 4;

/// Measures one node beside its peers.
#[derive(Debug, Parser)]
#[command(name = "tools/bench peers")]
struct Args {
    #[command(flatten)]
    publication: Publication,
    /// Only these parts: fetch, nbd, device, ram, flush, cpu.
    #[arg(long, value_name = "PART,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Size of the disk image in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..=65536))]
    image_mib: u32,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.publication.conclude("peers", measure(&args))
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let (_files, dir) = work_folder(&args.dir)?;
    let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
    println!("{}", machine());
    let image = dir.join("image.raw");
    volley_benches::full_image(&image, args.image_mib, 1)?;
    let bench = Bench { args, dir, sockets: sockets.path().to_owned() };
    run(&mut bench.volley(None, &["image", "import", &image.display().to_string(), "--name", "bench"])?)?;
    let parts: [(&str, Part<'_>); 6] = [
        ("fetch", Bench::fetch),
        ("nbd", Bench::nbd),
        ("device", Bench::device),
        ("ram", Bench::ram),
        ("flush", Bench::flush),
        ("cpu", Bench::cpu),
    ];
    if let Some(unknown) = args.only.iter().find(|only| parts.iter().all(|(name, _)| name != only)) {
        return Err(format!("--only {unknown}: the parts are fetch, nbd, device, ram, flush, cpu"));
    }
    let mut figures = Vec::new();
    for (name, part) in parts {
        if args.only.is_empty() || args.only.iter().any(|only| only == name) {
            part(&bench, &mut figures)?;
        }
    }
    Ok(figures)
}

type Part<'a> = fn(&Bench<'a>, &mut Vec<Figure>) -> Result<()>;

struct Bench<'a> {
    args: &'a Args,
    dir: PathBuf,
    sockets: PathBuf,
}

/// A node with hydrated volumes v0, v1, ….
struct Node {
    server: Server,
    data: PathBuf,
}

impl Node {
    fn stop(self) -> Result<()> {
        self.server.stop()?;
        std::fs::remove_dir_all(&self.data).map_err(|e| format!("{}: {e}", self.data.display()))
    }
}

impl Bench<'_> {
    fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    fn volley(&self, server: Option<&Server>, words: &[&str]) -> Result<Command> {
        volley(&self.objects(), server, words)
    }

    fn bare_node(&self, listen: &str) -> Result<Node> {
        let data = self.dir.join("node");
        let mut command = on_core(Some(SERVER_CORE), sibling("volleyd")?);
        command.arg("--data").arg(&data).args(["--cores", "1", "--log", "warn"]);
        command.arg("--object-store").arg(format!("file:{}", self.objects().display()));
        command.args(["--listen", listen, "--http", "127.0.0.1:0"]);
        Ok(Node { server: Server::start(command, "volleyd: ready")?, data })
    }

    fn node(&self, listen: &str, volumes: u32) -> Result<Node> {
        let node = self.bare_node(listen)?;
        for number in 0..volumes {
            self.hydrate(&node, &format!("v{number}"))?;
        }
        Ok(node)
    }

    fn hydrate(&self, node: &Node, name: &str) -> Result<()> {
        let create = ["volume", "create", name, "--snapshot", "bench", "--rate", "unlimited"];
        run(&mut self.volley(Some(&node.server), &create)?)?;
        run(&mut self.volley(Some(&node.server), &["volume", "wait", name, "--hydrated"])?)?;
        Ok(())
    }

    /// What the generator says of a load.
    fn load(&self, server: &Server, words: &[&str]) -> Result<Value> {
        let mut command = on_core(Some(CLIENT_CORE), sibling("volley-load")?);
        command.args(["--server", &server.ready_word("data")?, "--json"]).args(words);
        command.args(["--duration", &format!("{}s", self.args.seconds)]);
        serde_json::from_str(&run(&mut command)?).map_err(|e| format!("volley-load: {e}"))
    }

    fn fetches(&self, server: &Server, connections: u32, depth: u32) -> Result<Fetches> {
        let (connections, depth) = (connections.to_string(), depth.to_string());
        let names: Vec<String> = (0..VOLUMES).flat_map(|n| ["--volume".to_owned(), format!("v{n}")]).collect();
        let mut words = vec!["priority-fetch", "--generator", "wire"];
        words.extend(["--connections", &connections, "--depth", &depth]);
        words.extend(names.iter().map(String::as_str));
        let said = self.load(server, &words)?;
        let series = &said["series"]["priority-fetch"];
        Ok(Fetches {
            rate: number(&series["requests_per_second"])?,
            p50_us: number(&series["latency_us"]["p50"])?,
            p99_us: number(&series["latency_us"]["p99"])?,
        })
    }

    /// Priority fetches of resident chunks.
    fn fetch(&self, figures: &mut Vec<Figure>) -> Result<()> {
        for (kind, listen) in [("", "127.0.0.1:0".to_owned()), ("_unix", self.unix("data"))] {
            let node = self.node(&listen, VOLUMES)?;
            let redis = self.redis()?;
            for depth in [16, 64, 256] {
                let name = format!("priority_fetch{kind}_p{depth}_vs_redis");
                let mut pairs = Vec::new();
                for _ in self.args.publication.runs(&name) {
                    let ours = self.fetches(&node.server, CONNECTIONS, depth)?.rate;
                    pairs.push(Pair { ours, peer: self.redis_gets(&redis, kind == "_unix", depth, ours)? });
                }
                let way = if kind.is_empty() { "TCP" } else { "unix socket" };
                let peer = format!("redis-server, redis-benchmark -t get -c {CONNECTIONS} -P {depth}, {way}");
                figures.push(Figure::against(&name, "1/s", &peer, &pairs));
            }
            drop(redis.server);
            if kind.is_empty() {
                self.beside_the_floor(&node, figures)?;
            }
            node.stop()?;
        }
        Ok(())
    }

    fn beside_the_floor(&self, node: &Node, figures: &mut Vec<Figure>) -> Result<()> {
        let floor = Server::start(on_core(Some(SERVER_CORE), sibling("volley-floor")?), "floor ready")?;
        let peer = "a glommio echo of the same frames";
        let (mut deep, mut alone, mut many, mut fair) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in self.args.publication.runs("priority_fetch_vs_floor") {
            let pair = |connections, depth| {
                Ok::<_, String>((
                    self.fetches(&node.server, connections, depth)?,
                    self.fetches(&floor, connections, depth)?,
                ))
            };
            let (ours, least) = pair(CONNECTIONS, 64)?;
            deep.push(Pair { ours: ours.rate, peer: least.rate });
            let (ours, least) = pair(1, 1)?;
            alone.push(Pair { ours: ours.p50_us, peer: least.p50_us });
            let (ours, least) = pair(MANY_CONNECTIONS, 1)?;
            many.push(Pair { ours: ours.rate, peer: least.rate });
            fair.push(ours.p99_us / ours.p50_us);
        }
        figures.push(Figure::against("priority_fetch_vs_floor", "1/s", peer, &deep));
        figures.push(Figure::cost("priority_fetch_latency_vs_floor", "us", peer, &alone));
        figures.push(Figure::against("priority_fetch_6000_connections_vs_floor", "1/s", peer, &many));
        figures.push(Figure::alone("priority_fetch_6000_connections_p99_over_p50", "", &fair));
        Ok(())
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.sockets.join(format!("{name}.sock")).display())
    }

    fn redis(&self) -> Result<Redis> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = port.map_err(|e| format!("no free port: {e}"))?.port().to_string();
        let socket = self.sockets.join("redis.sock");
        let mut command = on_core(Some(SERVER_CORE), "redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"]);
        command.arg("--unixsocket").arg(&socket);
        let redis = Redis { server: Server::start(command, "eady to accept connections")?, port, socket };
        run(Command::new("redis-cli").args(["-p", &redis.port, "set", "key:__rand_int__", "xxx"]))?;
        Ok(redis)
    }

    /// GETs per second; as many as take about as long as ours did.
    fn redis_gets(&self, redis: &Redis, unix: bool, depth: u32, ours: f64) -> Result<f64> {
        let mut command = on_core(Some(CLIENT_CORE), "redis-benchmark");
        let count = (ours / 2.0 * f64::from(self.args.seconds)) as u64;
        command.args(["-t", "get", "-c", &CONNECTIONS.to_string(), "-P", &depth.to_string(), "-n", &count.to_string()]);
        if unix {
            command.arg("-s").arg(&redis.socket);
        } else {
            command.args(["-p", &redis.port]);
        }
        let said = run(command.arg("--csv"))?;
        let line = said.lines().find(|line| line.starts_with("\"GET\"")).ok_or("redis-benchmark tells no GET")?;
        let rate = line.split(',').nth(1).map(|field| field.trim_matches('"'));
        rate.and_then(|rate| rate.parse().ok()).ok_or_else(|| format!("redis-benchmark: {line}"))
    }

    /// 4 KiB requests through the agent over NBD, beside the better of those who serve such a file with direct I/O, and
    /// one who serves it from the page cache.
    fn nbd(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let node = self.node(&self.unix("data"), 1)?;
        let socket = self.sockets.join("agent.sock");
        let mut command = on_core(Some(CLIENT_CORE), sibling("volley-agent")?);
        command.args(["--server", &node.server.ready_word("data")?, "--log", "warn"]);
        command.args(["--nbd", &format!("unix:{}", socket.display())]);
        let agent = Server::start(command, "ready")?;
        let copy = self.dir.join("peer.raw");
        run(Command::new("cp").arg("--sparse=never").arg(only_volume_file(&node.data)?).arg(&copy))?;
        run(Command::new("sync").arg(&copy))?;
        let peers =
            ["qemu-nbd", "qemu-storage-daemon", "nbdkit"].map(|name| (name, self.sockets.join(format!("{name}.sock"))));
        let servers = peers.each_ref().map(|(name, socket)| nbd_server(name, &copy, socket));
        let servers: Vec<Server> = servers.into_iter().collect::<Result<_>>()?;
        for (rw, depth) in [("read", 1), ("read", 32), ("write", 1), ("write", 32)] {
            let name = format!("nbd_{rw}4k_qd{depth}_vs_best");
            let (mut direct, mut cached, mut wins) = (Vec::new(), Vec::new(), [0; 2]);
            for _ in self.args.publication.runs(&name) {
                let ours = self.fio_nbd(&socket, "v0", rw, depth)?;
                let rates = peers.iter().map(|(_, socket)| self.fio_nbd(socket, "v0", rw, depth));
                let rates: Vec<f64> = rates.collect::<Result<_>>()?;
                let best = usize::from(rates[1] > rates[0]);
                wins[best] += 1;
                direct.push(Pair { ours, peer: rates[best] });
                cached.push(Pair { ours, peer: rates[2] });
            }
            let peer = format!(
                "the better of each run, both with direct I/O on such a file: qemu-nbd {}, qemu-storage-daemon {}",
                wins[0], wins[1]
            );
            figures.push(Figure::against(&name, "IOPS", &peer, &direct));
            let peer = "nbdkit file cache=none, which has no direct I/O: reads and writes of the page cache";
            figures.push(Figure::against(&format!("nbd_{rw}4k_qd{depth}_vs_page_cache"), "IOPS", peer, &cached));
        }
        drop(servers);
        agent.stop()?;
        std::fs::remove_file(&copy).map_err(|e| e.to_string())?;
        node.stop()
    }

    fn fio_nbd(&self, socket: &Path, export: &str, rw: &str, depth: u32) -> Result<f64> {
        let mut command = on_core(Some(CLIENT_CORE), "fio");
        command.args(["--name=r", "--ioengine=nbd", &format!("--rw=rand{rw}"), "--bs=4k", "--time_based"]);
        command.args(["--norandommap", &format!("--iodepth={depth}"), &format!("--runtime={}", self.args.seconds)]);
        command.args(["--ramp_time=1", "--output-format=json"]);
        command.arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()));
        fio::field(&run(&mut command)?, rw, "iops")
    }

    /// 4 KiB reads of resident data through the client, which the device bounds, beside fio on the volume's file: as it does
    /// it, and in bursts, as requests arrive that a server was sent together.
    fn device(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let node = self.node(&self.unix("data"), 1)?;
        let file = only_volume_file(&node.data)?;
        for depth in [1, 32] {
            let name = format!("read4k_qd{depth}_vs_fio");
            let (mut pairs, mut bursts, mut more_us) = (Vec::new(), Vec::new(), Vec::new());
            for _ in self.args.publication.runs(&name) {
                let said = self.load(&node.server, &["read", "--volume", "v0", "--depth", &depth.to_string()])?;
                let ours = number(&said["series"]["read"]["requests_per_second"])?;
                let peer = self.fio_file(&file, "read", &["--readonly", &format!("--iodepth={depth}")])?;
                more_us.push((1.0 / ours - 1.0 / peer) * 1e6);
                pairs.push(Pair { ours, peer });
                if depth > 1 {
                    let batches = ["iodepth", "iodepth_batch_submit", "iodepth_batch_complete_min"];
                    let options = batches.map(|option| format!("--{option}={depth}"));
                    let options: Vec<&str> = options.iter().map(String::as_str).chain(["--readonly"]).collect();
                    bursts.push(Pair { ours, peer: self.fio_file(&file, "read", &options)? });
                }
            }
            let peer = "fio io_uring, direct I/O, on the same file";
            figures.push(Figure::against(&name, "IOPS", peer, &pairs));
            if depth == 1 {
                figures.push(Figure::alone("read4k_qd1_latency_over_fio_us", "us", &more_us));
            } else {
                let peer = format!("{peer}, {depth} at a time, and the next when all are done");
                figures.push(Figure::against(&format!("read4k_qd{depth}_vs_fio_bursts"), "IOPS", &peer, &bursts));
            }
        }
        node.stop()
    }

    /// Requests per second of 4 KiB each at random, with direct I/O on a file.
    fn fio_file(&self, file: &Path, rw: &str, options: &[&str]) -> Result<f64> {
        let mut command = on_core(Some(SERVER_CORE), "fio");
        command.args(["--name=r", &format!("--rw=rand{rw}"), "--bs=4k", "--direct=1", "--ioengine=io_uring"]);
        command.args(["--norandommap", "--time_based", "--output-format=json"]).args(options);
        command.arg(format!("--runtime={}", self.args.seconds)).arg(format!("--filename={}", file.display()));
        fio::field(&run(&mut command)?, rw, "iops")
    }

    /// A flush after each 4 KiB write, one at a time.
    fn flush(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let node = self.node(&self.unix("data"), 1)?;
        let copy = self.dir.join("flush.raw");
        run(Command::new("cp").arg("--sparse=never").arg(only_volume_file(&node.data)?).arg(&copy))?;
        let mut pairs = Vec::new();
        for _ in self.args.publication.runs("flush_vs_fdatasync") {
            let said = self.load(&node.server, &["write", "--fua", "--volume", "v0", "--depth", "1"])?;
            let iops = self.fio_file(&copy, "write", &["--fdatasync=1"])?;
            let ours = 1e6 / number(&said["series"]["write"]["requests_per_second"])?;
            pairs.push(Pair { ours, peer: 1e6 / iops });
        }
        let peer = "fio io_uring, direct I/O, fdatasync after each write, on such a file";
        figures.push(Figure::cost("flush_vs_fdatasync", "us", peer, &pairs));
        std::fs::remove_file(&copy).map_err(|e| e.to_string())?;
        node.stop()
    }

    /// Processor time of hydrating a volume, beside the tools that decompress, digest and write as much, one after the other.
    fn cpu(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let image = self.dir.join("image.raw");
        let packed = self.dir.join("image.zst");
        run(Command::new("zstd").args(["-1", "-q", "-f"]).arg(&image).arg("-o").arg(&packed))?;
        let mut pairs = Vec::new();
        for _ in self.args.publication.runs("hydration_cpu_vs_tools") {
            let node = self.bare_node(&self.unix("data"))?;
            let before = node.server.cpu_ns()?;
            self.hydrate(&node, "v0")?;
            let ours = node.server.cpu_ns()?.saturating_sub(before) as f64 / 1e9;
            node.stop()?;
            let plain = self.dir.join("tools.raw");
            let mut peer =
                cpu_seconds(Command::new("zstd").args(["-d", "-q", "-f"]).arg(&packed).arg("-o").arg(&plain))?;
            peer += cpu_seconds(Command::new("b3sum").args(["--num-threads", "1"]).arg(&plain))?;
            let copy = self.dir.join("copy.raw");
            peer +=
                cpu_seconds(
                    Command::new("dd")
                        .arg(format!("if={}", plain.display()))
                        .arg(format!("of={}", copy.display()))
                        .args(["bs=512k", "oflag=direct", "conv=fsync", "status=none"]),
                )?;
            for file in [plain, copy] {
                std::fs::remove_file(file).map_err(|e| e.to_string())?;
            }
            let per_gib = 1024.0 / f64::from(self.args.image_mib);
            pairs.push(Pair { ours: ours * per_gib, peer: peer * per_gib });
        }
        let peer = "zstd -d, b3sum --num-threads 1, dd bs=512k oflag=direct: user and system time, summed";
        figures.push(Figure::cost("hydration_cpu_vs_tools", "s/GiB", peer, &pairs));
        std::fs::remove_file(&packed).map_err(|e| e.to_string())
    }
}

struct Fetches {
    rate: f64,
    p50_us: f64,
    p99_us: f64,
}

struct Redis {
    server: Server,
    port: String,
    socket: PathBuf,
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().ok_or_else(|| "volley-load's JSON lacks a number".to_owned())
}

/// A peer that exports a raw file as `v0`.
fn nbd_server(name: &str, file: &Path, socket: &Path) -> Result<Server> {
    let (file, socket_text) = (file.display(), socket.display());
    let mut command = on_core(Some(SERVER_CORE), name);
    match name {
        "qemu-nbd" => {
            command.args(["--persistent", "--shared=8", "--format=raw", "--cache=none", "--aio=io_uring"]);
            command.args(["--export-name=v0", &format!("--socket={socket_text}"), &file.to_string()]);
        }
        "qemu-storage-daemon" => {
            command.arg("--blockdev");
            command.arg(format!("driver=file,node-name=f,filename={file},cache.direct=on,aio=io_uring,locking=off"));
            command.args(["--blockdev", "driver=raw,node-name=r,file=f"]);
            command.args(["--nbd-server", &format!("addr.type=unix,addr.path={socket_text}")]);
            command.args(["--export", "type=nbd,id=e,node-name=r,name=v0,writable=on"]);
        }
        _ => {
            command.args(["--foreground", "--unix", &socket_text.to_string(), "--exportname", "v0"]);
            command.args(["file", &format!("file={file}"), "cache=none"]);
        }
    }
    Server::start_silent(command, socket)
}

/// User and system time of a command, as its parent is told.
fn cpu_seconds(command: &mut Command) -> Result<f64> {
    let of_children = || {
        // SAFETY: the kernel fills the one struct it is given.
        unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
            let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
            seconds(usage.ru_utime) + seconds(usage.ru_stime)
        }
    };
    let before = of_children();
    run(command)?;
    Ok(of_children() - before)
}
