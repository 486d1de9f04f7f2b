//! `volley cache …`: what the chunk cache of a node holds, warming it with an image, dropping an image from it.

use std::thread::sleep;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{Api, fields_of, segment};
use super::{CliError, CliResult, Globals, Table, print_json, print_line};
use crate::units::format_size;

/// Between two looks at the progress.
const REFRESH: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Show what each tier of the cache holds and did, and which images are being warmed.
    Show,
    /// Fetch all chunks of an image into the cache, in the background of everything else, and wait for it.
    Warm {
        image: String,
        /// Keep the chunks in RAM, as far as half of it suffices, until `unpin` or `drop`.
        #[arg(long)]
        pin: bool,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// Let eviction have the chunks that `warm --pin` has pinned; ends a warming that still runs.
    Unpin { image: String },
    /// Drop the chunks of an image from RAM and disk, also those that other images share.
    Drop { image: String },
}

#[derive(Debug, Deserialize)]
struct Cache {
    ram: Tier,
    disk: Option<Tier>,
    warming: Vec<Warming>,
}

#[derive(Debug, Deserialize)]
struct Tier {
    budget_bytes: u64,
    used_bytes: u64,
    chunks: u64,
    pinned_bytes: u64,
    wave_pinned_bytes: u64,
    hits: u64,
    misses: u64,
    evicted: u64,
    corrupt: u64,
    skipped: u64,
    errors: u64,
}

#[derive(Debug, Deserialize)]
struct Warming {
    image: String,
    pin: bool,
    running: bool,
    chunks: u64,
    chunks_done: u64,
    chunks_pinned: u64,
    chunks_skipped: u64,
    chunks_failed: u64,
}

impl Warming {
    fn sentence(&self) -> String {
        let Warming { image, chunks, chunks_done, chunks_pinned, chunks_skipped, chunks_failed, .. } = self;
        let mut text = format!("{image}: {chunks_done} of {chunks} chunks are in the cache");
        if self.pin {
            text.push_str(&format!(", {chunks_pinned} of them pinned"));
        }
        if *chunks_skipped > 0 {
            text.push_str(&format!("; {chunks_skipped} left out: the cache is too small"));
        }
        if *chunks_failed > 0 {
            text.push_str(&format!("; {chunks_failed} could not be fetched"));
        }
        text
    }
}

/// Runs one cache command.
///
/// # Errors
/// The server's problem, or that it can't be reached.
pub fn run(globals: &Globals, command: CacheCommand) -> CliResult {
    let api = Api::new(&globals.server)?;
    match command {
        CacheCommand::Show => show(&api, globals),
        CacheCommand::Warm { image, pin, no_wait } => warm(&api, globals, &image, pin, no_wait),
        CacheCommand::Unpin { image } => {
            let answer = api.delete(&format!("/v1/cache/images/{}/pin", segment(&image)?))?;
            let unpinned = &answer["chunks_unpinned"];
            tell(globals, &answer, &format!("{image}: {unpinned} chunks unpinned"))
        }
        CacheCommand::Drop { image } => {
            let answer = api.delete(&format!("/v1/cache/images/{}", segment(&image)?))?;
            let (ram, disk) = (&answer["chunks_ram"], &answer["chunks_disk"]);
            tell(globals, &answer, &format!("{image}: dropped {ram} chunks from RAM and {disk} from the disk"))
        }
    }
}

fn tell(globals: &Globals, answer: &Value, text: &str) -> CliResult {
    if globals.json { print_json(answer) } else { print_line(text) }
}

fn show(api: &Api, globals: &Globals) -> CliResult {
    let answer = api.get("/v1/cache")?;
    if globals.json {
        return print_json(&answer);
    }
    let cache: Cache = fields_of(&answer)?;
    let header = [
        "TIER",
        "USED",
        "OF",
        "CHUNKS",
        "PINNED",
        "FOR WAVES",
        "HITS",
        "MISSES",
        "EVICTED",
        "CORRUPT",
        "SKIPPED",
        "ERRORS",
    ];
    let mut table = Table::new(&header);
    for (name, tier) in [("ram", Some(cache.ram)), ("disk", cache.disk)] {
        let Some(tier) = tier else { continue };
        table.row([
            name.to_owned(),
            format_size(tier.used_bytes),
            format_size(tier.budget_bytes),
            tier.chunks.to_string(),
            format_size(tier.pinned_bytes),
            format_size(tier.wave_pinned_bytes),
            tier.hits.to_string(),
            tier.misses.to_string(),
            tier.evicted.to_string(),
            tier.corrupt.to_string(),
            tier.skipped.to_string(),
            tier.errors.to_string(),
        ]);
    }
    table.print()?;
    let state = |warming: &Warming| if warming.running { "warming" } else { "warmed" };
    cache.warming.iter().try_for_each(|warming| print_line(&format!("{} {}", state(warming), warming.sentence())))
}

fn warm(api: &Api, globals: &Globals, image: &str, pin: bool, no_wait: bool) -> CliResult {
    let started = api.post(&format!("/v1/cache/images/{}/warm", segment(image)?), &json!({"pin": pin}))?;
    if no_wait {
        return tell(globals, &started, &format!("{image} is being warmed"));
    }
    let bar = ProgressBar::new(0);
    let style = "{msg} {wide_bar} {pos}/{len} chunks";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| CliError::new("internal", e.to_string()))?);
    bar.set_message(image.to_owned());
    let (answer, warming) = loop {
        let cache = api.get("/v1/cache")?;
        let found = cache["warming"].as_array().into_iter().flatten().find(|warming| warming["image"] == image);
        let Some(found) = found else {
            bar.finish_and_clear();
            return Err(CliError::new("conflict", format!("{image:?} was dropped or unpinned meanwhile")));
        };
        let warming: Warming = fields_of(found)?;
        bar.set_length(warming.chunks);
        bar.set_position(warming.chunks_done + warming.chunks_skipped + warming.chunks_failed);
        if !warming.running {
            break (found.clone(), warming);
        }
        sleep(REFRESH);
    };
    bar.finish_and_clear();
    tell(globals, &answer, &warming.sentence())?;
    match warming.chunks_failed {
        0 => Ok(()),
        failed => {
            let events = "volley node show names the cause";
            Err(CliError::new("object_store", format!("{failed} chunks of {image:?} could not be fetched: {events}")))
        }
    }
}
