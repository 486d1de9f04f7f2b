//! Tests of deletion and garbage collection, on real directories and real snapshots.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use futures::executor::block_on;

use super::*;
use crate::object_store::ObjectBytes;
use crate::object_store::dir::DirStore;
use crate::platform::blocking::Blocking;
use crate::snapshot::{
    ChunkEntry, IMPORT_PREFIX, PackBuilder, REFERENCE_PREFIX, SnapshotInfo, encode_chunk, pack_key, reference_key,
};

type Dir = DirStore<Blocking>;

fn store() -> (tempfile::TempDir, Dir) {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Dir::open(Blocking, dir.path())).unwrap();
    (dir, store)
}

fn put_pack(store: &Dir, id: u128) -> String {
    let mut pack = PackBuilder::new(id, 0);
    pack.push(&encode_chunk(&[id as u8; 65536], 3));
    let key = pack_key(id, 0);
    block_on(store.put_if_absent(&key, &pack.finish())).unwrap();
    key
}

/// A snapshot that references the packs of these ids.
fn put_snapshot(store: &Dir, name: &str, id: u128, packs: &[u128]) {
    let chunks = [ChunkEntry::Zero];
    let info = SnapshotInfo {
        id,
        name: name.to_owned(),
        size_bytes: 65536,
        chunk_bytes: 65536,
        parent: None,
        created_unix_ms: 1,
    };
    let manifest = Manifest::new(info, packs.iter().map(|id| pack_key(*id, 0)).collect(), &chunks).unwrap();
    block_on(store.put_if_absent(&manifest_key(name), &manifest.encode())).unwrap();
}

fn keys(store: &Dir, prefix: &str) -> Vec<String> {
    block_on(store.list(prefix)).unwrap().into_iter().map(|o| o.key).collect()
}

#[test]
fn delete_removes_what_only_this_snapshot_references() {
    let (_dir, store) = store();
    let (own, shared) = (put_pack(&store, 1), put_pack(&store, 2));
    put_snapshot(&store, "a", 1, &[1, 2]);
    put_snapshot(&store, "b", 2, &[2]);
    let collected = block_on(delete(&store, "a")).unwrap();
    assert_eq!((collected.packs_removed, collected.packs_kept), (1, 0));
    assert_eq!(keys(&store, PACK_PREFIX), std::slice::from_ref(&shared));
    assert_eq!(block_on(names(&store)).unwrap(), ["b"]);
    assert_eq!(block_on(delete(&store, "a")), Err(CatalogError::Unknown("a".to_owned())));
    assert!(own < shared);
    block_on(delete(&store, "b")).unwrap();
    assert!(keys(&store, "").is_empty());
}

#[test]
fn a_snapshot_that_nodes_need_is_kept_and_the_nodes_are_named() {
    let (_dir, store) = store();
    put_pack(&store, 1);
    put_snapshot(&store, "a", 1, &[1]);
    // Another snapshot's references do not count, also when the names share a prefix.
    block_on(store.put(&reference_key("a.b", "node-9"), b"")).unwrap();
    block_on(store.put(&reference_key("a", "node-7"), b"")).unwrap();
    let before = keys(&store, "");
    let error = block_on(delete(&store, "a")).unwrap_err();
    assert!(error.to_string().contains("node-7") && !error.to_string().contains("node-9"), "{error}");
    assert_eq!(keys(&store, ""), before);
    block_on(store.delete(&reference_key("a", "node-7"))).unwrap();
    block_on(delete(&store, "a")).unwrap();
}

/// The directory store, in which another process puts an object just before something is deleted.
#[derive(Clone)]
struct Interleaved {
    inner: Dir,
    puts: Rc<RefCell<Option<String>>>,
}

impl ObjectStore for Interleaved {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.inner.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        self.inner.get_range(key, range).await
    }
    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.inner.put(key, data).await
    }
    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.inner.put_if_absent(key, data).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        self.inner.list(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        let other = self.puts.borrow_mut().take();
        if let Some(other) = other {
            self.inner.put(&other, b"").await?;
        }
        self.inner.delete(key).await
    }
}

#[test]
fn a_reference_that_appears_during_the_deletion_brings_the_snapshot_back() {
    let (_dir, store) = store();
    put_pack(&store, 1);
    put_snapshot(&store, "a", 1, &[1]);
    let reference = reference_key("a", "node-1");
    let racing = Interleaved { inner: store.clone(), puts: Rc::new(RefCell::new(Some(reference))) };
    let error = block_on(delete(&racing, "a")).unwrap_err();
    assert!(matches!(error, CatalogError::Referenced { .. }), "{error}");
    assert_eq!(block_on(load(&store, "a")).unwrap().id, 1);
    assert_eq!(keys(&store, PACK_PREFIX).len(), 1);
}

#[test]
fn open_imports_keep_packs_until_they_are_dropped() {
    let (_dir, store) = store();
    put_pack(&store, 1);
    put_snapshot(&store, "a", 1, &[1]);
    // An import of "b" was interrupted after its first pack.
    put_pack(&store, 5);
    block_on(store.put(&import_key("b"), &marker::encode(5))).unwrap();

    let collected = block_on(delete(&store, "a")).unwrap();
    assert_eq!((collected.packs_removed, collected.packs_kept), (0, 1));
    assert_eq!(collected.imports_open, ["b"]);
    assert_eq!(block_on(collect(&store, None)).unwrap().packs_kept, 2);
    assert_eq!(block_on(load(&store, "b")).unwrap_err(), CatalogError::Incomplete("b".to_owned()));
    assert_eq!(block_on(collect(&store, Some("x"))), Err(CatalogError::NoImport("x".to_owned())));
    assert_eq!(block_on(collect(&store, Some("b"))).unwrap().packs_removed, 2);
    assert!(keys(&store, "").is_empty());
}

#[test]
fn the_marker_of_a_committed_import_blocks_nothing() {
    let (_dir, store) = store();
    put_pack(&store, 1);
    put_pack(&store, 2);
    put_snapshot(&store, "a", 1, &[1]);
    block_on(store.put(&import_key("a"), &marker::encode(1))).unwrap();
    assert_eq!(block_on(collect(&store, None)).unwrap().packs_removed, 1);
    assert!(keys(&store, IMPORT_PREFIX).is_empty());
    assert_eq!(keys(&store, PACK_PREFIX), [pack_key(1, 0)]);
}

#[test]
fn a_damaged_manifest_stops_collection_and_can_be_deleted() {
    let (_dir, store) = store();
    put_pack(&store, 1);
    put_pack(&store, 2);
    put_snapshot(&store, "a", 1, &[1]);
    put_snapshot(&store, "b", 2, &[2]);
    let mut bytes = block_on(store.get("snapshots/a")).unwrap();
    bytes[100] ^= 1;
    block_on(store.put("snapshots/a", &bytes)).unwrap();
    assert!(matches!(block_on(load(&store, "a")), Err(CatalogError::Manifest { .. })));
    let error = block_on(collect(&store, None)).unwrap_err();
    assert!(error.to_string().contains("\"a\""), "{error}");
    assert!(matches!(block_on(delete(&store, "b")), Err(CatalogError::Unreadable(_))));
    assert_eq!(keys(&store, PACK_PREFIX).len(), 2);
    block_on(delete(&store, "a")).unwrap();
    assert_eq!(block_on(collect(&store, None)).unwrap().packs_removed, 2);
}

#[test]
fn a_manifest_under_another_name_is_refused() {
    let (_dir, store) = store();
    put_snapshot(&store, "a", 1, &[]);
    let bytes = block_on(store.get("snapshots/a")).unwrap();
    block_on(store.put("snapshots/b", &bytes)).unwrap();
    let error = block_on(load(&store, "b")).unwrap_err();
    assert_eq!(error, CatalogError::Misplaced { name: "b".to_owned(), found: "a".to_owned() });
    assert!(matches!(block_on(load(&store, "../b")), Err(CatalogError::Name(_))));
    assert!(keys(&store, REFERENCE_PREFIX).is_empty());
}
