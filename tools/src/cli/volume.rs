//! `volley volume …`: create, list, show, delete volumes, change their rate, and wait for their hydration.

mod restore;
mod wait;

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Value, json};
use volley_server::types::HydrationRate;

use super::api::{Api, fields_of, request_of, segment};
use super::place::PlacementArgs;
use super::{CliError, CliResult, Globals, Table, print_json, print_line};
use crate::units::{format_duration, format_size, parse_duration, parse_size};

/// Volumes asked for in one page of a listing.
const PAGE: usize = 10_000;

#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume, or a batch of them, from a snapshot or blank.
    Create(CreateArgs),
    /// List volumes by name.
    List(ListArgs),
    /// Show a volume, its progress and what its hydration waits for.
    Show { name: String },
    /// Delete volumes and their data.
    Delete {
        #[arg(required = true)]
        names: Vec<String>,
        /// Also while a host has them attached.
        #[arg(long)]
        force: bool,
    },
    /// Wait until volumes are hydrated.
    Wait {
        #[arg(required = true)]
        names: Vec<String>,
        /// Wait for all data to be in the volume itself (the only thing to wait for so far).
        #[arg(long, required = true)]
        hydrated: bool,
        /// Give up after this long, e.g. 10m.
        #[arg(long, value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
    /// Change the rate of background hydration.
    Rate {
        name: String,
        /// unlimited, none or bytes per second, e.g. 200MiB/s.
        rate: HydrationRate,
    },
    /// Make a volume equal to a snapshot again. It can be attached at once; what differs hydrates, what is touched first.
    Rollback(restore::RollbackArgs),
    /// Make another volume of what a volume holds now, through a snapshot.
    Clone(restore::CloneArgs),
    /// Make a volume longer that no host has attached; the new part reads as zeroes.
    Resize {
        name: String,
        /// New size of the device, e.g. 20GiB.
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Read a volume from its disk and hold it against the snapshot it builds on. Exit code 1 if anything is damaged.
    Verify(restore::VerifyArgs),
    /// List the ranges of a volume that only the object store has: what would be lost with it.
    AtRisk { name: String },
    /// Change settings of volumes.
    Set {
        #[arg(required = true)]
        names: Vec<String>,
        /// Rate of background hydration: unlimited, none or bytes per second, e.g. 200MiB/s.
        #[arg(long)]
        rate: HydrationRate,
    },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the volume.
    #[arg(value_name = "NAME", conflicts_with = "name_prefix")]
    positional_name: Option<String>,
    /// Name of the volume, like NAME.
    #[arg(long, conflicts_with_all = ["positional_name", "name_prefix"])]
    name: Option<String>,
    /// Snapshot with the content; without one the volume is blank.
    #[arg(long)]
    snapshot: Option<String>,
    /// Device size, e.g. 10GiB: needed for a blank volume, at least the image's size otherwise.
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Number of volumes, named by the prefix and a number.
    #[arg(long, requires = "name_prefix")]
    count: Option<u64>,
    /// What the names start with; the first volume is PREFIX0.
    #[arg(long, value_name = "PREFIX")]
    name_prefix: Option<String>,
    /// Number of the first volume.
    #[arg(long, requires = "name_prefix")]
    start: Option<u64>,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Chunk size of a blank volume.
    #[arg(long, value_parser = parse_size)]
    chunk_size: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only names that start so.
    #[arg(long)]
    prefix: Option<String>,
    /// Only volumes of this snapshot.
    #[arg(long)]
    snapshot: Option<String>,
    /// Only volumes of this batch.
    #[arg(long)]
    batch: Option<String>,
    /// Only volumes in the store of this label.
    #[arg(long)]
    store: Option<String>,
}

/// What is shown of a volume's status.
#[derive(Debug, Deserialize)]
struct Volume {
    name: String,
    size_bytes: u64,
    snapshot: Option<String>,
    store: String,
    rate: String,
    attached: bool,
    hydrated: bool,
    resident_bytes: u64,
    eta_seconds: Option<f64>,
    hydration_state: String,
    last_error: Option<String>,
}

/// Runs one volume command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: VolumeCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    match command {
        VolumeCommand::Create(args) => create(&api, globals, args),
        VolumeCommand::List(args) => list(&api, globals, &args),
        VolumeCommand::Show { name } => show(&api, globals, &name),
        VolumeCommand::Delete { names, force } => delete(&api, globals, &names, force),
        VolumeCommand::Wait { names, timeout, hydrated: _ } => wait::run(&api, globals, &names, timeout),
        VolumeCommand::Rate { name, rate } => set_rate(&api, globals, &[name], rate),
        VolumeCommand::Rollback(args) => restore::roll_back(&api, globals, &args),
        VolumeCommand::Clone(args) => restore::clone(&api, globals, &args),
        VolumeCommand::Resize { name, size } => for_each(globals, &[name], "resized", |name| {
            api.patch(&format!("/v1/volumes/{}", segment(name)?), &json!({"size_bytes": size}))
        }),
        VolumeCommand::AtRisk { name } => restore::at_risk(&api, globals, &name),
        VolumeCommand::Verify(args) => restore::verify(&api, globals, &args),
        VolumeCommand::Set { names, rate } => set_rate(&api, globals, &names, rate),
    }
}

fn create(api: &Api, globals: &Globals, args: CreateArgs) -> CliResult {
    let fields = [
        ("name", json!(args.name.or(args.positional_name))),
        ("name_prefix", json!(args.name_prefix)),
        ("count", json!(args.count)),
        ("start", json!(args.start)),
        ("snapshot", json!(args.snapshot)),
        ("size_bytes", json!(args.size)),
        ("chunk_bytes", json!(args.chunk_size)),
    ];
    let request = request_of(fields.into_iter().chain(args.placement.fields()));
    let begun = Instant::now();
    let created = api.post("/v1/volumes", &request)?;
    let took = begun.elapsed();
    match globals.json {
        true => print_json(&created),
        false => print_line(&created_line(&created, took)),
    }
}

fn created_line(created: &Value, took: Duration) -> String {
    let volumes = created["volumes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |volume: Option<&Value>| volume.and_then(|v| v["name"].as_str()).unwrap_or_default().to_string();
    let names = match volumes {
        [only] => name(Some(only)),
        many => format!("{} volumes {} to {}", many.len(), name(many.first()), name(many.last())),
    };
    let from = created["snapshot"].as_str().map(|snapshot| format!(" from {snapshot}")).unwrap_or_default();
    let size = format_size(created["size_bytes"].as_u64().unwrap_or_default());
    let batch = created["batch"].as_str().unwrap_or_default();
    let each = if volumes.len() == 1 { "" } else { " each" };
    format!("created {names}{from}, {size}{each}, in {} (batch {batch})", format_duration(took))
}

fn list(api: &Api, globals: &Globals, args: &ListArgs) -> CliResult {
    let volumes = pages(api, args)?;
    if globals.json {
        return print_json(&volumes);
    }
    let mut table = Table::new(&["NAME", "SIZE", "SNAPSHOT", "STORE", "RESIDENT", "HYDRATION", "ETA", "ATTACHED"]);
    for volume in &volumes {
        let volume: Volume = fields_of(volume)?;
        table.row([
            volume.name.clone(),
            format_size(volume.size_bytes),
            volume.snapshot.clone().unwrap_or_else(|| "-".to_string()),
            volume.store.clone(),
            volume.resident(),
            volume.hydration_state.clone(),
            volume.eta(),
            yes_or_no(volume.attached),
        ]);
    }
    table.print()
}

fn pages(api: &Api, args: &ListArgs) -> CliResult<Vec<Value>> {
    let filters =
        [("prefix", &args.prefix), ("snapshot", &args.snapshot), ("batch", &args.batch), ("store", &args.store)];
    let mut query = format!("limit={PAGE}");
    for (key, value) in filters {
        if let Some(value) = value {
            query.push_str(&format!("&{key}={}", segment(value)?));
        }
    }
    let mut volumes = Vec::new();
    let mut after = String::new();
    loop {
        let mut page = api.get(&format!("/v1/volumes?{query}{after}"))?;
        if let Some(found) = page["volumes"].as_array_mut() {
            volumes.append(found);
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(volumes),
        }
    }
}

fn show(api: &Api, globals: &Globals, name: &str) -> CliResult {
    let volume = api.get(&format!("/v1/volumes/{}", segment(name)?))?;
    if globals.json {
        return print_json(&volume);
    }
    let fields: Volume = fields_of(&volume)?;
    let text = |key: &str| match &volume[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_string(),
        other => other.to_string(),
    };
    let size = |key: &str| format_size(volume[key].as_u64().unwrap_or_default());
    let io = |ops: &str, bytes: &str| format!("{} ({})", text(ops), size(bytes));
    let rows = [
        ("name", fields.name.clone()),
        ("id", text("id")),
        ("size", format!("{} ({} bytes)", format_size(fields.size_bytes), fields.size_bytes)),
        ("snapshot", text("snapshot")),
        ("chunk", size("chunk_bytes")),
        ("store", fields.store.clone()),
        ("placement", text("placement")),
        ("batch", text("batch")),
        ("shard", text("shard")),
        ("attached", format!("{} (generation {})", yes_or_no(fields.attached), text("generation"))),
        ("rate", rate_text(&fields.rate)),
        ("resident", format!("{} ({})", fields.resident(), format_size(fields.resident_bytes))),
        ("hydration", format!("{}, {}/s", fields.hydration_state, size("hydration_bytes_per_second"))),
        ("eta", fields.eta()),
        ("reads", io("reads", "read_bytes")),
        ("read misses", text("read_misses")),
        ("writes", io("writes", "written_bytes")),
        ("flushes", text("flushes")),
        ("priority fetches", text("priority_fetches")),
        ("last error", fields.last_error.clone().unwrap_or_else(|| "-".to_string())),
    ];
    for (key, value) in rows {
        print_line(&format!("{key:<17} {value}"))?;
    }
    Ok(())
}

/// Every volume is tried; the errors are reported together.
fn delete(api: &Api, globals: &Globals, names: &[String], force: bool) -> CliResult {
    let query = if force { "?force=true" } else { "" };
    for_each(globals, names, "deleted", |name| {
        api.delete(&format!("/v1/volumes/{}{query}", segment(name)?)).map(|_| json!(name))
    })
}

fn set_rate(api: &Api, globals: &Globals, names: &[String], rate: HydrationRate) -> CliResult {
    for_each(globals, names, "changed", |name| {
        api.patch(&format!("/v1/volumes/{}", segment(name)?), &json!({"rate": rate}))
    })
}

fn for_each(
    globals: &Globals,
    names: &[String],
    done: &str,
    mut act: impl FnMut(&str) -> CliResult<Value>,
) -> CliResult {
    let mut results = Vec::new();
    let mut errors: Vec<CliError> = Vec::new();
    for name in names {
        match act(name) {
            Ok(result) => {
                results.push(result);
                if !globals.json {
                    print_line(&format!("{done} {name}"))?;
                }
            }
            Err(error) => errors.push(error),
        }
    }
    if globals.json {
        print_json(&json!({done: results}))?;
    }
    match errors.first() {
        None => Ok(()),
        Some(first) => {
            let messages: Vec<&str> = errors.iter().map(|error| error.message.as_str()).collect();
            Err(CliError::new(first.code.clone(), messages.join("; ")))
        }
    }
}

impl Volume {
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    fn resident(&self) -> String {
        if self.hydrated {
            return "100%".to_string();
        }
        // Rounded down: 100% means hydrated.
        let share = self.resident_bytes as f64 / self.size_bytes.max(1) as f64;
        format!("{:.1}%", (share * 1000.0).floor() / 10.0)
    }

    fn eta(&self) -> String {
        match self.eta_seconds {
            _ if self.hydrated => "-".to_string(),
            Some(seconds) => Duration::try_from_secs_f64(seconds).map_or("unknown".to_string(), format_duration),
            None => "unknown".to_string(),
        }
    }
}

fn rate_text(rate: &str) -> String {
    rate.parse().map_or(rate.to_string(), |bytes| format!("{}/s", format_size(bytes)))
}

pub(super) fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_string()
}
