//! How far each batch is on this shard: one pass over the volumes, without waiting.

use std::collections::BTreeMap;

use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::{BatchOnStore, BatchTotals};
use crate::shard::volume::Volume;
use crate::types::HydrationRate;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// In the order of the batches' ids.
    pub(super) fn batch_totals(&self) -> Vec<BatchTotals> {
        let mut batches: BTreeMap<u64, BatchTotals> = BTreeMap::new();
        for volume in self.0.volumes.borrow().values() {
            let Some(batch) = volume.spec.batch else { continue };
            let totals = batches.entry(batch).or_insert_with(|| BatchTotals {
                batch,
                snapshot: volume.spec.snapshot.as_ref().map(|snapshot| snapshot.name.clone()),
                created_unix_ms: volume.spec.created_unix_ms,
                ..BatchTotals::default()
            });
            self.add_volume(totals, volume);
        }
        batches.into_values().collect()
    }

    fn add_volume(&self, totals: &mut BatchTotals, volume: &Volume<P>) {
        let spec = &volume.spec;
        let (resident, failure) = (volume.resident_bytes(), volume.failure());
        let map = volume.map.borrow();
        let mut hydration = volume.hydration.borrow_mut();
        let boot_set = spec.snapshot.as_ref().and_then(|snapshot| self.0.boots.set_of(snapshot));
        totals.volumes += 1;
        totals.volumes_attached += u64::from(volume.attached.get().is_some());
        totals.volumes_hydrated += u64::from(volume.hydrated.get());
        totals.volumes_failed += u64::from(failure.is_some());
        if let Some(boot_set) = boot_set.filter(|set| !set.is_empty()) {
            totals.has_boot_set = true;
            let there = |chunk: &u32| *chunk >= spec.chunks() || map.is_chunk_resident(*chunk);
            totals.volumes_boot_set_resident += u64::from(map.is_full() || boot_set.iter().all(there));
        }
        totals.size_bytes += spec.size_bytes;
        totals.resident_bytes += resident;
        let label = &self.0.stores[volume.store].label;
        let place = totals.stores.iter().position(|store| store.label == *label).unwrap_or_else(|| {
            totals.stores.push(BatchOnStore { label: label.clone(), ..BatchOnStore::default() });
            totals.stores.len() - 1
        });
        let store = &mut totals.stores[place];
        store.volumes += 1;
        store.hydration_bytes_per_second += hydration.meter.per_second(self.0.platform.now());
        store.remaining_bytes += spec.size_bytes - resident;
        store.paused |= hydration.rate == HydrationRate::None && !volume.hydrated.get();
        totals.last_error = totals.last_error.take().or(failure).or_else(|| hydration.last_error.clone());
    }
}
