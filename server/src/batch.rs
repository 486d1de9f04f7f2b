//! What is durable of a batch: many volumes that were asked for at once and are admitted as a whole.
//!
//! A batch is a file in `<data>/batches`, written before the first of its volumes exists and whenever its state changes
//! (`docs/batches.md`). The volumes themselves are facts of the shards' journals. The file says which volumes those are to
//! be, ids included, so that a node that was killed half-way goes on where it was, and nothing is made twice.
#![allow(clippy::disallowed_methods)] // The control thread's files: no shard touches them.

pub mod estimate;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::datadir::{self, DataDirError};
use crate::placement::{Overcommit, Spread};
use crate::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec, batch_text};
use estimate::Prediction;

/// Batch files lie here, inside of a data directory.
pub const BATCHES_DIR: &str = "batches";
const EXTENSION: &str = "toml";
/// Longest client token.
pub const TOKEN_BYTES_MAX: usize = 128;

/// What a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub name_prefix: String,
    pub count: u64,
    /// Number of the first volume.
    #[serde(default)]
    pub start: u64,
    pub snapshot: Option<String>,
    pub size_bytes: Option<u64>,
    pub chunk_bytes: Option<u32>,
    pub rate: Option<HydrationRate>,
    pub store: Option<String>,
    #[serde(default)]
    pub spread: Spread,
    pub overcommit: Option<Overcommit>,
    /// Seconds from admission until everything should be hydrated.
    pub deadline_seconds: Option<u64>,
    /// Refuse the batch if the estimate says that it will be late.
    #[serde(default)]
    pub require_deadline: bool,
    /// The same token again is the same batch again.
    pub token: Option<String>,
}

/// Where a batch is between its admission and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Volumes are being made.
    Creating,
    /// Some could not be made: `retry` or `cancel`.
    Stalled,
    /// All exist.
    Created,
    /// Its volumes are being deleted.
    Cancelling,
    /// Nothing of it is left.
    Cancelled,
}

/// When something happened to a batch, in milliseconds of the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Milestones {
    /// The last volume existed.
    pub created_unix_ms: Option<u64>,
    /// Every volume had its boot set.
    pub boot_set_unix_ms: Option<u64>,
    /// Every volume was hydrated.
    pub hydrated_unix_ms: Option<u64>,
    /// Nothing of it was left.
    pub ended_unix_ms: Option<u64>,
}

/// A batch as its file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    format: u32,
    id: String,
    /// The volumes' ids come from it.
    seed: String,
    pub admitted_unix_ms: u64,
    pub state: State,
    /// The deletion of a batch that is cancelled includes volumes that are attached.
    pub force: bool,
    /// Why it does not go on.
    pub problem: Option<String>,
    pub snapshot_id: Option<String>,
    /// Of each volume.
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    /// Of the image.
    pub data_bytes: u64,
    pub rate: HydrationRate,
    /// Labels of stores.
    stores: Vec<String>,
    /// For each volume the index of its store.
    placed: Vec<u32>,
    pub milestones: Milestones,
    pub request: Request,
    pub predicted: Option<Prediction>,
}

/// What the volumes of a batch have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Common {
    pub snapshot: Option<SnapshotRef>,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    pub data_bytes: u64,
    pub rate: HydrationRate,
}

impl Record {
    /// A batch that was admitted: `placed` gives the store of each volume, by its index in `stores`.
    #[must_use]
    pub fn new(
        request: Request,
        common: &Common,
        stores: Vec<String>,
        placed: Vec<u32>,
        random: [u64; 2],
        now_unix_ms: u64,
    ) -> Record {
        Record {
            format: datadir::FORMAT,
            id: batch_text(random[0]),
            seed: batch_text(random[1]),
            admitted_unix_ms: now_unix_ms,
            state: State::Creating,
            force: false,
            problem: None,
            snapshot_id: common.snapshot.as_ref().map(|snapshot| format!("{:032x}", snapshot.id)),
            size_bytes: common.size_bytes,
            chunk_bytes: common.chunk_bytes,
            data_bytes: common.data_bytes,
            rate: common.rate,
            stores,
            placed,
            milestones: Milestones::default(),
            request,
            predicted: None,
        }
    }

    #[must_use]
    pub fn id_text(&self) -> &str {
        &self.id
    }

    #[must_use]
    pub fn id(&self) -> u64 {
        hex(&self.id).unwrap_or_default()
    }

    #[must_use]
    pub fn count(&self) -> u64 {
        self.placed.len() as u64
    }

    #[must_use]
    pub fn deadline_unix_ms(&self) -> Option<u64> {
        self.request.deadline_seconds.map(|seconds| self.admitted_unix_ms.saturating_add(seconds.saturating_mul(1000)))
    }

    /// Volumes are still made or deleted.
    #[must_use]
    pub fn is_working(&self) -> bool {
        matches!(self.state, State::Creating | State::Cancelling)
    }

    /// There is nothing left to hydrate.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let Milestones { hydrated_unix_ms, ended_unix_ms, .. } = self.milestones;
        hydrated_unix_ms.or(ended_unix_ms).is_some()
    }

    /// Volumes that do not exist yet may come to exist.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Creating | State::Stalled)
    }

    /// Numbers of its volumes.
    pub fn volumes(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.placed.len()).expect("a request's count is bounded")
    }

    #[must_use]
    pub fn store_of(&self, volume: u32) -> &str {
        let store = self.placed.get(volume as usize).and_then(|store| self.stores.get(*store as usize));
        store.map_or("", String::as_str)
    }

    /// Puts a volume that could not be made elsewhere.
    pub fn place(&mut self, volume: u32, store: &str) {
        let known = self.stores.iter().position(|label| label == store).unwrap_or_else(|| {
            self.stores.push(store.to_string());
            self.stores.len() - 1
        });
        self.placed[volume as usize] = u32::try_from(known).expect("stores are counted in hundreds");
    }

    #[must_use]
    pub fn name(&self, volume: u32) -> String {
        format!("{}{}", self.request.name_prefix, self.request.start + u64::from(volume))
    }

    /// Which volume of the batch has this name.
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<u32> {
        let digits = name.strip_prefix(self.request.name_prefix.as_str())?;
        let canonical = digits == "0" || (!digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()));
        let number: u64 = digits.parse().ok().filter(|_| canonical)?;
        let index = number.checked_sub(self.request.start)?;
        (index < self.count()).then(|| u32::try_from(index).expect("bounded by the count"))
    }

    #[must_use]
    pub fn snapshot(&self) -> Option<SnapshotRef> {
        let id = u128::from_str_radix(self.snapshot_id.as_deref()?, 16).ok()?;
        Some(SnapshotRef { name: Arc::from(self.request.snapshot.as_deref()?), id })
    }

    /// A volume of the batch: always the same one.
    #[must_use]
    pub fn spec(&self, volume: u32) -> VolumeSpec {
        let name = self.name(volume);
        VolumeSpec {
            id: VolumeId::new(&name, mix(hex(&self.seed).unwrap_or_default().wrapping_add(u64::from(volume)))),
            name: Arc::from(name),
            size_bytes: self.size_bytes,
            chunk_bytes: self.chunk_bytes,
            snapshot: self.snapshot(),
            store: Arc::from(self.store_of(volume)),
            rate: self.rate,
            batch: Some(self.id()),
            created_unix_ms: self.admitted_unix_ms,
        }
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// Spreads numbers over all 64 bits, each to another one. Source: the output function of SplitMix64.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes the batch's file, atomically and durably.
///
/// # Errors
/// `Io`.
pub fn write(data: &Path, record: &Record) -> Result<(), DataDirError> {
    let dir = data.join(BATCHES_DIR);
    datadir::create_dir(&dir)?;
    datadir::write_file(&path_of(&dir, &record.id), record)
}

/// Removes the file of a batch that has ended.
///
/// # Errors
/// `Io`; a file that is gone already is none.
pub fn remove(data: &Path, id: &str) -> io::Result<()> {
    datadir::remove_record(&path_of(&data.join(BATCHES_DIR), id))
}

/// What the directory of batches holds.
pub type Stored = datadir::Records<Record>;

/// All batches of a data directory, oldest first.
///
/// # Errors
/// The directory can't be read.
pub fn read_all(data: &Path) -> io::Result<Stored> {
    let mut stored = datadir::read_records(&data.join(BATCHES_DIR), read)?;
    stored.records.sort_by(|a, b| (a.admitted_unix_ms, &a.id).cmp(&(b.admitted_unix_ms, &b.id)));
    Ok(stored)
}

fn read(path: &Path) -> Result<Option<Record>, String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if path.extension().is_none_or(|extension| extension != EXTENSION) || hex(stem).is_none() {
        return Err("not a file of Volley".to_string());
    }
    let record: Option<Record> = datadir::read_file(path).map_err(|e| e.to_string())?;
    let Some(record) = record else { return Ok(None) };
    if record.id != stem {
        return Err(format!("it holds batch {} under the name of another", record.id));
    }
    let stores = record.stores.len();
    if record.placed.iter().any(|store| *store as usize >= stores) || hex(&record.seed).is_none() {
        return Err("it does not say where its volumes belong".to_string());
    }
    Ok(Some(record))
}

fn path_of(dir: &Path, id: &str) -> PathBuf {
    dir.join(id).with_extension(EXTENSION)
}

#[cfg(test)]
mod tests;
