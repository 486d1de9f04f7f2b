//! `volley ledger`: what guests asked for, where it came from, and what sharing saved.

use clap::Args;
use serde::Deserialize;

use super::api::{Api, fields_of};
use super::{CliResult, Globals, Table, print_json, print_line};
use crate::units::format_size;

#[derive(Debug, Args)]
pub struct LedgerArgs {
    /// Only this image and its batches.
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Ledger {
    node: Line,
    images: Vec<Line>,
    batches: Vec<Line>,
    price_per_million_gets: u64,
}

#[derive(Debug, Deserialize)]
struct Line {
    image: Option<String>,
    batch: Option<String>,
    asked_bytes: u64,
    ram_bytes: u64,
    disk_bytes: u64,
    joined_bytes: u64,
    fetched_bytes: u64,
    gets: u64,
    object_bytes: u64,
    saved_bytes: u64,
    hedges: u64,
    retries: u64,
    throttles: u64,
    cost: f64,
}

/// Shows the ledger since the server started.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, args: LedgerArgs) -> CliResult {
    let mut value = Api::new(&globals.server)?.get("/v1/ledger")?;
    if let Some(image) = &args.image {
        for list in ["images", "batches"] {
            if let Some(lines) = value[list].as_array_mut() {
                lines.retain(|line| line["image"] == image.as_str());
            }
        }
    }
    if globals.json {
        return print_json(&value);
    }
    let ledger: Ledger = fields_of(&value)?;
    let mut table = Table::new(&[
        "IMAGE",
        "BATCH",
        "ASKED",
        "RAM",
        "DISK",
        "JOINED",
        "FETCHED",
        "GETS",
        "RECEIVED",
        "SAVED",
        "HEDGES",
        "RETRIES",
        "THROTTLES",
        "COST",
    ]);
    let node = std::iter::once(&ledger.node).filter(|_| args.image.is_none());
    for line in node.chain(&ledger.images).chain(&ledger.batches) {
        let Line { asked_bytes, ram_bytes, disk_bytes, joined_bytes, fetched_bytes, object_bytes, saved_bytes, .. } =
            *line;
        let [asked, ram, disk, joined, fetched, received, saved] =
            [asked_bytes, ram_bytes, disk_bytes, joined_bytes, fetched_bytes, object_bytes, saved_bytes]
                .map(format_size);
        table.row([
            line.image.clone().unwrap_or_else(|| "(node)".to_owned()),
            line.batch.clone().unwrap_or_else(|| "-".to_owned()),
            asked,
            ram,
            disk,
            joined,
            fetched,
            line.gets.to_string(),
            received,
            saved,
            line.hedges.to_string(),
            line.retries.to_string(),
            line.throttles.to_string(),
            format!("{:.4}", line.cost),
        ]);
    }
    table.print()?;
    print_line(&format!("cost at {} per 1,000,000 GETs", ledger.price_per_million_gets))
}
