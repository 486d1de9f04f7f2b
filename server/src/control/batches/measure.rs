//! How fast things went lately, and what that says of a new batch.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::batch::Record;
use crate::batch::estimate::{Measured, Part, Prediction, Work, predict};
use crate::shard::api::{Command, StoreLoad};
use crate::types::HydrationRate;

use super::super::Control;
use super::super::problem::Answer;
use super::lock;

/// Where volumes share extents a chunk is written once, and costs a block for every further volume.
const CLONED_PER_WRITTEN: u64 = 128;

/// Measured while batches are under way.
#[derive(Default)]
pub(super) struct Speeds {
    created: Measured,
    stores: BTreeMap<String, Measured>,
    object_store: Measured,
    /// Bytes from the object store so far.
    object_bytes: Option<(Instant, u64)>,
}

impl Speeds {
    pub(super) fn note_created(&mut self, volumes: u64, took: Duration) {
        self.created.sample(volumes as f64 / took.as_secs_f64().max(1e-3));
    }

    /// Nothing is measured between two batches.
    pub(super) fn pause(&mut self) {
        self.object_bytes = None;
    }

    fn note_object_bytes(&mut self, bytes: u64) {
        let now = Instant::now();
        if let Some((at, before)) = self.object_bytes.replace((now, bytes)) {
            let per_second = bytes.saturating_sub(before) as f64 / now.duration_since(at).as_secs_f64().max(1e-3);
            // That little was asked for says nothing of what it can: only more than was known does.
            if self.object_store.per_second().is_none_or(|known| per_second > known) {
                self.object_store.sample(per_second);
            }
        }
    }
}

impl Control {
    pub(super) async fn measure_speeds(&self) -> Answer<()> {
        let shards = &self.0.shards;
        let loads = shards.query_all(|reply| Command::StoreLoads { snapshot: None, reply }).await?;
        let ledgers = shards.query_all(|reply| Command::Ledger { reply }).await?;
        let object_bytes = ledgers.iter().flatten().map(|(_, totals)| totals.object_bytes).sum();
        let mut speeds = lock(&self.0.batches.speeds);
        speeds.note_object_bytes(object_bytes);
        for (index, store) in self.0.settings.stores.iter().enumerate() {
            let parts = || loads.iter().filter_map(|loads| loads.get(index));
            let sum = |field: fn(&StoreLoad) -> u64| parts().map(field).sum::<u64>();
            let per_second = sum(|load| load.hydrated_bytes_per_second);
            // With little to do, or volumes that have a rate of their own, it is not the store that is slow.
            let busy = sum(|load| load.backlog_bytes) > per_second.saturating_mul(2);
            if busy && sum(|load| load.promised_bytes_per_second) == 0 {
                speeds.stores.entry(store.label.to_string()).or_default().sample(per_second as f64);
            }
        }
        Ok(())
    }

    /// When the batch should be done, as things are now.
    pub(super) async fn predict(&self, record: &Record) -> Answer<Prediction> {
        let totals = self.batch_totals().await?;
        let mut due: BTreeMap<String, u64> = BTreeMap::new();
        for batch in totals.values() {
            let deadline = self.0.batches.deadline_of(batch.batch);
            // Without a deadline it takes turns with whatever there is.
            let comes_first = match (record.deadline_unix_ms(), deadline) {
                (Some(own), Some(other)) => other <= own,
                (Some(_), None) => false,
                (None, _) => true,
            };
            for store in batch.stores.iter().filter(|store| comes_first && !store.paused) {
                *due.entry(store.label.to_string()).or_default() += store.remaining_bytes;
            }
        }
        let mut volumes: BTreeMap<&str, u64> = BTreeMap::new();
        for volume in record.volumes() {
            *volumes.entry(record.store_of(volume)).or_default() += 1;
        }
        let loads = self.0.shards.query_all(|reply| Command::StoreLoads { snapshot: None, reply }).await?;
        let speeds = lock(&self.0.batches.speeds);
        let part = |(store, volumes): (&str, u64)| {
            let place = self.0.settings.stores.iter().position(|known| *known.label == *store);
            let shares = place.is_some_and(|at| loads.iter().any(|loads| loads[at].shares_extents));
            let measured = speeds.stores.get(store).and_then(Measured::per_second);
            let whole = Part {
                store: store.to_string(),
                bytes: volumes.saturating_mul(record.data_bytes),
                ahead_bytes: due.get(store).copied().unwrap_or_default(),
                measured,
                share: place.and_then(|at| self.0.settings.stores[at].hydration_bandwidth),
            };
            match (shares, measured) {
                (false, _) => whole,
                // What is cloned was measured as what it stands for, and its share was part of that.
                (true, Some(_)) => Part { share: None, ..whole },
                (true, None) => Part {
                    bytes: record.data_bytes + whole.bytes / CLONED_PER_WRITTEN,
                    ahead_bytes: whole.ahead_bytes / CLONED_PER_WRITTEN,
                    ..whole
                },
            }
        };
        Ok(predict(&Work {
            volumes: record.count(),
            parts: volumes.into_iter().map(part).collect(),
            object_bytes: record.data_bytes,
            object_rate: speeds.object_store.per_second(),
            created_per_second: speeds.created.per_second(),
            volume_bytes: record.data_bytes,
            volume_rate: match record.rate {
                HydrationRate::BytesPerSecond(rate) => Some(rate),
                _ => None,
            },
            unhydrated: record.rate == HydrationRate::None,
        }))
    }
}
