//! The end of a seed: every snapshot that was taken is deleted, and nothing of them stays but what others need.

use std::collections::BTreeSet;
use std::time::Duration;

use volley_server::object_store::ObjectStore;
use volley_server::platform::sim::SimObjects;
use volley_server::snapshot::gc::{ABANDONED_MS, GcOptions, collect};
use volley_server::snapshot::{IMPORT_PREFIX, MANIFEST_PREFIX, Manifest, PACK_PREFIX, manifest_key};

use crate::control::Control;
use crate::model::Existence;
use crate::snapshots::NAMES;

const GRACE: Duration = Duration::from_secs(60);

impl Control<'_> {
    /// All volumes are hydrated, and nobody else gives orders.
    pub async fn clear_away(&self, objects: &SimObjects) {
        self.done("references", self.reconcile().await);
        // Whoever holds a lease is dead, and what has neither a marker nor a manifest is nobody's who is about to begin.
        let forward = &self.guests.snapshots_taken.forward_ms;
        forward.set(forward.get() + ABANDONED_MS + 1);
        let listed = self.store.list(MANIFEST_PREFIX).await.expect("no faults");
        let names = listed.iter().filter_map(|object| object.key.strip_prefix(MANIFEST_PREFIX));
        let mut kept = BTreeSet::new();
        for name in names.filter(|name| name.starts_with(NAMES)) {
            if !self.delete(name, false).await.expect("a deletion without faults") {
                assert!(self.is_held_for_one_in_doubt(name), "{name} is in use");
                kept.insert(manifest_key(name));
            }
        }
        // Markers of what was interrupted in any life.
        for object in self.store.list(IMPORT_PREFIX).await.expect("no faults") {
            let name = object.key.strip_prefix(IMPORT_PREFIX).map(str::to_owned);
            self.collect_all(name).await;
        }
        // One condemns; when the grace is over, the next removes.
        self.collect_all(None).await;
        forward.set(forward.get() + 2 * GRACE.as_millis() as u64);
        self.collect_all(None).await;

        let mut held = BTreeSet::new();
        for key in objects.keys(MANIFEST_PREFIX) {
            let is_taken = key[MANIFEST_PREFIX.len()..].starts_with(NAMES);
            assert!(!is_taken || kept.contains(&key), "{key} is there, and was deleted");
            let manifest = Manifest::decode(&objects.peek(&key).expect("listed")).expect("a whole manifest");
            held.extend(manifest.pack_keys().iter().cloned());
        }
        assert_eq!(objects.keys(PACK_PREFIX), held.into_iter().collect::<Vec<_>>(), "packs, and those of snapshots");
    }

    /// Of a volume that was deleted while the server stopped, and the like, a restart tells.
    fn is_held_for_one_in_doubt(&self, name: &str) -> bool {
        let volumes = self.guests.volumes.borrow();
        let mut in_doubt = volumes.iter().filter(|volume| volume.borrow().existence != Existence::Sure);
        in_doubt.any(|volume| volume.borrow().may_need().any(|needed| **needed == *name))
    }

    async fn collect_all(&self, drop_import: Option<String>) {
        let options = GcOptions { grace: GRACE, drop_import, ..GcOptions::default() };
        let report = collect(&self.store, &self.clock(), &options).await.expect("a collection without faults");
        self.count_packs(&report);
    }
}
