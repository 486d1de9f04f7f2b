//! Garbage collection by the node itself, every so often: the same as `volley snapshot gc`, with the same grace period.
//!
//! It runs on a thread of its own, for which a stop does not wait: a collection that ends anywhere has removed only what nobody needs.
//! Any number of nodes may do so beside each other (`docs/snapshot.md`, "Garbage collection").
#![allow(clippy::disallowed_methods)] // Not on a shard.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::executor::block_on;

use crate::metrics::Metric;
use crate::object_store::any::StoreChoice;
use crate::platform::blocking::{Blocking, open_store};
use crate::snapshot::gc::{GcOptions, GcReport, collect};

use super::Control;
use super::create::unix_ms;
use super::on_own_thread;

/// What collections of this node did since its start.
#[derive(Default)]
pub(super) struct Collected {
    runs: AtomicU64,
    errors: AtomicU64,
    snapshots_deleted: AtomicU64,
    packs_condemned: AtomicU64,
    packs_removed: AtomicU64,
    bytes_removed: AtomicU64,
    last_run_seconds: AtomicU64,
}

impl Control {
    /// Collects for ever, if the configuration says so.
    pub(super) async fn keep_collecting(&self) {
        let settings = &self.0.settings;
        let (Some(every), Some(choice)) = (settings.gc_every, &settings.object_store_choice) else {
            return std::future::pending().await;
        };
        let mut pause = first_pause(every, settings.node_id);
        loop {
            tokio::time::sleep(pause).await;
            self.0.collected.note(collect_on_a_thread(choice.clone()).await);
            pause = every;
        }
    }

    pub(super) fn gc_metrics(&self) -> Vec<Metric> {
        let Collected {
            runs,
            errors,
            snapshots_deleted,
            packs_condemned,
            packs_removed,
            bytes_removed,
            last_run_seconds,
        } = &self.0.collected;
        let last = "End of the last garbage collection of this node that succeeded, since the epoch; 0: none yet.";
        let removed = "Bytes of the packs that were removed.";
        [
            ("gc_runs_total", "counter", "Garbage collections that this node ran.", runs),
            ("gc_errors_total", "counter", "Of these, collections that failed.", errors),
            ("gc_snapshots_deleted_total", "counter", "Intended deletions that were carried out.", snapshots_deleted),
            ("gc_packs_condemned_total", "counter", "Packs that were condemned as garbage.", packs_condemned),
            ("gc_packs_removed_total", "counter", "Packs that were removed.", packs_removed),
            ("gc_removed_bytes_total", "counter", removed, bytes_removed),
            ("gc_last_run_time_seconds", "gauge", last, last_run_seconds),
        ]
        .map(|(name, kind, help, value)| (name, kind, help, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

impl Collected {
    fn note(&self, collected: Result<GcReport, String>) {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let report = match collected {
            Ok(report) => report,
            Err(error) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(error, "garbage not collected: trying again at the next time");
                return;
            }
        };
        let add = |sum: &AtomicU64, more: u64| {
            sum.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.snapshots_deleted, report.snapshots_deleted.len() as u64);
        add(&self.packs_condemned, report.packs_condemned);
        add(&self.packs_removed, report.packs_removed);
        add(&self.bytes_removed, report.bytes_removed);
        self.last_run_seconds.store(unix_ms() / 1000, Ordering::Relaxed);
        for snapshot in &report.snapshots_deleted {
            tracing::info!(snapshot, "deleted, as was intended: no node needs it any more");
        }
        let (packs_removed, packs_condemned) = (report.packs_removed, report.packs_condemned);
        if packs_removed + packs_condemned > 0 {
            tracing::info!(packs_removed, bytes_removed = report.bytes_removed, packs_condemned, "garbage collected");
        } else {
            tracing::debug!(packs_waiting = report.packs_waiting, "no garbage to remove");
        }
    }
}

/// Between half and all of the time: nodes that start together do not collect together for ever.
fn first_pause(every: Duration, node_id: u128) -> Duration {
    const PARTS: u32 = 1024;
    let part = u32::try_from(node_id % u128::from(PARTS)).expect("below 1024");
    every / 2 + every / 2 * part / PARTS
}

async fn collect_on_a_thread(choice: StoreChoice) -> Result<GcReport, String> {
    let collected = on_own_thread("gc", move || {
        let store = open_store(&choice).map_err(|e| e.to_string())?;
        block_on(collect(&store, &Blocking, &GcOptions::default())).map_err(|e| e.to_string())
    });
    collected.await.map_err(|e| e.to_string())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pauses_of_nodes_lie_between_half_and_all() {
        let every = Duration::from_secs(100);
        assert_eq!(first_pause(every, 1024), Duration::from_secs(50));
        let pauses: Vec<Duration> = (0..1024).map(|id| first_pause(every, id)).collect();
        assert!(pauses.is_sorted() && pauses[1023] < every && pauses[512] == Duration::from_secs(75));
    }
}
