//! `volley image blocks` and `volley image diff`: what an incremental backup asks for, from the object store alone.

use clap::Args;
use futures::executor::block_on;
use serde_json::json;
use volley_server::snapshot::diff::{self, Change, digest_text};
use volley_server::snapshot::{Manifest, catalog};

use crate::cli::{CliError, CliResult, Globals, Table, objects, print_json, print_line};
use crate::units::format_size;

#[derive(Debug, Args)]
pub struct BlocksArgs {
    /// Name of the snapshot.
    name: String,
}

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Name of the older snapshot.
    since: String,
    /// Name of the newer snapshot.
    name: String,
}

pub(super) fn list(globals: &Globals, args: &BlocksArgs) -> CliResult {
    let manifest = block_on(catalog::load(&objects::open(globals)?, &args.name))?;
    let blocks: Vec<_> = diff::blocks(&manifest, 0).collect();
    if globals.json {
        return print_json(&json!({
            "snapshot": manifest.name,
            "id": format!("{:032x}", manifest.id),
            "size_bytes": manifest.size_bytes,
            "block_bytes": manifest.chunk_bytes,
            "blocks": blocks,
        }));
    }
    let mut table = Table::new(&["BLOCK", "OFFSET", "LENGTH", "BLAKE3"]);
    for block in &blocks {
        table.row(place_of(&manifest, block.index, block.len).into_iter().chain([digest_text(&block.digest)]));
    }
    table.print()?;
    let bytes = blocks.iter().map(|block| u64::from(block.len)).sum();
    print_line(&format!("{} of {} blocks have data ({})", blocks.len(), manifest.chunk_count(), format_size(bytes)))
}

pub(super) fn diff(globals: &Globals, args: &DiffArgs) -> CliResult {
    let store = objects::open(globals)?;
    let since = block_on(catalog::load(&store, &args.since))?;
    let manifest = block_on(catalog::load(&store, &args.name))?;
    let changes = diff::changes(&manifest, &since, 0).map_err(|e| CliError::new("invalid", e.to_string()))?;
    let changes: Vec<_> = changes.collect();
    if globals.json {
        return print_json(&json!({
            "snapshot": manifest.name,
            "id": format!("{:032x}", manifest.id),
            "since": since.name,
            "since_id": format!("{:032x}", since.id),
            "size_bytes": manifest.size_bytes,
            "block_bytes": manifest.chunk_bytes,
            "changes": changes,
        }));
    }
    let mut table = Table::new(&["BLOCK", "OFFSET", "LENGTH", "CHANGE"]);
    for change in &changes {
        table.row(place_of(&manifest, change.index, change.len).into_iter().chain([kind_of(change).to_owned()]));
    }
    table.print()?;
    let bytes = changes.iter().map(|change| u64::from(change.len)).sum();
    print_line(&format!(
        "{} of {} blocks of {:?} differ from {:?} ({})",
        changes.len(),
        manifest.chunk_count(),
        manifest.name,
        since.name,
        format_size(bytes)
    ))
}

fn place_of(manifest: &Manifest, index: u32, len: u32) -> [String; 3] {
    [index.to_string(), (u64::from(index) * u64::from(manifest.chunk_bytes)).to_string(), len.to_string()]
}

/// How a block came to differ; exactly one side may be without data.
fn kind_of(change: &Change) -> &'static str {
    match (change.since_digest, change.digest) {
        (None, _) => "added",
        (_, None) => "zeroed",
        _ => "changed",
    }
}
