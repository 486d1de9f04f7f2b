//! Looks at the journals of a stopped node without changing anything, and goes on after what recovery would refuse.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use super::current::CURRENT;
use super::frame::{SegmentName, TMP_SUFFIX};
use super::recovery::{FileReport, missing_current, missing_segment, read_current, read_segment, report, two_owners};
use crate::error::{Error, Result, Status};
use crate::platform::Platform;
use crate::types::{VolumeId, VolumeState};

/// What the journal directory of a stopped node holds.
#[derive(Debug, Default)]
pub struct Inspection {
    /// There is neither a superblock nor a segment.
    pub absent: bool,
    /// The valid epoch; 0 when the superblock can't be read, or no start was completed.
    pub epoch: u64,
    /// Journals of that epoch.
    pub shards: usize,
    /// Those that could be read, by shard.
    pub files: Vec<FileReport>,
    /// Volumes of those, by id.
    pub volumes: Vec<VolumeState>,
    /// Why recovery would refuse, by file. Volumes of these are unknown.
    pub faults: Vec<(PathBuf, Error)>,
    /// Names of our files that the next start removes.
    pub leftovers: Vec<String>,
    /// Names that are not ours.
    pub foreign: Vec<String>,
}

/// Reads every journal of the valid epoch; damage is part of the result.
///
/// # Errors
/// When the directory can't be listed, or a newer version wrote it (`Unsupported`).
pub async fn inspect<P: Platform>(platform: &P, dir: &Path) -> Result<Inspection> {
    let entries = match platform.list_dir(dir).await {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Inspection { absent: true, ..Inspection::default() });
        }
        Err(error) => return Err(Error::from_io(&format!("journal directory {}", dir.display()), &error)),
    };
    let segments: Vec<SegmentName> = entries.iter().filter_map(|entry| SegmentName::parse(&entry.name)).collect();
    let mut found = Inspection::default();
    for entry in entries.iter().filter(|entry| entry.name != CURRENT && SegmentName::parse(&entry.name).is_none()) {
        let ours = entry.name.strip_suffix(TMP_SUFFIX).is_some_and(|name| name == CURRENT || is_segment(name));
        if ours { found.leftovers.push(entry.name.clone()) } else { found.foreign.push(entry.name.clone()) }
    }
    if !entries.iter().any(|entry| entry.name == CURRENT) {
        match segments.first() {
            Some(segment) => found.faults.push((dir.join(CURRENT), missing_current(dir, *segment))),
            None => found.absent = true,
        }
        return Ok(found);
    }
    let current = match read_current(platform, dir).await {
        Ok(current) => current,
        Err(error) => {
            fault(&mut found, dir.join(CURRENT), error)?;
            return Ok(found);
        }
    };
    (found.epoch, found.shards) = (current.epoch, current.shards as usize);
    let mut volumes: BTreeMap<VolumeId, (u32, VolumeState)> = BTreeMap::new();
    let mut live = Vec::new();
    for shard in 0..current.shards {
        let Some(name) = segments.iter().filter(|name| (name.epoch, name.shard) == (current.epoch, shard)).max() else {
            found.faults.push((dir.to_path_buf(), missing_segment(dir, current, shard)));
            continue;
        };
        live.push(*name);
        let scanned = match read_segment(platform, dir, *name).await {
            Ok(scanned) => scanned,
            Err(error) => {
                fault(&mut found, dir.join(name.file_name()), error)?;
                continue;
            }
        };
        found.files.push(report(*name, &scanned));
        for state in scanned.volumes {
            match volumes.entry(state.spec.id) {
                Entry::Vacant(slot) => drop(slot.insert((shard, state))),
                Entry::Occupied(slot) => {
                    let error = two_owners(dir, &state, slot.get().0, shard);
                    found.faults.push((dir.join(name.file_name()), error));
                }
            }
        }
    }
    found.leftovers.extend(segments.iter().filter(|name| !live.contains(name)).map(|name| name.file_name()));
    found.volumes = volumes.into_values().map(|(_, state)| state).collect();
    Ok(found)
}

fn is_segment(name: &str) -> bool {
    SegmentName::parse(name).is_some()
}

/// Damage is noted; what a newer version wrote can't be judged at all.
fn fault(found: &mut Inspection, path: PathBuf, error: Error) -> Result<()> {
    if error.status == Status::Unsupported {
        return Err(error);
    }
    found.faults.push((path, error));
    Ok(())
}
