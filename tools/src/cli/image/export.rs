//! `volley image export`: a snapshot back into a raw or qcow2 image. A file appears whole under its name or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Args;
use futures::executor::block_on;
use serde_json::json;
use volley_server::import::ImageFormat;
use volley_server::object_store::ObjectStore;
use volley_server::snapshot::read::{self, ExportError, ExportTo};
use volley_server::snapshot::{Manifest, catalog};

use super::ParallelArgs;
use super::progress::Progress;
use crate::cli::{CliError, CliResult, Globals, objects, print_json, print_line};
use crate::units::format_size;

mod qcow2;

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Name of the snapshot.
    name: String,
    /// File to write, or `-` for stdout (raw only).
    out: PathBuf,
    /// Format of the file: raw or qcow2.
    #[arg(long, default_value = "raw")]
    format: ImageFormat,
    /// Write only what changed since this snapshot, as an overlay of its export (qcow2 only).
    #[arg(long, value_name = "NAME", requires = "backing_file")]
    since: Option<String>,
    /// The export of the other snapshot, as the overlay is to name it: relative to the overlay's directory.
    #[arg(long, value_name = "PATH", requires = "since")]
    backing_file: Option<String>,
    /// Format of the backing file: raw or qcow2.
    #[arg(long, default_value = "raw", value_name = "FORMAT", requires = "since")]
    backing_format: ImageFormat,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    parallel: ParallelArgs,
}

pub(super) fn run(globals: &Globals, args: &ExportArgs) -> CliResult {
    if args.format == ImageFormat::Raw && args.since.is_some() {
        return Err(CliError::new("invalid", "--since needs --format qcow2: a raw image holds everything"));
    }
    let store = objects::open(globals)?;
    let manifest = block_on(catalog::load(&store, &args.name))?;
    match args.format {
        ImageFormat::Raw => raw(globals, &store, &manifest, args),
        ImageFormat::Qcow2 => qcow2::run(globals, &store, &manifest, args),
    }
}

fn raw<S: ObjectStore + Send + Sync>(
    globals: &Globals,
    store: &S,
    manifest: &Manifest,
    args: &ExportArgs,
) -> CliResult {
    let (out, force, threads) = (args.out.as_path(), args.force, args.parallel.threads());
    let progress = Progress::start("export", globals.json);
    let tick = |done, total| progress.update(done, total);
    if out == Path::new("-") {
        return match read::export(store, manifest, threads, &mut io::stdout().lock(), tick) {
            // The reader has had enough.
            Err(ExportError::Write(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|e| failed(Path::new("stdout"), &e)),
        };
    }
    let io_failed = |e: io::Error| failed(out, &ExportError::Write(e));
    match look_at(out, force)? {
        // A device or a pipe is written in place, zeroes too: what it holds now is not known.
        Some(metadata) if !metadata.is_file() => {
            let mut device = OpenOptions::new().write(true).open(out).map_err(io_failed)?;
            read::export(store, manifest, threads, &mut device, tick).map_err(|e| failed(out, &e))?;
            device.flush().map_err(io_failed)?;
            if metadata_is_block(&metadata) {
                device.sync_all().map_err(io_failed)?;
            }
        }
        _ => {
            let tmp = Temporary::create(out).map_err(io_failed)?;
            let mut sparse = Sparse { file: &tmp.file, at: 0 };
            read::export(store, manifest, threads, &mut sparse, tick).map_err(|e| failed(out, &e))?;
            tmp.publish(manifest.size_bytes, out, force).map_err(io_failed)?;
        }
    }
    progress.finish();
    if globals.json {
        return print_json(&json!({"name": manifest.name, "size_bytes": manifest.size_bytes, "out": out}));
    }
    print_line(&format!("exported {:?} ({}) to {}", manifest.name, format_size(manifest.size_bytes), out.display()))
}

/// What is at the place of the export, if it may be replaced.
fn look_at(out: &Path, force: bool) -> CliResult<Option<fs::Metadata>> {
    let existing = match fs::metadata(out) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(out, &ExportError::Write(e))),
    };
    if !force {
        let text = format!("{} exists: give --force to replace it", out.display());
        return Err(CliError::new("conflict", text));
    }
    if existing.is_dir() {
        return Err(CliError::new("invalid", format!("{} is a directory", out.display())));
    }
    Ok(Some(existing))
}

fn metadata_is_block(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    metadata.file_type().is_block_device()
}

fn failed(out: &Path, error: &ExportError) -> CliError {
    match error {
        ExportError::Chunk(_) => CliError::new("corrupt", format!("cannot export: {error}")),
        ExportError::Write(e) => {
            let code = if e.kind() == io::ErrorKind::StorageFull { "no_space" } else { "io" };
            CliError::new(code, format!("cannot write {}: {e}", out.display()))
        }
    }
}

/// The export while it is being written; removed unless published.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn create(out: &Path) -> io::Result<Temporary> {
        let name = out.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
        let path = out.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Temporary { path, file })
    }

    fn publish(self, len: u64, out: &Path, force: bool) -> io::Result<()> {
        self.file.set_len(len)?;
        self.file.sync_all()?;
        if force {
            fs::rename(&self.path, out)?;
        } else {
            // Fails if a file has appeared since we looked.
            fs::hard_link(&self.path, out)?;
        }
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing to remove; otherwise a failure leaves a hidden file, and nothing can be done.
        let _ = fs::remove_file(&self.path);
    }
}

/// A new file in which zeroes stay holes.
struct Sparse<'a> {
    file: &'a File,
    at: u64,
}

impl ExportTo for Sparse<'_> {
    fn data(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.at)?;
        self.at += data.len() as u64;
        Ok(())
    }

    fn zeroes(&mut self, len: u32) -> io::Result<()> {
        self.at += u64::from(len);
        Ok(())
    }
}
