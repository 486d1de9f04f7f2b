//! `volley node …`: the server itself.

use clap::Subcommand;
use serde::Deserialize;

use super::api::{Api, fields_of};
use super::{CliResult, Globals, Table, print_json, print_line};

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Show the node, its shards and its recent events.
    Show,
}

#[derive(Debug, Deserialize)]
struct Node {
    node_id: String,
    version: String,
    data: String,
    object_store: String,
    volumes: u64,
    volumes_hydrated: u64,
    volumes_attached: u64,
    shards: Vec<Shard>,
    events: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Shard {
    shard: u64,
    address: Option<String>,
    volumes: u64,
    connections: u64,
}

/// Runs one node command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: NodeCommand) -> CliResult {
    let NodeCommand::Show = command;
    let node = Api::new(&globals.server)?.get("/v1/node")?;
    if globals.json {
        return print_json(&node);
    }
    let node: Node = fields_of(&node)?;
    let volumes = format!("{} ({} hydrated, {} attached)", node.volumes, node.volumes_hydrated, node.volumes_attached);
    let rows = [
        ("node", node.node_id),
        ("version", node.version),
        ("data", node.data),
        ("object store", node.object_store),
        ("volumes", volumes),
    ];
    for (key, value) in rows {
        print_line(&format!("{key:<13} {value}"))?;
    }
    let mut table = Table::new(&["SHARD", "ADDRESS", "VOLUMES", "CONNECTIONS"]);
    for shard in node.shards {
        let address = shard.address.unwrap_or_else(|| "-".to_string());
        table.row([shard.shard.to_string(), address, shard.volumes.to_string(), shard.connections.to_string()]);
    }
    table.print()?;
    node.events.iter().try_for_each(|event| print_line(&format!("event: {event}")))
}
