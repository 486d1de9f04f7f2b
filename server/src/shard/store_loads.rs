//! What each volume store bears on this shard, for placement: one pass over the volumes, without waiting.

use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::StoreLoad;
use crate::types::HydrationRate;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// In the order of the stores.
    pub(super) fn store_loads(&self, snapshot: Option<u128>) -> Vec<StoreLoad> {
        let now = self.0.platform.now();
        let idle = |(store, base): (&super::Store, &super::Base<P>)| StoreLoad {
            shares_extents: base.is_usable(),
            guest_written_bytes_per_second: store.guest_writes.borrow_mut().per_second(now),
            hydrated_bytes_per_second: store.hydrated.borrow_mut().per_second(now),
            ..StoreLoad::default()
        };
        let mut loads: Vec<StoreLoad> = self.0.stores.iter().zip(&self.0.bases).map(idle).collect();
        for volume in self.0.volumes.borrow().values() {
            let load = &mut loads[volume.store];
            let size = volume.spec.size_bytes;
            let resident = volume.resident_bytes();
            load.volumes += 1;
            load.volume_bytes += size;
            if !volume.hydrated.get() {
                let rate = volume.hydration.borrow().rate;
                if let HydrationRate::BytesPerSecond(bytes) = rate {
                    load.promised_bytes_per_second = load.promised_bytes_per_second.saturating_add(bytes);
                }
                load.backlog_bytes += if rate == HydrationRate::None { 0 } else { size - resident };
            }
            if snapshot.is_some() && volume.spec.snapshot.as_ref().map(|of| of.id) == snapshot {
                load.image_bytes = load.image_bytes.max(resident);
            }
            load.failure = load.failure.take().or_else(|| volume.failure());
        }
        loads
    }
}
