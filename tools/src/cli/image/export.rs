//! `volley image export`: a snapshot back into a raw image. A file appears whole under its name or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use volley_server::object_store::ObjectStore;
use volley_server::snapshot::Manifest;
use volley_server::snapshot::read::{self, ExportError, ExportTo};

use super::progress::Progress;
use crate::cli::{CliError, CliResult, Globals, print_json, print_line};
use crate::units::format_size;

pub(super) fn run<S: ObjectStore + Send + Sync>(
    globals: &Globals,
    store: &S,
    manifest: &Manifest,
    out: &Path,
    force: bool,
    threads: Option<usize>,
) -> CliResult {
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
    let existing = match fs::metadata(out) {
        Ok(metadata) => Some(metadata),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(io_failed(e)),
    };
    if existing.is_some() && !force {
        let text = format!("{} exists: give --force to replace it", out.display());
        return Err(CliError::new("conflict", text));
    }
    match existing {
        Some(metadata) if metadata.is_dir() => {
            return Err(CliError::new("invalid", format!("{} is a directory", out.display())));
        }
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
