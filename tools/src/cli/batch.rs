//! `volley batch …`: progress of the volumes that one request created.

use clap::Subcommand;
use serde::Deserialize;
use serde_json::Value;

use super::api::{Api, fields_of, segment};
use super::{CliResult, Globals, Table, print_json};
use crate::units::{format_duration, format_size};

#[derive(Debug, Subcommand)]
pub enum BatchCommand {
    /// List batches, oldest first.
    List,
    /// Show one batch.
    Show { id: String },
}

#[derive(Debug, Deserialize)]
struct Batch {
    id: String,
    snapshot: Option<String>,
    volumes: u64,
    volumes_hydrated: u64,
    volumes_attached: u64,
    remaining_bytes: u64,
    hydration_bytes_per_second: u64,
    eta_seconds: Option<f64>,
}

/// Runs one batch command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: BatchCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    match command {
        BatchCommand::List => {
            let batches = api.get("/v1/batches")?["batches"].take();
            if globals.json {
                return print_json(&batches);
            }
            table(batches.as_array().map(Vec::as_slice).unwrap_or_default())
        }
        BatchCommand::Show { id } => {
            let batch = api.get(&format!("/v1/batches/{}", segment(&id)?))?;
            if globals.json { print_json(&batch) } else { table(&[batch]) }
        }
    }
}

fn table(batches: &[Value]) -> CliResult {
    let mut table = Table::new(&["BATCH", "SNAPSHOT", "VOLUMES", "HYDRATED", "ATTACHED", "REMAINING", "RATE", "ETA"]);
    for batch in batches {
        let batch: Batch = fields_of(batch)?;
        let eta = batch.eta_seconds.and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok());
        table.row([
            batch.id,
            batch.snapshot.unwrap_or_else(|| "-".to_string()),
            batch.volumes.to_string(),
            batch.volumes_hydrated.to_string(),
            batch.volumes_attached.to_string(),
            format_size(batch.remaining_bytes),
            format!("{}/s", format_size(batch.hydration_bytes_per_second)),
            match eta {
                _ if batch.volumes == batch.volumes_hydrated => "-".to_string(),
                Some(eta) => format_duration(eta),
                None => "unknown".to_string(),
            },
        ]);
    }
    table.print()
}
