//! The lease on a snapshot: the right to replace or delete its manifest. A handful of requests long, and never two at once.
//!
//! `docs/snapshot.md`, "Rewriting" and "Several collectors", says why that is needed and what of it relies on time.

use super::{Clock, id_ms};
use crate::object_store::{ObjectError, ObjectStore};
use crate::snapshot::{CatalogError, manifest_key};

pub const LEASE_PREFIX: &str = "rewrites/";
const LEASE_HEAD: &str = "volley-rewrite 1 ";
/// A lease is held for a handful of requests; one of this age belongs to an owner that is dead.
const LEASE_MS: u64 = 15 * 60_000;

/// Whether somebody is about to replace or delete the manifest of the snapshot.
///
/// # Errors
/// When the object store fails.
pub async fn is_held<S: ObjectStore>(store: &S, clock: &impl Clock, name: &str) -> Result<bool, ObjectError> {
    Ok(Lease::read(store, name).await?.is_some_and(|id| !is_expired(id, clock)))
}

/// Deletes the manifest of a snapshot if it still has these `bytes`; whether it had. Under the lease nobody replaces or deletes it between
/// the look and the deletion, and so nobody makes another snapshot of the name either.
///
/// # Errors
/// `Rewriting` when somebody else holds the lease.
pub async fn delete_manifest<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    name: &str,
    bytes: &[u8],
) -> Result<bool, CatalogError> {
    if !store.puts_once() {
        // No lease is to be had: nothing is between the two but their requests.
        return delete_if_same(store, name, bytes).await;
    }
    let Some(lease) = Lease::take(store, clock, name).await? else {
        return Err(CatalogError::Rewriting(name.to_owned()));
    };
    let deleted = match lease.is_held(store, clock).await? {
        true => delete_if_same(store, name, bytes).await,
        false => Err(CatalogError::Rewriting(name.to_owned())),
    };
    lease.end(store).await?;
    deleted
}

async fn delete_if_same<S: ObjectStore>(store: &S, name: &str, bytes: &[u8]) -> Result<bool, CatalogError> {
    match store.get(&manifest_key(name)).await {
        Ok(found) if found == bytes => store.delete(&manifest_key(name)).await?,
        Ok(_) | Err(ObjectError::NotFound(_)) => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    Ok(true)
}

/// The right to replace or delete the manifest of a snapshot, as long as it is held.
pub(super) struct Lease<'a> {
    pub(super) name: &'a str,
    id: u128,
}

impl<'a> Lease<'a> {
    pub(super) async fn take<S: ObjectStore>(
        store: &S,
        clock: &impl Clock,
        name: &'a str,
    ) -> Result<Option<Lease<'a>>, CatalogError> {
        if let Some(id) = Lease::read(store, name).await? {
            if !is_expired(id, clock) {
                return Ok(None);
            }
            store.delete(&lease_key(name)).await?;
        }
        let id = clock.timed_id();
        match store.put_if_absent(&lease_key(name), format!("{LEASE_HEAD}{id:032x}\n").as_bytes()).await {
            Ok(()) => Ok(Some(Lease { name, id })),
            Err(ObjectError::AlreadyExists(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The id of the lease on a snapshot, if there is one. One that can't be read is as old as can be.
    pub(super) async fn read<S: ObjectStore>(store: &S, name: &str) -> Result<Option<u128>, ObjectError> {
        let bytes = match store.get(&lease_key(name)).await {
            Err(ObjectError::NotFound(_)) => return Ok(None),
            other => other?,
        };
        let text = std::str::from_utf8(&bytes).ok();
        let digits = text.and_then(|text| text.strip_prefix(LEASE_HEAD)?.strip_suffix('\n'));
        Ok(Some(digits.and_then(|digits| u128::from_str_radix(digits, 16).ok()).unwrap_or(0)))
    }

    /// Whether it is, for long enough to send one more request.
    pub(super) async fn is_held<S: ObjectStore>(&self, store: &S, clock: &impl Clock) -> Result<bool, ObjectError> {
        let is_ours = Lease::read(store, self.name).await? == Some(self.id);
        Ok(is_ours && clock.now_ms() < id_ms(self.id).saturating_add(LEASE_MS / 2))
    }

    pub(super) async fn end<S: ObjectStore>(&self, store: &S) -> Result<(), ObjectError> {
        if Lease::read(store, self.name).await? == Some(self.id) {
            store.delete(&lease_key(self.name)).await?;
        }
        Ok(())
    }
}

fn lease_key(name: &str) -> String {
    format!("{LEASE_PREFIX}{name}")
}

pub(super) fn is_expired(id: u128, clock: &impl Clock) -> bool {
    clock.now_ms() >= id_ms(id).saturating_add(LEASE_MS)
}
