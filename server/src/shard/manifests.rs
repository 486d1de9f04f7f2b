//! The manifests a shard works with: loaded once, shared by its volumes, dropped when the last volume lets go.
//!
//! A rewrite of packs replaces a manifest; the old packs stay as long as the node holds a reference to the snapshot. So what was loaded
//! before the reference was put is [forgotten](Manifests::forget): a boot that is being recorded may have kept it alive.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::{Error, Result, Status};
use crate::object_store::{ObjectError, ObjectStore};
use crate::platform::Platform;
use crate::snapshot::{Manifest, manifest_key};
use crate::types::SnapshotRef;

const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);

pub struct Manifests<P: Platform, O: ObjectStore> {
    platform: P,
    objects: O,
    deadline: Duration,
    loaded: RefCell<hashbrown::HashMap<u128, Weak<Manifest>, ahash::RandomState>>,
    /// How often something was forgotten: what was asked for before does not count any more.
    forgotten: Cell<u64>,
    /// One load at a time: the second asker finds what the first one got.
    loading: futures::lock::Mutex<()>,
}

impl<P: Platform, O: ObjectStore> Manifests<P, O> {
    pub fn new(platform: P, objects: O, deadline: Duration) -> Self {
        let loaded = RefCell::new(hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(17, 18, 19, 20)));
        Manifests {
            platform,
            objects,
            deadline,
            loaded,
            forgotten: Cell::new(0),
            loading: futures::lock::Mutex::new(()),
        }
    }

    /// # Errors
    /// `UnknownSnapshot` when it is gone or another one bears its name, `Corrupt`, `ObjectStore` past the deadline.
    pub async fn get(&self, snapshot: &SnapshotRef) -> Result<Arc<Manifest>> {
        if let Some(found) = self.find(snapshot.id) {
            return Ok(found);
        }
        let _one = self.loading.lock().await;
        if let Some(found) = self.find(snapshot.id) {
            return Ok(found);
        }
        let manifest = self.load_as_it_is(&snapshot.name).await?;
        if manifest.id != snapshot.id {
            let message = format!("snapshot {:?} was replaced by another one of the same name", &*snapshot.name);
            return Err(Error::new(Status::UnknownSnapshot, message));
        }
        let manifest = Arc::new(manifest);
        let mut loaded = self.loaded.borrow_mut();
        loaded.retain(|_, weak| weak.strong_count() > 0);
        loaded.insert(snapshot.id, Arc::downgrade(&manifest));
        Ok(manifest)
    }

    /// Whoever asks from here on gets the manifest as it is in the object store now. Who has it keeps what they have.
    pub fn forget(&self, name: &str) {
        self.forgotten.set(self.forgotten.get() + 1);
        self.loaded.borrow_mut().retain(|_, weak| weak.upgrade().is_some_and(|manifest| manifest.name != name));
    }

    async fn load_as_it_is(&self, name: &str) -> Result<Manifest> {
        loop {
            let forgotten = self.forgotten.get();
            let bytes = self.load(name).await?;
            if self.forgotten.get() == forgotten {
                return Manifest::decode(&bytes)
                    .map_err(|e| Error::new(Status::Corrupt, format!("snapshot {name:?}: {e}")));
            }
        }
    }

    fn find(&self, id: u128) -> Option<Arc<Manifest>> {
        self.loaded.borrow().get(&id)?.upgrade()
    }

    async fn load(&self, name: &str) -> Result<Vec<u8>> {
        let deadline = self.platform.now().after(self.deadline);
        let mut pause = RETRY_MIN;
        loop {
            let error = match self.objects.get(&manifest_key(name)).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            let status = match &error {
                ObjectError::NotFound(_) => Status::UnknownSnapshot,
                ObjectError::Corrupt(_) => Status::Corrupt,
                _ => Status::ObjectStore,
            };
            if !error.may_pass() || self.platform.now().after(pause) >= deadline {
                return Err(Error::new(status, format!("snapshot {name:?}: {error}")));
            }
            self.platform.sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}
