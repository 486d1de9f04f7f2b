//! Which eviction policy keeps the right chunks: hit ratios of the candidates on requests made from the recorded boot.
//! No times are measured, so the figures are the same everywhere; but with `--restart` how long a restart takes to read the
//! index of the disk tier. Start it with `tools/bench cache`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use clap::Parser;
use glommio::{LocalExecutorBuilder, Placement};
use volley_benches::figure::{Figure, conclude};
use volley_benches::mix::{Mix, boot_chunks, first_touches, requests};
use volley_benches::policies::{ALL, Access, New};
use volley_server::cache::disk::files::{index_name, slots_name};
use volley_server::cache::disk::{DiskCacheConfig, DiskTier, Owner};
use volley_server::cache::record::{PART_BYTES, Record, SLOT_BYTES, encode_head};
use volley_server::platform::glommio::Glommio;
use volley_server::snapshot::Encoding;

const BOOT_TRACE: &str = include_str!("../../../tools/data/boot-trace-debian12.csv");

/// Compares eviction policies by hit ratio.
#[derive(Debug, Parser)]
#[command(name = "tools/bench cache")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Sizes of the cache in MiB.
    #[arg(long, value_delimiter = ',', default_value = "64,128,256,512,1024,2048,4096")]
    sizes: Vec<usize>,
    /// Volumes that boot and are hydrated.
    #[arg(long, default_value_t = 400)]
    volumes: u32,
    /// Measure the start of a disk tier with so many used slots instead.
    #[arg(long, value_name = "SLOTS")]
    restart: Option<u32>,
    /// Runs of that; the median is published.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Do it there: a folder on a disk with direct I/O.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
}

/// The situations, by name.
fn mixes(volumes: u32) -> [(&'static str, Mix); 3] {
    let mix = Mix { images: 8, zipf: 1.0, volumes, booting: 40, hydrating: 4, scan_per_boot: 4 };
    [
        // One wave from one image.
        ("wave", Mix { images: 1, ..mix }),
        // Eight images of different popularity.
        ("images", mix),
        // The same, and hydration takes most of the requests at any time.
        ("scans", Mix { hydrating: 16, scan_per_boot: 16, booting: 10, ..mix }),
    ]
}

fn main() -> ExitCode {
    let args = Args::parse();
    let compared = || boot_chunks(BOOT_TRACE).map(|boot| first_touches(&boot)).map(|boot| compare(&args, &boot));
    let made = args.restart.map_or_else(compared, |slots| restart(&args, slots));
    conclude("cache", made, args.json.as_deref())
}

fn compare(args: &Args, boot: &[u32]) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (name, mix) in mixes(args.volumes) {
        let requests = requests(&mix, boot);
        for size in &args.sizes {
            for (policy, new) in ALL {
                let (guests, all) = hit_ratios(new, size * 2, &requests);
                let figure = |what: &str| format!("cache_{name}_{size}mib_{policy}_{what}");
                figures.push(Figure::alone(&figure("guests"), "%", &[guests]));
                figures.push(Figure::alone(&figure("all"), "%", &[all]));
            }
        }
    }
    figures
}

/// Of the requests of guests, and of all, in percent. A chunk has half a MiB.
fn hit_ratios(new: New, chunks: usize, requests: &[Access]) -> (f64, f64) {
    let mut cache = new(chunks);
    let (mut hits, mut guest_hits, mut guests) = (0_u64, 0_u64, 0_u64);
    for access in requests {
        let hit = u64::from(cache.access(*access));
        hits += hit;
        if !access.background {
            guests += 1;
            guest_hits += hit;
        }
    }
    let percent = |part: u64, of: u64| 100.0 * part as f64 / of.max(1) as f64;
    (percent(guest_hits, guests), percent(hits, requests.len() as u64))
}

/// Times the start of a tier whose index names `slots` chunks of one slot each.
fn restart(args: &Args, slots: u32) -> Result<Vec<Figure>, String> {
    let fail = |e: std::io::Error| format!("{}: {e}", args.dir.display());
    std::fs::create_dir_all(&args.dir).map_err(fail)?;
    let files = tempfile::tempdir_in(&args.dir).map_err(fail)?;
    write_index(files.path(), slots).map_err(fail)?;
    let times: Vec<f64> = (0..args.runs).map(|_| start_tier(files.path(), slots)).collect::<Result<_, _>>()?;
    Ok(vec![Figure::alone(&format!("cache_restart_{slots}_slots"), "ms", &times)])
}

fn write_index(dir: &Path, slots: u32) -> std::io::Result<()> {
    let mut index = encode_head(1).to_vec();
    for slot in 0..slots {
        let mut digest = [7; 32];
        digest[..4].copy_from_slice(&slot.to_le_bytes());
        let (stored_len, chunk_len) = (PART_BYTES as u32, SLOT_BYTES as u32);
        let sequence = u64::from(slot);
        let record =
            Record { digest, sequence, placement: 0, stored_len, chunk_len, encoding: Encoding::Zstd, part: 0 };
        index.extend_from_slice(&record.encode());
    }
    index.resize(index.len().next_multiple_of(4096), 0);
    std::fs::write(dir.join(index_name(0)), index)?;
    std::fs::File::create(dir.join(slots_name(0)))?.set_len(u64::from(slots) * SLOT_BYTES as u64)
}

/// Milliseconds from nothing to a tier that knows all its chunks.
fn start_tier(dir: &Path, slots: u32) -> Result<f64, String> {
    let config = DiskCacheConfig { dir: dir.to_path_buf(), bytes: u64::from(slots) * SLOT_BYTES as u64 };
    let timed = async move || {
        let platform = Glommio::new().map_err(|e| e.to_string())?;
        let begun = Instant::now();
        let owner = Owner { node_id: 1, shard: 0, shards: 1 };
        let tier = DiskTier::open(platform, &config, owner, Rc::default()).await?;
        match tier.status().chunks == u64::from(slots) {
            true => Ok(begun.elapsed().as_secs_f64() * 1e3),
            false => Err(format!("{} of {slots} chunks were found", tier.status().chunks)),
        }
    };
    let executor = LocalExecutorBuilder::new(Placement::Unbound).name("bench").spawn(timed);
    executor.map_err(|e| e.to_string())?.join().map_err(|e| e.to_string())?
}
