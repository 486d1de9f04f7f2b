//! `volley image …`: images into the object store, and the snapshots there. Works on the object store alone.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use futures::executor::block_on;
use serde_json::{Value, json};
use volley_server::import::{self, ImageFormat, ImportError, ImportOptions, ImportReport};
use volley_server::platform::blocking::ToolStore;
use volley_server::snapshot::{CatalogError, ChunkEntry, Manifest, catalog, deletion, merkle, read};

use super::{CliError, CliResult, Globals, Table, objects, print_json, print_line};
use crate::units::{format_duration, format_size, parse_size};
pub(super) use create::take as take_snapshot;
pub(super) use progress::Progress;

mod blocks;
mod copy;
mod create;
mod export;
mod gc;
mod progress;

/// More threads than this only fight over the disk.
const PARALLEL_MAX: i64 = 256;
/// Damaged chunks named one by one; the rest are counted.
const BAD_CHUNKS_SHOWN: usize = 20;

/// What the server logs of such a store, in the words of an import.
const WEAKER_STORE: &str = "the object store does not honour If-None-Match: do not import under one name from two \
                            machines at the same moment";

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make a snapshot from a raw or qcow2 image. An interrupted import goes on where it stopped when run again.
    Import(ImportArgs),
    /// Take a snapshot of a volume, or of several at one moment, while guests use them. Asks the server.
    Create(create::CreateArgs),
    /// List the snapshots of the object store.
    List,
    /// Show one snapshot.
    Show {
        /// Name of the snapshot.
        name: String,
    },
    /// Read every chunk of a snapshot and check its digest.
    Verify {
        /// Name of the snapshot.
        name: String,
        #[command(flatten)]
        parallel: ParallelArgs,
    },
    /// Write the content of a snapshot to a raw image file, sparse where it is zero, or to stdout (`-`); or to a qcow2 file,
    /// also one with only what changed since another snapshot.
    Export(export::ExportArgs),
    /// Copy a snapshot to another object store. What is there already is not sent; an interrupted copy goes on where it
    /// stopped when run again.
    Copy(copy::CopyArgs),
    /// List the blocks of a snapshot that have data.
    Blocks(blocks::BlocksArgs),
    /// List the blocks that differ between two snapshots of the same size.
    Diff(blocks::DiffArgs),
    /// Delete a snapshot. What only it references is removed by `volley image gc`, after its grace period.
    Delete(gc::DeleteArgs),
    /// Carry out intended deletions and remove packs that no snapshot references.
    Gc(gc::GcArgs),
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Image file.
    image: PathBuf,
    /// Name of the snapshot.
    #[arg(long)]
    name: String,
    /// Size of a chunk: a power of two from 64KiB to 4MiB.
    #[arg(long, default_value = "512KiB", value_parser = parse_chunk_size, value_name = "SIZE")]
    chunk_size: u32,
    /// Format of the image, raw or qcow2, instead of looking at its first bytes.
    #[arg(long)]
    format: Option<ImageFormat>,
    #[command(flatten)]
    parallel: ParallelArgs,
}

#[derive(Debug, Args)]
pub struct ParallelArgs {
    /// Threads; one per core by default.
    #[arg(long = "parallel", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=PARALLEL_MAX))]
    threads: Option<u32>,
}

impl ParallelArgs {
    fn threads(&self) -> Option<usize> {
        self.threads.map(|n| n as usize)
    }
}

/// Runs one image command.
///
/// # Errors
/// Says what failed and what to do.
pub fn run(globals: &Globals, command: ImageCommand) -> CliResult {
    match command {
        ImageCommand::Import(args) => import(globals, args),
        ImageCommand::Create(args) => create::run(globals, &args),
        ImageCommand::List => list(globals),
        ImageCommand::Show { name } => show(globals, &name),
        ImageCommand::Verify { name, parallel } => verify(globals, &name, &parallel),
        ImageCommand::Export(args) => export::run(globals, &args),
        ImageCommand::Copy(args) => copy::run(globals, &args),
        ImageCommand::Blocks(args) => blocks::list(globals, &args),
        ImageCommand::Diff(args) => blocks::diff(globals, &args),
        ImageCommand::Delete(args) => gc::delete(globals, &args),
        ImageCommand::Gc(args) => gc::collect(globals, args),
    }
}

fn import(globals: &Globals, args: ImportArgs) -> CliResult {
    // An image that isn't there must not leave a new object store behind.
    if let Err(e) = std::fs::metadata(&args.image) {
        return Err(CliError::new("invalid", format!("image {}: {e}", args.image.display())));
    }
    let store = objects::open_or_create(globals)?;
    let options = ImportOptions {
        image: args.image,
        name: args.name,
        chunk_bytes: args.chunk_size,
        format: args.format,
        threads: args.parallel.threads(),
    };
    let progress = Progress::start("import", globals.json);
    let mut report = import::import(&store, &options, |done, total| progress.update(done, total))?;
    if matches!(&store, ToolStore::S3(s3) if s3.honours_conditional_put() == Some(false)) {
        report.notes.push(WEAKER_STORE.to_owned());
    }
    progress.finish();
    if globals.json { print_json(&report) } else { print_line(&import_text(&report)) }
}

fn import_text(report: &ImportReport) -> String {
    let counts = &report.chunks;
    let chunk = u64::from(report.chunk_bytes);
    let amount = |chunks: u32| format!("{chunks} chunks ({})", format_size(u64::from(chunks) * chunk));
    let mut lines = vec![
        format!("imported {:?} from a {} image of {}", report.name, report.format, format_size(report.image_bytes)),
        format!("  device     {} bytes, {} chunks of {}", report.size_bytes, counts.chunks, format_size(chunk)),
        format!("  zero       {}", amount(counts.zero_chunks)),
        format!("  duplicate  {}", amount(counts.duplicate_chunks)),
        format!("  shared     {} with other snapshots", amount(counts.shared_chunks)),
    ];
    if counts.resumed_chunks > 0 {
        lines.push(format!("  resumed    {} chunks reused of an interrupted import", counts.resumed_chunks));
    }
    let ratio =
        if report.raw_bytes == 0 { 100.0 } else { 100.0 * report.stored_bytes as f64 / report.raw_bytes as f64 };
    lines.push(format!(
        "  stored     {} as {} in {} packs ({ratio:.0} %)",
        amount(counts.stored_chunks),
        format_size(report.stored_bytes),
        report.packs
    ));
    let seconds = (report.elapsed_ms.max(1) as f64) / 1000.0;
    let rate = format_size((report.size_bytes as f64 / seconds) as u64);
    lines.push(format!("  time       {} ({rate}/s)", format_duration(Duration::from_millis(report.elapsed_ms))));
    lines.extend(report.notes.iter().map(|note| format!("  note: {note}")));
    lines.join("\n")
}

fn list(globals: &Globals) -> CliResult {
    let store = objects::open(globals)?;
    let mut summaries = Vec::new();
    let mut damaged = None;
    for name in block_on(catalog::names(&store))? {
        match block_on(catalog::load(&store, &name)) {
            Ok(manifest) => summaries.push(Summary::of(&manifest)),
            // One damaged manifest must not hide the others, nor go unnoticed.
            Err(e @ (CatalogError::Manifest { .. } | CatalogError::Misplaced { .. })) => damaged = Some(e),
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if globals.json {
        print_json(&summaries.iter().map(Summary::json).collect::<Vec<_>>())?;
    } else {
        let mut table = Table::new(&["NAME", "SIZE", "CHUNK", "DATA", "STORED"]);
        for s in &summaries {
            let sizes = [s.size_bytes, s.chunk_bytes, s.data_bytes, s.stored_bytes].map(format_size);
            table.row(std::iter::once(s.name.clone()).chain(sizes));
        }
        table.print()?;
    }
    damaged.map_or(Ok(()), |e| Err(e.into()))
}

fn show(globals: &Globals, name: &str) -> CliResult {
    let store = objects::open(globals)?;
    let manifest = block_on(catalog::load(&store, name))?;
    let intention = block_on(deletion::intention(&store, name))?;
    let to_be_deleted = intention.is_some_and(|intention| deletion::concerns(&intention, manifest.id));
    let summary = Summary::of(&manifest);
    if globals.json {
        let mut value = summary.json();
        value["to_be_deleted"] = json!(to_be_deleted);
        return print_json(&value);
    }
    let mut lines = vec![
        format!("name       {}", summary.name),
        format!("id         {}", summary.id),
        format!("size       {} ({} bytes)", format_size(summary.size_bytes), summary.size_bytes),
        format!("chunk      {}", format_size(summary.chunk_bytes)),
        format!("chunks     {} of which {} zero", summary.chunks, summary.zero_chunks),
        format!("data       {}", format_size(summary.data_bytes)),
        format!("stored     {} in {} packs", format_size(summary.stored_bytes), summary.packs),
        format!("parent     {}", summary.parent.as_deref().unwrap_or("none")),
        format!("created    {} (Unix time in ms)", summary.created_unix_ms),
        format!("root       {}", summary.merkle_root),
    ];
    if to_be_deleted {
        lines.push("deletion   when no node needs it: no new volumes are made of it".to_owned());
    }
    print_line(&lines.join("\n"))
}

fn verify(globals: &Globals, name: &str, parallel: &ParallelArgs) -> CliResult {
    let store = objects::open(globals)?;
    let manifest = block_on(catalog::load(&store, name))?;
    let progress = Progress::start("verify", globals.json);
    let verified = read::verify(&store, &manifest, parallel.threads(), |done, total| progress.update(done, total))?;
    progress.finish();
    let root = hex(&merkle::root(&manifest));
    if globals.json {
        let mut value = json!(verified);
        value["name"] = json!(name);
        value["good"] = json!(verified.bad.is_empty());
        value["merkle_root"] = json!(root);
        print_json(&value)?;
    } else if !verified.bad.is_empty() {
        for bad in verified.bad.iter().take(BAD_CHUNKS_SHOWN) {
            print_line(&format!("bad: {bad}"))?;
        }
    }
    if let Some(first) = verified.bad.first() {
        let count = verified.bad.len();
        let more = if count > 1 { format!(" ({count} bad chunks in all)") } else { String::new() };
        return Err(CliError::new("corrupt", format!("snapshot {name:?} is damaged: {first}{more}")));
    }
    if globals.json {
        return Ok(());
    }
    let (data, read) = (verified.chunks - verified.zero_chunks, format_size(verified.stored_bytes));
    print_line(&format!("snapshot {name:?} is good: {data} chunks read ({read}), {} zero", verified.zero_chunks))?;
    print_line(&format!("root {root}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is told of a snapshot.
struct Summary {
    name: String,
    id: String,
    size_bytes: u64,
    chunk_bytes: u64,
    chunks: u32,
    zero_chunks: u32,
    data_bytes: u64,
    stored_bytes: u64,
    packs: usize,
    parent: Option<String>,
    created_unix_ms: u64,
    merkle_root: String,
}

impl Summary {
    fn of(m: &Manifest) -> Summary {
        let (mut zero_chunks, mut data_bytes, mut stored_bytes) = (0, 0, 0);
        for index in 0..m.chunk_count() {
            match m.chunk(index) {
                ChunkEntry::Zero => zero_chunks += 1,
                ChunkEntry::Stored { stored_len, .. } => {
                    data_bytes += u64::from(m.chunk_len(index));
                    stored_bytes += u64::from(stored_len);
                }
            }
        }
        Summary {
            name: m.name.clone(),
            id: format!("{:032x}", m.id),
            size_bytes: m.size_bytes,
            chunk_bytes: u64::from(m.chunk_bytes),
            chunks: m.chunk_count(),
            zero_chunks,
            data_bytes,
            stored_bytes,
            packs: m.pack_keys().len(),
            parent: m.parent.clone(),
            created_unix_ms: m.created_unix_ms,
            merkle_root: hex(&merkle::root(m)),
        }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "id": self.id,
            "size_bytes": self.size_bytes,
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.chunks,
            "zero_chunks": self.zero_chunks,
            "data_bytes": self.data_bytes,
            "stored_bytes": self.stored_bytes,
            "packs": self.packs,
            "parent": self.parent,
            "created_unix_ms": self.created_unix_ms,
            "merkle_root": self.merkle_root,
        })
    }
}

fn parse_chunk_size(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text)?;
    let small = u32::try_from(bytes).map_err(|_| format!("{text:?} is more than 4 MiB"))?;
    // A device of one block: only the chunk size can be wrong.
    volley_server::snapshot::manifest::check_geometry(512, small).map(|()| small)
}

impl From<CatalogError> for CliError {
    fn from(e: CatalogError) -> CliError {
        let code = match &e {
            CatalogError::Name(_) => "invalid",
            CatalogError::Unknown(_) | CatalogError::NoImport(_) => "unknown_snapshot",
            CatalogError::Incomplete(_) | CatalogError::Referenced { .. } | CatalogError::Announced { .. } => {
                "conflict"
            }
            CatalogError::Manifest { .. }
            | CatalogError::Misplaced { .. }
            | CatalogError::Unreadable(_)
            | CatalogError::Condemned { .. } => "corrupt",
            CatalogError::Rewriting(_) | CatalogError::TooSlow(_) => "busy",
            CatalogError::NoConditionalPut => "unsupported",
            CatalogError::Store(_) => "object_store",
        };
        CliError::new(code, e.to_string())
    }
}

impl From<ImportError> for CliError {
    fn from(e: ImportError) -> CliError {
        let code = match e {
            ImportError::Catalog(e) => return e.into(),
            ImportError::Invalid(_) | ImportError::Image { .. } | ImportError::Manifest(_) => "invalid",
            ImportError::NameTaken(_) => "name_taken",
            ImportError::Interfered(_) | ImportError::Volume { .. } => "conflict",
            ImportError::Marker(_) => "corrupt",
            ImportError::Store(_) => "object_store",
        };
        CliError::new(code, e.to_string())
    }
}
