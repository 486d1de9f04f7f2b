//! A volume that becomes another one under its own name: rolled back to a snapshot, or grown.
//!
//! Its guests and fills end first, and a restart must find either the old volume or the new one. So the volume is *retired*, its residency made
//! durable, and one record replaces all that the journal knows of it; only then does the new volume, which has the same file, take its place.
//! What the new one lacks is absent in it, whatever the file holds there, and comes as for any volume: by priority, or in the background.

use std::rc::Rc;

use crate::error::{Error, Result, Status};
use crate::journal::Record;
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::changes::ChunkSet;
use crate::shard::proof::check_base;
use crate::shard::volume::Volume;
use crate::types::{ChunkResidency, Lineage, SECTOR_BYTES, SnapshotRef, VolumeState};

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Makes the volume equal to the snapshot: what differs is absent afterwards. That is what was changed since the `base`, and what
    /// `differs` between the base and the snapshot.
    pub(super) async fn roll_back(
        &self,
        name: &str,
        snapshot: SnapshotRef,
        base: Option<&SnapshotRef>,
        differs: &ChunkSet,
        force: bool,
    ) -> Result<()> {
        let volume = self.by_name(name)?;
        self.retire(&volume, force).await?;
        let replaced = async {
            check_base(&volume, base)?;
            let keeps = |chunk| volume.changes.borrow().is_changed(chunk) == Some(false) && !differs.contains(chunk);
            let mut state = self.settled(&volume).await?;
            let held = whole_residency(&volume, state.residency, state.hydrated);
            state.residency = match mutation::on(Mutation::RollbackKeepsResidency) {
                true => held,
                false => held.into_iter().filter(|(chunk, _)| keeps(*chunk)).collect(),
            };
            state.hydrated = false;
            state.lineage = Lineage::new(Some(snapshot.clone()));
            state.spec.snapshot = Some(snapshot);
            self.replace(&volume, state).await
        };
        let replaced = replaced.await;
        self.end_retirement(&volume, replaced)
    }

    /// Makes the device longer; what is new reads as zeroes.
    pub(super) async fn grow(&self, name: &str, size_bytes: u64) -> Result<()> {
        let volume = self.by_name(name)?;
        let now = volume.spec.size_bytes;
        if size_bytes < now {
            let text = format!("volume {name:?} has {now} bytes and can't shrink to {size_bytes}: data would be lost");
            return Err(Error::new(Status::Invalid, text));
        }
        if size_bytes == now {
            return Ok(());
        }
        self.retire(&volume, false).await?;
        let replaced = async {
            let mut state = self.settled(&volume).await?;
            let (last, sectors) = {
                let map = volume.map.borrow();
                let last = map.chunks() - 1;
                (last, map.chunk_sectors(last).end - map.chunk_sectors(last).start)
            };
            if let Some((_, residency)) = state.residency.iter_mut().find(|(chunk, _)| *chunk == last)
                && *residency == ChunkResidency::Resident
            {
                *residency = first_sectors(sectors, state.spec.chunk_bytes);
            }
            state.spec.size_bytes = size_bytes;
            volume.grow_file(size_bytes).await?;
            self.replace(&volume, state).await
        };
        let replaced = replaced.await;
        self.end_retirement(&volume, replaced)
    }

    /// Ends what guests and fills do to the volume; new ones wait or are refused.
    async fn retire(&self, volume: &Rc<Volume<P>>, force: bool) -> Result<()> {
        self.refuse_when_stopping()?;
        let name = &*volume.spec.name;
        if volume.changes.borrow().cut().is_some() || volume.frozen.get().is_some() {
            let text = format!("a snapshot of volume {name:?} is being taken: wait until it is done");
            return Err(Error::new(Status::Conflict, text));
        }
        if volume.attached.get().is_some() && !force {
            let text = format!("volume {name:?} is attached: detach it first, or use --force to fence its host");
            return Err(Error::new(Status::Conflict, text));
        }
        if let Some(why) = volume.failure() {
            return Err(Error::new(Status::Io, format!("volume {name:?}: {why}")));
        }
        if volume.retired.replace(true) {
            return Err(Error::new(Status::Conflict, format!("volume {name:?} is being changed already")));
        }
        volume.attached.set(None);
        volume.writes_done.until(|| volume.writing.get() == 0).await;
        if !mutation::on(Mutation::RollbackOvertakesFills) {
            volume.fills_done.until(|| volume.filling.get() == 0).await;
        }
        Ok(())
    }

    /// A volume that was not replaced goes on.
    fn end_retirement(&self, volume: &Rc<Volume<P>>, replaced: Result<()>) -> Result<()> {
        volume.end_retirement(replaced.is_ok());
        if replaced.is_err() {
            self.wake_hydrator(volume);
        }
        replaced
    }

    /// The volume as a restart will find it, once everything is durable.
    async fn settled(&self, volume: &Rc<Volume<P>>) -> Result<VolumeState> {
        volume.sync(&self.0.journal, &self.0.counters).await?;
        let generation = volume.generation.get() + 1;
        Ok(VolumeState { generation, ..volume.durable_state() })
    }

    async fn replace(&self, volume: &Rc<Volume<P>>, state: VolumeState) -> Result<()> {
        let new = Rc::new(self.open_volume(state.clone(), volume.store)?);
        self.0.journal.admit().await?;
        // A checkpoint that begins now is to contain the new volume: its segment gets no earlier record.
        *volume.replacement.borrow_mut() = Some(new.clone());
        let lsn = self.0.journal.append(&Record::Replaced(state));
        if let Err(error) = self.0.journal.commit(lsn).await {
            volume.refuse_writes(&error);
            return Err(error);
        }
        volume.close_file().await;
        volume.deleted.set(true);
        volume.changed.wake_all();
        volume.account.volumes.set(volume.account.volumes.get().saturating_sub(1));
        self.end_read_ahead(volume);
        self.0.stores[volume.store].queue.borrow_mut().remove(volume.spec.id);
        self.adopt(new);
        Ok(())
    }
}

/// All chunks of a volume that is hydrated, said one by one.
fn whole_residency<P: Platform>(
    volume: &Volume<P>,
    residency: Vec<(u32, ChunkResidency)>,
    hydrated: bool,
) -> Vec<(u32, ChunkResidency)> {
    match hydrated {
        true => (0..volume.map.borrow().chunks()).map(|chunk| (chunk, ChunkResidency::Resident)).collect(),
        false => residency,
    }
}

/// The first sectors of a chunk.
fn first_sectors(sectors: u64, chunk_bytes: u32) -> ChunkResidency {
    let all = u64::from(chunk_bytes / SECTOR_BYTES);
    if sectors == all {
        return ChunkResidency::Resident;
    }
    let mut words = vec![0_u64; (all as usize).div_ceil(64)];
    (0..sectors).for_each(|sector| words[(sector / 64) as usize] |= 1 << (sector % 64));
    ChunkResidency::Partial(words.into())
}
