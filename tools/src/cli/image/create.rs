//! `volley snapshot create`: snapshots of volumes, taken by their server.

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::progress::Progress;
use crate::cli::api::{Api, fields_of, segment};
use crate::cli::{CliError, CliResult, Globals, print_json, print_line};
use crate::units::format_size;

/// One request waits this long for the end, then asks again.
const WAIT_SECONDS: u64 = 1;

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Volumes, all of them at the same moment.
    #[arg(required = true, value_name = "VOLUME")]
    volumes: Vec<String>,
    /// Name of the snapshot; of several volumes what the names begin with: NAME-VOLUME.
    #[arg(long)]
    name: String,
    /// Return when the snapshots exist.
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Deserialize)]
struct Task {
    state: String,
    bytes_done: u64,
    bytes_total: u64,
    error: Option<(String, String)>,
    snapshots: Vec<Taken>,
}

#[derive(Debug, Deserialize)]
struct Taken {
    volume: String,
    snapshot: String,
    base: Option<String>,
    chunks: u32,
    captured_chunks: u64,
    stored_chunks: u32,
    stored_bytes: u64,
    stall_us: u64,
}

pub(super) fn run(globals: &Globals, args: &CreateArgs) -> CliResult {
    let api = Api::new(&globals.server)?;
    let shown = take(&api, globals.json, &args.volumes, &args.name, args.wait)?;
    if globals.json {
        return print_json(&shown);
    }
    let task: Task = fields_of(&shown)?;
    if task.state != "done" {
        return print_line(&format!("snapshot {} is {}: volley snapshot show {}", args.name, task.state, args.name));
    }
    for taken in task.snapshots {
        let base = taken.base.map_or_else(|| "no snapshot known".to_owned(), |base| format!("snapshot {base}"));
        print_line(&format!(
            "{}: volume {}, {} of {} chunks read since {base}, {} stored in {}; guest held back for {:.2} ms",
            taken.snapshot,
            taken.volume,
            taken.captured_chunks,
            taken.chunks,
            taken.stored_chunks,
            format_size(taken.stored_bytes),
            taken.stall_us as f64 / 1000.0
        ))?;
    }
    Ok(())
}

/// Asks for snapshots; with `wait` until they exist. What the server says of the task.
///
/// # Errors
/// The server's reason.
pub(in crate::cli) fn take(api: &Api, quiet: bool, volumes: &[String], name: &str, wait: bool) -> CliResult<Value> {
    segment(name)?;
    let mut shown = api.post("/v1/snapshots", &json!({"name": name, "volumes": volumes}))?;
    let progress = Progress::start("snapshot", quiet);
    if !wait {
        return Ok(shown);
    }
    loop {
        let task: Task = fields_of(&shown)?;
        match task.state.as_str() {
            "done" => return Ok(shown),
            "failed" => {
                let (code, message) = task.error.unwrap_or_default();
                return Err(CliError::new(code, message));
            }
            _ => progress.update(task.bytes_done, task.bytes_total),
        }
        shown = api.get(&format!("/v1/snapshot-tasks/{name}?wait_s={WAIT_SECONDS}"))?;
    }
}
