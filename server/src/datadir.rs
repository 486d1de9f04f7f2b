//! The data directory of a node: its identity, its lock, and the volume stores that belong to it.
//!
//! `<data>/node.toml` names the node and the stores it has ever used, `<data>/LOCK` is held by the running server, and
//! `<store>/volley-store.toml` ties a volume store to its node. So two servers can't share a directory, a store can't
//! be served by the wrong node, and a store whose filesystem is not mounted is an error instead of an empty store.
#![allow(clippy::disallowed_methods)] // Runs before any shard exists, and on no shard's thread.

mod identity;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::config::StoreConfig;
use crate::placement::Overcommit;

mod records;

pub use identity::{NodeIdentity, StoreIdentity, data_names, lock_shared, read_identity, store_names, verify_store};
pub use records::{Records, read_records, remove_record};

const NODE_FILE: &str = "node.toml";
const LOCK_FILE: &str = "LOCK";
const STORE_FILE: &str = "volley-store.toml";
/// Volume files lie here, inside of a store.
pub const VOLUMES_DIR: &str = "volumes";
/// The disk cache lies here, inside of a data directory, unless it is configured elsewhere.
pub const CACHE_DIR: &str = "cache";
/// Layout of both files and of what lies beside them.
pub(crate) const FORMAT: u32 = 1;

/// An open data directory. The lock is released when it is dropped or the process ends.
#[derive(Debug)]
pub struct DataDir {
    pub path: PathBuf,
    pub node_id: u128,
    pub created_unix_ms: u64,
    /// In the order of the configuration.
    pub stores: Vec<Store>,
    node: NodeFile,
    _lock: File,
}

/// A volume store that belongs to this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    pub label: Arc<str>,
    pub path: PathBuf,
    pub id: u128,
    /// Bytes per second hydration may write here; `None` is unlimited.
    pub hydration_bandwidth: Option<u64>,
    /// What fails together with it.
    pub domain: Arc<str>,
    /// `None`: as the node says.
    pub overcommit: Option<Overcommit>,
    /// What of the filesystem its base may take.
    pub base_percent: u8,
}

/// Why a data directory can't be used: one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("{what} {}: {error}", path.display())]
    Io { what: &'static str, path: PathBuf, error: io::Error },
    #[error(
        "data directory {} is locked by a running volleyd{}: stop it first or choose another --data",
        path.display(),
        pid.as_deref().map(|pid| format!(" (pid {pid})")).unwrap_or_default()
    )]
    Locked { path: PathBuf, pid: Option<String> },
    #[error("{} is not readable as the identity of a node or store ({reason}): restore it from a backup", path.display())]
    Corrupt { path: PathBuf, reason: String },
    #[error("{} has format {found}, this volleyd knows format {FORMAT}: use a newer volleyd", path.display())]
    FutureFormat { path: PathBuf, found: u32 },
    #[error(
        "volume store {} belongs to node {found:032x}, not to node {wanted:032x} of this data directory: give the node \
         its own --data back, or choose another store path",
        path.display()
    )]
    ForeignStore { path: PathBuf, found: u128, wanted: u128 },
    #[error(
        "volume store {} was created with label {found:?} and is configured as {wanted:?}: volumes find their store by \
         its label, so configure it as {found:?}",
        path.display()
    )]
    Relabelled { path: PathBuf, found: String, wanted: String },
    #[error(
        "volume store {label:?} of this node is not at {}: mount its filesystem or correct its path",
        path.display()
    )]
    StoreMissing { label: String, path: PathBuf },
    #[error("{} is not empty and holds no {what} of Volley: choose another directory", path.display())]
    Occupied { what: &'static str, path: PathBuf },
    #[error("volume store {label:?} at {} is another store than this node used before: correct its path", path.display())]
    StoreSwapped { label: String, path: PathBuf },
}

pub(crate) type Result<T> = std::result::Result<T, DataDirError>;

/// `node.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NodeFile {
    format: u32,
    node_id: String,
    created_unix_ms: u64,
    /// The node has made its journals: from then on a directory without any has lost them.
    #[serde(default)]
    journal: bool,
    #[serde(default, rename = "store")]
    stores: Vec<KnownStore>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownStore {
    label: String,
    store_id: String,
    /// Where it was when the node last started, relative to the data directory if inside of it; for programs that look
    /// at the node while it is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

/// `volley-store.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    node_id: String,
    store_id: String,
    label: String,
}

impl DataDir {
    /// Creates or opens the directory and its stores and locks it.
    ///
    /// # Errors
    /// See [`DataDirError`]; nothing of another node is touched.
    pub fn open(path: &Path, stores: &[StoreConfig]) -> Result<DataDir> {
        create_dir(path)?;
        let node_path = path.join(NODE_FILE);
        refuse_occupied(path, NODE_FILE, "node")?;
        let lock = lock(path)?;
        let old: Option<NodeFile> = read_file(&node_path)?;
        let mut node = match &old {
            Some(node) => node.clone(),
            None => NodeFile {
                format: FORMAT,
                node_id: format!("{:032x}", random_id(path)?),
                created_unix_ms: unix_ms(),
                journal: false,
                stores: Vec::new(),
            },
        };
        let node_id = parse_id(&node_path, &node.node_id)?;
        if old.is_none() {
            // Before any store names it, so that no store is left behind by a node that never was.
            write_file(&node_path, &node)?;
        }
        let stores =
            stores.iter().map(|store| open_store(&mut node, node_id, path, store)).collect::<Result<Vec<_>>>()?;
        if old.as_ref().is_none_or(|old| *old != node) {
            write_file(&node_path, &node)?;
        }
        let created_unix_ms = node.created_unix_ms;
        Ok(DataDir { path: path.to_path_buf(), node_id, created_unix_ms, stores, node, _lock: lock })
    }

    /// The node has run before: if there is no journal now, it was lost.
    #[must_use]
    pub fn has_journal(&self) -> bool {
        self.node.journal
    }

    /// Remembers, durably, that the journals were made. Called before the first volume can be.
    ///
    /// # Errors
    /// As writing `node.toml`.
    pub fn remember_journal(&mut self) -> Result<()> {
        if self.node.journal {
            return Ok(());
        }
        let node = NodeFile { journal: true, ..self.node.clone() };
        write_file(&self.path.join(NODE_FILE), &node)?;
        self.node = node;
        Ok(())
    }
}

fn open_store(node: &mut NodeFile, node_id: u128, data: &Path, config: &StoreConfig) -> Result<Store> {
    let known = node.stores.iter().find(|known| known.label == config.label).cloned();
    let file_path = config.path.join(STORE_FILE);
    let file = match (read_file::<StoreFile>(&file_path)?, &known) {
        (Some(file), _) => file,
        (None, Some(_)) => {
            return Err(DataDirError::StoreMissing { label: config.label.clone(), path: config.path.clone() });
        }
        (None, None) => create_store(node, config, &file_path)?,
    };
    match_store(&file, known.as_ref().map(|known| known.store_id.as_str()), node_id, &config.label, &config.path)?;
    let id = parse_id(&file_path, &file.store_id)?;
    if known.is_none() {
        node.stores.push(KnownStore { label: file.label, store_id: file.store_id, path: None });
    }
    let place = place_of(data, &config.path);
    node.stores.iter_mut().filter(|known| known.label == config.label).for_each(|known| known.path.clone_from(&place));
    create_dir(&config.path.join(VOLUMES_DIR))?;
    Ok(Store {
        label: Arc::from(config.label.as_str()),
        path: config.path.clone(),
        id,
        hydration_bandwidth: config.hydration_bandwidth.0,
        domain: Arc::from(config.domain.as_ref().unwrap_or(&config.label).as_str()),
        overcommit: config.overcommit,
        base_percent: config.base_percent,
    })
}

/// A path that is not UTF-8 can't be written into the file and is not remembered.
fn place_of(data: &Path, store: &Path) -> Option<String> {
    let (data, store) = (std::path::absolute(data).ok()?, std::path::absolute(store).ok()?);
    store.strip_prefix(&data).unwrap_or(&store).to_str().map(str::to_owned)
}

/// Whether the store at `path` is this node's store `label`; `known_id` is its id if the node has used it before.
fn match_store(file: &StoreFile, known_id: Option<&str>, node_id: u128, label: &str, path: &Path) -> Result<()> {
    let found = parse_id(&path.join(STORE_FILE), &file.node_id)?;
    if found != node_id {
        return Err(DataDirError::ForeignStore { path: path.to_path_buf(), found, wanted: node_id });
    }
    if file.label != label {
        let (found, wanted) = (file.label.clone(), label.to_owned());
        return Err(DataDirError::Relabelled { path: path.to_path_buf(), found, wanted });
    }
    if known_id.is_some_and(|known| known != file.store_id) {
        return Err(DataDirError::StoreSwapped { label: label.to_owned(), path: path.to_path_buf() });
    }
    Ok(())
}

fn create_store(node: &NodeFile, config: &StoreConfig, file_path: &Path) -> Result<StoreFile> {
    create_dir(&config.path)?;
    refuse_occupied(&config.path, STORE_FILE, "volume store")?;
    let file = StoreFile {
        format: FORMAT,
        node_id: node.node_id.clone(),
        store_id: format!("{:032x}", random_id(&config.path)?),
        label: config.label.clone(),
    };
    write_file(file_path, &file)?;
    Ok(file)
}

/// The lock file holds the pid of its holder, for the error message of the next.
fn lock(path: &Path) -> Result<File> {
    let lock_path = path.join(LOCK_FILE);
    let fail = |error| DataDirError::Io { what: "can't lock", path: lock_path.clone(), error };
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock_path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(fail(error)),
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let read = file.read_to_string(&mut pid);
            let pid = read.ok().map(|_| pid.trim().to_string()).filter(|pid| !pid.is_empty());
            return Err(DataDirError::Locked { path: path.to_path_buf(), pid });
        }
    }
    // The lock is what counts: a full disk, which may have no room for the pid, does not keep a node from starting.
    if let Err(error) = file.set_len(0).and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes())) {
        tracing::warn!(file = %lock_path.display(), %error, "the pid was not written");
    }
    Ok(file)
}

/// Creates a directory with its parents, durably: every directory that got an entry is synced.
pub(crate) fn create_dir(path: &Path) -> Result<()> {
    create_dir_with(path, &mut |dir| File::open(dir)?.sync_all())
}

fn create_dir_with(path: &Path, sync: &mut impl FnMut(&Path) -> io::Result<()>) -> Result<()> {
    let fail = |error| DataDirError::Io { what: "can't create", path: path.to_path_buf(), error };
    let missing: Vec<&Path> = path.ancestors().take_while(|dir| is_missing(dir)).collect();
    fs::create_dir_all(path).map_err(fail)?;
    // The entry of the uppermost directory first: what a crash leaves is reachable. One that was there already may be
    // the work of a start that crashed before it was synced.
    let mut entries: Vec<&Path> = missing.into_iter().rev().collect();
    if entries.is_empty() {
        entries.push(path);
    }
    for entry in entries {
        let parent = entry.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match sync(parent) {
            // Then it was not made by us, but by whoever set the machine up.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            result => result.map_err(fail)?,
        }
    }
    Ok(())
}

fn is_missing(dir: &Path) -> bool {
    !dir.as_os_str().is_empty() && matches!(fs::symlink_metadata(dir), Err(e) if e.kind() == io::ErrorKind::NotFound)
}

/// A directory without the file `own` must be empty, but for what a fresh filesystem or an interrupted first start
/// leaves in it.
fn refuse_occupied(path: &Path, own: &'static str, what: &'static str) -> Result<()> {
    let fail = |error| DataDirError::Io { what: "can't read", path: path.to_path_buf(), error };
    let temporary = temporary_of(Path::new(own));
    let harmless = [OsStr::new(LOCK_FILE), OsStr::new("lost+found"), temporary.as_os_str()];
    let mut occupied = false;
    for entry in fs::read_dir(path).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        if name == own {
            return Ok(());
        }
        occupied |= !harmless.contains(&name.as_os_str());
    }
    match occupied {
        true => Err(DataDirError::Occupied { what, path: path.to_path_buf() }),
        false => Ok(()),
    }
}

pub(crate) fn temporary_of(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

/// The format is checked before anything else of the file is interpreted.
pub(crate) fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DataDirError::Io { what: "can't read", path: path.to_path_buf(), error }),
    };
    let corrupt = |error: toml::de::Error| DataDirError::Corrupt {
        path: path.to_path_buf(),
        reason: error.message().replace('\n', " "),
    };
    let Version { format } = toml::from_str(&text).map_err(corrupt)?;
    match format {
        FORMAT => toml::from_str(&text).map(Some).map_err(corrupt),
        found => Err(DataDirError::FutureFormat { path: path.to_path_buf(), found }),
    }
}

/// Atomic and durable when it returns.
pub(crate) fn write_file(path: &Path, value: &impl Serialize) -> Result<()> {
    let fail = |error| DataDirError::Io { what: "can't write", path: path.to_path_buf(), error };
    let text = toml::to_string(value).map_err(|e| fail(io::Error::other(e)))?;
    let temporary = temporary_of(path);
    let mut file = File::create(&temporary).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    fs::rename(&temporary, path).map_err(fail)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail)
}

fn parse_id(path: &Path, text: &str) -> Result<u128> {
    u128::from_str_radix(text, 16)
        .map_err(|e| DataDirError::Corrupt { path: path.to_path_buf(), reason: format!("id {text:?}: {e}") })
}

fn random_id(path: &Path) -> Result<u128> {
    let mut bytes = [0; 16];
    random_bytes(&mut bytes).map_err(|error| DataDirError::Io {
        what: "no random id for",
        path: path.to_path_buf(),
        error,
    })?;
    Ok(u128::from_ne_bytes(bytes))
}

/// Fills `bytes` from the system's random source, for ids.
pub(crate) fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}

fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
