//! The names in the directories of a node.
#![allow(clippy::disallowed_methods)] // Runs in a tool, on no shard's thread.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::CheckError;
use crate::shard::SET_ASIDE;
use crate::types::VolumeId;

/// What lies in the folder of a store's volumes.
#[derive(Debug, Default)]
pub(super) struct VolumeFiles {
    pub(super) dir: PathBuf,
    /// `<id>.raw`, by id.
    pub(super) raw: BTreeMap<VolumeId, PathBuf>,
    /// `<id>.deleted`, by id.
    pub(super) set_aside: BTreeMap<VolumeId, PathBuf>,
    pub(super) foreign: Vec<PathBuf>,
}

/// Sorted; a name that is not UTF-8 is nobody's of ours and comes as it can be shown.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, CheckError> {
    let fail = |error| CheckError::Io { path: dir.to_path_buf(), error };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        names.push(entry.map_err(fail)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A store without the folder has no files: the server makes it.
pub(super) fn volume_files(dir: &Path) -> Result<VolumeFiles, CheckError> {
    let mut files = VolumeFiles { dir: dir.to_path_buf(), ..VolumeFiles::default() };
    let names = match names(dir) {
        Err(CheckError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        names => names?,
    };
    for name in names {
        let path = dir.join(&name);
        let id = name.split_once('.').and_then(|(stem, extension)| Some((volume_id(stem)?, extension)));
        match id {
            Some((id, "raw")) => drop(files.raw.insert(id, path)),
            Some((id, SET_ASIDE)) => drop(files.set_aside.insert(id, path)),
            _ => files.foreign.push(path),
        }
    }
    Ok(files)
}

/// Only the spelling that the server uses.
fn volume_id(stem: &str) -> Option<VolumeId> {
    let id = VolumeId(u64::from_str_radix(stem, 16).ok()?);
    (id.to_string() == stem).then_some(id)
}
