//! `volley bootset …`: what machines read when they boot from an image, so that later ones have it first.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{Api, fields_of, segment};
use super::{CliError, CliResult, Globals, print_json, print_line};
use crate::load::trace::{self, Op};
use crate::units::format_size;

#[derive(Debug, Subcommand)]
pub enum BootSetCommand {
    /// Show how many boots an image's set was learned from and what is in it.
    Show { image: String },
    /// Replace what was learned by a recorded boot.
    Record {
        image: String,
        /// CSV with the head us,op,offset,length; its reads are the boot.
        #[arg(long, value_name = "FILE.csv")]
        trace: PathBuf,
    },
    /// Forget what was learned.
    Drop { image: String },
}

#[derive(Debug, Deserialize)]
struct BootSet {
    image: String,
    boots: u64,
    chunks: u64,
    bytes: u64,
    share: f64,
}

/// Runs one command about boot sets.
///
/// # Errors
/// The server's problem, a trace that can't be used, or that the server can't be reached.
pub fn run(globals: &Globals, command: BootSetCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    let path = |image: &str| Ok::<_, CliError>(format!("/v1/images/{}/bootset", segment(image)?));
    let (answer, what) = match &command {
        BootSetCommand::Show { image } => (api.get(&path(image)?)?, ""),
        BootSetCommand::Record { image, trace } => {
            let chunks = chunks_of(&api.get(&format!("/v1/images/{}", segment(image)?))?, trace)?;
            (api.put(&path(image)?, &json!({ "chunks": chunks }))?, "recorded: ")
        }
        BootSetCommand::Drop { image } => (api.delete(&path(image)?)?, "dropped: "),
    };
    if globals.json {
        return print_json(&answer);
    }
    let BootSet { image, boots, chunks, bytes, share } = fields_of(&answer)?;
    let from = match boots {
        0 if chunks > 0 => "inherited from other images".to_owned(),
        boots => format!("learned from {boots} boots"),
    };
    let size = format_size(bytes);
    print_line(&format!("{image}: {what}{chunks} chunks, {size}, {:.1} % of its data, {from}", share * 100.0))
}

/// The chunks that the trace's reads touch, in the order of the first touch.
fn chunks_of(image: &Value, path: &std::path::Path) -> Result<Vec<u64>, CliError> {
    #[derive(Deserialize)]
    struct Geometry {
        size_bytes: u64,
        chunk_bytes: u64,
    }
    let Geometry { size_bytes, chunk_bytes } = fields_of(image)?;
    let events = trace::load(path, size_bytes).map_err(|error| CliError::new("invalid", error))?;
    let reads = events.iter().filter(|event| event.op == Op::Read);
    let mut seen = HashSet::new();
    Ok(reads.flat_map(|read| read.chunks(chunk_bytes)).filter(|chunk| seen.insert(*chunk)).collect())
}
