//! `volley place --dry-run`: where the volumes of a request would go, and why.

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use volley_server::placement::Overcommit;
use volley_server::types::HydrationRate;

use super::api::{Api, fields_of, request_of};
use super::{CliError, CliResult, Globals, Table, print_json, print_line};
use crate::units::{format_size, parse_size};

#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Only say what would be (the only thing there is; `volley volume create` creates).
    #[arg(long, required = true)]
    dry_run: bool,
    /// Snapshot with the content; without one the volumes are blank.
    #[arg(long)]
    snapshot: Option<String>,
    /// Device size of each, e.g. 10GiB; the image's without.
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Number of volumes.
    #[arg(long, default_value_t = 1)]
    count: u64,
    #[command(flatten)]
    placement: PlacementArgs,
}

/// What of a request decides where volumes go.
#[derive(Debug, Args)]
pub struct PlacementArgs {
    /// Background hydration of each: unlimited, none or bytes per second, e.g. 200MiB/s.
    #[arg(long)]
    rate: Option<HydrationRate>,
    /// Label of the only volume store that will do; without, the server chooses one for each volume.
    #[arg(long)]
    store: Option<String>,
    /// Spread the volumes over stores as their load allows, or evenly over failure domains.
    #[arg(long, value_parser = ["store", "domain"])]
    spread: Option<String>,
    /// What may be promised for each free byte: unlimited or a number, instead of what the stores say.
    #[arg(long, value_name = "RATIO")]
    overcommit: Option<Overcommit>,
}

impl PlacementArgs {
    /// As fields of a request.
    pub fn fields(&self) -> [(&'static str, Value); 4] {
        [
            ("rate", json!(self.rate)),
            ("store", json!(self.store)),
            ("spread", json!(self.spread)),
            ("overcommit", json!(self.overcommit)),
        ]
    }
}

#[derive(Debug, Deserialize)]
struct Placed {
    fits: bool,
    count: u64,
    size_bytes: u64,
    stores: Vec<Store>,
    refusal: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Store {
    label: String,
    domain: String,
    volumes: u64,
    skipped: Option<String>,
    room_before: Option<u64>,
    after: Load,
    bandwidth_exceeded: bool,
}

#[derive(Debug, Deserialize)]
struct Load {
    total: f64,
    space: f64,
    volumes: f64,
    hydration: f64,
    guests: f64,
}

/// Asks and prints; what does not fit is an error after the table.
///
/// # Errors
/// The server's problem, that it can't be reached, or that the volumes do not fit.
pub fn run(globals: &Globals, args: PlaceArgs) -> CliResult {
    let PlaceArgs { dry_run: _, snapshot, size, count, placement } = args;
    let fields = [("snapshot", json!(snapshot)), ("size_bytes", json!(size)), ("count", json!(count))];
    let request = request_of(fields.into_iter().chain(placement.fields()));
    let answer = Api::new(&globals.server)?.post("/v1/place", &request)?;
    let placed: Placed = fields_of(&answer)?;
    match globals.json {
        true => print_json(&answer)?,
        false => print(&placed)?,
    }
    match placed.refusal {
        Some(refusal) if !placed.fits => Err(CliError::new("no_space", refusal)),
        _ => Ok(()),
    }
}

fn print(placed: &Placed) -> CliResult {
    let header = ["STORE", "DOMAIN", "VOLUMES", "ROOM FOR", "LOAD", "SPACE", "COUNT", "HYDRATION", "GUESTS", "NOTE"];
    let mut table = Table::new(&header);
    for Store { label, domain, volumes, skipped, room_before, after, bandwidth_exceeded } in &placed.stores {
        let exceeded = || bandwidth_exceeded.then(|| "hydration share promised entirely".to_string());
        let loads = [after.total, after.space, after.volumes, after.hydration, after.guests];
        let room = room_before.map_or("any".to_string(), |room| room.to_string());
        let first = [label.clone(), domain.clone(), volumes.to_string(), room];
        let note = skipped.clone().or_else(exceeded).unwrap_or_default();
        table.row(first.into_iter().chain(loads.map(|load| format!("{load:.2}"))).chain([note]));
    }
    table.print()?;
    if placed.fits {
        let size = format_size(placed.size_bytes);
        let volumes = if placed.count == 1 { "1 volume".to_string() } else { format!("{} volumes", placed.count) };
        print_line(&format!("{volumes} of {size} fit; loads are after them, 1.00 is the average of the stores"))?;
    }
    Ok(())
}
