//! Deadlines of batches: which volumes hydrate before others. The control thread tells them anew after each start.

use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::hydration_queue::{Class, Rank};
use crate::shard::volume::Volume;
use crate::types::SnapshotRef;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Volumes of the batch, those that are there and those to come, hydrate in the order of this deadline; `None`: after
    /// all that have one.
    pub(super) fn set_deadline(&self, batch: u64, deadline_unix_ms: Option<u64>) {
        match deadline_unix_ms {
            Some(deadline) => self.0.deadlines.borrow_mut().insert(batch, deadline),
            None => self.0.deadlines.borrow_mut().remove(&batch),
        };
        self.rank_again(|volume| volume.spec.batch == Some(batch));
    }

    /// The set of chunks that volumes of the snapshot hydrate first is another one.
    pub(super) fn rank_volumes_of(&self, snapshot: &SnapshotRef) {
        self.rank_again(|volume| volume.spec.snapshot.as_ref().is_some_and(|of| of.id == snapshot.id));
    }

    fn rank_again(&self, which: impl Fn(&Volume<P>) -> bool) {
        for volume in self.0.volumes.borrow().values().filter(|volume| !volume.hydrated.get() && which(volume)) {
            self.0.stores[volume.store].queue.borrow_mut().change_rank(volume.spec.id, self.rank_of(volume));
        }
    }

    /// Where the volume stands in its store's queue.
    pub(super) fn rank_of(&self, volume: &Volume<P>) -> Rank {
        let hydration = volume.hydration.borrow();
        let boot_set = || volume.spec.snapshot.as_ref().and_then(|snapshot| self.0.boots.set_of(snapshot));
        let class = if !hydration.owed.is_empty() {
            Class::Priority
        } else if boot_set().is_some_and(|set| hydration.boot_cursor < set.len()) {
            Class::BootSet
        } else {
            Class::Background
        };
        let deadline = volume.spec.batch.and_then(|batch| self.0.deadlines.borrow().get(&batch).copied());
        Rank::new(class, deadline)
    }
}
