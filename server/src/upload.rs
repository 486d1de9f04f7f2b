//! What is durable of a block upload: that this node has put a marker into the object store, and under which id.
//!
//! An upload lives in memory and ends with the process. Its marker would stay, keep the name taken and stop garbage
//! collection; so a file in `<data>/uploads` says which markers are this node's, from before the marker is put until
//! after it is gone (`docs/data-directory.md`).
#![allow(clippy::disallowed_methods)] // The control thread's files: no shard touches them.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::datadir::{self, DataDirError};

/// Files of uploads lie here, inside of a data directory.
pub const UPLOADS_DIR: &str = "uploads";
const EXTENSION: &str = "toml";

/// An upload whose marker may be in the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: u128,
    /// Name of the snapshot it is to become.
    pub snapshot: String,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    snapshot: String,
}

/// Writes the file of an upload, atomically and durably.
///
/// # Errors
/// `Io`.
pub fn write(data: &Path, record: &Record) -> Result<(), DataDirError> {
    let dir = data.join(UPLOADS_DIR);
    datadir::create_dir(&dir)?;
    let stored = Stored { format: datadir::FORMAT, snapshot: record.snapshot.clone() };
    datadir::write_file(&path_of(&dir, record.id), &stored)
}

/// Removes the file of an upload whose marker is gone.
///
/// # Errors
/// `Io`; a file that is gone already is none.
pub fn remove(data: &Path, id: u128) -> io::Result<()> {
    datadir::remove_record(&path_of(&data.join(UPLOADS_DIR), id))
}

/// Uploads of an earlier run of the node.
pub type Left = datadir::Records<Record>;

/// All uploads of a data directory.
///
/// # Errors
/// The directory can't be read.
pub fn read_all(data: &Path) -> io::Result<Left> {
    datadir::read_records(&data.join(UPLOADS_DIR), read)
}

fn read(path: &Path) -> Result<Option<Record>, String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let id =
        u128::from_str_radix(stem, 16).ok().filter(|id| path.file_name() == path_of(Path::new(""), *id).file_name());
    let id = id.ok_or("not a file of Volley")?;
    let stored: Option<Stored> = datadir::read_file(path).map_err(|e| e.to_string())?;
    Ok(stored.map(|stored| Record { id, snapshot: stored.snapshot }))
}

fn path_of(dir: &Path, id: u128) -> PathBuf {
    dir.join(format!("{id:032x}.{EXTENSION}"))
}

#[cfg(test)]
mod tests {
    use super::{Left, Record, UPLOADS_DIR, read_all, remove, write};

    #[test]
    fn files_are_found_again_until_removed_and_others_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_all(dir.path()).unwrap(), Left::default());
        let record = Record { id: 0xfeed, snapshot: "nightly".to_owned() };
        write(dir.path(), &record).unwrap();
        std::fs::write(dir.path().join(UPLOADS_DIR).join("feed.toml"), "format = 1\nsnapshot = \"x\"\n").unwrap();
        std::fs::write(dir.path().join(UPLOADS_DIR).join("half.tmp"), "form").unwrap();
        let Left { records, faults } = read_all(dir.path()).unwrap();
        assert_eq!(records, [record]);
        assert_eq!(faults.len(), 1, "{faults:?}");
        remove(dir.path(), 0xfeed).unwrap();
        remove(dir.path(), 0xfeed).unwrap();
        assert!(read_all(dir.path()).unwrap().records.is_empty());
    }
}
