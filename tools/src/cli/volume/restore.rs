//! `volley volume rollback`, `clone` and `verify`: what a volume was, and what it is.

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use volley_server::snapshot::sectors::Differing;

use crate::cli::api::{Api, fields_of, request_of, segment};
use crate::cli::image::{Progress, take_snapshot};
use crate::cli::place::PlacementArgs;
use crate::cli::{CliError, CliResult, Globals, Table, print_json, print_line};
use crate::units::format_size;

/// Chunks that the server looks at for one request.
const STEP_CHUNKS: u32 = 128;
/// Of chunks that are compared by sectors less: an answer names all runs of a step this large, whatever the size of the chunks.
const STEP_CHUNKS_OF_SECTORS: u32 = 16;
const STEP_BYTES_OF_SECTORS: u32 = 64 << 20;
/// Runs in a sentence.
const RUNS_SAID: usize = 8;

#[derive(Debug, Args)]
pub struct RollbackArgs {
    name: String,
    /// Snapshot to go back to.
    #[arg(long, value_name = "SNAPSHOT")]
    to: String,
    /// Also while a host has the volume attached: it is fenced and must attach again.
    #[arg(long)]
    force: bool,
    /// Do not keep what the volume holds now.
    #[arg(long)]
    discard: bool,
    /// Name of the snapshot that keeps what the volume holds now [default: NAME-before-SNAPSHOT-TIME].
    #[arg(long, value_name = "NAME", conflicts_with = "discard")]
    keep_as: Option<String>,
}

#[derive(Debug, Args)]
pub struct CloneArgs {
    /// Volume to clone; it may be in use.
    name: String,
    /// Name of the new volume.
    new: String,
    /// Name of the snapshot between them [default: NEW-from-NAME].
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    #[command(flatten)]
    placement: PlacementArgs,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    name: String,
    /// Put back what is damaged, from the object store.
    #[arg(long)]
    repair: bool,
    /// Compare chunks that guests wrote to with the object store, sector by sector, and say which sectors differ.
    #[arg(long)]
    sectors: bool,
}

#[derive(Debug, Default, Deserialize)]
struct Step {
    snapshot: Option<String>,
    snapshot_id: Option<String>,
    size_bytes: u64,
    chunk_bytes: u32,
    chunks: u32,
    next: Option<u32>,
    equal: u32,
    changed: u32,
    absent: u32,
    unexplained: u32,
    damaged: u32,
    repaired: u32,
    damaged_chunks: Vec<u32>,
    sectors: Option<Differing>,
}

pub(super) fn roll_back(api: &Api, globals: &Globals, args: &RollbackArgs) -> CliResult {
    let request = request_of([
        ("to", json!(args.to)),
        ("force", json!(args.force)),
        ("discard", json!(args.discard)),
        ("keep_as", json!(args.keep_as)),
    ]);
    let rolled = api.post(&format!("/v1/volumes/{}/rollback", segment(&args.name)?), &request)?;
    if globals.json {
        return print_json(&rolled);
    }
    let remaining = format_size(rolled["remaining_bytes"].as_u64().unwrap_or_default());
    let kept = match rolled["kept_as"].as_str() {
        Some(kept) => format!("what it held before is snapshot {kept}"),
        None => "what it held before is gone".to_owned(),
    };
    print_line(&format!("rolled back {} to {}: {remaining} to hydrate; {kept}", args.name, args.to))
}

pub(super) fn clone(api: &Api, globals: &Globals, args: &CloneArgs) -> CliResult {
    let snapshot = args.snapshot.clone().unwrap_or_else(|| format!("{}-from-{}", args.new, args.name));
    segment(&args.new)?;
    let taken = take_snapshot(api, globals.json, std::slice::from_ref(&args.name), &snapshot, true)?;
    let fields = [("name", json!(args.new)), ("snapshot", json!(snapshot))];
    let created = api.post("/v1/volumes", &request_of(fields.into_iter().chain(args.placement.fields())))?;
    if globals.json {
        return print_json(&json!({"snapshot": taken, "created": created}));
    }
    print_line(&format!("created {} from {}, which is snapshot {snapshot} now", args.new, args.name))
}

pub(super) fn verify(api: &Api, globals: &Globals, args: &VerifyArgs) -> CliResult {
    let progress = Progress::start("verify", globals.json);
    let mut sum = Step::default();
    let mut from = 0;
    loop {
        let path = format!("/v1/volumes/{}/verify", segment(&args.name)?);
        let query =
            format!("from={from}&chunks={}&repair={}&sectors={}", sum.step_chunks(args), args.repair, args.sectors);
        let step = api.post(&format!("{path}?{query}"), &Value::Null)?;
        let step: Step = fields_of(&step)?;
        if from > 0 && step.snapshot_id != sum.snapshot_id {
            return Err(CliError::new("conflict", "a snapshot of the volume was taken meanwhile: verify again"));
        }
        sum.add(step);
        let Some(next) = sum.next else { break };
        from = next;
        progress.update(u64::from(from) * u64::from(sum.chunk_bytes), sum.size_bytes);
    }
    progress.finish();
    let snapshot = match &sum.snapshot {
        Some(name) => Some(api.get(&format!("/v1/snapshots/{}", segment(name)?))?),
        None => None,
    };
    let report = sum.report(&args.name, snapshot.as_ref());
    match globals.json {
        true => print_json(&report)?,
        false => sum.sentences(&args.name).iter().try_for_each(|line| print_line(line))?,
    }
    match sum.damaged - sum.repaired {
        0 => Ok(()),
        damaged => {
            let text =
                format!("{damaged} chunks of volume {:?} are damaged on its disk: {:?}", args.name, sum.damaged_chunks);
            Err(CliError::new("corrupt", text))
        }
    }
}

pub(super) fn at_risk(api: &Api, globals: &Globals, name: &str) -> CliResult {
    let found = api.get(&format!("/v1/volumes/{}/at-risk", segment(name)?))?;
    if globals.json {
        return print_json(&found);
    }
    let mut table = Table::new(&["OFFSET", "BYTES", "SIZE"]);
    for range in found["ranges"].as_array().into_iter().flatten() {
        let bytes = range["bytes"].as_u64().unwrap_or_default();
        table.row([range["offset"].to_string(), bytes.to_string(), format_size(bytes)]);
    }
    table.print()?;
    let more = if found["more"] == true { "; there are more ranges" } else { "" };
    let bytes = format_size(found["bytes"].as_u64().unwrap_or_default());
    print_line(&format!("{bytes} of {name} are in the object store only{more}"))
}

impl Step {
    fn add(&mut self, step: Step) {
        self.equal += step.equal;
        self.changed += step.changed;
        self.absent += step.absent;
        self.unexplained += step.unexplained;
        self.damaged += step.damaged;
        self.repaired += step.repaired;
        self.damaged_chunks.extend(step.damaged_chunks);
        if let Some(differing) = step.sectors {
            self.sectors.get_or_insert_default().join(differing);
        }
        (self.snapshot, self.snapshot_id, self.next) = (step.snapshot, step.snapshot_id, step.next);
        (self.size_bytes, self.chunk_bytes, self.chunks) = (step.size_bytes, step.chunk_bytes, step.chunks);
    }

    fn step_chunks(&self, args: &VerifyArgs) -> u32 {
        match (args.sectors, self.chunk_bytes) {
            (false, _) => STEP_CHUNKS,
            (true, 0) => STEP_CHUNKS_OF_SECTORS,
            (true, chunk_bytes) => (STEP_BYTES_OF_SECTORS / chunk_bytes).max(1),
        }
    }

    /// What was found, with a digest over all of it.
    fn report(&self, volume: &str, snapshot: Option<&Value>) -> Value {
        let mut body = json!({
            "volume": volume,
            "snapshot": self.snapshot,
            "snapshot_id": self.snapshot_id,
            "merkle_root": snapshot.map(|snapshot| snapshot["merkle_root"].clone()),
            "size_bytes": self.size_bytes,
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.chunks,
            "chunks_equal": self.equal,
            "chunks_changed": self.changed,
            "chunks_absent": self.absent,
            "chunks_unexplained": self.unexplained,
            "chunks_damaged": self.damaged,
            "chunks_repaired": self.repaired,
            "damaged_chunks": self.damaged_chunks,
        });
        if let Some(differing) = &self.sectors {
            body["sectors"] = json!(differing);
        }
        let digest = blake3::hash(body.to_string().as_bytes()).to_hex().to_string();
        json!({"report": body, "blake3": digest})
    }

    fn sentences(&self, volume: &str) -> Vec<String> {
        let snapshot = self.snapshot.as_ref().map_or("zeroes".to_owned(), |name| format!("snapshot {name}"));
        let counts = format!(
            "volume {volume} is {snapshot} in {} of {} chunks, read from its disk; {} changed by guests, {} not in the volume yet, \
             {} changed by nobody knows whom before a crash, {} damaged, {} of them repaired",
            self.equal, self.chunks, self.changed, self.absent, self.unexplained, self.damaged, self.repaired
        );
        let damaged = if self.damaged > self.repaired { " and the damaged chunks" } else { "" };
        let differing = self
            .sectors
            .iter()
            .map(|differing| format!("volume {volume} equals {snapshot} except for {}{damaged}", said_of(differing)));
        std::iter::once(counts).chain(differing).collect()
    }
}

/// The first of them, in a sentence.
fn said_of(differing: &Differing) -> String {
    if differing.differing_runs == 0 {
        return "nothing".to_owned();
    }
    let runs: Vec<String> =
        differing.runs.iter().take(RUNS_SAID).map(|run| format!("{} at {}", run.bytes, run.offset)).collect();
    let more = differing.differing_runs - runs.len() as u64;
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(
        "{} bytes in {} runs of sectors: {}{more}",
        differing.differing_bytes,
        differing.differing_runs,
        runs.join(", ")
    )
}
