//! A data directory as a program sees it that only looks: identity, lock and stores of a stopped node. Writes nothing.
#![allow(clippy::disallowed_methods)] // Runs in tools, on no shard's thread.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::{
    DataDirError, KnownStore, LOCK_FILE, NODE_FILE, NodeFile, Result, STORE_FILE, StoreFile, parse_id, read_file,
    temporary_of,
};

/// What `node.toml` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    pub node_id: u128,
    /// The journals were made once.
    pub has_journal: bool,
    pub stores: Vec<StoreIdentity>,
}

/// A volume store that the node has used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreIdentity {
    pub label: String,
    pub store_id: String,
    /// Where it was at the last start; unknown of nodes that were last started by an older version.
    pub path: Option<PathBuf>,
}

/// Reads `node.toml`; `None` when there is none.
///
/// # Errors
/// `Io`, `Corrupt` or `FutureFormat`.
pub fn read_identity(data: &Path) -> Result<Option<NodeIdentity>> {
    let path = data.join(NODE_FILE);
    let Some(node) = read_file::<NodeFile>(&path)? else { return Ok(None) };
    let node_id = parse_id(&path, &node.node_id)?;
    let store = |known: KnownStore| StoreIdentity {
        label: known.label,
        store_id: known.store_id,
        path: known.path.map(|path| data.join(path)),
    };
    Ok(Some(NodeIdentity { node_id, has_journal: node.journal, stores: node.stores.into_iter().map(store).collect() }))
}

/// Checks that the store at `path` is the one that the node calls `store`.
///
/// # Errors
/// Those of opening it: missing, foreign, relabelled, swapped, damaged.
pub fn verify_store(node_id: u128, store: &StoreIdentity, path: &Path) -> Result<()> {
    let Some(file) = read_file::<StoreFile>(&path.join(STORE_FILE))? else {
        return Err(DataDirError::StoreMissing { label: store.label.clone(), path: path.to_path_buf() });
    };
    super::match_store(&file, Some(&store.store_id), node_id, &store.label, path)
}

/// Keeps a server from starting while the directory is looked at; several may look. `None` when no server ever ran.
///
/// # Errors
/// `Locked` while a server runs, `Io`.
pub fn lock_shared(data: &Path) -> Result<Option<File>> {
    let path = data.join(LOCK_FILE);
    let fail = |error| DataDirError::Io { what: "can't lock", path: path.clone(), error };
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::Error(error)) => Err(fail(error)),
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let read = file.read_to_string(&mut pid);
            let pid = read.ok().map(|_| pid.trim().to_owned()).filter(|pid| !pid.is_empty());
            Err(DataDirError::Locked { path: data.to_path_buf(), pid })
        }
    }
}

/// Names of files that belong into a data directory, and those that only a crash leaves.
#[must_use]
pub fn data_names() -> ([&'static str; 2], PathBuf) {
    ([NODE_FILE, LOCK_FILE], temporary_of(Path::new(NODE_FILE)))
}

/// Likewise of a volume store, beside its volumes.
#[must_use]
pub fn store_names() -> (&'static str, PathBuf) {
    (STORE_FILE, temporary_of(Path::new(STORE_FILE)))
}
