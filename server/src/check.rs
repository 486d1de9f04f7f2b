//! `volley check`: what a stopped node has on its disks, held against each other. Reads only.
//!
//! Identity and stores, the journals, every volume's file against its residency, and, where the object store is
//! known, the content of volumes against the digests of their snapshots. Every finding says what is wrong, what it
//! costs and what to do; docs/data-directory.md explains each kind.
//!
//! What can be told from what: the journal says which chunks are resident, not who wrote them. A volume that was never
//! attached (generation 0) holds what hydration wrote, so every byte of it is known from its snapshot. A guest may have
//! written or discarded anything, so in a volume that was attached a chunk that differs is counted, not judged.
#![allow(clippy::disallowed_methods)] // Runs in a tool, on no shard's thread.

mod cache;
mod content;
mod extents;
mod files;
mod finding;
mod volumes;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use futures::executor::block_on;
use serde::Serialize;

use crate::batch;
use crate::bootstrap::{JOURNAL_DIR, RESERVE};
use crate::datadir::{self, DataDirError, NodeIdentity, StoreIdentity};
use crate::error::Error;
use crate::journal::{self, Inspection};
use crate::object_store::ObjectError;
use crate::object_store::any::StoreChoice;
use crate::platform::blocking::Blocking;
use crate::shard::{BASE_DIR, STAGING_DIR};
use crate::types::VolumeState;
use crate::upload;
use content::Snapshots;
pub use finding::{Finding, Kind, Severity};

/// What to look at besides the data directory.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where volume stores are, by label, if not where the node last had them.
    pub stores: Vec<(String, PathBuf)>,
    /// With it, volumes are held against their snapshots.
    pub object_store: Option<StoreChoice>,
    /// Where the disk cache is, if not in the data directory.
    pub cache_dir: Option<PathBuf>,
    /// Look at files and extents only, and read no volume.
    pub quick: bool,
}

/// Why nothing can be said about a directory.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("{} holds no node of Volley: name the directory that volleyd has as --data", .0.display())]
    NoNode(PathBuf),
    #[error("can't read {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Journal(#[from] Error),
    #[error(transparent)]
    ObjectStore(#[from] ObjectError),
}

/// The outcome of a check.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub data: PathBuf,
    pub node_id: Option<String>,
    pub epoch: u64,
    pub journals: usize,
    pub journal_bytes: u64,
    pub journal_records: u64,
    pub stores: usize,
    pub volumes: u64,
    pub volumes_hydrated: u64,
    /// Chunks in volumes that are wholly resident.
    pub chunks_resident: u64,
    /// Of those, how many hold exactly what their snapshot has.
    pub chunks_verified: u64,
    /// Resident chunks of attached volumes that differ from the snapshot: their guests wrote them.
    pub chunks_changed: u64,
    /// Resident chunks of attached volumes without data where the snapshot has some: their guests discarded them.
    pub chunks_discarded: u64,
    /// Chunks that the disk cache has.
    pub cache_chunks: u64,
    /// Of those, how many fail their checks; they will be fetched again.
    pub cache_chunks_corrupt: u64,
    /// Worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Nothing that an operator has to look at.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity == Severity::Note)
    }

    /// Findings of a severity.
    #[must_use]
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

/// Checks the data directory of a stopped node.
///
/// # Errors
/// [`CheckError`] when it can't be judged: a server runs on it, it is no node, a newer version wrote it, or it can't
/// be read.
pub fn check(data: &Path, options: &Options) -> Result<Report, CheckError> {
    // Held to the end: no server starts meanwhile.
    let lock = datadir::lock_shared(data)?;
    let mut checker = Checker { data, options, report: Report { data: data.to_path_buf(), ..Report::default() } };
    let identity = checker.identity(lock.is_some())?;
    let inspection = block_on(journal::inspect(&Blocking, &data.join(JOURNAL_DIR)))?;
    checker.journals(identity.as_ref(), &inspection);
    let stores = checker.stores(identity.as_ref())?;
    let snapshots = match &options.object_store {
        Some(url) => Some(Snapshots::open(url)?),
        None => None,
    };
    checker.volumes(inspection, &stores, snapshots)?;
    checker.cache()?;
    drop(lock);
    checker.report.findings.sort_by(|a, b| (b.severity, &a.path).cmp(&(a.severity, &b.path)));
    Ok(checker.report)
}

/// A volume store that could be opened, by label.
type Stores = BTreeMap<String, PathBuf>;

struct Checker<'a> {
    data: &'a Path,
    options: &'a Options,
    report: Report,
}

impl Checker<'_> {
    fn find(&mut self, kind: Kind, path: &Path, message: String) {
        self.report.findings.push(Finding::new(kind, path, message));
    }

    /// `node.toml`, and what else lies in the directory. `None`: it is lost.
    fn identity(&mut self, locked_before: bool) -> Result<Option<NodeIdentity>, CheckError> {
        let names = files::names(self.data)?;
        let has_journal = names.iter().any(|name| name == JOURNAL_DIR);
        let identity = match datadir::read_identity(self.data) {
            Ok(Some(identity)) => identity,
            Ok(None) if has_journal => {
                self.find(Kind::NodeLost, self.data, "node.toml is missing, so the node has lost its identity".into());
                return Ok(None);
            }
            Ok(None) if locked_before => {
                self.find(Kind::Leftover, self.data, "a first start ended before the node had an identity".into());
                return Ok(None);
            }
            Ok(None) => return Err(CheckError::NoNode(self.data.to_path_buf())),
            Err(error @ DataDirError::Corrupt { .. }) => {
                self.find(Kind::NodeLost, &self.data.join("node.toml"), error.to_string());
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        self.report.node_id = Some(format!("{:032x}", identity.node_id));
        let (known, temporary) = datadir::data_names();
        let stores: Vec<PathBuf> = identity.stores.iter().map(|store| self.place_of(store)).collect();
        for name in names {
            let path = self.data.join(&name);
            if Path::new(&name) == temporary {
                self.find(Kind::Leftover, &path, "left by a write of node.toml that a crash cut short".into());
            } else if name != JOURNAL_DIR
                && name != datadir::CACHE_DIR
                && name != batch::BATCHES_DIR
                && name != upload::UPLOADS_DIR
                && !known.contains(&name.as_str())
                && !stores.contains(&path)
            {
                self.find(Kind::Foreign, &path, "not a file of Volley".into());
            }
        }
        let dir = self.data.join(batch::BATCHES_DIR);
        let batches = batch::read_all(self.data).map_err(|error| CheckError::Io { path: dir, error })?;
        for (path, fault) in batches.faults {
            self.find(Kind::BatchDamaged, &path, fault);
        }
        let dir = self.data.join(upload::UPLOADS_DIR);
        let uploads = upload::read_all(self.data).map_err(|error| CheckError::Io { path: dir, error })?;
        for (path, fault) in uploads.faults {
            self.find(Kind::Foreign, &path, fault);
        }
        Ok(Some(identity))
    }

    fn journals(&mut self, identity: Option<&NodeIdentity>, inspection: &Inspection) {
        let dir = self.data.join(JOURNAL_DIR);
        let made = identity.is_none_or(|identity| identity.has_journal);
        if made && (inspection.absent || (inspection.epoch == 0 && inspection.faults.is_empty())) {
            let message = "the journal is gone: which volumes exist and what is resident in them is unknown";
            self.find(Kind::JournalLost, &dir, message.into());
        }
        for (path, error) in &inspection.faults {
            self.find(Kind::JournalDamaged, path, error.message.clone());
        }
        for name in &inspection.leftovers {
            self.find(Kind::Leftover, &dir.join(name), "an unfinished or older journal that a crash left".into());
        }
        for name in inspection.foreign.iter().filter(|name| *name != RESERVE) {
            self.find(Kind::Foreign, &dir.join(name), "not a file of Volley".into());
        }
        for file in &inspection.files {
            self.report.journal_bytes += file.bytes;
            self.report.journal_records += file.records;
            if file.torn_bytes > 0 {
                let message = format!(
                    "the last batch was begun and not finished ({} bytes at byte {}): nothing of it was acknowledged",
                    file.torn_bytes, file.bytes
                );
                self.find(Kind::TornTail, &dir.join(&file.file), message);
            }
        }
        if inspection.files.iter().any(|file| !file.closed) {
            let message = "the node did not stop in good order: it was killed, or its machine was";
            self.find(Kind::NotClosed, &dir, message.into());
        }
        (self.report.epoch, self.report.journals) = (inspection.epoch, inspection.shards);
    }

    fn place_of(&self, store: &StoreIdentity) -> PathBuf {
        let told = self.options.stores.iter().find(|(label, _)| *label == store.label).map(|(_, path)| path.clone());
        told.or_else(|| store.path.clone()).unwrap_or_else(|| self.data.join("store"))
    }

    /// Every store the node has used must be there and be its own.
    fn stores(&mut self, identity: Option<&NodeIdentity>) -> Result<Stores, CheckError> {
        let mut stores = Stores::new();
        for store in identity.map(|identity| identity.stores.as_slice()).unwrap_or_default() {
            let path = self.place_of(store);
            let node_id = identity.map_or(0, |identity| identity.node_id);
            match datadir::verify_store(node_id, store, &path) {
                Ok(()) => {
                    self.store_names(&path)?;
                    stores.insert(store.label.clone(), path);
                }
                Err(error @ DataDirError::FutureFormat { .. }) => return Err(error.into()),
                Err(error) => self.find(Kind::StoreLost, &path, error.to_string()),
            }
        }
        self.report.stores = stores.len();
        Ok(stores)
    }

    fn store_names(&mut self, path: &Path) -> Result<(), CheckError> {
        let (known, temporary) = datadir::store_names();
        for name in files::names(path)? {
            if Path::new(&name) == temporary {
                let message = "left by a write of volley-store.toml that a crash cut short";
                self.find(Kind::Leftover, &path.join(name), message.into());
            } else if name == BASE_DIR {
                self.base_names(&path.join(name))?;
            } else if name != known && name != STAGING_DIR && name != datadir::VOLUMES_DIR && name != "lost+found" {
                self.find(Kind::Foreign, &path.join(name), "not a file of Volley".into());
            }
        }
        Ok(())
    }

    /// What is in a base means nothing without the process that wrote it: only names are looked at.
    fn base_names(&mut self, path: &Path) -> Result<(), CheckError> {
        for name in files::names(path)? {
            let ours =
                |(stem, kind): (&str, &str)| stem.parse::<usize>().is_ok() && ["chunks", "probe"].contains(&kind);
            if !name.split_once('.').is_some_and(ours) {
                self.find(Kind::Foreign, &path.join(name), "not a file of Volley".into());
            }
        }
        Ok(())
    }

    /// Every volume against its file, and every file against the volumes.
    fn volumes(
        &mut self,
        inspection: Inspection,
        stores: &Stores,
        mut snapshots: Option<Snapshots>,
    ) -> Result<(), CheckError> {
        let complete = inspection.faults.is_empty() && self.report.count(Severity::Damage) == 0;
        self.specs(&inspection.volumes, stores);
        let mut by_store: BTreeMap<&str, Vec<&VolumeState>> = BTreeMap::new();
        for state in &inspection.volumes {
            self.report.volumes += 1;
            self.report.volumes_hydrated += u64::from(state.hydrated);
            by_store.entry(&state.spec.store).or_default().push(state);
        }
        for (label, path) in stores {
            let volumes = by_store.remove(label.as_str()).unwrap_or_default();
            let files = files::volume_files(&path.join(datadir::VOLUMES_DIR))?;
            for state in &volumes {
                self.volume(state, &files, snapshots.as_mut());
            }
            self.strangers(&volumes, &files, complete);
        }
        Ok(())
    }
}
