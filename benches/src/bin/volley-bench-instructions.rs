//! Instructions that the hot requests take, counted by valgrind and held against committed bounds: the same on a busy machine.
//! Start it with `tools/bench instructions`, which builds it in the profile of the bounds.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use volley_benches::cases;
use volley_benches::instructions::{
    BOUNDS, Bounds, Count, chosen, count, incomparable, judge, run, rustc, table, valgrind_is_installed,
};

// As in the server: what a request allocates is a part of its cost.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Counts the instructions of the hot requests and compares with the committed bounds.
#[derive(Debug, Parser)]
#[command(name = "tools/bench instructions")]
struct Args {
    /// Only cases whose name contains one of these.
    words: Vec<String>,
    /// Write the counts as the new bounds.
    #[arg(long)]
    write: bool,
    /// Write the counts as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The file of the bounds.
    #[arg(long, value_name = "FILE", default_value = BOUNDS)]
    bounds: PathBuf,
    /// Run this case and count nothing: what valgrind is given.
    #[arg(long, hide = true, value_name = "NAME")]
    case: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.case {
        Some(name) => run_case(name),
        None => compare(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tools/bench instructions: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run_case(name: &str) -> Result<(), String> {
    let case = cases::all().into_iter().find(|case| case.name == name);
    run(&case.ok_or_else(|| format!("no case {name:?}"))?);
    Ok(())
}

fn compare(args: &Args) -> Result<(), String> {
    if !valgrind_is_installed() {
        return Err("valgrind is not installed: it is the package `valgrind`".into());
    }
    let foreign = incomparable();
    let bounds = match foreign.is_none() && args.bounds.exists() {
        true => Bounds::read(&args.bounds)?,
        false => Bounds::default(),
    };
    let counts = counts(&args.words, &bounds)?;
    print!("{}", table(&counts));
    if let Some(path) = &args.json {
        write_json(path, &counts).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    match foreign {
        Some(why) if args.write => Err(format!("no bounds written: {why}")),
        Some(why) => {
            println!("Not compared: {why}.");
            Ok(())
        }
        None if args.write => renew(args, bounds, &counts),
        None => conclude(&counts, &bounds, args.words.is_empty()),
    }
}

fn counts(words: &[String], bounds: &Bounds) -> Result<Vec<Count>, String> {
    let cases = chosen(words);
    if cases.is_empty() {
        return Err(format!("no case has one of {words:?} in its name"));
    }
    let program = std::env::current_exe().map_err(|e| format!("this program: {e}"))?;
    let one = |case: &cases::Case| {
        let bound = bounds.bounds.get(case.name).copied();
        let instructions = count(&program, case)?;
        Ok(Count { case: case.name.into(), unit: case.unit.into(), instructions, bound })
    };
    cases.iter().map(one).collect()
}

fn write_json(path: &Path, counts: &[Count]) -> std::io::Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(counts)? + "\n")
}

/// The counts are the bounds from now on; those of cases that were not counted stay.
fn renew(args: &Args, mut bounds: Bounds, counts: &[Count]) -> Result<(), String> {
    if args.words.is_empty() {
        bounds.bounds.clear();
    }
    bounds.rustc = rustc();
    bounds.bounds.extend(counts.iter().map(|count| (count.case.clone(), count.instructions)));
    bounds.write(&args.bounds)?;
    println!("{}: {} bounds written", args.bounds.display(), counts.len());
    Ok(())
}

fn conclude(counts: &[Count], bounds: &Bounds, whole: bool) -> Result<(), String> {
    let verdict = judge(counts, bounds, whole);
    let renewal = "`tools/bench instructions --write` renews the bounds";
    if !verdict.better.is_empty() {
        println!("Better than their bounds:\n  {}\n{renewal}.", verdict.better.join("\n  "));
    }
    if verdict.failures.is_empty() {
        return Ok(());
    }
    let mut message = format!("the hot requests take more than they may:\n  {}\n", verdict.failures.join("\n  "));
    let here = rustc();
    if here != bounds.rustc {
        message +=
            &format!("The bounds were made with {}, this is {here}: the compiler may be the reason.\n", bounds.rustc);
    }
    Err(message + "If that is meant, " + renewal + ": commit the file and say why.")
}
