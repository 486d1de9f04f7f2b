//! `volley store …`: the volume stores of a node and the space on them.

use clap::Subcommand;
use serde::Deserialize;
use serde_json::Value;

use super::api::{Api, fields_of, segment};
use super::{CliResult, Globals, Table, print_json};
use crate::units::format_size;

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// List the volume stores.
    List,
    /// Show one volume store.
    Show { label: String },
}

#[derive(Debug, Deserialize)]
struct Store {
    label: String,
    path: String,
    volumes: u64,
    volume_bytes: u64,
    capacity_bytes: u64,
    free_bytes: u64,
    domain: String,
    committed_bytes: u64,
    guest_written_bytes_per_second: u64,
    hydration_bytes_per_second: u64,
    failure: Option<String>,
    hydration_bytes_per_second_max: Option<u64>,
    shares_extents: bool,
    base_bytes: u64,
    cloned_chunks: u64,
    cloned_bytes: u64,
}

/// Runs one store command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: StoreCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    match command {
        StoreCommand::List => {
            let stores = api.get("/v1/stores")?["stores"].take();
            if globals.json {
                return print_json(&stores);
            }
            table(stores.as_array().map(Vec::as_slice).unwrap_or_default())
        }
        StoreCommand::Show { label } => {
            let store = api.get(&format!("/v1/stores/{}", segment(&label)?))?;
            if globals.json { print_json(&store) } else { table(&[store]) }
        }
    }
}

fn table(stores: &[Value]) -> CliResult {
    let header = [
        "STORE",
        "PATH",
        "DOMAIN",
        "VOLUMES",
        "VOLUME SIZE",
        "CAPACITY",
        "FREE",
        "COMMITTED",
        "GUEST WRITES",
        "HYDRATION",
        "HYDRATION LIMIT",
        "SHARES EXTENTS",
        "BASE",
        "CHUNKS CLONED",
        "SAVED",
        "STATE",
    ];
    let mut table = Table::new(&header);
    for store in stores {
        let store: Store = fields_of(store)?;
        table.row([
            store.label,
            store.path,
            store.domain,
            store.volumes.to_string(),
            format_size(store.volume_bytes),
            format_size(store.capacity_bytes),
            format_size(store.free_bytes),
            format_size(store.committed_bytes),
            format!("{}/s", format_size(store.guest_written_bytes_per_second)),
            format!("{}/s", format_size(store.hydration_bytes_per_second)),
            store
                .hydration_bytes_per_second_max
                .map_or("unlimited".to_string(), |bytes| format!("{}/s", format_size(bytes))),
            if store.shares_extents { "yes" } else { "no" }.to_string(),
            format_size(store.base_bytes),
            store.cloned_chunks.to_string(),
            format_size(store.cloned_bytes),
            store.failure.map_or("ok".to_string(), |why| format!("failing: {why}")),
        ]);
    }
    table.print()
}
