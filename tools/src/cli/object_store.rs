//! `volley object-store …`. `check`: what an object store supports and how fast it is, as seen from this machine.
//!
//! It writes trial objects under `trial/`, reads them back, and removes them. Exit code 0: everything that Volley needs is
//! there; 1: something is missing or the store can't be used.

use std::time::Instant;

use clap::Subcommand;
use futures::executor::block_on;
use serde::Serialize;
use serde_json::json;
use volley_server::object_store::ObjectStore;
use volley_server::object_store::s3::TRIAL_PREFIX;
use volley_server::platform::Platform;
use volley_server::platform::blocking::{Blocking, ToolStore};

use super::{CliError, CliResult, Globals, Table, objects, print_json, print_line};

mod features;
mod speed;
mod usage;

use features::Feature;
use speed::{Latency, Throughput};

#[derive(Debug, Subcommand)]
pub enum ObjectStoreCommand {
    /// Try what Volley needs of the object store, and measure it. Leaves nothing behind.
    Check,
    /// Show what each snapshot takes of it, what is garbage, and what would be freed.
    Usage,
}

#[derive(Serialize)]
struct Report {
    object_store: String,
    ok: bool,
    features: Vec<Feature>,
    small_get: Option<Latency>,
    throughput: Vec<Throughput>,
    elapsed_ms: u64,
}

/// Runs one object store command.
///
/// # Errors
/// What is missing, or why the store can't be used.
pub fn run(globals: &Globals, command: ObjectStoreCommand) -> CliResult {
    match command {
        ObjectStoreCommand::Check => check(globals),
        ObjectStoreCommand::Usage => usage::run(globals),
    }
}

fn check(globals: &Globals) -> CliResult {
    let begun = Instant::now();
    let store = objects::open_or_create(globals)?;
    let prefix = format!("{TRIAL_PREFIX}{:016x}/", Blocking.random_u64());
    let result = try_out(&store, &prefix);
    let cleaned = clean(&store, &prefix);
    let (features, small_get, throughput) = result;
    let missing: Vec<String> = features.iter().filter(|f| f.needed && !f.ok).map(|f| f.name.to_owned()).collect();
    let report = Report {
        object_store: place(&store),
        ok: missing.is_empty() && cleaned.is_ok(),
        features,
        small_get,
        throughput,
        elapsed_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    if globals.json {
        print_json(&json!(report))?
    } else {
        print_text(&report)?
    }
    cleaned?;
    match missing.is_empty() {
        true => Ok(()),
        false => Err(CliError::new("object_store", format!("{} lacks: {}", report.object_store, missing.join(", ")))),
    }
}

fn try_out(store: &ToolStore, prefix: &str) -> (Vec<Feature>, Option<Latency>, Vec<Throughput>) {
    let features = features::try_all(store, prefix);
    if features.iter().any(|feature| feature.needed && !feature.ok) {
        return (features, None, Vec::new());
    }
    let latency = speed::small_gets(store, prefix);
    let throughput = speed::large_gets(store, prefix);
    (features, latency, throughput)
}

/// Removes the trial objects, whatever became of the trial.
fn clean(store: &ToolStore, prefix: &str) -> CliResult {
    let left = block_on(store.list(prefix))?;
    let keys: Vec<&str> = left.iter().map(|object| object.key.as_str()).collect();
    Ok(block_on(store.delete_all(&keys))?)
}

fn place(store: &ToolStore) -> String {
    match store {
        ToolStore::Dir(store) => format!("file:{}", store.root().display()),
        ToolStore::S3(store) => store.place().to_owned(),
    }
}

fn print_text(report: &Report) -> CliResult {
    print_line(&format!("object store {}", report.object_store))?;
    let mut table = Table::new(&["FEATURE", "RESULT", "DETAIL"]);
    for Feature { name, ok, needed, detail } in &report.features {
        let result = match (ok, needed) {
            (true, _) => "ok",
            (false, true) => "MISSING",
            (false, false) => "weaker",
        };
        table.row([(*name).to_owned(), result.to_owned(), detail.clone()]);
    }
    table.print()?;
    if let Some(Latency { bytes, requests, p50_ms, p90_ms, p99_ms, max_ms }) = report.small_get {
        print_line(&format!(
            "{requests} reads of {bytes} bytes, one after the other: p50 {p50_ms:.1} ms, p90 {p90_ms:.1} ms, p99 \
             {p99_ms:.1} ms, longest {max_ms:.1} ms"
        ))?;
    }
    for Throughput { concurrency, mib_per_second, failed, .. } in &report.throughput {
        let failed = if *failed == 0 { String::new() } else { format!(" ({failed} failed)") };
        print_line(&format!("{concurrency:>3} reads at a time: {mib_per_second:.0} MiB/s{failed}"))?;
    }
    Ok(())
}
