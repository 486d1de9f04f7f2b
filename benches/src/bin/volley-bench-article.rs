//! The published experiment, side by side: many volumes of one image boot in a wave, (a) every volume fetches for itself,
//! (b) one fetch for all, cold, (c) the next wave, warm. Start it with `tools/bench article`, which builds everything it runs.
//!
//! Each volume is read as the recorded boot of Debian reads its disk, at the recorded pace times `--speed`; the wave arrives at
//! `--arrivals` volumes per second. The object store is an S3 server of ours (`origin`) in this process, with a delay before
//! each answer and a bandwidth for each connection; it counts what leaves it. The trace's writes are left out.
//!
//! At the end one volume of a full image is hydrated from that server, which then answers as fast as it can, beside
//! `curl` of the same packs and beside fio writing as much as the image.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::time::{Instant, sleep_until};
use volley_benches::figure::{Figure, Pair, conclude};
use volley_benches::fio;
use volley_benches::origin::{Manners, Origin};
use volley_benches::process::{Result, Server, machine, run, sibling, timed};
use volley_tools::load::histogram::Histogram;
use volley_tools::load::trace::{self, Event, Op};

/// The device that the trace was recorded on.
const IMAGE_BYTES: u64 = 2 << 30;
const CHUNK_BYTES: u64 = 512 << 10;
/// What is in the image beside the chunks that the boot reads, so that it is as full as the real one.
const OTHER_DATA_CHUNKS: u64 = 600;
/// The image that is hydrated as a whole, and another one before it, so that the node's memory is its own by then.
const FULL_IMAGE_MIB: u32 = 1024;
const OTHER_IMAGE_MIB: u32 = 640;
/// Clients of the node: hypervisor hosts.
const HOSTS: usize = 4;
/// Nobody waits for the object store's manners while the image is put there.
const AT_ONCE: Manners = Manners { first_byte: Duration::ZERO, bytes_per_second: 10 << 30 };
const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/data/boot-trace-debian12.csv");

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
    /// Delay of the object store before each answer, in milliseconds.
    #[arg(long, default_value_t = 20)]
    first_byte_ms: u64,
    /// Bandwidth of each connection to the object store, in MiB/s.
    #[arg(long, default_value_t = 100)]
    connection_mib: u64,
    /// Runs of the hydration of one volume.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
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
    std::fs::create_dir_all(&args.dir).map_err(|e| format!("{}: {e}", args.dir.display()))?;
    let files = tempfile::tempdir_in(&args.dir).map_err(|e| format!("{}: {e}", args.dir.display()))?;
    let dir = files.path().canonicalize().map_err(|e| e.to_string())?;
    let origin = Origin::start(AT_ONCE).map_err(|e| format!("object store: {e}"))?;
    let reads: Arc<[Event]> =
        trace::load(Path::new(TRACE), IMAGE_BYTES)?.into_iter().filter(|event| event.op == Op::Read).collect();
    println!("{}", machine());
    println!(
        "{} volumes, {} arrive in a second, boot {} times faster; object store: {} ms, {} MiB/s a connection",
        args.volumes, args.arrivals, args.speed, args.first_byte_ms, args.connection_mib
    );
    let image = dir.join("image.raw");
    make_image(&image, &reads)?;
    let bench = Bench { args, dir: &dir, origin: &origin, reads };
    bench.import(&image, "debian")?;
    let first_byte = Duration::from_millis(args.first_byte_ms);
    origin.set_manners(Manners { first_byte, bytes_per_second: args.connection_mib << 20 });

    let alone = bench.node("alone", "transfer.share = false\n", |server| bench.wave(server, "a-"))?;
    let (cold, warm) = bench.node("shared", "", |server| Ok((bench.wave(server, "b-")?, bench.wave(server, "c-")?)))?;
    let mut figures = figures(&alone, &cold, &warm);
    bench.hydrate(&mut figures)?;
    Ok(figures)
}

struct Bench<'a> {
    args: &'a Args,
    dir: &'a Path,
    origin: &'a Origin,
    reads: Arc<[Event]>,
}

impl Bench<'_> {
    fn volley(&self, http: Option<&str>, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(sibling("volley")?);
        command.args(words);
        self.use_origin(&mut command);
        if let Some(http) = http {
            command.env("VOLLEY_SERVER", http);
        }
        Ok(command)
    }

    fn use_origin(&self, command: &mut Command) {
        command.env("VOLLEY_OBJECT_STORE", "s3://bench/article").env("AWS_ENDPOINT_URL", self.origin.endpoint());
        command.env("AWS_ACCESS_KEY_ID", "bench").env("AWS_SECRET_ACCESS_KEY", "bench").env("AWS_REGION", "us-east-1");
    }

    /// Puts an image into the object store; its file is removed.
    fn import(&self, image: &Path, name: &str) -> Result<()> {
        run(&mut self.volley(None, &["image", "import", &image.display().to_string(), "--name", name])?)?;
        std::fs::remove_file(image).map_err(|e| e.to_string())
    }

    /// From the request for a volume of a full image to its last chunk durable in it.
    fn hydrate(&self, figures: &mut Vec<Figure>) -> Result<()> {
        self.origin.set_manners(AT_ONCE);
        let image = self.dir.join("image.raw");
        volley_benches::full_image(&image, OTHER_IMAGE_MIB, 1 << 32)?;
        self.import(&image, "other")?;
        let before = self.origin.packs();
        volley_benches::full_image(&image, FULL_IMAGE_MIB, 1)?;
        self.import(&image, "full")?;
        let mut packs = self.origin.packs();
        packs.retain(|pack| !before.contains(pack));
        let (mut beside_curl, mut beside_fio, mut gets_per_mib) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.args.runs {
            let (seconds, gets, bytes) = self.node("hydrate", "", |server| {
                self.hydrate_volume(server, "other")?;
                let _ = self.origin.take_counts();
                let seconds = self.hydrate_volume(server, "full")?;
                let (gets, bytes) = self.origin.take_counts();
                Ok((seconds, gets as f64, bytes as f64))
            })?;
            let mut curl = Command::new("curl");
            curl.args(["--silent", "--show-error", "--fail"]);
            curl.args(packs.iter().flat_map(|pack| ["--output", "/dev/null", pack]));
            let curl_seconds = timed(&mut curl)?;
            beside_curl.push(Pair { ours: bytes / seconds / 1e6, peer: bytes / curl_seconds / 1e6 });
            let ours = f64::from(FULL_IMAGE_MIB) * f64::from(1 << 20) / seconds / 1e6;
            beside_fio.push(Pair { ours, peer: fio::sequential_write(self.dir, FULL_IMAGE_MIB, None)? });
            gets_per_mib.push(gets / (bytes / f64::from(1 << 20)));
        }
        figures.push(Figure::alone("article_gets_per_mib", "1/MiB", &gets_per_mib));
        let peer = "curl of the same packs, one after the other, to /dev/null";
        figures.push(Figure::against("s3_hydrate_vs_curl", "MB/s", peer, &beside_curl));
        figures.push(Figure::against("s3_hydrate_vs_fio", "MB/s", fio::SEQUENTIAL_WRITE, &beside_fio));
        Ok(())
    }

    fn hydrate_volume(&self, server: &Server, image: &str) -> Result<f64> {
        let (begun, http) = (Instant::now(), server.ready_word("http")?);
        run(&mut self.volley(Some(&http), &["volume", "create", image, "--snapshot", image, "--rate", "unlimited"])?)?;
        run(&mut self.volley(Some(&http), &["volume", "wait", image, "--hydrated"])?)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Starts a node with a line of configuration, measures on it, and stops it.
    fn node<T>(&self, name: &str, config: &str, measure: impl FnOnce(&Server) -> Result<T>) -> Result<T> {
        eprintln!("article: {name}");
        let (data, file) = (self.dir.join(name), self.dir.join(format!("{name}.toml")));
        std::fs::write(&file, config).map_err(|e| e.to_string())?;
        let mut command = Command::new(sibling("volleyd")?);
        command.arg("--config").arg(&file).arg("--data").arg(&data);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log", "warn"]);
        self.use_origin(&mut command);
        let server = Server::start(command, "volleyd: ready")?;
        let measured = measure(&server)?;
        server.stop()?;
        std::fs::remove_dir_all(&data).map_err(|e| e.to_string())?;
        Ok(measured)
    }

    /// Creates the volumes of one request and boots them.
    fn wave(&self, server: &Server, prefix: &str) -> Result<Wave> {
        let count = self.args.volumes.to_string();
        let create = ["volume", "create", "--snapshot", "debian", "--rate", "none", "--count", &count];
        run(self.volley(Some(&server.ready_word("http")?), &create)?.args(["--name-prefix", prefix]))?;
        let _ = self.origin.take_counts();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
        let begun = Instant::now();
        let first_touch = runtime.block_on(self.boot_all(&server.ready_word("data")?, prefix))?;
        let (gets, bytes) = self.origin.take_counts();
        let seconds = begun.elapsed().as_secs_f64();
        // The next wave finds the disk as this one did.
        let names: Vec<String> = (0..self.args.volumes).map(|number| format!("{prefix}{number}")).collect();
        run(self.volley(Some(&server.ready_word("http")?), &["volume", "delete", "--force"])?.args(names))?;
        Ok(Wave { seconds, gets, bytes, first_touch })
    }

    async fn boot_all(&self, address: &str, prefix: &str) -> Result<Histogram> {
        let mut hosts = Vec::new();
        for _ in 0..HOSTS {
            hosts.push(volley_client::Client::connect(address, volley_client::Options::default()).await.map_err(say)?);
        }
        let begun = Instant::now();
        let mut boots = Vec::new();
        for number in 0..self.args.volumes {
            let (host, name) = (hosts[number as usize % HOSTS].clone(), format!("{prefix}{number}"));
            let start = begun + Duration::from_secs(1) * number / self.args.arrivals.max(1);
            boots.push(tokio::spawn(boot(host, name, start, self.args.speed.max(1), self.reads.clone())));
        }
        let mut all = Histogram::default();
        for boot in boots {
            all.merge(&boot.await.map_err(|e| e.to_string())??);
        }
        Ok(all)
    }
}

/// Reads a volume as the trace says; the latencies of first touches.
async fn boot(
    host: volley_client::Client,
    name: String,
    start: Instant,
    speed: u32,
    reads: Arc<[Event]>,
) -> Result<Histogram> {
    sleep_until(start).await;
    let volume = host.attach(&name).await.map_err(say)?;
    let (mut touched, mut first_touch) = (HashSet::new(), Histogram::default());
    for read in reads.iter() {
        sleep_until(start + Duration::from_micros(read.at_us) / speed).await;
        let asked = Instant::now();
        let len = usize::try_from(read.len).map_err(|e| e.to_string())?;
        volume.read(read.offset, len).await.map_err(say)?;
        let chunks = read.offset / CHUNK_BYTES..(read.offset + read.len).div_ceil(CHUNK_BYTES);
        let before = touched.len();
        touched.extend(chunks);
        if touched.len() > before {
            first_touch.record(asked.elapsed());
        }
    }
    volume.detach().await.map_err(say)?;
    Ok(first_touch)
}

fn say(error: volley_client::Error) -> String {
    error.to_string()
}

/// Data where the boot reads and in some chunks more; holes elsewhere.
fn make_image(path: &Path, reads: &[Event]) -> Result<()> {
    let said = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = std::fs::File::create(path).map_err(said)?;
    file.set_len(IMAGE_BYTES).map_err(said)?;
    let mut chunks: HashSet<u64> = reads
        .iter()
        .flat_map(|read| read.offset / CHUNK_BYTES..(read.offset + read.len).div_ceil(CHUNK_BYTES))
        .collect();
    chunks.extend((0..OTHER_DATA_CHUNKS).map(|n| n * (IMAGE_BYTES / CHUNK_BYTES) / OTHER_DATA_CHUNKS));
    for chunk in chunks {
        let data = volley_benches::compressible(chunk + 1, CHUNK_BYTES as usize);
        std::os::unix::fs::FileExt::write_all_at(&file, &data, chunk * CHUNK_BYTES).map_err(said)?;
    }
    file.sync_all().map_err(said)
}

fn figures(alone: &Wave, cold: &Wave, warm: &Wave) -> Vec<Figure> {
    let mut figures = Vec::new();
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    for (name, wave) in [("alone", alone), ("cold", cold), ("warm", warm)] {
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
        ("article_mean_reduction_warm", "%", reduction(mean(warm), mean(alone))),
        ("article_mean_reduction_cold", "%", reduction(mean(cold), mean(alone))),
    ] {
        figures.push(Figure::alone(name, unit, &[value]));
    }
    figures
}
