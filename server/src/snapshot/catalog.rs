//! Whole snapshots in an object store: find, load, delete, collect garbage.

use thiserror::Error;
use volley_protocol::name::check_name;

use super::{MANIFEST_PREFIX, Manifest, ManifestError, manifest_key};
use crate::object_store::{ObjectError, ObjectStore};

/// Why an operation on snapshots failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CatalogError {
    #[error("{0}")]
    Name(String),
    #[error("no snapshot {0:?} in the object store")]
    Unknown(String),
    #[error("snapshot {name:?}: {source}")]
    Manifest { name: String, source: ManifestError },
    #[error("snapshot {name:?}: its manifest is of {found:?}")]
    Misplaced { name: String, found: String },
    #[error(transparent)]
    Store(#[from] ObjectError),
}

/// Reads and checks the manifest of the snapshot `name`.
///
/// # Errors
/// See [`CatalogError`].
pub async fn load<S: ObjectStore>(store: &S, name: &str) -> Result<Manifest, CatalogError> {
    check_name(name).map_err(CatalogError::Name)?;
    match store.get(&manifest_key(name)).await {
        Ok(bytes) => decode(name, &bytes),
        Err(ObjectError::NotFound(_)) => Err(CatalogError::Unknown(name.to_owned())),
        Err(e) => Err(e.into()),
    }
}

/// Names of all snapshots, sorted. Their manifests may still be damaged.
///
/// # Errors
/// When the object store fails.
pub async fn names<S: ObjectStore>(store: &S) -> Result<Vec<String>, CatalogError> {
    let objects = store.list(MANIFEST_PREFIX).await?;
    let names = objects.iter().filter_map(|o| o.key.strip_prefix(MANIFEST_PREFIX));
    Ok(names.filter(|name| check_name(name).is_ok()).map(str::to_owned).collect())
}

fn decode(name: &str, bytes: &[u8]) -> Result<Manifest, CatalogError> {
    let manifest =
        Manifest::decode(bytes).map_err(|source| CatalogError::Manifest { name: name.to_owned(), source })?;
    if manifest.name != name {
        return Err(CatalogError::Misplaced { name: name.to_owned(), found: manifest.name });
    }
    Ok(manifest)
}
