//! What shards say of stores and batches: each its part, to be added up.

use std::sync::Arc;

/// A shard's part of a volume store, as placement sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreLoad {
    pub volumes: u64,
    /// Device sizes.
    pub volume_bytes: u64,
    /// Rates of volumes that are not hydrated.
    pub promised_bytes_per_second: u64,
    /// What background hydration still has to bring.
    pub backlog_bytes: u64,
    /// Over the last seconds.
    pub guest_written_bytes_per_second: u64,
    pub hydrated_bytes_per_second: u64,
    /// Most that a volume of the snapshot in question has of its data.
    pub image_bytes: u64,
    /// Volumes share chunks with the base of the store.
    pub shares_extents: bool,
    /// The error of a volume whose file failed.
    pub failure: Option<String>,
}

impl StoreLoad {
    /// With another shard's part.
    #[must_use]
    pub fn and(mut self, other: &StoreLoad) -> StoreLoad {
        self.volumes += other.volumes;
        self.volume_bytes = self.volume_bytes.saturating_add(other.volume_bytes);
        self.promised_bytes_per_second = self.promised_bytes_per_second.saturating_add(other.promised_bytes_per_second);
        self.backlog_bytes = self.backlog_bytes.saturating_add(other.backlog_bytes);
        self.guest_written_bytes_per_second += other.guest_written_bytes_per_second;
        self.hydrated_bytes_per_second += other.hydrated_bytes_per_second;
        self.image_bytes = self.image_bytes.max(other.image_bytes);
        self.shares_extents |= other.shares_extents;
        self.failure = self.failure.or_else(|| other.failure.clone());
        self
    }
}

/// A shard's part of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchTotals {
    pub batch: u64,
    pub snapshot: Option<Arc<str>>,
    pub created_unix_ms: u64,
    pub volumes: u64,
    pub volumes_attached: u64,
    pub volumes_hydrated: u64,
    /// Their store fails.
    pub volumes_failed: u64,
    /// The image has a boot set, and so many volumes have all of it.
    pub has_boot_set: bool,
    pub volumes_boot_set_resident: u64,
    pub size_bytes: u64,
    pub resident_bytes: u64,
    pub stores: Vec<BatchOnStore>,
    /// Of some volume.
    pub last_error: Option<String>,
}

/// A shard's part of a batch on one volume store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchOnStore {
    pub label: Arc<str>,
    pub volumes: u64,
    pub remaining_bytes: u64,
    /// Over the last seconds.
    pub hydration_bytes_per_second: u64,
    /// The rate of some volume is `none`.
    pub paused: bool,
}

impl BatchTotals {
    /// With another shard's part.
    #[must_use]
    pub fn and(mut self, other: &BatchTotals) -> BatchTotals {
        self.batch = other.batch;
        self.snapshot = self.snapshot.or_else(|| other.snapshot.clone());
        self.created_unix_ms = other.created_unix_ms;
        self.volumes += other.volumes;
        self.volumes_attached += other.volumes_attached;
        self.volumes_hydrated += other.volumes_hydrated;
        self.volumes_failed += other.volumes_failed;
        self.has_boot_set |= other.has_boot_set;
        self.volumes_boot_set_resident += other.volumes_boot_set_resident;
        self.size_bytes = self.size_bytes.saturating_add(other.size_bytes);
        self.resident_bytes = self.resident_bytes.saturating_add(other.resident_bytes);
        self.last_error = self.last_error.or_else(|| other.last_error.clone());
        for part in &other.stores {
            let Some(store) = self.stores.iter_mut().find(|store| store.label == part.label) else {
                self.stores.push(part.clone());
                continue;
            };
            store.volumes += part.volumes;
            store.remaining_bytes = store.remaining_bytes.saturating_add(part.remaining_bytes);
            store.hydration_bytes_per_second += part.hydration_bytes_per_second;
            store.paused |= part.paused;
        }
        self
    }

    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        self.stores.iter().map(|store| store.remaining_bytes).sum()
    }

    #[must_use]
    pub fn hydration_bytes_per_second(&self) -> u64 {
        self.stores.iter().map(|store| store.hydration_bytes_per_second).sum()
    }

    /// Seconds until the last volume is hydrated at the rates of the last seconds; `None` where nothing moves.
    #[must_use]
    pub fn eta_seconds(&self) -> Option<f64> {
        self.stores.iter().map(BatchOnStore::eta_seconds).try_fold(0.0, |all: f64, store| Some(all.max(store?)))
    }
}

impl BatchOnStore {
    /// Like [`BatchTotals::eta_seconds`], of this store.
    #[must_use]
    pub fn eta_seconds(&self) -> Option<f64> {
        match (self.remaining_bytes, self.hydration_bytes_per_second) {
            (0, _) => Some(0.0),
            (_, 0) => None,
            _ if self.paused => None,
            (remaining, rate) => Some(remaining as f64 / rate as f64),
        }
    }
}

/// What volumes share in a volume store instead of each having a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct StoreSharing {
    /// The filesystem can, and is used so.
    pub shares_extents: bool,
    /// What the base may hold, and holds.
    pub base_bytes_max: u64,
    pub base_bytes: u64,
    pub base_chunks: u64,
    pub base_written_chunks: u64,
    pub base_written_bytes: u64,
    pub base_evicted_bytes: u64,
    /// Hydrated by clones of the base: what was not copied.
    pub cloned_chunks: u64,
    pub cloned_bytes: u64,
    /// Calls of the filesystem that this took: neighbours are cloned together.
    pub clones: u64,
    /// Writes to the base and clones of it that failed.
    pub clone_failures: u64,
}

impl std::ops::AddAssign for StoreSharing {
    fn add_assign(&mut self, other: StoreSharing) {
        self.shares_extents |= other.shares_extents;
        self.base_bytes_max += other.base_bytes_max;
        self.base_bytes += other.base_bytes;
        self.base_chunks += other.base_chunks;
        self.base_written_chunks += other.base_written_chunks;
        self.base_written_bytes += other.base_written_bytes;
        self.base_evicted_bytes += other.base_evicted_bytes;
        self.cloned_chunks += other.cloned_chunks;
        self.cloned_bytes += other.cloned_bytes;
        self.clones += other.clones;
        self.clone_failures += other.clone_failures;
    }
}
