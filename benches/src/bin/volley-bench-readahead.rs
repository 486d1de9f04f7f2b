//! A cold volume read in order by one guest, one request after another: what reading ahead gains, by the size of its window,
//! and what it costs in GETs. Start it with `tools/bench readahead`, which builds everything it runs.
//!
//! The object store is an S3 server of ours (`origin`) in this process, with a delay before each answer and a bandwidth for
//! each connection. Each window has a node of its own, without hydration; the runs go through all windows in turn.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokio::time::Instant;
use volley_benches::figure::{Figure, Pair, conclude};
use volley_benches::process::{Result, machine, run};
use volley_benches::site::{Site, SiteArgs};
use volley_server::config::TransferConfig;

/// Largest windows that are compared, in MiB; 0: no read-ahead, the peer of the others.
const WINDOWS_MIB: [u64; 6] = [0, 1, 2, 4, 8, 16];
/// Measures what reading ahead gains for a guest that reads a cold volume in order.
#[derive(Debug, Parser)]
#[command(name = "tools/bench readahead")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Size of the volume, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=4096))]
    volume_mib: u32,
    /// Size of a read, in KiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(4..=4096))]
    read_kib: u64,
    /// Runs; the figures are medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    #[command(flatten)]
    site: SiteArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("readahead", measure(&args), args.json.as_deref())
}

/// The volume read once.
#[derive(Clone, Copy)]
struct Pass {
    mib_per_second: f64,
    gets: u64,
    bytes: u64,
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let site = Site::new(&args.site)?;
    println!("{}", machine());
    println!(
        "a volume of {} MiB read in order, {} KiB at a time; object store: {} ms, {} MiB/s a connection",
        args.volume_mib, args.read_kib, args.site.first_byte_ms, args.site.connection_mib
    );
    let image = site.dir().join("image.raw");
    volley_benches::full_image(&image, args.volume_mib, 1)?;
    site.import(&image, "image")?;
    site.answer(Some(&args.site));
    let bench = Bench { args, site: &site };
    let mut passes = vec![Vec::new(); WINDOWS_MIB.len()];
    for number in 0..args.runs {
        for (window, passes) in WINDOWS_MIB.iter().zip(&mut passes) {
            eprintln!("readahead: run {} of {}, window of {window} MiB", number + 1, args.runs);
            passes.push(bench.pass(*window)?);
        }
    }
    Ok(figures(&passes))
}

struct Bench<'a> {
    args: &'a Args,
    site: &'a Site,
}

impl Bench<'_> {
    /// Starts a node with this window and reads a new volume on it.
    fn pass(&self, window_mib: u64) -> Result<Pass> {
        self.site.node(&format!("transfer.readahead_bytes_max = \"{window_mib}MiB\"\n"), |server| {
            let create = ["volume", "create", "--snapshot", "image", "--rate", "none", "v"];
            run(&mut self.site.volley(Some(server), &create)?)?;
            let _ = self.site.origin().take_counts();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| e.to_string())?;
            let took = runtime.block_on(self.read_all(&server.ready_word("data")?))?;
            let (gets, bytes) = self.site.origin().take_counts();
            Ok(Pass { mib_per_second: f64::from(self.args.volume_mib) / took.as_secs_f64(), gets, bytes })
        })
    }

    async fn read_all(&self, address: &str) -> Result<Duration> {
        let client = volley_client::Client::connect(address, volley_client::Options::default()).await.map_err(say)?;
        let volume = client.attach("v").await.map_err(say)?;
        let (end, step) = (u64::from(self.args.volume_mib) << 20, self.args.read_kib << 10);
        let begun = Instant::now();
        let mut at = 0;
        while at < end {
            let len = step.min(end - at);
            volume.read(at, usize::try_from(len).map_err(|e| e.to_string())?).await.map_err(say)?;
            at += len;
        }
        let took = begun.elapsed();
        volume.detach().await.map_err(say)?;
        Ok(took)
    }
}

fn say(error: volley_client::Error) -> String {
    error.to_string()
}

fn figures(passes: &[Vec<Pass>]) -> Vec<Figure> {
    let off = &passes[0];
    let mut figures = Vec::new();
    for (window, passes) in WINDOWS_MIB.iter().zip(passes) {
        let name = if *window == 0 { "off".to_owned() } else { format!("{window}mib") };
        let pairs: Vec<Pair> = passes
            .iter()
            .zip(off)
            .map(|(ours, off)| Pair { ours: ours.mib_per_second, peer: off.mib_per_second })
            .collect();
        figures.push(Figure::against(&format!("readahead_{name}"), "MiB/s", "off, same run", &pairs));
        let of = |value: fn(&Pass) -> f64| passes.iter().map(value).collect::<Vec<_>>();
        figures.push(Figure::alone(&format!("readahead_{name}_gets"), "", &of(|pass| pass.gets as f64)));
        let mib: Vec<f64> = of(|pass| pass.bytes as f64 / f64::from(1 << 20));
        figures.push(Figure::alone(&format!("readahead_{name}_object_mib"), "MiB", &mib));
    }
    let default_mib = TransferConfig::default().readahead_bytes_max.0 >> 20;
    if let Some(chosen) = WINDOWS_MIB.iter().position(|window| *window == default_mib) {
        println!("readahead_speedup is that of the default window, {default_mib} MiB");
        let speedup = |(ours, off): (&Pass, &Pass)| ours.mib_per_second / off.mib_per_second;
        let speedups: Vec<f64> = passes[chosen].iter().zip(off).map(speedup).collect();
        figures.push(Figure::alone("readahead_speedup", "x", &speedups));
    }
    figures
}
