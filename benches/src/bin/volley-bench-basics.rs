//! What one node costs: reads through agent and server beside qemu-nbd, hydration beside fio, import beside
//! `qemu-img convert`, and thousands of volumes. Start it with `tools/bench basics`, which builds everything it runs.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use volley_benches::figure::{Figure, Pair, report};
use volley_benches::process::{Result, Server, machine, run, sibling, timed};

/// Measures the basic figures of one node, each beside a peer in the same run.
#[derive(Debug, Parser)]
#[command(name = "tools/bench basics")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only figures whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Runs of each figure; the median is published.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Size of the disk image in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=65536))]
    image_mib: u32,
    /// Volumes of the creation figures.
    #[arg(long, default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    volumes: u32,
    /// Seconds of each fio run.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Shards of the server; 0: every core.
    #[arg(long, default_value_t = 0)]
    cores: usize,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match measure(&args).and_then(|figures| report(&figures, args.json.as_deref()).map_err(|e| e.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tools/bench basics: {message}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    std::fs::create_dir_all(&args.dir).map_err(|e| format!("{}: {e}", args.dir.display()))?;
    let files = tempfile::tempdir_in(&args.dir).map_err(|e| format!("{}: {e}", args.dir.display()))?;
    let dir = files.path().canonicalize().map_err(|e| e.to_string())?;
    let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
    let bench = Bench { args, dir: &dir, sockets: sockets.path(), image: dir.join("image.raw") };
    println!("{}", machine());
    bench.make_image()?;
    let parts: [(&[&str], Part<'_>); 4] = [
        (&["import_vs_qemu_img", "import_vs_qemu_img_plain"], Bench::import),
        (&["hydrate_vs_fio"], Bench::hydrate),
        (&["nbd_read4k_qd1_vs_qemu_nbd", "nbd_read4k_qd32_vs_qemu_nbd"], Bench::read),
        (&["create_seconds", "bytes_per_volume", "rss_bytes"], Bench::create),
    ];
    let mut figures = Vec::new();
    for (names, part) in parts {
        if names.iter().any(|name| name.contains(&args.only)) {
            part(&bench, &mut figures)?;
        }
    }
    Ok(figures)
}

type Part<'a> = fn(&Bench<'a>, &mut Vec<Figure>) -> Result<()>;

struct Bench<'a> {
    args: &'a Args,
    dir: &'a Path,
    sockets: &'a Path,
    image: PathBuf,
}

impl Bench<'_> {
    fn make_image(&self) -> Result<()> {
        let mut file = std::fs::File::create(&self.image).map_err(|e| format!("{}: {e}", self.image.display()))?;
        for mib in 0..self.args.image_mib {
            let block = volley_benches::compressible(u64::from(mib) + 1, 1 << 20);
            std::io::Write::write_all(&mut file, &block).map_err(|e| format!("{}: {e}", self.image.display()))?;
        }
        file.sync_all().map_err(|e| e.to_string())
    }

    fn image_bytes(&self) -> f64 {
        f64::from(self.args.image_mib) * f64::from(1 << 20)
    }

    fn runs(&self, what: &str) -> impl Iterator<Item = u32> {
        let (what, runs) = (what.to_owned(), self.args.runs);
        (0..runs).inspect(move |run| eprintln!("{what}: run {} of {runs}", run + 1))
    }

    fn volley(&self, objects: &Path, http: Option<&str>, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(sibling("volley")?);
        command.args(words).env("VOLLEY_OBJECT_STORE", format!("file:{}", objects.display()));
        if let Some(http) = http {
            command.env("VOLLEY_SERVER", http);
        }
        Ok(command)
    }

    fn import_into(&self, objects: &Path) -> Result<f64> {
        let image = self.image.display().to_string();
        timed(&mut self.volley(objects, None, &["image", "import", &image, "--name", "bench"])?)
    }

    fn node(&self, objects: &Path, data: &Path) -> Result<Server> {
        let mut command = Command::new(sibling("volleyd")?);
        let socket = self.sockets.join("data.sock");
        command.arg("--data").arg(data).arg("--object-store").arg(format!("file:{}", objects.display()));
        command.arg("--listen").arg(format!("unix:{}", socket.display())).args(["--http", "127.0.0.1:0"]);
        command.args(["--cores", &self.args.cores.to_string(), "--log", "warn"]);
        Server::start(command, "volleyd: ready")
    }

    /// Import beside a compressed and beside a plain `qemu-img convert`.
    fn import(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut compressed, mut plain) = (Vec::new(), Vec::new());
        for run_number in self.runs("import") {
            let objects = self.dir.join(format!("import-{run_number}"));
            let ours = self.image_bytes() / self.import_into(&objects)? / 1e6;
            remove_dir(&objects)?;
            let convert = |words: &[&str]| {
                let target = self.dir.join("convert.qcow2");
                let mut command = Command::new("qemu-img");
                command.args(["convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "16"]).args(words);
                let seconds = timed(command.arg(&self.image).arg(&target))?;
                std::fs::remove_file(&target).map_err(|e| e.to_string())?;
                Ok::<f64, String>(self.image_bytes() / seconds / 1e6)
            };
            compressed.push(Pair { ours, peer: convert(&["-c", "-o", "compression_type=zstd"])? });
            plain.push(Pair { ours, peer: convert(&[])? });
        }
        let peer = "qemu-img convert -c -o compression_type=zstd -W -m 16 (raw to qcow2)";
        figures.push(Figure::against("import_vs_qemu_img", "MB/s", peer, &compressed));
        let peer = "qemu-img convert -W -m 16 (raw to qcow2, not compressed, no digests)";
        figures.push(Figure::against("import_vs_qemu_img_plain", "MB/s", peer, &plain));
        Ok(())
    }

    /// From the request for a volume to the last chunk durable in it, cache cold, beside fio writing as much.
    fn hydrate(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let objects = self.dir.join("objects");
        self.import_into(&objects)?;
        let mut pairs = Vec::new();
        for run_number in self.runs("hydrate") {
            let data = self.dir.join(format!("hydrate-{run_number}"));
            let server = self.node(&objects, &data)?;
            let http = server.ready_word("http")?;
            let begun = Instant::now();
            let create = ["volume", "create", "v", "--snapshot", "bench", "--rate", "unlimited"];
            run(&mut self.volley(&objects, Some(&http), &create)?)?;
            run(&mut self.volley(&objects, Some(&http), &["volume", "wait", "v", "--hydrated"])?)?;
            let ours = self.image_bytes() / begun.elapsed().as_secs_f64() / 1e6;
            server.stop()?;
            remove_dir(&data)?;
            pairs.push(Pair { ours, peer: self.fio_write()? });
        }
        let peer = "fio sequential write, bs=512k direct=1 iodepth=8 io_uring, end_fsync, to a new file";
        figures.push(Figure::against("hydrate_vs_fio", "MB/s", peer, &pairs));
        remove_dir(&objects)
    }

    fn fio_write(&self) -> Result<f64> {
        let file = self.dir.join("fio.raw");
        let mut command = Command::new("fio");
        command.args(["--name=w", "--rw=write", "--bs=512k", "--direct=1", "--ioengine=io_uring", "--iodepth=8"]);
        command.args(["--fallocate=none", "--end_fsync=1", &format!("--size={}M", self.args.image_mib)]);
        command.arg(format!("--filename={}", file.display())).arg("--output-format=json");
        let result = fio_field(&run(&mut command)?, "write", "runtime")?;
        std::fs::remove_file(&file).map_err(|e| e.to_string())?;
        Ok(self.image_bytes() / (result / 1e3) / 1e6)
    }

    /// 4 KiB random reads of a hydrated volume: through agent and server, and of the same file through qemu-nbd.
    fn read(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (objects, data) = (self.dir.join("objects"), self.dir.join("read"));
        self.import_into(&objects)?;
        let server = self.node(&objects, &data)?;
        let http = server.ready_word("http")?;
        let create = ["volume", "create", "v", "--snapshot", "bench", "--rate", "unlimited"];
        run(&mut self.volley(&objects, Some(&http), &create)?)?;
        run(&mut self.volley(&objects, Some(&http), &["volume", "wait", "v", "--hydrated"])?)?;
        let file = only_volume_file(&data)?;
        let agent_socket = self.sockets.join("agent.sock");
        let mut command = Command::new(sibling("volley-agent")?);
        command.args(["--server", &server.ready_word("data")?, "--log", "warn"]);
        command.args(["--nbd", &format!("unix:{}", agent_socket.display())]);
        let agent = Server::start(command, "ready")?;
        let peer_socket = self.sockets.join("qemu.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--persistent", "--shared=8", "--format=raw", "--cache=none", "--aio=io_uring"]);
        command.args(["--export-name=v", &format!("--socket={}", peer_socket.display())]).arg(&file);
        let peer = Server::start_silent(command, &peer_socket)?;
        for (figure, depth) in [("nbd_read4k_qd1_vs_qemu_nbd", 1), ("nbd_read4k_qd32_vs_qemu_nbd", 32)] {
            if !figure.contains(&self.args.only) {
                continue;
            }
            let mut pairs = Vec::new();
            for _ in self.runs(figure) {
                let (ours, peer) = (self.fio_read(&agent_socket, depth)?, self.fio_read(&peer_socket, depth)?);
                pairs.push(Pair { ours, peer });
            }
            let peer = "qemu-nbd --cache=none --aio=io_uring on the same file";
            figures.push(Figure::against(figure, "IOPS", peer, &pairs));
        }
        agent.stop()?;
        drop(peer);
        server.stop()?;
        remove_dir(&data)?;
        remove_dir(&objects)
    }

    fn fio_read(&self, socket: &Path, depth: u32) -> Result<f64> {
        let mut command = Command::new("fio");
        command.args(["--name=r", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--time_based", "--norandommap"]);
        command.args([&format!("--iodepth={depth}"), &format!("--runtime={}", self.args.seconds), "--ramp_time=1"]);
        command.arg(format!("--uri=nbd+unix:///v?socket={}", socket.display())).arg("--output-format=json");
        fio_field(&run(&mut command)?, "read", "iops")
    }

    /// Thousands of volumes of one snapshot: wall time of the request, and memory.
    fn create(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let objects = self.dir.join("objects");
        self.import_into(&objects)?;
        let count = self.args.volumes;
        let (mut seconds, mut idle, mut attached) = (Vec::new(), Vec::new(), Vec::new());
        for run_number in self.runs("create") {
            let data = self.dir.join(format!("create-{run_number}"));
            let server = self.node(&objects, &data)?;
            let http = server.ready_word("http")?;
            // The first volume loads the manifest, which all share.
            let first = ["volume", "create", "first", "--snapshot", "bench", "--rate", "none"];
            run(&mut self.volley(&objects, Some(&http), &first)?)?;
            let before = server.resident_bytes()?;
            let count_text = count.to_string();
            let create = ["volume", "create", "--snapshot", "bench", "--rate", "none", "--count", &count_text];
            let mut command = self.volley(&objects, Some(&http), &create)?;
            seconds.push(timed(command.args(["--name-prefix", "v"]))?);
            let after = server.resident_bytes()?;
            idle.push((after.saturating_sub(before)) as f64 / f64::from(count));
            attached.push(attach_all(&server, count)? as f64);
            server.stop()?;
            remove_dir(&data)?;
        }
        figures.push(Figure::alone(&format!("create_{count}_seconds"), "s", &seconds));
        figures.push(Figure::alone("bytes_per_volume", "B", &idle));
        figures.push(Figure::alone(&format!("rss_{count}_attached_bytes"), "B", &attached));
        remove_dir(&objects)
    }
}

/// Attaches every volume and reads a sector of each; returns the server's resident memory then.
fn attach_all(server: &Server, count: u32) -> Result<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let address = server.ready_word("data")?;
    runtime.block_on(async {
        let say = |e: volley_client::Error| e.to_string();
        let client = volley_client::Client::connect(&address, volley_client::Options::default()).await.map_err(say)?;
        let mut volumes = Vec::new();
        for number in 0..count {
            volumes.push(client.attach(&format!("v{number}")).await.map_err(say)?);
        }
        let resident = server.resident_bytes();
        for volume in volumes {
            volume.detach().await.map_err(say)?;
        }
        resident
    })
}

fn only_volume_file(data: &Path) -> Result<PathBuf> {
    let dir = data.join("store/volumes");
    let mut entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    match (entries.next(), entries.next()) {
        (Some(Ok(entry)), None) => Ok(entry.path()),
        _ => Err(format!("{} does not hold exactly one volume", dir.display())),
    }
}

fn remove_dir(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))
}

/// A number of the first job of fio's JSON.
fn fio_field(json: &str, side: &str, field: &str) -> Result<f64> {
    let start = json.find('{').ok_or_else(|| format!("fio printed no JSON: {json}"))?;
    let value: serde_json::Value = serde_json::from_str(&json[start..]).map_err(|e| format!("fio's JSON: {e}"))?;
    value["jobs"][0][side][field].as_f64().ok_or_else(|| format!("fio's JSON has no {side}.{field}"))
}
