//! Folders of a data directory that hold a file for each record.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::temporary_of;

/// What such a folder holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Records<T> {
    pub records: Vec<T>,
    /// Files that are none, and what is wrong with them.
    pub faults: Vec<(PathBuf, String)>,
}

impl<T> Default for Records<T> {
    fn default() -> Records<T> {
        Records { records: Vec::new(), faults: Vec::new() }
    }
}

/// All records of a folder, which need not be there. What a write that a crash cut short left is none; nor is a file that is gone
/// (`None`) when it is `read`.
///
/// # Errors
/// The folder can't be read.
pub fn read_records<T>(dir: &Path, read: impl Fn(&Path) -> Result<Option<T>, String>) -> io::Result<Records<T>> {
    let mut found = Records::default();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension() == temporary_of(&path).extension() {
            continue;
        }
        match read(&path) {
            Ok(record) => found.records.extend(record),
            Err(fault) => found.faults.push((path, fault)),
        }
    }
    Ok(found)
}

/// Removes the file of a record.
///
/// # Errors
/// `Io`; a file that is gone already is none.
pub fn remove_record(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
