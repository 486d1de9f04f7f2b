//! Recovery: from the journal directory to the states of all volumes, or a precise reason why not.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use super::current::{self, CURRENT, Current, CurrentError};
use super::frame::{BLOCK_BYTES, SegmentName};
use super::scan::{Scan, ScanError, Scanned, WINDOW_BYTES};
use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::platform::{DirEntry, File, OpenMode, Platform};
use crate::types::{VolumeId, VolumeState};

/// What the journals of a node say.
#[derive(Debug)]
pub struct Recovered {
    /// The valid epoch; the next start creates its journals in `epoch + 1`.
    pub epoch: u64,
    /// Journals of that epoch; 0 before the first start was completed.
    pub shards: usize,
    /// The directory held no journal at all: a first start, or somebody removed it.
    pub fresh: bool,
    /// Sorted by id.
    pub volumes: Vec<VolumeState>,
    /// One for each journal, by shard.
    pub files: Vec<FileReport>,
}

/// How one journal read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    pub file: String,
    pub volumes: usize,
    pub records: u64,
    /// Bytes of good batches, with the header.
    pub bytes: u64,
    /// Bytes of a last batch that was begun and never acknowledged; ignored. Nonzero only after a crash.
    pub torn_bytes: u64,
    /// Closed in good order.
    pub closed: bool,
}

/// Reads the journals of the valid epoch. On a first start it makes the directory and its superblock, with epoch 0.
///
/// # Errors
/// `Corrupt`, naming file and offset, when committed records are damaged or missing; `Unsupported` when a newer version
/// wrote them; `Io` when a file can't be read. Nothing is changed then.
pub async fn recover<P: Platform>(platform: &P, dir: &Path) -> Result<Recovered> {
    platform.create_dir_all(dir).await.map_err(|error| directory_error(dir, &error))?;
    let entries = list(platform, dir).await?;
    if !entries.iter().any(|entry| entry.name == CURRENT) {
        return first_start(platform, dir, &segments_of(&entries)).await;
    }
    read_all(platform, dir, &entries).await
}

/// Like [`recover`] for a node that has made its journals before: it makes nothing.
///
/// # Errors
/// As [`recover`], and `Corrupt` when there is no journal: it was lost, or its filesystem is not mounted.
pub async fn recover_existing<P: Platform>(platform: &P, dir: &Path) -> Result<Recovered> {
    let entries = match platform.list_dir(dir).await {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(lost(dir)),
        Err(error) => return Err(directory_error(dir, &error)),
    };
    let segments = segments_of(&entries);
    match entries.iter().any(|entry| entry.name == CURRENT) {
        false if segments.is_empty() => return Err(lost(dir)),
        false => return Err(missing_current(dir, segments[0])),
        true => {}
    }
    let recovered = read_all(platform, dir, &entries).await?;
    // Epoch 0 is that of a first start which was not completed.
    if recovered.epoch == 0 { Err(lost(dir)) } else { Ok(recovered) }
}

async fn read_all<P: Platform>(platform: &P, dir: &Path, entries: &[DirEntry]) -> Result<Recovered> {
    let segments = segments_of(entries);
    let current = read_current(platform, dir).await?;
    let mut merged: BTreeMap<VolumeId, (u32, VolumeState)> = BTreeMap::new();
    let mut files = Vec::new();
    let forgotten = u32::from(mutation::on(Mutation::RestartLosesPartition) && current.shards > 1);
    for shard in 0..current.shards - forgotten {
        let newest = segments.iter().filter(|name| (name.epoch, name.shard) == (current.epoch, shard)).max();
        let name = *newest.ok_or_else(|| missing_segment(dir, current, shard))?;
        let scanned = read_segment(platform, dir, name).await?;
        files.push(report(name, &scanned));
        for state in scanned.volumes {
            match merged.entry(state.spec.id) {
                Entry::Vacant(slot) => drop(slot.insert((shard, state))),
                Entry::Occupied(slot) => return Err(two_owners(dir, &state, slot.get().0, shard)),
            }
        }
    }
    let volumes = merged.into_values().map(|(_, state)| state).collect();
    Ok(Recovered { epoch: current.epoch, shards: current.shards as usize, fresh: false, volumes, files })
}

async fn list<P: Platform>(platform: &P, dir: &Path) -> Result<Vec<DirEntry>> {
    platform.list_dir(dir).await.map_err(|error| directory_error(dir, &error))
}

fn directory_error(dir: &Path, error: &std::io::Error) -> Error {
    Error::from_io(&format!("journal directory {}", dir.display()), error)
}

fn segments_of(entries: &[DirEntry]) -> Vec<SegmentName> {
    entries.iter().filter_map(|entry| SegmentName::parse(&entry.name)).collect()
}

/// The superblock is made before the first segment: segments without one mean that it was lost.
async fn first_start<P: Platform>(platform: &P, dir: &Path, segments: &[SegmentName]) -> Result<Recovered> {
    let path = dir.join(CURRENT);
    if let Some(segment) = segments.first() {
        return Err(missing_current(dir, *segment));
    }
    let made = async {
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            platform.sync_dir(parent).await?;
        }
        current::write(platform, dir, Current { epoch: 0, shards: 0 }).await
    };
    made.await.map_err(|error| Error::from_io(&format!("journal superblock {}: writing", path.display()), &error))?;
    Ok(Recovered { epoch: 0, shards: 0, fresh: true, volumes: Vec::new(), files: Vec::new() })
}

pub(super) async fn read_current<P: Platform>(platform: &P, dir: &Path) -> Result<Current> {
    let path = dir.join(CURRENT);
    let what = format!("journal superblock {}", path.display());
    let read = async {
        let file = platform.open(&path, OpenMode::Read).await?;
        // One block more than it has, to notice a longer file.
        let block = file.read_at(0, 2 * BLOCK_BYTES).await?;
        file.close().await?;
        Ok(block)
    };
    let block = read.await.map_err(|error| Error::from_io(&what, &error))?;
    Current::decode(&block).map_err(|error| match error {
        CurrentError::Version(_) => Error::new(Status::Unsupported, format!("{what}: {error}")),
        _ => corrupt(format!("{what}: {error}")),
    })
}

/// Streams one segment: at most one window is in memory.
pub(super) async fn read_segment<P: Platform>(platform: &P, dir: &Path, name: SegmentName) -> Result<Scanned> {
    let path = dir.join(name.file_name());
    let what = format!("journal file {}", path.display());
    let failed = |error: std::io::Error| Error::from_io(&format!("{what}: reading"), &error);
    let file = platform.open(&path, OpenMode::Read).await.map_err(failed)?;
    let scanned = scan(&file, name, &what).await;
    file.close().await.map_err(failed)?;
    scanned
}

async fn scan<F: File>(file: &F, name: SegmentName, what: &str) -> Result<Scanned>
where
    F::ReadBuf: std::ops::Deref<Target = [u8]>,
{
    let refused = |error: ScanError| match error.fault.is_newer_version() {
        true => Error::new(Status::Unsupported, format!("{what}: {error}")),
        false => corrupt(format!("{what}: {error}")),
    };
    let unread =
        |offset: u64| move |error: std::io::Error| Error::from_io(&format!("{what}: reading at byte {offset}"), &error);
    let block = file.read_at(0, BLOCK_BYTES).await.map_err(unread(0))?;
    let mut scan = Scan::start(name, &block).map_err(refused)?;
    while let Some(offset) = scan.wants() {
        let window = file.read_at(offset, WINDOW_BYTES).await.map_err(unread(offset))?;
        scan.feed(&window).map_err(refused)?;
        // Shorter means the end of the file, also for a length that is not whole blocks.
        if window.len() < WINDOW_BYTES {
            break;
        }
    }
    scan.finish().map_err(refused)
}

pub(super) fn report(name: SegmentName, scanned: &Scanned) -> FileReport {
    FileReport {
        file: name.file_name(),
        volumes: scanned.volumes.len(),
        records: scanned.records,
        bytes: scanned.good_bytes,
        torn_bytes: scanned.torn_bytes,
        closed: scanned.closed,
    }
}

pub(super) fn missing_segment(dir: &Path, current: Current, shard: u32) -> Error {
    let pattern = format!("{:010}-{shard:04}-*.vj", current.epoch);
    corrupt(format!(
        "journal of shard {shard} is missing: {} says epoch {} has {} journals, but there is no {pattern} in {}",
        CURRENT,
        current.epoch,
        current.shards,
        dir.display()
    ))
}

pub(super) fn missing_current(dir: &Path, segment: SegmentName) -> Error {
    let text = format!(
        "journal superblock {} is missing, but segments such as {} exist: restore it from a backup, or move the \
         segments away to start without any volume",
        dir.join(CURRENT).display(),
        segment.file_name()
    );
    Error::new(Status::Corrupt, text)
}

fn lost(dir: &Path) -> Error {
    let text = format!(
        "the journal of this node is gone: node.toml says that it was made, but {} holds none; restore it from a \
         backup or mount its filesystem. To give up every volume of the node, delete the line 'journal = true' of \
         node.toml and start again",
        dir.display()
    );
    Error::new(Status::Corrupt, text)
}

pub(super) fn two_owners(dir: &Path, state: &VolumeState, first: u32, second: u32) -> Error {
    corrupt(format!(
        "volume {} ({}) is in the journals of shard {first} and shard {second} in {}",
        state.spec.name,
        state.spec.id,
        dir.display()
    ))
}

fn corrupt(text: String) -> Error {
    Error::new(Status::Corrupt, format!("{text}; nothing was changed: restore the directory from a backup"))
}
