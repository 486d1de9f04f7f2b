//! `volley image delete` and `volley image gc`: what goes, what stays, and why.

use std::time::Duration;

use clap::Args;
use futures::executor::block_on;
use serde_json::json;
use volley_server::platform::blocking::Blocking;
use volley_server::snapshot::deletion::{self, Outcome};
use volley_server::snapshot::gc::collect::{self, PackVerdict};
use volley_server::snapshot::gc::{GcOptions, GcReport, Verdict};

use crate::cli::{CliResult, Globals, Table, objects, print_json, print_line};
use crate::units::{format_duration, format_size, parse_duration};

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Name of the snapshot.
    name: String,
    /// If nodes need it, have it deleted by `volley image gc` once they do not. No new volumes are made of it from now on.
    #[arg(long)]
    when_unused: bool,
}

#[derive(Debug, Args)]
pub struct GcArgs {
    /// First give up the interrupted import of this name.
    #[arg(long, value_name = "NAME", conflicts_with = "dry_run")]
    incomplete: Option<String>,
    /// Keep a pack for so long after it was condemned, for whoever still reads it. 1h by default.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    grace: Option<Duration>,
    /// Copy what is still referenced of packs of which less than this is, and condemn them.
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    rewrite_below: Option<u8>,
    /// Only say for each pack what would be done, and why.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn delete(globals: &Globals, args: &DeleteArgs) -> CliResult {
    let DeleteArgs { name, when_unused } = args;
    let outcome = block_on(deletion::delete(&objects::open(globals)?, &Blocking, name, *when_unused))?;
    if globals.json {
        return print_json(&match outcome {
            Outcome::Deleted(released) => json!({
                "name": name,
                "deleted": true,
                "packs_condemned": released.packs_condemned,
                "bytes_condemned": released.bytes_condemned,
            }),
            Outcome::WhenUnused { nodes } => json!({"name": name, "deleted": false, "nodes": nodes}),
        });
    }
    print_line(&match outcome {
        Outcome::Deleted(released) => format!(
            "deleted snapshot {name:?}; {} packs ({}) are garbage: 'volley image gc' removes them after its grace period",
            released.packs_condemned,
            format_size(released.bytes_condemned)
        ),
        Outcome::WhenUnused { nodes } => format!(
            "snapshot {name:?} is needed by volumes of node {}: 'volley image gc' deletes it once they are hydrated or gone",
            nodes.join(", ")
        ),
    })
}

pub(super) fn collect(globals: &Globals, args: GcArgs) -> CliResult {
    let options = GcOptions {
        grace: args.grace.unwrap_or(collect::GRACE_DEFAULT),
        dry_run: args.dry_run,
        drop_import: args.incomplete,
        rewrite_below_percent: args.rewrite_below,
    };
    let report = block_on(collect::collect(&objects::open(globals)?, &Blocking, &options))?;
    if globals.json {
        return print_json(&report);
    }
    if report.dry_run {
        table(&report.packs).print()?;
    }
    text(&report).iter().try_for_each(|line| print_line(line))
}

fn text(report: &GcReport) -> Vec<String> {
    let would = if report.dry_run { "would have " } else { "" };
    let amount = |packs: u64, bytes: u64| format!("{packs} packs ({})", format_size(bytes));
    let mut lines: Vec<String> =
        report.snapshots_deleted.iter().map(|name| format!("deleted snapshot {name:?}, which is unused now")).collect();
    lines.extend(report.deletions_pending.iter().map(|pending| match pending.nodes.as_slice() {
        [] => format!("would have deleted snapshot {:?}, which is unused now", pending.snapshot),
        nodes => format!("snapshot {:?} is deleted once node {} needs it no more", pending.snapshot, nodes.join(", ")),
    }));
    if let Some(rewritten) = &report.rewritten {
        let (packs, written) = (amount(rewritten.packs, rewritten.bytes), rewritten.bytes_written);
        let size = format_size(if report.dry_run { rewritten.live_bytes } else { written });
        lines.push(format!("{would}rewritten {packs} as {size}; snapshots changed: {}", rewritten.snapshots.len()));
        lines.extend(rewritten.left.iter().map(|left| format!("left as it is: {left}")));
    }
    lines.push(format!("{would}removed {}", amount(report.packs_removed, report.bytes_removed)));
    if report.packs_condemned > 0 {
        let packs = amount(report.packs_condemned, report.bytes_condemned);
        lines.push(format!("{would}condemned {packs}: removed by a later collection"));
    }
    if report.packs_waiting > 0 {
        let packs = amount(report.packs_waiting, report.bytes_waiting);
        lines.push(format!("kept {packs} that were condemned before; 'volley image gc --dry-run' says why"));
    }
    if !report.imports_open.is_empty() {
        lines.push(format!(
            "imports are running or were interrupted: {}; finish them, or drop one with 'volley image gc --incomplete NAME'",
            report.imports_open.join(", ")
        ));
    }
    lines
}

fn table(packs: &[PackVerdict]) -> Table {
    let mut table = Table::new(&["PACK", "SIZE", "ACTION", "WHY"]);
    for PackVerdict { pack, bytes, verdict } in packs {
        let (action, why) = explain(verdict);
        table.row([pack.clone(), format_size(*bytes), action.to_owned(), why]);
    }
    table
}

fn explain(verdict: &Verdict) -> (&'static str, String) {
    match verdict {
        Verdict::Remove => ("remove", "no snapshot references it, and its grace period is over".to_owned()),
        Verdict::Condemn => ("condemn", "no snapshot references it".to_owned()),
        Verdict::WaitForGrace { left_ms } => {
            ("keep", format!("condemned; {} of grace left", format_duration(Duration::from_millis(*left_ms))))
        }
        Verdict::WaitForImports { imports } => {
            ("keep", format!("condemned; imports may use it: {}", imports.join(", ")))
        }
        Verdict::WaitForNodes { nodes } => ("keep", format!("condemned; nodes may read it: {}", nodes.join(", "))),
        Verdict::WaitForOthers => ("keep", "a deletion, rewrite or collection is at it".to_owned()),
        Verdict::Importing { import } => ("keep", format!("of the import of {import:?}, which has not ended")),
        Verdict::Used { snapshots, named, live_bytes } => {
            let more = snapshots - named.len();
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            let live = live_bytes.map_or(String::new(), |bytes| format!(", {} of it", format_size(bytes)));
            ("keep", format!("used by {}{more}{live}", named.join(", ")))
        }
    }
}

/// `50%` or `50`.
fn parse_percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<u8>();
    let number = number.ok().filter(|percent| (1..=100).contains(percent));
    number.ok_or_else(|| format!("{text:?} is not a percentage from 1% to 100%"))
}
