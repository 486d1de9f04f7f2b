//! Who uses which export: connections to one export share one attachment, made for the first and given up by the last.
//!
//! **Invariant:** this agent never attaches an export twice at once, because the second attachment would fence the
//! first. Attaching and detaching of one name are therefore serialised by its slot.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use super::backend::{Backend, Description, ErrorKind, Export, ExportError, Result};
use super::device::Device;

/// All exports of a backend and their present users.
#[derive(Debug)]
pub struct Exports<B: Backend> {
    backend: B,
    slots: Mutex<HashMap<String, SlotEntry<B::Export>>>,
}

#[derive(Debug)]
struct SlotEntry<E> {
    slot: Arc<Slot<E>>,
    /// Users of the slot, those that wait for it included; it is removed with the last.
    interest: usize,
}

type Slot<E> = tokio::sync::Mutex<Option<Arc<Shared<E>>>>;

/// One attachment.
#[derive(Debug)]
struct Shared<E> {
    device: Device<E>,
    /// Leases; changed under the slot's lock only.
    leases: Mutex<usize>,
    gone: AtomicBool,
}

/// A connection's share of an attachment. End it with [`Exports::leave`].
#[derive(Debug)]
pub struct Lease<E> {
    name: String,
    shared: Arc<Shared<E>>,
}

impl<E: Export> Lease<E> {
    /// The device to work on.
    #[must_use]
    pub fn device(&self) -> &Device<E> {
        &self.shared.device
    }

    /// Name of the export.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Notes what an error says about the attachment: after `Gone`, new connections attach afresh.
    pub fn observe(&self, error: &ExportError) {
        if error.kind == ErrorKind::Gone && !self.shared.gone.swap(true, Ordering::Relaxed) {
            warn!(export = self.name, "attachment lost: {error}");
        }
    }
}

impl<B: Backend> Exports<B> {
    /// Serves everything of `backend`.
    pub fn new(backend: B) -> Exports<B> {
        Exports { backend, slots: Mutex::default() }
    }

    /// Names of all exports.
    ///
    /// # Errors
    /// The backend's.
    pub async fn names(&self) -> Result<Vec<String>> {
        self.backend.names().await
    }

    /// Describes an export without attaching it.
    ///
    /// # Errors
    /// The backend's; `UnknownExport` for an empty name, because no default would stay right.
    pub async fn describe(&self, name: &str) -> Result<Description> {
        if name.is_empty() {
            let hint = "no export name given: name a volume, e.g. nbd+unix:///web-7?socket=/run/volley.sock";
            return Err(ExportError::new(ErrorKind::UnknownExport, hint));
        }
        self.backend.describe(name).await
    }

    /// Joins the attachment of `name`, attaching it if there is none (or only one that was lost).
    ///
    /// # Errors
    /// The backend's.
    pub async fn join(&self, name: &str) -> Result<Lease<B::Export>> {
        let slot = self.enter(name);
        let joined = self.join_slot(name, &slot).await;
        if joined.is_err() {
            self.exit(name);
        }
        joined
    }

    async fn join_slot(&self, name: &str, slot: &Slot<B::Export>) -> Result<Lease<B::Export>> {
        let mut current = slot.lock().await;
        let shared = match current.as_ref().filter(|shared| !shared.gone.load(Ordering::Relaxed)) {
            Some(shared) => Arc::clone(shared),
            None => {
                let device = Device::new(self.backend.attach(name).await?);
                info!(export = name, size_bytes = device.export().size_bytes(), "attached");
                let shared = Arc::new(Shared { device, leases: Mutex::new(0), gone: AtomicBool::new(false) });
                Arc::clone(current.insert(shared))
            }
        };
        *locked(&shared.leases) += 1;
        Ok(Lease { name: name.to_owned(), shared })
    }

    /// Ends a lease. The last one flushes and detaches.
    pub async fn leave(&self, lease: Lease<B::Export>) {
        let slot = self.slot_of(&lease.name);
        let mut current = slot.lock().await;
        let last = {
            let mut leases = locked(&lease.shared.leases);
            *leases -= 1;
            *leases == 0
        };
        if last {
            if current.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, &lease.shared)) {
                *current = None;
            }
            detach(&lease).await;
        }
        drop(current);
        self.exit(&lease.name);
    }

    fn enter(&self, name: &str) -> Arc<Slot<B::Export>> {
        let mut slots = locked(&self.slots);
        let entry = slots.entry(name.to_owned()).or_insert_with(|| SlotEntry { slot: Arc::default(), interest: 0 });
        entry.interest += 1;
        Arc::clone(&entry.slot)
    }

    fn slot_of(&self, name: &str) -> Arc<Slot<B::Export>> {
        Arc::clone(&locked(&self.slots).get(name).expect("a lease keeps its slot").slot)
    }

    fn exit(&self, name: &str) {
        let mut slots = locked(&self.slots);
        let entry = slots.get_mut(name).expect("interest keeps the slot");
        entry.interest -= 1;
        if entry.interest == 0 {
            slots.remove(name);
        }
    }
}

/// Flushes and detaches. A lost attachment has nothing to flush and is not ours to detach.
async fn detach<E: Export>(lease: &Lease<E>) {
    let name = lease.name.as_str();
    if lease.shared.gone.load(Ordering::Relaxed) {
        return;
    }
    let export = lease.device().export();
    if let Err(error) = export.flush().await {
        warn!(export = name, "flush before detaching failed: {error}");
    }
    match export.detach().await {
        Ok(()) => info!(export = name, "detached"),
        Err(error) => warn!(export = name, "detaching failed: {error}"),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single step, so a panic elsewhere leaves them consistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::Exports;
    use crate::nbd::backend::{ErrorKind, ExportError};
    use crate::nbd::memory::MemoryBackend;

    fn exports() -> (MemoryBackend, Exports<MemoryBackend>) {
        let backend = MemoryBackend::new([("a", vec![0; 1024])]);
        (backend.clone(), Exports::new(backend))
    }

    #[tokio::test]
    async fn connections_share_one_attachment_and_the_last_flushes_and_detaches() {
        let (backend, exports) = exports();
        let (first, second) = tokio::join!(exports.join("a"), exports.join("a"));
        assert_eq!(backend.disk("a").attached_total, 1);
        exports.leave(first.unwrap()).await;
        assert_eq!(backend.disk("a").detached_total, 0);
        exports.leave(second.unwrap()).await;
        assert_eq!(backend.disk("a").flushes_total, 1);
        assert_eq!(backend.disk("a").detached_total, 1);
        assert!(exports.slots.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn after_a_lost_attachment_the_next_connection_attaches_afresh() {
        let (backend, exports) = exports();
        let lost = exports.join("a").await.unwrap();
        lost.observe(&ExportError::new(ErrorKind::Gone, "fenced by another host"));
        let fresh = exports.join("a").await.unwrap();
        assert_eq!(backend.disk("a").attached_total, 2);
        exports.leave(lost).await;
        assert_eq!(backend.disk("a").detached_total, 0, "what was lost is not ours to detach");
        exports.leave(fresh).await;
        assert_eq!(backend.disk("a").detached_total, 1);
    }

    #[tokio::test]
    async fn an_unknown_name_leaves_nothing_behind() {
        let (_, exports) = exports();
        assert_eq!(exports.join("b").await.unwrap_err().kind, ErrorKind::UnknownExport);
        assert_eq!(exports.describe("").await.unwrap_err().kind, ErrorKind::UnknownExport);
        assert!(exports.slots.lock().unwrap().is_empty());
    }
}
