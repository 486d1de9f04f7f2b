//! What whoever makes a snapshot does around storing its chunks: claim the name, learn which packs may be shared, commit.
//!
//! Image import uses it, and so does anything else that writes a manifest. The order is the whole point
//! (`docs/snapshot.md`, "Garbage collection"): [`Claim::begin`], then [`StoredPacks::load`], then any packs under the id of
//! the claim, then [`Claim::commit`]. A pack that is not [reusable](StoredPacks::reusable) must not be referenced, even
//! if another manifest does, or one in memory.

use hashbrown::{HashMap, HashSet};
use thiserror::Error;

use super::gc::condemned;
use super::{CatalogError, Manifest, PACK_PREFIX, import_key, manifest_key, marker};
use crate::object_store::{ObjectError, ObjectMeta, ObjectStore};

/// A snapshot in the making, with its marker in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub name: String,
    /// Of the snapshot to be, and of its packs.
    pub id: u128,
    /// This run made the marker.
    fresh: bool,
}

#[derive(Debug, Error)]
pub enum ClaimError {
    #[error("snapshot {0:?} exists already")]
    NameTaken(String),
    #[error("somebody else makes a snapshot {0:?}, or this one was dropped by 'volley image gc'")]
    Interfered(String),
    #[error("the marker of an interrupted import of {0:?} is damaged")]
    Marker(String),
    #[error(transparent)]
    Store(#[from] ObjectError),
}

impl Claim {
    /// Puts the marker, or goes on with the one of an interrupted run. From here on garbage collection leaves alone what
    /// [`StoredPacks::load`] calls reusable, and the packs under the claim's id.
    ///
    /// # Errors
    /// `Marker` when the one that is there is damaged.
    pub async fn begin<S: ObjectStore>(store: &S, name: &str, new_id: u128) -> Result<Claim, ClaimError> {
        let claim = |id, fresh| Claim { name: name.to_owned(), id, fresh };
        match store.put_if_absent(&import_key(name), &marker::encode(new_id)).await {
            Ok(()) => Ok(claim(new_id, true)),
            Err(ObjectError::AlreadyExists(_)) => match marker::read(store, name).await? {
                Some(marker) => Ok(claim(marker.id.ok_or_else(|| ClaimError::Marker(name.to_owned()))?, false)),
                None => Err(ClaimError::Interfered(name.to_owned())),
            },
            Err(e) => Err(e.into()),
        }
    }

    /// Makes the snapshot exist. The marker must be in place before and after: if `volley image gc --incomplete` took it
    /// away in between, packs may be gone, and the manifest must go too.
    ///
    /// # Errors
    /// See [`ClaimError`]. No snapshot of this claim exists after an error.
    pub async fn commit<S: ObjectStore>(&self, store: &S, manifest: &Manifest) -> Result<(), ClaimError> {
        let name = &self.name;
        if !self.is_in_place(store).await? {
            return Err(ClaimError::Interfered(name.clone()));
        }
        match store.put_if_absent(&manifest_key(name), &manifest.encode()).await {
            Ok(()) => {}
            Err(ObjectError::AlreadyExists(_)) => {
                self.abandon(store).await?;
                return Err(ClaimError::NameTaken(name.clone()));
            }
            Err(e) => return Err(e.into()),
        }
        if !self.is_in_place(store).await? {
            self.retract(store).await?;
            return Err(ClaimError::Interfered(name.clone()));
        }
        if let Err(e) = self.end(store).await {
            // The snapshot exists; a marker of the same id stands in nobody's way.
            tracing::warn!("cannot remove the marker of the finished import {name:?}: {e}");
        }
        Ok(())
    }

    /// Whether the marker is still this claim's.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn is_in_place<S: ObjectStore>(&self, store: &S) -> Result<bool, ObjectError> {
        Ok(marker::read(store, &self.name).await?.is_some_and(|marker| marker.id == Some(self.id)))
    }

    /// Removes the marker if this run made it: one that an interrupted run left stays, with what that one stored.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn abandon<S: ObjectStore>(&self, store: &S) -> Result<(), ObjectError> {
        if self.fresh { self.end(store).await } else { Ok(()) }
    }

    /// Removes the marker. What was stored and is not in a manifest is garbage from here on.
    ///
    /// # Errors
    /// When the object store fails.
    pub async fn end<S: ObjectStore>(&self, store: &S) -> Result<(), ObjectError> {
        store.delete(&import_key(&self.name)).await
    }

    /// Deletes the manifest, unless somebody else's has taken its place.
    async fn retract<S: ObjectStore>(&self, store: &S) -> Result<(), ObjectError> {
        let bytes = match store.get(&manifest_key(&self.name)).await {
            Err(ObjectError::NotFound(_)) => return Ok(()),
            other => other?,
        };
        match Manifest::decode(&bytes) {
            Ok(manifest) if manifest.id != self.id => Ok(()),
            _ => store.delete(&manifest_key(&self.name)).await,
        }
    }
}

/// The packs of an object store as seen after a claim.
pub struct StoredPacks {
    /// All of them, sorted by key.
    pub listed: Vec<ObjectMeta>,
    condemned: HashSet<String>,
}

impl StoredPacks {
    /// Looks at condemnations first and at packs second: a pack that was carried off in between is in neither.
    ///
    /// # Errors
    /// When the object store fails, or a condemnation can't be read.
    pub async fn load<S: ObjectStore>(store: &S) -> Result<StoredPacks, CatalogError> {
        StoredPacks::under(store, [PACK_PREFIX.to_owned()]).await
    }

    /// The same of the packs under these prefixes only.
    ///
    /// # Errors
    /// See [`StoredPacks::load`].
    pub async fn under<S: ObjectStore>(
        store: &S,
        prefixes: impl IntoIterator<Item = String>,
    ) -> Result<StoredPacks, CatalogError> {
        let condemned = condemned::packs(store).await?;
        let mut listed = Vec::new();
        for prefix in prefixes {
            listed.extend(store.list(&prefix).await?);
        }
        Ok(StoredPacks { listed, condemned })
    }

    /// Packs that the snapshot in the making may reference, with their sizes.
    #[must_use]
    pub fn reusable(&self) -> HashMap<&str, u64> {
        let free = self.listed.iter().filter(|pack| !self.condemned.contains(&pack.key));
        free.map(|pack| (pack.key.as_str(), pack.size_bytes)).collect()
    }
}
