//! Snapshots of a volume in use: what its guest feels, what is stored, and how long going back takes. Start it with
//! `tools/bench snapshots`, which builds everything it runs.
//!
//! A volume of a full image is hydrated; then chunks are written here and there, one sector in each, so that a known share of
//! them has changed. The peer of an incremental snapshot is what one does without: qemu-img reads the whole volume into a file,
//! and the file is imported, which finds all the chunks that are stored already.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use volley_benches::figure::{Figure, Pair, conclude};
use volley_benches::process::{Result, Server, machine, run, timed};
use volley_benches::site::{Site, SiteArgs};
use volley_benches::{fio, full_image};
use volley_client::{Client, Options};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CHUNK: u64 = 512 << 10;
/// How long a guest is measured, alone and with snapshots.
const GUEST_SECONDS: u32 = 10;
/// Between the end of a snapshot and the next one.
const PAUSE: Duration = Duration::from_secs(1);

/// Measures snapshots of volumes in use.
#[derive(Debug, Parser)]
#[command(name = "tools/bench snapshots")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Size of the volume in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    volume_mib: u32,
    /// Of 1000 chunks so many are changed.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    changed_per_mille: u32,
    /// Snapshots of the chain of which the first and the last are restored.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    chain: u32,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Only these parts, e.g. --only guest,chain [default: all].
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true, value_name = "PART")]
    only: Vec<Part>,
    /// Lines of the node's configuration, e.g. --config 'snapshots.bandwidth = "32MiB"'.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "LINES")]
    config: String,
    #[command(flatten)]
    site: SiteArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A snapshot of what has changed, beside reading everything.
    Increments,
    /// Back to a snapshot: until it can be attached, until it is hydrated.
    Rollback,
    /// What a guest feels of snapshots.
    Guest,
    /// Restores of the first and the last snapshot of a chain.
    Chain,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("snapshots", measure(&args), args.json.as_deref())
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let mut site = Site::new(&args.site)?;
    site.use_unix_sockets()?;
    println!("{}", machine());
    let image = site.dir().join("import.raw");
    full_image(&image, args.volume_mib, 7)?;
    site.import(&image, "image")?;
    let bench = Bench { args, site: &site };
    let mut figures = Vec::new();
    site.node(&args.config, |server| {
        bench.volley(server, &["volume", "create", "db", "--snapshot", "image", "--rate", "unlimited"])?;
        bench.volley(server, &["volume", "wait", "db", "--hydrated"])?;
        bench.snapshot(server, "before")?;
        let wanted = |part| args.only.is_empty() || args.only.contains(&part);
        if wanted(Part::Increments) {
            bench.increments(server, &mut figures)?;
        }
        if wanted(Part::Rollback) {
            bench.rollback(server, &mut figures)?;
        }
        if wanted(Part::Guest) {
            bench.guest(server, &mut figures)?;
        }
        if wanted(Part::Chain) {
            bench.chain(server, &mut figures)?;
        }
        Ok(())
    })?;
    Ok(figures)
}

struct Bench<'a> {
    args: &'a Args,
    site: &'a Site,
}

impl Bench<'_> {
    fn volley(&self, server: &Server, words: &[&str]) -> Result<String> {
        run(&mut self.site.volley(Some(server), words)?)
    }

    fn changed_chunks(&self) -> u64 {
        (u64::from(self.args.volume_mib) * 2 * u64::from(self.args.changed_per_mille) / 1000).max(1)
    }

    /// Writes one sector in so many chunks, spread over the volume.
    fn change(&self, server: &Server, chunks: u64, seed: u64) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
        let all = u64::from(self.args.volume_mib) * 2;
        runtime.block_on(async {
            let said = |e: volley_client::Error| e.to_string();
            let client = Client::connect(&server.ready_word("data")?, Options::default()).await.map_err(said)?;
            let volume = client.attach("db").await.map_err(said)?;
            for number in 0..chunks {
                let chunk = (number * all / chunks + seed) % all;
                let data = volley_benches::noise(seed * 1000 + number + 1, 4096);
                volume.write(chunk * CHUNK + 8192, data.into(), false).await.map_err(said)?;
            }
            volume.flush().await.map_err(said)?;
            volume.detach().await.map_err(said)
        })
    }

    /// Seconds, and what the server says of it.
    fn snapshot(&self, server: &Server, name: &str) -> Result<(f64, serde_json::Value)> {
        let begun = Instant::now();
        let printed = self.volley(server, &["snapshot", "create", "db", "--name", name, "--wait", "--json"])?;
        let seconds = begun.elapsed().as_secs_f64();
        let mut task: serde_json::Value =
            serde_json::from_str(&printed).map_err(|e| format!("snapshot create: {e}"))?;
        Ok((seconds, task["snapshots"][0].take()))
    }

    /// A snapshot of what has changed, beside reading everything.
    fn increments(&self, server: &Server, figures: &mut Vec<Figure>) -> Result<()> {
        let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
        let socket = sockets.path().join("nbd.sock");
        let (mut times, mut shares) = (Vec::new(), Vec::new());
        for number in 0..self.args.runs {
            eprintln!("increments: run {} of {}", number + 1, self.args.runs);
            self.change(server, self.changed_chunks(), u64::from(number) + 1)?;
            let agent = self.site.agent(server, &socket)?;
            let copy = self.site.dir().join("copy.raw");
            let mut read = Command::new("qemu-img");
            read.args(["convert", "-f", "raw", "-O", "raw", "-t", "none"]);
            read.arg(format!("nbd:unix:{}:exportname=db", socket.display())).arg(&copy);
            let whole = timed(&mut read)?;
            agent.stop()?;
            let (ours, shown) = self.snapshot(server, &format!("inc-{number}"))?;
            let begun = Instant::now();
            self.site.import(&copy, &format!("whole-{number}"))?;
            times.push(Pair { ours, peer: whole + begun.elapsed().as_secs_f64() });
            let raw = shown["raw_bytes"].as_f64().ok_or("snapshot create prints no raw_bytes")?;
            shares.push(raw / (self.changed_chunks() * CHUNK) as f64);
        }
        let peer = "qemu-img convert of the whole volume into a file, and its import, which stores only what is new";
        figures.push(Figure::time("snapshot_incremental_vs_full", "s", peer, &times));
        figures.push(Figure::alone("snapshot_upload_per_changed", "x", &shares));
        Ok(())
    }

    /// Back by so many chunks: until it may be attached, and until everything is in the volume.
    fn rollback(&self, server: &Server, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut attach, mut done) = (Vec::new(), Vec::new());
        self.snapshot(server, "back")?;
        for number in 0..self.args.runs {
            eprintln!("rollback: run {} of {}", number + 1, self.args.runs);
            self.change(server, self.changed_chunks(), 100 + u64::from(number))?;
            let begun = Instant::now();
            self.volley(server, &["volume", "rollback", "db", "--to", "back", "--discard"])?;
            attach.push(begun.elapsed().as_secs_f64() * 1e3);
            self.volley(server, &["volume", "wait", "db", "--hydrated"])?;
            done.push(begun.elapsed().as_secs_f64());
        }
        figures.push(Figure::alone("rollback_attach_ms", "ms", &attach));
        figures.push(Figure::alone("rollback_seconds", "s", &done));
        Ok(())
    }

    /// A guest while one snapshot after the other is taken, beside the same guest alone.
    fn guest(&self, server: &Server, figures: &mut Vec<Figure>) -> Result<()> {
        let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
        let socket = sockets.path().join("nbd.sock");
        let (mut felt, mut stalls, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..self.args.runs {
            eprintln!("guest: run {} of {}", number + 1, self.args.runs);
            let agent = self.site.agent(server, &socket)?;
            let quiet = fio::p99_ms_and_iops(&run(&mut fio::guest_mix(&socket, "db", GUEST_SECONDS))?)?;
            let mut guest = fio::guest_mix(&socket, "db", GUEST_SECONDS);
            let guest = guest.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(|e| format!("fio: {e}"))?;
            let ends = Instant::now() + Duration::from_secs(u64::from(GUEST_SECONDS));
            let mut count = 0;
            while Instant::now() < ends {
                let (_, shown) = self.snapshot(server, &format!("busy-{number}-{count}"))?;
                stalls.push(shown["stall_us"].as_f64().ok_or("snapshot create prints no stall_us")? / 1e3);
                count += 1;
                std::thread::sleep(PAUSE);
            }
            let printed = guest.wait_with_output().map_err(|e| format!("fio: {e}"))?;
            let busy = fio::p99_ms_and_iops(&String::from_utf8_lossy(&printed.stdout))?;
            agent.stop()?;
            felt.push(Pair { ours: busy.0, peer: quiet.0 });
            taken.push(f64::from(count));
        }
        let peer = "the same fio without snapshots: 4 KiB random, 70 % reads, QD4, NBD through volley-agent";
        figures.push(Figure::cost("snapshot_guest_p99_vs_quiet", "ms", peer, &felt));
        figures.push(Figure::alone("snapshot_stall_ms", "ms", &stalls));
        figures.push(Figure::alone("snapshots_meanwhile", "", &taken));
        Ok(())
    }

    /// The first and the last snapshot of a chain, restored.
    fn chain(&self, server: &Server, figures: &mut Vec<Figure>) -> Result<()> {
        let last = self.args.chain - 1;
        let begun = Instant::now();
        for number in 0..self.args.chain {
            self.change(server, 1, 1000 + u64::from(number))?;
            self.snapshot(server, &format!("chain-{number}"))?;
        }
        let each = begun.elapsed().as_secs_f64() / f64::from(self.args.chain);
        let restore = |number: u32, run: u32| {
            let (name, snapshot) = (format!("r{number}-{run}"), format!("chain-{number}"));
            let begun = Instant::now();
            self.volley(server, &["volume", "create", &name, "--snapshot", &snapshot, "--rate", "unlimited"])?;
            self.volley(server, &["volume", "wait", &name, "--hydrated"])?;
            let seconds = begun.elapsed().as_secs_f64();
            self.volley(server, &["volume", "delete", &name])?;
            Ok::<f64, String>(seconds)
        };
        let mut pairs = Vec::new();
        for run in 0..self.args.runs {
            eprintln!("chain: run {} of {}", run + 1, self.args.runs);
            // Whoever comes second finds the cache warm: they take turns.
            let (ours, peer) = match run % 2 {
                0 => (restore(last, run)?, restore(0, run)?),
                _ => {
                    let peer = restore(0, run)?;
                    (restore(last, run)?, peer)
                }
            };
            pairs.push(Pair { ours, peer });
        }
        figures.push(Figure::cost("restore_chain_vs_first", "s", "the first snapshot of the chain", &pairs));
        figures.push(Figure::alone("snapshot_of_one_chunk_seconds", "s", &[each]));
        Ok(())
    }
}
