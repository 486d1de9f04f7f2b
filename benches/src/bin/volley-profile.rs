//! Where the processor time of one node goes under a load. Start it with `tools/profile`, which builds everything it runs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use volley_benches::process::{Result, Server, machine};
use volley_benches::profile::node::{Place, cores};
use volley_benches::profile::report::{PerRequest, Report, Sampled};
use volley_benches::profile::workload::{Load, Shape};
use volley_benches::profile::{Args, perf, stacks};

fn main() -> ExitCode {
    let args = Args::parse();
    match profile(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tools/profile {}: {message}", args.workload.name());
            ExitCode::FAILURE
        }
    }
}

fn profile(args: &Args) -> Result<()> {
    let name = args.workload.name();
    let output = args.output.clone().unwrap_or_else(|| PathBuf::from("target/profile").join(name));
    let say = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
    std::fs::create_dir_all(&output).map_err(|e| say(&output, e))?;
    let (server_core, load_core) = cores(args)?;
    let run =
        Run { args, output: &output, load_core, shape: args.workload.shape(args), event: perf::sampling_event()? };
    let place = Place::new(args, server_core)?;
    let shape = &run.shape;
    eprintln!("tools/profile {name}: making images");
    place.import(if args.workload.is_cold() { shape.connections } else { 1 }, shape.volume_mib)?;
    let (plain, sampled, counted) = if args.workload.is_cold() {
        let cold = |server: &Server| place.cold_volumes(server, shape);
        (
            place.node(|server| cold(server).and_then(|()| run.plain(server)))?,
            place.node(|server| cold(server).and_then(|()| run.sample(server)))?,
            place.node(|server| cold(server).and_then(|()| run.count(server)))?,
        )
    } else {
        place.node(|server| {
            place.resident_volumes(server, shape)?;
            Ok((run.plain(server)?, run.sample(server)?, run.count(server)?))
        })?
    };
    let (load, cpu_ns) = plain;
    let cpu_ns_per_request = cpu_ns as f64 / load.requests as f64;
    let (sampled_load, folded) = sampled;
    let report = Report {
        workload: name,
        machine: machine(),
        server_core,
        load_core,
        shards: args.shards,
        shape: *shape,
        load,
        cpu_ns_per_request,
        core_percent: cpu_ns as f64 / load.seconds / 1e7,
        sampled: Sampled::new((run.event, args.frequency), &sampled_load, &stacks::parse(&folded)?, cpu_ns_per_request),
        counted,
    };
    let write = |file: &str, text: &str| {
        let path = output.join(file);
        std::fs::write(&path, text).map_err(|e| say(&path, e))
    };
    write("stacks.folded", &folded)?;
    write("report.json", &report.to_json())?;
    write("report.txt", &report.to_string())?;
    let title = format!("volleyd, {name}: {cpu_ns_per_request:.0} ns of processor time for each request");
    perf::draw(&folded, title, &output.join("flamegraph.svg"))?;
    eprintln!("tools/profile {name}: flamegraph.svg, report.txt and report.json are in {}", output.display());
    print!("{}", if args.json { report.to_json() } else { report.to_string() });
    Ok(())
}

/// The same load, watched in different ways.
struct Run<'a> {
    args: &'a Args,
    output: &'a Path,
    load_core: usize,
    shape: Shape,
    event: &'static str,
}

impl Run<'_> {
    fn load(&self, server: &Server, how: &str) -> Result<Load> {
        eprintln!("tools/profile {}: the load, {how}", self.args.workload.name());
        self.args.workload.load(server, &self.shape, self.load_core)
    }

    /// With the processor time that the node took for it, in nanoseconds.
    fn plain(&self, server: &Server) -> Result<(Load, u64)> {
        let before = server.cpu_ns()?;
        let load = self.load(server, "alone")?;
        Ok((load, server.cpu_ns()?.saturating_sub(before)))
    }

    fn sample(&self, server: &Server) -> Result<(Load, String)> {
        let how = (self.event, self.args.frequency);
        perf::sample(server.pid(), how, self.output, || self.load(server, "with samples taken"))
    }

    fn count(&self, server: &Server) -> Result<PerRequest> {
        let (load, counted) = perf::count(server.pid(), self.output, || self.load(server, "with calls counted"))?;
        Ok(PerRequest::new(&load, &counted))
    }
}
