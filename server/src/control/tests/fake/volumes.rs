//! Volumes of the fake shards: plain values, and what is told of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result, Status};
use crate::shard::api::{BatchOnStore, BatchTotals, ShardStats, StoreLoad, VolumeStatus};
use crate::types::{VolumeSpec, batch_text};

pub(super) fn load(volumes: &BTreeMap<String, VolumeStatus>, label: &str) -> StoreLoad {
    let of_store = || volumes.values().filter(|volume| volume.store == label);
    StoreLoad {
        volumes: of_store().count() as u64,
        volume_bytes: of_store().map(|volume| volume.size_bytes).sum(),
        ..StoreLoad::default()
    }
}

/// The boot set of every image is resident once the first half of a volume is.
pub(super) fn totals(volumes: &BTreeMap<String, VolumeStatus>) -> Vec<BatchTotals> {
    let mut batches: BTreeMap<u64, BatchTotals> = BTreeMap::new();
    for volume in volumes.values() {
        let batch = u64::from_str_radix(volume.batch.as_deref().unwrap(), 16).unwrap();
        let part = BatchTotals {
            batch,
            snapshot: volume.snapshot.as_deref().map(Arc::from),
            created_unix_ms: volume.created_unix_ms,
            volumes: 1,
            volumes_attached: u64::from(volume.attached),
            volumes_hydrated: u64::from(volume.hydrated),
            volumes_failed: 0,
            has_boot_set: volume.snapshot.is_some(),
            volumes_boot_set_resident: u64::from(2 * volume.resident_bytes >= volume.size_bytes),
            size_bytes: volume.size_bytes,
            resident_bytes: volume.resident_bytes,
            stores: vec![BatchOnStore {
                label: Arc::from(volume.store.as_str()),
                volumes: 1,
                remaining_bytes: volume.remaining_bytes,
                hydration_bytes_per_second: volume.hydration_bytes_per_second,
                paused: false,
            }],
            last_error: None,
        };
        let sum = batches.remove(&batch).unwrap_or_default().and(&part);
        batches.insert(batch, sum);
    }
    batches.into_values().collect()
}

pub(super) fn stats(volumes: &BTreeMap<String, VolumeStatus>, shard: usize) -> ShardStats {
    let needed = volumes.values().filter(|volume| !volume.hydrated).filter_map(|volume| volume.snapshot.clone());
    ShardStats { shard, volumes: volumes.len() as u64, snapshots_needed: needed.collect(), ..ShardStats::default() }
}

pub(super) fn create(volumes: &mut BTreeMap<String, VolumeStatus>, shard: usize, specs: &[VolumeSpec]) -> Result<()> {
    if let Some(taken) = specs.iter().find(|spec| volumes.contains_key(&*spec.name)) {
        return Err(Error::new(Status::NameTaken, format!("volume {:?} exists", taken.name)));
    }
    volumes.extend(specs.iter().map(|spec| (spec.name.to_string(), status(spec, shard))));
    Ok(())
}

fn status(spec: &VolumeSpec, shard: usize) -> VolumeStatus {
    VolumeStatus {
        id: spec.id.to_string(),
        name: spec.name.to_string(),
        size_bytes: spec.size_bytes,
        chunk_bytes: spec.chunk_bytes,
        snapshot: spec.snapshot.as_ref().map(|snapshot| snapshot.name.to_string()),
        store: spec.store.to_string(),
        rate: spec.rate.to_string(),
        batch: spec.batch.map(batch_text),
        created_unix_ms: spec.created_unix_ms,
        shard,
        generation: 0,
        attached: false,
        hydrated: false,
        resident_bytes: 0,
        remaining_bytes: spec.size_bytes,
        eta_seconds: None,
        hydration_bytes_per_second: 0,
        hydration_state: "running".to_string(),
        last_error: None,
        reads: 0,
        read_bytes: 0,
        writes: 0,
        written_bytes: 0,
        flushes: 0,
        read_misses: 0,
        priority_fetches: 0,
    }
}
