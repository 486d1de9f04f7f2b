//! `volley batch …`: many volumes asked for at once: admission, progress, cancellation and retry.

mod watch;

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{Api, fields_of, request_of, segment};
use super::place::PlacementArgs;
use super::{CliError, CliResult, Globals, Table, print_json, print_line};
use crate::units::{format_duration, format_size, parse_duration, parse_size};

#[derive(Debug, Subcommand)]
pub enum BatchCommand {
    /// Create many volumes: all of them are admitted, or none.
    Create(CreateArgs),
    /// List batches, oldest first.
    List,
    /// Show one batch.
    Show { id: String },
    /// Follow a batch until it is hydrated.
    Watch(WatchArgs),
    /// Delete the volumes of a batch, those that exist and those that are still to be made.
    Cancel {
        id: String,
        /// Also while hosts have volumes of it attached.
        #[arg(long)]
        force: bool,
        /// Return when it has begun, not when nothing is left.
        #[arg(long)]
        no_wait: bool,
    },
    /// Make what a stalled batch could not.
    Retry { id: String },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Snapshot with the content; without one the volumes are blank.
    #[arg(long)]
    snapshot: Option<String>,
    /// Number of volumes.
    #[arg(long)]
    count: u64,
    /// What the names start with; the first volume is PREFIX0.
    #[arg(long, value_name = "PREFIX")]
    name_prefix: String,
    /// Number of the first volume.
    #[arg(long)]
    start: Option<u64>,
    /// All should be hydrated after this long, e.g. 60s: hydrated before batches that are due later.
    #[arg(long, value_parser = parse_duration)]
    deadline: Option<Duration>,
    /// Refuse the batch if the estimate says that it will miss the deadline.
    #[arg(long, requires = "deadline")]
    require_deadline: bool,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Device size, e.g. 10GiB: needed for blank volumes, at least the image's size otherwise.
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Chunk size of blank volumes.
    #[arg(long, value_parser = parse_size)]
    chunk_size: Option<u64>,
    /// Names this request: with the same token again, the batch that it made is shown and nothing is made twice.
    #[arg(long)]
    token: Option<String>,
    /// Follow it until then.
    #[arg(long, value_name = "MILESTONE")]
    wait: Option<Milestone>,
}

#[derive(Debug, Args)]
pub struct WatchArgs {
    id: String,
    /// What to wait for.
    #[arg(long, value_name = "MILESTONE", default_value = "hydrated")]
    until: Milestone,
    /// Give up after this long, e.g. 10m.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
}

/// What a batch reaches one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Milestone {
    /// Every volume exists and can be attached.
    Created,
    /// Every volume has what machines read when they boot.
    BootSet,
    /// Every volume has all its data.
    Hydrated,
}

/// What is shown of a batch.
#[derive(Debug, Deserialize)]
struct Batch {
    id: String,
    state: String,
    problem: Option<String>,
    snapshot: Option<String>,
    count: u64,
    volumes: u64,
    volumes_attachable: u64,
    volumes_attached: u64,
    volumes_boot_set_resident: Option<u64>,
    volumes_hydrated: u64,
    volumes_failed: u64,
    resident_bytes: u64,
    size_bytes: u64,
    remaining_bytes: u64,
    hydration_bytes_per_second: u64,
    eta_seconds: Option<f64>,
    deadline_met: Option<bool>,
    predicted: Option<Prediction>,
    actual: Actual,
}

#[derive(Debug, Deserialize)]
struct Prediction {
    created_seconds: f64,
    hydrated_seconds: Option<f64>,
    limited_by: String,
    assumed: bool,
}

#[derive(Debug, Deserialize)]
struct Actual {
    created_seconds: Option<f64>,
    boot_set_seconds: Option<f64>,
    hydrated_seconds: Option<f64>,
    hydrated_off_percent: Option<f64>,
}

/// Runs one batch command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: BatchCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    match command {
        BatchCommand::Create(args) => create(&api, globals, args),
        BatchCommand::List => {
            let batches = api.get("/v1/batches")?["batches"].take();
            if globals.json {
                return print_json(&batches);
            }
            table(batches.as_array().map(Vec::as_slice).unwrap_or_default())
        }
        BatchCommand::Show { id } => shown(globals, &api.get(&format!("/v1/batches/{}", segment(&id)?))?),
        BatchCommand::Watch(args) => watch::run(&api, globals, segment(&args.id)?, Some(args.until), args.timeout),
        BatchCommand::Cancel { id, force, no_wait } => cancel(&api, globals, segment(&id)?, force, no_wait),
        BatchCommand::Retry { id } => {
            shown(globals, &api.post(&format!("/v1/batches/{}/retry", segment(&id)?), &json!({}))?)
        }
    }
}

fn create(api: &Api, globals: &Globals, args: CreateArgs) -> CliResult {
    let deadline = args.deadline.map(|deadline| deadline.as_secs_f64().ceil() as u64);
    let fields = [
        ("snapshot", json!(args.snapshot)),
        ("count", json!(args.count)),
        ("name_prefix", json!(args.name_prefix)),
        ("start", json!(args.start)),
        ("deadline_seconds", json!(deadline)),
        ("require_deadline", if args.require_deadline { json!(true) } else { Value::Null }),
        ("size_bytes", json!(args.size)),
        ("chunk_bytes", json!(args.chunk_size)),
        ("token", json!(args.token)),
    ];
    let admitted = api.post("/v1/batches", &request_of(fields.into_iter().chain(args.placement.fields())))?;
    let batch: Batch = fields_of(&admitted)?;
    match (globals.json, args.wait) {
        (true, None) => return print_json(&admitted),
        // The events say it all.
        (true, Some(_)) => {}
        (false, _) => {
            let from = batch.snapshot.as_deref().map(|snapshot| format!(" from {snapshot}")).unwrap_or_default();
            print_line(&format!("batch {}: {} volumes{from}, {}", batch.id, batch.count, batch.expected()))?;
        }
    }
    args.wait.map_or(Ok(()), |until| watch::run(api, globals, &batch.id, Some(until), None))
}

fn cancel(api: &Api, globals: &Globals, id: &str, force: bool, no_wait: bool) -> CliResult {
    let query = if force { "?force=true" } else { "" };
    let batch = api.post(&format!("/v1/batches/{id}/cancel{query}"), &json!({}))?;
    match no_wait {
        true => shown(globals, &batch),
        false => watch::run(api, globals, id, None, None),
    }
}

fn shown(globals: &Globals, value: &Value) -> CliResult {
    if globals.json {
        return print_json(value);
    }
    let batch: Batch = fields_of(value)?;
    let of = |part: u64| format!("{part} of {}", batch.count);
    let seconds = |seconds: Option<f64>| seconds.map_or("-".to_string(), |seconds| format!("{seconds:.2} s"));
    let off = batch.actual.hydrated_off_percent.map(|off| format!(" ({off:+.0} %)")).unwrap_or_default();
    let boot_set = batch.volumes_boot_set_resident.map_or("the image has none".to_string(), of);
    let deadline = match batch.deadline_met {
        _ if value["deadline_unix_ms"].is_null() => "none",
        None => "running",
        Some(true) => "met",
        Some(false) => "missed",
    };
    let rows = [
        ("batch", batch.id.clone()),
        ("state", batch.state.clone()),
        ("snapshot", batch.snapshot.clone().unwrap_or_else(|| "-".to_string())),
        ("created", of(batch.volumes)),
        ("attachable", of(batch.volumes_attachable)),
        ("attached", of(batch.volumes_attached)),
        ("boot set", boot_set),
        ("hydrated", of(batch.volumes_hydrated)),
        ("failed", of(batch.volumes_failed)),
        ("resident", format!("{} of {}", format_size(batch.resident_bytes), format_size(batch.size_bytes))),
        ("rate", format!("{}/s", format_size(batch.hydration_bytes_per_second))),
        ("eta", batch.eta()),
        ("deadline", deadline.to_string()),
        ("expected", batch.expected()),
        ("creation took", seconds(batch.actual.created_seconds)),
        ("boot sets took", seconds(batch.actual.boot_set_seconds)),
        ("hydration took", format!("{}{off}", seconds(batch.actual.hydrated_seconds))),
        ("problem", batch.problem.clone().unwrap_or_else(|| "-".to_string())),
    ];
    rows.iter().try_for_each(|(key, text)| print_line(&format!("{key:<17} {text}")))?;
    let stores = value["stores"].as_array().map(Vec::as_slice).unwrap_or_default();
    stores.iter().try_for_each(|store| {
        let size = |key: &str| format_size(store[key].as_u64().unwrap_or_default());
        let (label, volumes) = (store["label"].as_str().unwrap_or_default(), &store["volumes"]);
        let (left, rate) = (size("remaining_bytes"), size("hydration_bytes_per_second"));
        print_line(&format!("{:<17} {label}: {volumes} volumes, {left} to come, {rate}/s", "store"))
    })
}

fn table(batches: &[Value]) -> CliResult {
    let header =
        ["BATCH", "STATE", "SNAPSHOT", "VOLUMES", "ATTACHED", "HYDRATED", "FAILED", "REMAINING", "RATE", "ETA"];
    let mut table = Table::new(&header);
    for batch in batches {
        let batch: Batch = fields_of(batch)?;
        table.row([
            batch.id.clone(),
            batch.state.clone(),
            batch.snapshot.clone().unwrap_or_else(|| "-".to_string()),
            format!("{}/{}", batch.volumes, batch.count),
            batch.volumes_attached.to_string(),
            batch.volumes_hydrated.to_string(),
            batch.volumes_failed.to_string(),
            format_size(batch.remaining_bytes),
            format!("{}/s", format_size(batch.hydration_bytes_per_second)),
            batch.eta(),
        ]);
    }
    table.print()
}

impl Batch {
    fn eta(&self) -> String {
        let eta = self.eta_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        match eta {
            _ if self.remaining_bytes == 0 => "-".to_string(),
            Some(eta) => format_duration(eta),
            None => "unknown".to_string(),
        }
    }

    /// What was predicted at its admission.
    fn expected(&self) -> String {
        let Some(predicted) = &self.predicted else { return "not estimated".to_string() };
        let assumed = if predicted.assumed { "; not all of it was ever measured" } else { "" };
        let created = format!("created after about {:.1} s", predicted.created_seconds);
        match predicted.hydrated_seconds {
            None => format!("{created}, not hydrated in the background"),
            Some(seconds) => {
                format!("{created}, hydrated after about {seconds:.0} s ({}{assumed})", predicted.limited_by)
            }
        }
    }

    fn has_reached(&self, milestone: Milestone) -> bool {
        match milestone {
            Milestone::Created => self.actual.created_seconds.is_some() || self.state == "hydrated",
            Milestone::BootSet => {
                self.actual.created_seconds.is_some() && self.volumes_boot_set_resident == Some(self.volumes)
            }
            Milestone::Hydrated => self.state == "hydrated",
        }
    }

    /// Why it will not get there by itself.
    fn obstacle(&self, milestone: Milestone) -> Option<CliError> {
        let problem = self.problem.clone().unwrap_or_default();
        match self.state.as_str() {
            "stalled" => Some(CliError::new("stalled", format!("batch {} is stalled: {problem}", self.id))),
            "cancelling" | "cancelled" | "deleted" => {
                Some(CliError::new("conflict", format!("batch {} is {}", self.id, self.state)))
            }
            "created" => match (milestone, &self.predicted) {
                (Milestone::Hydrated, Some(Prediction { hydrated_seconds: None, .. })) => {
                    let message = format!("the volumes of batch {} have rate none: set a rate", self.id);
                    Some(CliError::new("conflict", message))
                }
                (Milestone::BootSet, _) if self.volumes_boot_set_resident.is_none() => {
                    Some(CliError::new("conflict", format!("the image of batch {} has no boot set", self.id)))
                }
                _ => None,
            },
            _ => None,
        }
    }
}
