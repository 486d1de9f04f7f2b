//! What a shard does by itself, off the data path: periodic syncs, checkpoints, closing idle files, unpinning, stopping.

use std::rc::Rc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};

use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::signal::within;
use crate::shard::volume::Volume;

const TICK: Duration = Duration::from_secs(1);
/// Residency that no guest flush has made durable is at most this old: what a crash costs in hydration done again.
const SYNC_EVERY_TICKS: u64 = 10;
/// Syncs of different volumes in flight: the disk merges them, the guests still come first.
const SYNCS_MAX: usize = 8;
/// Idle files are closed this often.
const CLOSE_EVERY_TICKS: u64 = 60;
/// Between two looks at whether the shard has stopped, and after a checkpoint that failed: a full disk is not hammered.
const CHECKPOINT_PAUSE: Duration = Duration::from_secs(1);
/// In-flight requests get this long to end when the server stops.
const DRAIN_MAX: Duration = Duration::from_secs(8);

/// A stop waits so long for the disk cache to write what it took: worth a warm start, and no more than that.
const SETTLE_CACHE_MAX: Duration = Duration::from_secs(1);

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Remembers that the volume has something the next upkeep should make durable. If now everything is in the
    /// volume, that is made durable at once.
    pub(super) fn note_dirty(&self, volume: &Rc<Volume<P>>) {
        self.0.dirty.borrow_mut().insert(volume.spec.id);
        if !volume.hydrated.get() && volume.map.borrow().is_full() && !volume.finishing.replace(true) {
            let (shard, volume) = (self.clone(), volume.clone());
            self.0.platform.spawn(Queue::Background, async move {
                shard.sync_volume(&volume).await;
                volume.finishing.set(false);
            });
        }
    }

    /// A failure is noted and tried again by the next upkeep.
    async fn sync_volume(&self, volume: &Rc<Volume<P>>) {
        if volume.deleted.get() {
            return;
        }
        if let Err(error) = volume.sync(&self.0.journal, &self.0.counters).await {
            self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message);
            self.0.dirty.borrow_mut().insert(volume.spec.id);
        }
    }

    pub(super) async fn upkeep(self) {
        let mut tick = 0_u64;
        while !self.0.stopping.get() {
            self.0.platform.sleep(TICK).await;
            tick += 1;
            self.end_recordings();
            self.0.transfer.release_waves();
            self.watch_bases().await;
            if tick.is_multiple_of(SYNC_EVERY_TICKS) {
                self.sync_dirty().await;
            }
            if tick.is_multiple_of(CLOSE_EVERY_TICKS) {
                self.close_idle().await;
            }
        }
    }

    /// Writes checkpoints when the journal asks for them. Also while stopping: commits of a full log wait for one.
    pub(super) async fn checkpoints(self) {
        while !self.0.stopped.get() {
            within(&self.0.platform, CHECKPOINT_PAUSE, self.0.journal.checkpoint_wanted()).await;
            if self.0.journal.checkpoint_due() && !self.checkpoint().await {
                self.0.platform.sleep(CHECKPOINT_PAUSE).await;
            }
        }
    }

    async fn sync_dirty(&self) {
        let mut ids: Vec<_> = self.0.dirty.borrow_mut().drain().collect();
        ids.sort_unstable();
        let mut running = FuturesUnordered::new();
        for id in ids {
            let Ok(volume) = self.volume(id) else { continue };
            if running.len() >= SYNCS_MAX {
                running.next().await;
            }
            let shard = self.clone();
            running.push(async move { shard.sync_volume(&volume).await });
        }
        while running.next().await.is_some() {}
    }

    async fn close_idle(&self) {
        for volume in self.volumes() {
            let idle = volume.attached.get().is_none() && !volume.needs_sync();
            if idle && volume.hydration.borrow().running.is_empty() {
                volume.close_file().await;
            }
        }
    }

    /// `false`: it failed; an event says why.
    pub(super) async fn checkpoint(&self) -> bool {
        // Listed when the journal asks for the first one: it collects later records by then, and no earlier one is missed.
        let mut volumes = None;
        let next = || {
            let creating = || self.0.creating.borrow().clone().into_iter();
            let creating = || creating().filter(|_| !mutation::on(Mutation::CheckpointForgetsCreating));
            let list = || self.volumes().into_iter().chain(creating());
            volumes.get_or_insert_with(list).find(|v| !v.is_gone()).map(|v| v.durable_state())
        };
        let written = self.0.journal.checkpoint(next).await;
        match &written {
            Ok(()) => self.0.counters.checkpoints.add(1),
            Err(error) => self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message),
        }
        written.is_ok()
    }

    /// Clean stop: nothing new is taken, what is in flight ends (within a bound), everything is synced, the journal is
    /// compacted and closed.
    pub(super) async fn stop(&self) {
        self.0.stopping.set(true);
        self.0.stores.iter().for_each(|store| store.wake.wake_all());
        self.volumes().iter().for_each(|volume| volume.changed.wake_all());
        if within(&self.0.platform, DRAIN_MAX, self.0.drained.until(|| self.0.in_flight.get() == 0)).await.is_none() {
            tracing::warn!(in_flight = self.0.in_flight.get(), "stopping with requests in flight");
        }
        self.sync_dirty().await;
        self.checkpoint().await;
        for volume in self.volumes() {
            volume.close_file().await;
        }
        for base in &self.0.bases {
            base.close().await;
        }
        if let Some(disk) = self.0.transfer.disk() {
            within(&self.0.platform, SETTLE_CACHE_MAX, disk.settled()).await;
        }
        if let Err(error) = self.0.journal.clone().close().await {
            tracing::warn!(%error, "closing the journal");
        }
        self.0.stopped.set(true);
        self.0.drained.wake_all();
    }
}
