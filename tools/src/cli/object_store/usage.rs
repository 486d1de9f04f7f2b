//! `volley object-store usage`: what the snapshots take, and what would be freed.

use futures::executor::block_on;
use volley_server::snapshot::gc::usage::{Totals, Usage, usage};

use crate::cli::{CliResult, Globals, Table, objects, print_json, print_line};
use crate::units::format_size;

pub(super) fn run(globals: &Globals) -> CliResult {
    let usage = block_on(usage(&objects::open(globals)?))?;
    if globals.json { print_json(&usage) } else { print_text(&usage) }
}

fn print_text(usage: &Usage) -> CliResult {
    let mut table = Table::new(&["SNAPSHOT", "CHUNKS", "OWN", "OWN IN SHARED PACKS", "SHARED"]);
    for of in &usage.snapshots {
        let sizes = [of.own_bytes, of.own_in_shared_packs_bytes, of.shared_bytes].map(format_size);
        table.row([of.name.clone(), of.chunks.to_string()].into_iter().chain(sizes));
    }
    table.print()?;
    let Totals { packs, bytes, live_bytes, dead_bytes, condemned_bytes, importing_bytes, foreign_objects } =
        &usage.total;
    let [bytes, live, dead, condemned, importing] =
        [bytes, live_bytes, dead_bytes, condemned_bytes, importing_bytes].map(|bytes| format_size(*bytes));
    print_line(&format!(
        "{packs} packs, {bytes}: {live} live, {dead} dead, {condemned} condemned, {importing} of imports that have not ended"
    ))?;
    match foreign_objects {
        0 => Ok(()),
        _ => print_line(&format!("{foreign_objects} objects under packs/ are no packs and are left alone")),
    }
}
