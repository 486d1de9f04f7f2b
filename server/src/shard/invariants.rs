//! What must hold between any two steps of a shard, whatever it is doing. The simulation asks after every step; no
//! server does.

use crate::cache::TierStatus;
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::StoreSharing;
use crate::shard::base::Base;
use crate::shard::fills::MISS_FILLS_MAX;
use crate::shard::residency::SectorRange;
use crate::shard::volume::Volume;
use crate::types::VolumeId;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Checks the shard's state against itself.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    #[doc(hidden)]
    pub fn check_invariants(&self) -> Result<(), String> {
        let volumes = self.0.volumes.borrow();
        let names = self.0.names.borrow();
        if names.len() != volumes.len() || names.iter().any(|(_, id)| !volumes.contains_key(id)) {
            return Err(format!("{} names for {} volumes", names.len(), volumes.len()));
        }
        for volume in volumes.values() {
            let name = &*volume.spec.name;
            if volume.spec.id.owner(self.0.config.shards) != self.0.config.shard {
                return Err(format!("volume {name:?} is at the wrong shard"));
            }
            check_volume(volume).map_err(|e| format!("volume {name:?}: {e}"))?;
        }
        if self.0.miss_fills.get() > MISS_FILLS_MAX {
            return Err(format!("{} fills behind read misses", self.0.miss_fills.get()));
        }
        if self.0.ahead_bytes.get() > self.ahead_bytes_max() {
            return Err(format!("{} bytes are on their way ahead of readers", self.0.ahead_bytes.get()));
        }
        self.0.bases.iter().try_for_each(Base::check_invariants)?;
        for store in &self.0.stores {
            store.queue.borrow().check()?;
        }
        self.0.transfer.check_invariants()
    }

    /// What the tiers of the chunk cache hold and did.
    #[doc(hidden)]
    #[must_use]
    pub fn tiers(&self) -> (TierStatus, Option<TierStatus>) {
        self.0.transfer.tiers()
    }

    /// What volumes share in each store.
    #[doc(hidden)]
    #[must_use]
    pub fn sharing(&self) -> Vec<StoreSharing> {
        self.0.bases.iter().map(Base::status).collect()
    }

    /// A checkpoint now, due or not.
    #[doc(hidden)]
    pub async fn checkpoint_now(&self) {
        self.checkpoint().await;
    }

    /// Whether every sector of a range is in the volume itself; `None` for a volume that guests do not see.
    #[doc(hidden)]
    #[must_use]
    pub fn is_resident(&self, volume: VolumeId, offset: u64, len: u64) -> Option<bool> {
        let volume = self.volume(volume).ok()?;
        let resident = volume.map.borrow().is_resident(SectorRange::covering(offset, len));
        Some(resident)
    }
}

fn check_volume<P: Platform>(volume: &Volume<P>) -> Result<(), String> {
    let map = volume.map.borrow();
    map.check()?;
    if volume.deleted.get() {
        return Err("it is deleted and still known".into());
    }
    if volume.hydrated.get() && !map.is_full() {
        return Err("it is hydrated and lacks sectors".into());
    }
    if volume.attached.get().is_some() && volume.generation.get() == 0 {
        return Err("it is attached without a generation".into());
    }
    match volume.hydration.borrow().running.iter().find(|chunk| **chunk >= map.chunks()) {
        Some(chunk) => Err(format!("it hydrates chunk {chunk} of {}", map.chunks())),
        None => Ok(()),
    }
}
