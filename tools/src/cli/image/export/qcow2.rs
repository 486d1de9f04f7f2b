//! Export into qcow2: everything, or what changed since another snapshot as an overlay of that one's export.

use std::path::Path;

use futures::executor::block_on;
use serde_json::json;
use volley_server::object_store::ObjectStore;
use volley_server::qcow2::{Backing, Writer};
use volley_server::snapshot::read::{ExportError, export_chosen};
use volley_server::snapshot::{Manifest, catalog, diff};

use super::{ExportArgs, Temporary, failed, look_at};
use crate::cli::image::progress::Progress;
use crate::cli::{CliError, CliResult, Globals, print_json, print_line};
use crate::units::format_size;

pub(super) fn run<S: ObjectStore + Send + Sync>(
    globals: &Globals,
    store: &S,
    manifest: &Manifest,
    args: &ExportArgs,
) -> CliResult {
    let invalid = |why: String| CliError::new("invalid", why);
    let out = args.out.as_path();
    if out == Path::new("-") {
        return Err(invalid("a qcow2 image is not written front to back: give a file instead of -".to_owned()));
    }
    if look_at(out, args.force)?.is_some_and(|metadata| !metadata.is_file()) {
        return Err(invalid(format!("{} is not a file", out.display())));
    }
    let wanted: Vec<u32> = match &args.since {
        None => diff::blocks(manifest, 0).map(|block| block.index).collect(),
        Some(since) => {
            let since = block_on(catalog::load(store, since))?;
            let changes = diff::changes(manifest, &since, 0).map_err(|e| invalid(e.to_string()))?;
            changes.map(|change| change.index).collect()
        }
    };
    let backing = args.backing_file.clone().map(|name| Backing { name, format: args.backing_format });
    let progress = Progress::start("export", globals.json);
    let io_failed = |e| failed(out, &ExportError::Write(e));
    let tmp = Temporary::create(out).map_err(io_failed)?;
    let mut writer = Writer::new(&tmp.file, manifest.size_bytes, backing).map_err(invalid)?;
    let (mut done, chunk_bytes) = (0, u64::from(manifest.chunk_bytes));
    let total = wanted.len() as u64 * chunk_bytes;
    export_chosen(store, manifest, &wanted, args.parallel.threads(), |index, data| {
        let at = u64::from(index) * chunk_bytes;
        match data {
            Some(data) => writer.data(at, data)?,
            None => writer.zeroes(at, manifest.chunk_len(index))?,
        }
        done += chunk_bytes;
        progress.update(done, total);
        Ok(())
    })
    .map_err(|e| failed(out, &e))?;
    let file_bytes = writer.finish().map_err(io_failed)?;
    tmp.publish(file_bytes, out, args.force).map_err(io_failed)?;
    progress.finish();
    let changed = wanted.len();
    if globals.json {
        return print_json(&json!({
            "name": manifest.name,
            "size_bytes": manifest.size_bytes,
            "out": out,
            "format": "qcow2",
            "since": args.since,
            "blocks": changed,
            "file_bytes": file_bytes,
        }));
    }
    let what = match &args.since {
        None => format!("exported {:?}", manifest.name),
        Some(since) => format!("exported what changed in {:?} since {since:?}", manifest.name),
    };
    print_line(&format!("{what} ({changed} blocks, {}) to {}", format_size(file_bytes), out.display()))
}
