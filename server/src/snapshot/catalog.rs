//! Whole snapshots in an object store: find them, load them, and why something can't be done with them.

use thiserror::Error;
use volley_protocol::name::check_name;

use super::{MANIFEST_PREFIX, Manifest, ManifestError, manifest_key, marker};
use crate::object_store::{ObjectError, ObjectStore};

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
        "snapshot {name:?} is needed by volumes of node {}: wait until they are hydrated, delete them, or have it \
         deleted after them with --when-unused",
        nodes.join(", ")
    )]
    Referenced { name: String, nodes: Vec<String> },
    #[error(
        "node {} began to need snapshot {name:?} just now: 'volley image gc' deletes it once it is unused",
        nodes.join(", ")
    )]
    Announced { name: String, nodes: Vec<String> },
    #[error(
        "packs of snapshot {0:?} are being rewritten, or somebody else deletes it: 'volley image gc' does it after that"
    )]
    Rewriting(String),
    #[error("cannot tell which packs are garbage: {0}; delete that snapshot or restore its manifest first")]
    Unreadable(Box<CatalogError>),
    #[error("cannot tell which packs are condemned: object {key}: {why}; delete it, then collect garbage again")]
    Condemned { key: String, why: String },
    #[error(
        "the object store cannot put an object only if it is absent, without which rewriting packs may overwrite what \
         others do: collect without --rewrite-below"
    )]
    NoConditionalPut,
    #[error("rewriting took longer than {0} hours, so others may believe it dead: run it again, it goes on from there")]
    TooSlow(u64),
    #[error(transparent)]
    Store(#[from] ObjectError),
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

/// The bytes of a manifest, which may be damaged.
pub(super) async fn load_bytes<S: ObjectStore>(store: &S, name: &str) -> Result<Vec<u8>, CatalogError> {
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
mod tests {
    use futures::executor::block_on;

    use super::*;
    use crate::object_store::dir::DirStore;
    use crate::platform::blocking::Blocking;
    use crate::snapshot::{ChunkEntry, SnapshotInfo};

    #[test]
    fn a_manifest_under_another_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = block_on(DirStore::open(Blocking, dir.path())).unwrap();
        let info = SnapshotInfo {
            id: 1,
            name: "a".to_owned(),
            size_bytes: 65536,
            chunk_bytes: 65536,
            parent: None,
            created_unix_ms: 1,
        };
        let bytes = Manifest::new(info, Vec::new(), &[ChunkEntry::Zero]).unwrap().encode();
        block_on(store.put("snapshots/b", &bytes)).unwrap();
        let error = block_on(load(&store, "b")).unwrap_err();
        assert_eq!(error, CatalogError::Misplaced { name: "b".to_owned(), found: "a".to_owned() });
        assert!(matches!(block_on(load(&store, "../b")), Err(CatalogError::Name(_))));
        assert_eq!(block_on(load(&store, "c")), Err(CatalogError::Unknown("c".to_owned())));
        assert_eq!(block_on(names(&store)).unwrap(), ["b"]);
    }
}
