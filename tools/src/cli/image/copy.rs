//! `volley image copy`: a snapshot from one object store to another.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use futures::executor::block_on;
use volley_server::import::copy::{self, CopyError, CopyReport};
use volley_server::snapshot::catalog;

use super::ParallelArgs;
use super::progress::Progress;
use crate::cli::{CliError, CliResult, Globals, objects, print_json, print_line};
use crate::units::{format_duration, format_size};

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// Name of the snapshot.
    name: String,
    /// Object store to copy to: file:DIR or s3://BUCKET/PREFIX.
    #[arg(long, value_name = "URL")]
    to: String,
    /// Name of the copy; the same name by default.
    #[arg(long = "as", value_name = "NAME")]
    new_name: Option<String>,
    /// Configuration file whose [s3] belongs to the target, if it is not the one of the source.
    #[arg(long, value_name = "FILE")]
    to_config: Option<PathBuf>,
    #[command(flatten)]
    parallel: ParallelArgs,
}

pub(super) fn run(globals: &Globals, args: &CopyArgs) -> CliResult {
    let source = objects::open(globals)?;
    let manifest = block_on(catalog::load(&source, &args.name))?;
    let config = args.to_config.clone().or_else(|| globals.config.clone());
    let target = Globals { object_store: Some(args.to.clone()), config, ..globals.clone() };
    let target = objects::open_or_create(&target)?;
    let name = args.new_name.as_deref().unwrap_or(&args.name);
    let progress = Progress::start("copy", globals.json);
    let tick = |done, total| progress.update(done, total);
    let report = copy::copy(&source, &manifest, &target, name, args.parallel.threads(), tick)?;
    progress.finish();
    if globals.json { print_json(&report) } else { print_line(&text_of(&args.name, &args.to, &report)) }
}

fn text_of(name: &str, to: &str, report: &CopyReport) -> String {
    let counts = &report.chunks;
    let there = counts.shared_chunks + counts.resumed_chunks + counts.duplicate_chunks;
    let mut lines = vec![
        format!("copied {name:?} to {to} as {:?} ({})", report.name, format_size(report.size_bytes)),
        format!("  zero       {} chunks", counts.zero_chunks),
        format!("  there      {there} chunks, not sent"),
        format!(
            "  sent       {} chunks as {} in {} packs",
            counts.stored_chunks,
            format_size(report.stored_bytes),
            report.packs
        ),
        format!("  time       {}", format_duration(Duration::from_millis(report.elapsed_ms))),
    ];
    lines.extend(report.notes.iter().map(|note| format!("  note: {note}")));
    lines.join("\n")
}

impl From<CopyError> for CliError {
    fn from(e: CopyError) -> CliError {
        let code = match e {
            CopyError::Target(e) => {
                let CliError { code, message } = e.into();
                return CliError::new(code, format!("target: {message}"));
            }
            CopyError::Chunk(_) => "corrupt",
            CopyError::Source(_) => "object_store",
        };
        CliError::new(code, e.to_string())
    }
}
