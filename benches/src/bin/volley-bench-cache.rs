//! Which eviction policy keeps the right chunks: hit ratios of the candidates on requests made from the recorded boot.
//! No times are measured, so the figures are the same everywhere. Start it with `tools/bench cache`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use volley_benches::figure::{Figure, report};
use volley_benches::mix::{Mix, boot_chunks, first_touches, requests};
use volley_benches::policies::{ALL, Access, New};

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
    let made = boot_chunks(BOOT_TRACE).map(|boot| first_touches(&boot)).map(|boot| compare(&args, &boot));
    match made.and_then(|figures| report(&figures, args.json.as_deref()).map_err(|e| e.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tools/bench cache: {message}");
            ExitCode::FAILURE
        }
    }
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
