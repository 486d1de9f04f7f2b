//! Whole snapshots in an object store: find, load, delete, collect what nothing references.
//!
//! Deleting races with imports (which reuse chunks of snapshots they have seen) and with nodes (which create volumes). The rules:
//! an import puts its marker before it lists manifests; a node puts its reference before it reads the manifest; so whoever
//! removes a manifest looks for references afterwards, and whoever removes packs looks for markers before and after it
//! has read all manifests.

use hashbrown::HashSet;
use thiserror::Error;
use volley_protocol::name::check_name;

use super::{
    MANIFEST_PREFIX, Manifest, ManifestError, PACK_PREFIX, import_key, manifest_key, marker, parse_pack_key,
    reference_prefix,
};
use crate::bootset::boot_set_key;
use crate::object_store::{ObjectError, ObjectMeta, ObjectStore};

/// Collection starts again when imports or deletions change the manifests under it; never longer than this.
const COLLECT_ATTEMPTS: usize = 5;

/// Why an operation on snapshots failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CatalogError {
    #[error("{0}")]
    Name(String),
    #[error("no snapshot {0:?} in the object store")]
    Unknown(String),
    #[error(
        "snapshot {0:?} is not complete: its import is running or was interrupted; import it again, or drop it with \
         'volley image gc --incomplete {0}'"
    )]
    Incomplete(String),
    #[error("no interrupted import of {0:?} in the object store")]
    NoImport(String),
    #[error("snapshot {name:?}: {source}")]
    Manifest { name: String, source: ManifestError },
    #[error("snapshot {name:?}: its manifest is of {found:?}")]
    Misplaced { name: String, found: String },
    #[error(
        "snapshot {name:?} is needed by volumes of node {}: wait until they are hydrated, or delete them",
        nodes.join(", ")
    )]
    Referenced { name: String, nodes: Vec<String> },
    #[error("cannot tell which packs are garbage: {0}; delete that snapshot or restore its manifest first")]
    Unreadable(Box<CatalogError>),
    #[error("imports or deletions go on in the object store: collect garbage again when they are done")]
    Busy,
    #[error(transparent)]
    Store(#[from] ObjectError),
}

/// What a garbage collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    pub packs_removed: u64,
    pub bytes_removed: u64,
    /// Packs that nothing references and that were kept because of `imports_open`.
    pub packs_kept: u64,
    pub bytes_kept: u64,
    /// Names of imports that are running or were interrupted.
    pub imports_open: Vec<String>,
}

/// Reads and checks the manifest of the snapshot `name`.
///
/// # Errors
/// See [`CatalogError`].
pub async fn load<S: ObjectStore>(store: &S, name: &str) -> Result<Manifest, CatalogError> {
    decode(name, &load_bytes(store, name).await?)
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

/// Deletes a snapshot, then the packs that only it referenced. Also deletes one whose manifest is damaged.
///
/// # Errors
/// `Referenced` while a node needs it; it exists unchanged then. After `Unreadable`, `Busy` or a `Store` error
/// of the collection the snapshot is gone and packs may be left for [`collect`].
pub async fn delete<S: ObjectStore>(store: &S, name: &str) -> Result<Collected, CatalogError> {
    let bytes = load_bytes(store, name).await?;
    refuse_referenced(store, name).await?;
    store.delete(&manifest_key(name)).await?;
    // A node may have put its reference after the first look and read the manifest before it went.
    if let Err(referenced) = refuse_referenced(store, name).await {
        return match store.put_if_absent(&manifest_key(name), &bytes).await {
            Ok(()) | Err(ObjectError::AlreadyExists(_)) => Err(referenced),
            Err(e) => Err(e.into()),
        };
    }
    store.delete(&boot_set_key(name)).await?;
    let Ok(manifest) = decode(name, &bytes) else { return Ok(Collected::default()) };
    let own: HashSet<&str> = manifest.pack_keys().iter().map(String::as_str).collect();
    let packs = store.list(PACK_PREFIX).await?;
    remove_unreferenced(store, packs.into_iter().filter(|p| own.contains(p.key.as_str())).collect()).await
}

/// Removes every pack that no manifest references. While imports are open, their packs can't be told from garbage, so
/// nothing is removed. `drop_import` gives up the interrupted import of that name first.
///
/// # Errors
/// See [`CatalogError`].
pub async fn collect<S: ObjectStore>(store: &S, drop_import: Option<&str>) -> Result<Collected, CatalogError> {
    if let Some(name) = drop_import {
        check_name(name).map_err(CatalogError::Name)?;
        if marker::read(store, name).await?.is_none() {
            return Err(CatalogError::NoImport(name.to_owned()));
        }
        store.delete(&import_key(name)).await?;
    }
    // Packs listed before anything else: those of an import that begins later are not even candidates.
    let packs = store.list(PACK_PREFIX).await?;
    remove_unreferenced(store, packs.into_iter().filter(|p| parse_pack_key(&p.key).is_some()).collect()).await
}

async fn remove_unreferenced<S: ObjectStore>(
    store: &S,
    candidates: Vec<ObjectMeta>,
) -> Result<Collected, CatalogError> {
    for _ in 0..COLLECT_ATTEMPTS {
        let open_before = open_imports(store).await?;
        let seen = names(store).await?;
        let referenced = referenced_packs(store, &seen).await?;
        let garbage: Vec<&ObjectMeta> = candidates.iter().filter(|p| !referenced.contains(&p.key)).collect();
        if open_before != open_imports(store).await? || seen != names(store).await? {
            continue;
        }
        let (packs, bytes) = (garbage.len() as u64, garbage.iter().map(|p| p.size_bytes).sum());
        if !open_before.is_empty() {
            let kept = Collected { packs_kept: packs, bytes_kept: bytes, ..Collected::default() };
            return Ok(Collected { imports_open: open_before, ..kept });
        }
        let keys: Vec<&str> = garbage.iter().map(|pack| pack.key.as_str()).collect();
        store.delete_all(&keys).await?;
        return Ok(Collected { packs_removed: packs, bytes_removed: bytes, ..Collected::default() });
    }
    Err(CatalogError::Busy)
}

/// Imports with a marker, less those whose snapshot exists: they only failed to remove the marker, which is done here.
async fn open_imports<S: ObjectStore>(store: &S) -> Result<Vec<String>, CatalogError> {
    let mut open = Vec::new();
    for marker in marker::list(store).await? {
        match load(store, &marker.name).await {
            Ok(manifest) if marker.id == Some(manifest.id) => store.delete(&import_key(&marker.name)).await?,
            _ => open.push(marker.name),
        }
    }
    Ok(open)
}

async fn referenced_packs<S: ObjectStore>(store: &S, names: &[String]) -> Result<HashSet<String>, CatalogError> {
    let mut referenced = HashSet::new();
    for name in names {
        match load(store, name).await {
            Ok(manifest) => referenced.extend(manifest.pack_keys().iter().cloned()),
            // Deleted meanwhile; the caller compares the lists.
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => {}
            Err(e @ CatalogError::Store(_)) => return Err(e),
            Err(e) => return Err(CatalogError::Unreadable(Box::new(e))),
        }
    }
    Ok(referenced)
}

async fn refuse_referenced<S: ObjectStore>(store: &S, name: &str) -> Result<(), CatalogError> {
    let prefix = reference_prefix(name);
    let references = store.list(&prefix).await?;
    let nodes: Vec<String> = references.iter().map(|o| o.key[prefix.len()..].to_owned()).collect();
    if nodes.is_empty() { Ok(()) } else { Err(CatalogError::Referenced { name: name.to_owned(), nodes }) }
}

async fn load_bytes<S: ObjectStore>(store: &S, name: &str) -> Result<Vec<u8>, CatalogError> {
    check_name(name).map_err(CatalogError::Name)?;
    match store.get(&manifest_key(name)).await {
        Ok(bytes) => Ok(bytes),
        Err(ObjectError::NotFound(_)) if marker::read(store, name).await?.is_some() => {
            Err(CatalogError::Incomplete(name.to_owned()))
        }
        Err(ObjectError::NotFound(_)) => Err(CatalogError::Unknown(name.to_owned())),
        Err(e) => Err(e.into()),
    }
}

fn decode(name: &str, bytes: &[u8]) -> Result<Manifest, CatalogError> {
    let manifest =
        Manifest::decode(bytes).map_err(|source| CatalogError::Manifest { name: name.to_owned(), source })?;
    if manifest.name != name {
        return Err(CatalogError::Misplaced { name: name.to_owned(), found: manifest.name });
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests;
