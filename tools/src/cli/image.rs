//! `volley image …`: images into the object store, and the snapshots there. Works on the object store alone.

use clap::Subcommand;

use futures::executor::block_on;
use serde_json::json;
use volley_server::object_store::dir::DirStore;
use volley_server::object_store::{ObjectError, ObjectStoreUrl};
use volley_server::platform::blocking::Blocking;
use volley_server::snapshot::{CatalogError, Manifest, catalog};

use super::{CliError, CliResult, Globals, Table, print_json};
use crate::units::format_size;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the snapshots of the object store.
    List,
}

/// Runs one image command.
///
/// # Errors
/// Says what failed and what to do.
pub fn run(globals: &Globals, command: ImageCommand) -> CliResult {
    match command {
        ImageCommand::List => list(globals),
    }
}

fn list(globals: &Globals) -> CliResult {
    let store = existing_store(globals)?;
    let mut manifests = Vec::new();
    for name in block_on(catalog::names(&store))? {
        manifests.push(block_on(catalog::load(&store, &name))?);
    }
    if globals.json {
        return print_json(&manifests.iter().map(summary).collect::<Vec<_>>());
    }
    let mut table = Table::new(&["NAME", "SIZE", "CHUNK", "CHUNKS"]);
    for m in &manifests {
        let chunk = format_size(u64::from(m.chunk_bytes));
        table.row([m.name.clone(), format_size(m.size_bytes), chunk, m.chunk_count().to_string()]);
    }
    table.print()
}

fn summary(m: &Manifest) -> serde_json::Value {
    json!({"name": m.name, "size_bytes": m.size_bytes, "chunk_bytes": m.chunk_bytes, "chunks": m.chunk_count()})
}

fn store_url(globals: &Globals) -> CliResult<ObjectStoreUrl> {
    let missing = "no object store: give --object-store file:DIR or set VOLLEY_OBJECT_STORE";
    let url = globals.object_store.as_deref().ok_or_else(|| CliError::new("invalid", missing))?;
    url.parse().map_err(|e: String| CliError::new("invalid", e))
}

fn existing_store(globals: &Globals) -> CliResult<DirStore<Blocking>> {
    let ObjectStoreUrl::File(path) = store_url(globals)?;
    Ok(block_on(DirStore::open(Blocking, path))?)
}

impl From<ObjectError> for CliError {
    fn from(e: ObjectError) -> CliError {
        CliError::new("object_store", e.to_string())
    }
}

impl From<CatalogError> for CliError {
    fn from(e: CatalogError) -> CliError {
        let code = match &e {
            CatalogError::Name(_) => "invalid",
            CatalogError::Unknown(_) => "unknown_snapshot",
            CatalogError::Manifest { .. } | CatalogError::Misplaced { .. } => "corrupt",
            CatalogError::Store(_) => "object_store",
        };
        CliError::new(code, e.to_string())
    }
}
