//! `volley check DIR`: verifies the data directory of a stopped node. Needs no server, and writes nothing.
//!
//! Exit code 0: nothing to look at (notes are allowed). 1: findings. 2: it could not be checked.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};
use volley_server::check::{self, CheckError, Options, Report, Severity};
use volley_server::datadir::DataDirError;

use super::{CliError, CliResult, Globals, main_exit, objects, print_json, print_line};

const FINDINGS: u8 = 1;
const NOT_CHECKED: u8 = 2;

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Data directory of a node that is not running.
    dir: PathBuf,
    /// Where a volume store is, if it is not where the node last had it. May be repeated.
    #[arg(long = "store", value_name = "LABEL=PATH", value_parser = parse_store)]
    stores: Vec<(String, PathBuf)>,
    /// Where the disk cache is, if neither in the data directory nor where the configuration file says.
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Look at files and extents only: read no volume, even if an object store is given.
    #[arg(long)]
    quick: bool,
}

/// Checks a data directory and says what was found.
#[must_use]
pub fn run(globals: &Globals, args: CheckArgs) -> ExitCode {
    let checked = checked(globals, args);
    let printed = checked.and_then(|report| print(globals, &report).map(|()| report));
    match printed {
        Ok(report) if report.is_clean() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(FINDINGS),
        Err(error) => {
            main_exit(globals.json, Err(error));
            ExitCode::from(NOT_CHECKED)
        }
    }
}

fn checked(globals: &Globals, args: CheckArgs) -> CliResult<Report> {
    let CheckArgs { dir, stores, cache_dir, quick } = args;
    let object_store = globals.object_store.as_ref().map(|_| objects::chosen(globals)).transpose()?;
    let cache_dir = match cache_dir {
        Some(dir) => Some(dir),
        None => objects::configuration(globals)?.cache.dir,
    };
    check::check(&dir, &Options { stores, object_store, cache_dir, quick }).map_err(|error| {
        let code = match &error {
            CheckError::DataDir(DataDirError::Locked { .. }) => "conflict",
            CheckError::DataDir(DataDirError::FutureFormat { .. }) => "unsupported",
            CheckError::DataDir(_) | CheckError::Io { .. } => "io",
            CheckError::NoNode(_) => "invalid",
            CheckError::Journal(error) => error.status.as_str(),
            CheckError::ObjectStore(_) => "object_store",
        };
        CliError::new(code, error.to_string())
    })
}

fn print(globals: &Globals, report: &Report) -> CliResult {
    let [damage, warnings, notes] = [Severity::Damage, Severity::Warning, Severity::Note].map(|s| report.count(s));
    if globals.json {
        let mut value = serde_json::to_value(report).map_err(|e| CliError::new("internal", e.to_string()))?;
        if let Value::Object(fields) = &mut value {
            fields.insert("clean".into(), json!(report.is_clean()));
        }
        return print_json(&value);
    }
    report.findings.iter().try_for_each(|finding| print_line(&finding.to_string()))?;
    print_line(&format!(
        "node {}: epoch {}, {} journals ({} records, {} bytes), {} stores, {} volumes ({} hydrated), {} chunks resident",
        report.node_id.as_deref().unwrap_or("-"),
        report.epoch,
        report.journals,
        report.journal_records,
        report.journal_bytes,
        report.stores,
        report.volumes,
        report.volumes_hydrated,
        report.chunks_resident
    ))?;
    if globals.object_store.is_some() {
        print_line(&format!(
            "against the snapshots: {} chunks equal, {} changed and {} discarded by guests",
            report.chunks_verified, report.chunks_changed, report.chunks_discarded
        ))?;
    }
    if report.cache_chunks > 0 {
        let (chunks, corrupt) = (report.cache_chunks, report.cache_chunks_corrupt);
        print_line(&format!("disk cache: {chunks} chunks, {corrupt} of them corrupt"))?;
    }
    let verdict = if report.is_clean() { "clean" } else { "not clean" };
    print_line(&format!("{verdict}: {damage} damaged, {warnings} to look at, {notes} notes"))
}

fn parse_store(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((label, path)) if !label.is_empty() && !path.is_empty() => Ok((label.to_owned(), PathBuf::from(path))),
        _ => Err("write LABEL=PATH".to_owned()),
    }
}
