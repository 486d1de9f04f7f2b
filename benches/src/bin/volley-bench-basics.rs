//! What one node costs: reads through agent and server beside qemu-nbd, hydration beside fio, import beside
//! `qemu-img convert`, and thousands of volumes. Start it with `tools/bench basics`, which builds everything it runs.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use volley_benches::figure::{Figure, Pair, conclude, runs};
use volley_benches::process::{Result, Server, machine, only_volume_file, run, sibling, timed, work_folder};
use volley_benches::{creation, fio};

/// More than the cache holds, so that the node has all the memory it will have.
const OTHER_IMAGE_MIB: u32 = 384;

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
    conclude("basics", measure(&args), args.json.as_deref())
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let (_files, dir) = work_folder(&args.dir)?;
    let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
    let memory = tempfile::tempdir_in("/dev/shm").map_err(|e| format!("/dev/shm: {e}"))?;
    let bench = Bench { args, dir: &dir, sockets: sockets.path(), memory: memory.path(), image: dir.join("image.raw") };
    println!("{}", machine());
    volley_benches::full_image(&bench.image, args.image_mib, 1)?;
    let parts: [(&[&str], Part<'_>); 4] = [
        (&["import_vs_qemu_img", "import_vs_qemu_img_plain"], Bench::import),
        (&["hydrate_vs_fio", "hydrate_from_same_disk_vs_fio"], Bench::hydrate),
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
    /// A folder in memory: an object store there takes nothing of the disk, as a remote one.
    memory: &'a Path,
    image: PathBuf,
}

impl Bench<'_> {
    fn image_bytes(&self) -> f64 {
        f64::from(self.args.image_mib) * f64::from(1 << 20)
    }

    fn runs(&self, what: &str) -> impl Iterator<Item = u32> + use<> {
        runs(what, self.args.runs)
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
        self.import_file(objects, &self.image, "bench")
    }

    fn import_file(&self, objects: &Path, image: &Path, name: &str) -> Result<f64> {
        let image = image.display().to_string();
        timed(&mut self.volley(objects, None, &["image", "import", &image, "--name", name])?)
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

    /// From the request for a volume to the last chunk durable in it, beside fio writing as much: with the object store in
    /// memory, so that both have the disk for their writes alone, and with the object store on the same disk, where fio
    /// reads at the same time what hydration reads. The node has hydrated another image before, so that its memory is its own;
    /// of this image nothing is cached.
    fn hydrate(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (in_memory, on_disk) = (self.memory.join("objects"), self.dir.join("objects"));
        let other = self.dir.join("other.raw");
        volley_benches::full_image(&other, OTHER_IMAGE_MIB, 1 << 32)?;
        for objects in [&in_memory, &on_disk] {
            self.import_into(objects)?;
            self.import_file(objects, &other, "other")?;
        }
        let shown = run(&mut self.volley(&on_disk, None, &["image", "show", "bench", "--json"])?)?;
        let shown: serde_json::Value = serde_json::from_str(&shown).map_err(|e| format!("image show: {e}"))?;
        let stored_mib = shown["stored_bytes"].as_u64().ok_or("image show prints no stored_bytes")? >> 20;
        let (mut alone, mut beside_reads) = (Vec::new(), Vec::new());
        for _ in self.runs("hydrate") {
            alone.push(Pair {
                ours: self.hydrate_from(&in_memory)?,
                peer: fio::sequential_write(self.dir, self.args.image_mib, None)?,
            });
            beside_reads.push(Pair {
                ours: self.hydrate_from(&on_disk)?,
                peer: fio::sequential_write(self.dir, self.args.image_mib, Some((&self.image, stored_mib)))?,
            });
        }
        let peer = format!("{}; object store in memory", fio::SEQUENTIAL_WRITE);
        figures.push(Figure::against("hydrate_vs_fio", "MB/s", &peer, &alone));
        let peer =
            format!("the same fio beside one that reads {stored_mib} MiB, bs=1M iodepth=4; object store on that disk");
        figures.push(Figure::against("hydrate_from_same_disk_vs_fio", "MB/s", &peer, &beside_reads));
        remove_dir(&in_memory)?;
        remove_dir(&on_disk)
    }

    /// MB/s of hydrating one volume on a node that has hydrated another image.
    fn hydrate_from(&self, objects: &Path) -> Result<f64> {
        let data = self.dir.join("hydrate");
        let server = self.node(objects, &data)?;
        let http = server.ready_word("http")?;
        let volume = |name: &str, snapshot: &str| {
            let begun = Instant::now();
            let create = ["volume", "create", name, "--snapshot", snapshot, "--rate", "unlimited"];
            run(&mut self.volley(objects, Some(&http), &create)?)?;
            run(&mut self.volley(objects, Some(&http), &["volume", "wait", name, "--hydrated"])?)?;
            Ok::<f64, String>(begun.elapsed().as_secs_f64())
        };
        volume("before", "other")?;
        let seconds = volume("v", "bench")?;
        server.stop()?;
        remove_dir(&data)?;
        Ok(self.image_bytes() / seconds / 1e6)
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
        fio::field(&run(&mut command)?, "read", "iops")
    }

    /// Thousands of volumes of one snapshot: wall time of the request, and memory. A request of thousands takes memory
    /// of its own, which the allocator keeps for the next one: so each volume's is what a second batch adds.
    fn create(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let objects = self.dir.join("objects");
        self.import_into(&objects)?;
        let count = self.args.volumes;
        let (mut seconds, mut first, mut next, mut attached) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for run_number in self.runs("create") {
            for attach in [false, true] {
                let data = self.dir.join(format!("create-{run_number}-{attach}"));
                let server = self.node(&objects, &data)?;
                // One volume loads the manifest, which all share.
                self.create_batch(&server, &objects, "one", 1)?;
                let idle = server.resident_bytes()?;
                seconds.push(self.create_batch(&server, &objects, "v", count)?);
                if attach {
                    attached.push(attach_all(&server, count)? as f64);
                } else {
                    let one_batch = server.resident_bytes()?;
                    self.create_batch(&server, &objects, "w", count)?;
                    let two_batches = server.resident_bytes()?;
                    first.push(one_batch.saturating_sub(idle) as f64 / f64::from(count));
                    next.push(two_batches.saturating_sub(one_batch) as f64 / f64::from(count));
                }
                server.stop()?;
                remove_dir(&data)?;
            }
        }
        figures.push(Figure::alone(&format!("create_{count}_seconds"), "s", &seconds));
        figures.push(Figure::alone("bytes_per_volume", "B", &next));
        figures.push(Figure::alone("bytes_per_volume_of_first_batch", "B", &first));
        figures.push(Figure::alone(&format!("rss_{count}_attached_bytes"), "B", &attached));
        remove_dir(&objects)
    }

    /// Creates `count` volumes in one request; returns the seconds it took.
    fn create_batch(&self, server: &Server, objects: &Path, prefix: &str, count: u32) -> Result<f64> {
        let (http, count) = (server.ready_word("http")?, count.to_string());
        let mut command = self.volley(objects, Some(&http), &creation("bench", prefix, &count))?;
        timed(command.args(["--rate", "none"]))
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

fn remove_dir(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))
}
