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
    hydration_bytes_per_second_max: Option<u64>,
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
    let header = ["STORE", "PATH", "VOLUMES", "VOLUME SIZE", "CAPACITY", "FREE", "HYDRATION LIMIT"];
    let mut table = Table::new(&header);
    for store in stores {
        let store: Store = fields_of(store)?;
        table.row([
            store.label,
            store.path,
            store.volumes.to_string(),
            format_size(store.volume_bytes),
            format_size(store.capacity_bytes),
            format_size(store.free_bytes),
            store
                .hydration_bytes_per_second_max
                .map_or("unlimited".to_string(), |bytes| format!("{}/s", format_size(bytes))),
        ]);
    }
    table.print()
}
