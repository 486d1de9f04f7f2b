//! Volumes against their files: names, lengths, extents, content; and files that belong to no volume.
#![allow(clippy::disallowed_methods)] // Runs in a tool, on no shard's thread.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::Path;

use super::content::{Snapshots, compare};
use super::extents::has_data;
use super::files::VolumeFiles;
use super::{Checker, Kind, Stores};
use crate::types::{ChunkResidency, SECTOR_BYTES, VolumeId, VolumeState};

/// Chunks named one by one in a finding; the rest is counted.
const CHUNKS_NAMED_MAX: usize = 8;

impl Checker<'_> {
    /// What the journals say of volumes must make sense by itself.
    pub(super) fn specs(&mut self, volumes: &[VolumeState], stores: &Stores) {
        let dir = self.data.join(crate::bootstrap::JOURNAL_DIR);
        let mut names = BTreeMap::new();
        for VolumeState { spec, .. } in volumes {
            if let Some(other) = names.insert(spec.name.clone(), spec.id) {
                let message = format!("volumes {other} and {} have the same name {:?}", spec.id, spec.name);
                self.find(Kind::VolumeDuplicate, &dir, message);
            }
            if spec.id != VolumeId::new(&spec.name, spec.id.0) {
                let message =
                    format!("the id {} does not lead to the name {:?}: no client finds it", spec.id, spec.name);
                self.find(Kind::VolumeMisplaced, &dir, message);
            }
        }
        let unknown: BTreeSet<_> = volumes.iter().map(|state| &*state.spec.store).collect();
        for label in unknown.into_iter().filter(|label| !stores.contains_key(*label)) {
            let count = volumes.iter().filter(|state| &*state.spec.store == label).count();
            let message = format!("the files of {count} volumes were not checked: volume store {label:?} is not known");
            self.find(Kind::StoreUnknown, self.data, message);
        }
    }

    /// One volume and its file.
    pub(super) fn volume(&mut self, state: &VolumeState, files: &VolumeFiles, snapshots: Option<&mut Snapshots>) {
        let (id, name) = (state.spec.id, &state.spec.name);
        let path = files.dir.join(format!("{id}.raw"));
        match (files.raw.contains_key(&id), files.set_aside.get(&id)) {
            (true, None) => {}
            (true, Some(aside)) => {
                let message = format!("volume {name:?} has this file and also {}", aside.display());
                self.find(Kind::FileAmbiguous, &path, message);
            }
            (false, Some(aside)) => {
                let message = format!("the deletion of volume {name:?} was cut short");
                return self.find(Kind::DeletionUnfinished, aside, message);
            }
            (false, None) => {
                let message = format!("the file of volume {name:?} is missing: what was resident in it is lost");
                return self.find(Kind::FileMissing, &path, message);
            }
        }
        if let Err(error) = self.file(state, &path, snapshots) {
            self.find(Kind::FileUnreadable, &path, format!("the file of volume {name:?} can't be read ({error})"));
        }
    }

    fn file(&mut self, state: &VolumeState, path: &Path, snapshots: Option<&mut Snapshots>) -> io::Result<()> {
        let name = &state.spec.name;
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let (len, expected) = (metadata.len(), state.spec.size_bytes.next_multiple_of(u64::from(SECTOR_BYTES)));
        let resident = state.hydrated || !state.residency.is_empty();
        if len > expected {
            let message =
                format!("the file of volume {name:?} has {len} bytes, {} more than the volume", len - expected);
            self.find(Kind::FileLong, path, message);
        }
        if len < expected && resident {
            let lost = expected - len;
            let message =
                format!("the file of volume {name:?} has {len} bytes, the volume {expected}: {lost} are lost");
            self.find(Kind::FileShort, path, message);
            return Ok(());
        }
        if len < expected {
            let message = format!("the file of volume {name:?} has {len} bytes of {expected}: it was never written");
            self.find(Kind::FileUnsized, path, message);
            return Ok(());
        }
        let chunks = resident_chunks(state);
        self.report.chunks_resident += chunks.len() as u64;
        self.content(state, &file, path, &chunks, snapshots)
    }

    fn content(
        &mut self,
        state: &VolumeState,
        file: &File,
        path: &Path,
        chunks: &[u32],
        snapshots: Option<&mut Snapshots>,
    ) -> io::Result<()> {
        let (spec, name) = (&state.spec, &state.spec.name);
        let Some(snapshot) = &spec.snapshot else { return Ok(()) };
        let Some(snapshots) = snapshots else {
            if !chunks.is_empty() && !has_data(file, 0, spec.size_bytes)? {
                let message = format!(
                    "the file of volume {name:?} has no data at all, though {} chunks are resident: they are lost, \
                     unless the snapshot is all zeroes or the guest discarded everything",
                    chunks.len()
                );
                self.find(Kind::NoData, path, message);
            }
            return Ok(());
        };
        let manifest = match snapshots.get(snapshot) {
            Ok(manifest) => manifest,
            Err(_) if state.hydrated => return Ok(()),
            Err(why) => {
                self.find(Kind::SnapshotLost, path, format!("volume {name:?} is not hydrated and needs it: {why}"));
                return Ok(());
            }
        };
        let compared = compare(file, spec, &manifest, chunks, self.options.quick)?;
        self.report.chunks_verified += compared.equal;
        if state.generation > 0 {
            self.report.chunks_discarded += compared.holes.len() as u64;
            self.report.chunks_changed += compared.different.len() as u64;
            return Ok(());
        }
        if !compared.holes.is_empty() {
            let message = format!(
                "volume {name:?} was never attached and {} of its resident chunks are holes in the file, though \
                 snapshot {:?} has data for them: {}",
                compared.holes.len(),
                snapshot.name,
                named(&compared.holes)
            );
            self.find(Kind::ChunkHole, path, message);
        }
        if !compared.different.is_empty() {
            let message = format!(
                "volume {name:?} was never attached and {} of its resident chunks are not what snapshot {:?} has: {}",
                compared.different.len(),
                snapshot.name,
                named(&compared.different)
            );
            self.find(Kind::ChunkDiffers, path, message);
        }
        Ok(())
    }

    /// Files in the folder of a store that no volume of it has. `complete`: all volumes are known.
    pub(super) fn strangers(&mut self, volumes: &[&VolumeState], files: &VolumeFiles, complete: bool) {
        let known: BTreeSet<VolumeId> = volumes.iter().map(|state| state.spec.id).collect();
        for path in &files.foreign {
            self.find(Kind::Foreign, path, "not a file of Volley".into());
        }
        if !complete {
            return;
        }
        for path in files.set_aside.iter().filter(|(id, _)| !known.contains(id)).map(|(_, path)| path) {
            self.find(Kind::DeletionUnfinished, path, "the file of a volume that was deleted".into());
        }
        for path in files.raw.iter().filter(|(id, _)| !known.contains(id)).map(|(_, path)| path) {
            match File::open(path).and_then(|file| has_data(&file, 0, u64::MAX >> 1)) {
                Ok(false) => {
                    self.find(Kind::CreationUnfinished, path, "an empty file that belongs to no volume".into())
                }
                Ok(true) => self.find(Kind::FileOrphaned, path, "a file with data that belongs to no volume".into()),
                Err(error) => self.find(Kind::FileUnreadable, path, format!("it belongs to no volume ({error})")),
            }
        }
    }
}

/// Chunks that are resident as a whole.
fn resident_chunks(state: &VolumeState) -> Vec<u32> {
    if state.hydrated {
        return (0..state.spec.chunks()).collect();
    }
    let whole = state.residency.iter().filter(|(_, residency)| *residency == ChunkResidency::Resident);
    whole.map(|(chunk, _)| *chunk).collect()
}

fn named(chunks: &[u32]) -> String {
    let shown: Vec<String> = chunks.iter().take(CHUNKS_NAMED_MAX).map(u32::to_string).collect();
    let more = if chunks.len() > CHUNKS_NAMED_MAX { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}
