//! Tests of the directory store on real files.
#![allow(clippy::disallowed_methods)] // Tests look behind the seam.

use std::fs;
use std::sync::Barrier;

use futures::executor::block_on;

use super::*;
use crate::platform::blocking::Blocking;

fn store() -> (tempfile::TempDir, DirStore<Blocking>) {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(DirStore::open(Blocking, dir.path())).unwrap();
    (dir, store)
}

fn keys(store: &DirStore<Blocking>, prefix: &str) -> Vec<String> {
    block_on(store.list(prefix)).unwrap().into_iter().map(|o| o.key).collect()
}

#[test]
fn objects_come_back_at_their_exact_length() {
    let (_dir, store) = store();
    for len in [0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000] {
        let data: Vec<u8> = (0..len).map(|i: usize| (i % 251) as u8).collect();
        let key = format!("a/b-{len}");
        block_on(store.put(&key, &data)).unwrap();
        assert_eq!(block_on(store.get(&key)).unwrap(), data);
        let listed = block_on(store.list(&key)).unwrap();
        assert!(listed.contains(&ObjectMeta { key: key.clone(), size_bytes: len as u64 }));
        let (from, to) = (len / 3, len - len / 4);
        let range = from as u64..to as u64;
        assert_eq!(block_on(store.get_range(&key, range)).unwrap()[..], data[from..to]);
        let past = block_on(store.get_range(&key, 0..len as u64 + 1)).unwrap_err();
        assert!(matches!(past, ObjectError::Corrupt(_)), "{past}");
    }
}

#[test]
fn put_replaces_and_put_if_absent_does_not() {
    let (_dir, store) = store();
    block_on(store.put_if_absent("k", b"one")).unwrap();
    assert_eq!(block_on(store.put_if_absent("k", b"two")), Err(ObjectError::AlreadyExists("k".to_owned())));
    assert_eq!(block_on(store.get("k")).unwrap(), b"one");
    block_on(store.put("k", b"three")).unwrap();
    assert_eq!(block_on(store.get("k")).unwrap(), b"three");
    block_on(store.delete("k")).unwrap();
    block_on(store.delete("k")).unwrap();
    block_on(store.delete("never/was")).unwrap();
    assert_eq!(block_on(store.get("k")), Err(ObjectError::NotFound("k".to_owned())));
}

#[test]
fn exactly_one_of_racing_callers_puts() {
    let (dir, store) = store();
    for round in 0..20 {
        let barrier = Barrier::new(8);
        let key = format!("race/{round}");
        let winners: Vec<u8> = std::thread::scope(|scope| {
            let run = |id: u8| {
                let (store, key, barrier) = (store.clone(), &key, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    match block_on(store.put_if_absent(key, &[id; 10_000])) {
                        Ok(()) => Some(id),
                        Err(ObjectError::AlreadyExists(_)) => None,
                        Err(e) => panic!("{e}"),
                    }
                })
            };
            let threads: Vec<_> = (0..8).map(run).collect();
            threads.into_iter().filter_map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1);
        assert_eq!(block_on(store.get(&key)).unwrap(), vec![winners[0]; 10_000]);
    }
    assert_eq!(fs::read_dir(dir.path().join(TMP_DIR)).unwrap().count(), 0, "no temporary file stays");
}

#[test]
fn lists_are_sorted_by_key_and_know_prefixes() {
    let (dir, store) = store();
    for key in ["b/2", "b/1", "b-x/1", "a", "b/1.d/z", "bb"] {
        block_on(store.put(key, b"")).unwrap();
    }
    fs::write(dir.path().join(TMP_DIR).join("leftover"), "x").unwrap();
    fs::write(dir.path().join("b/.hidden"), "x").unwrap();
    assert_eq!(keys(&store, ""), ["a", "b-x/1", "b/1", "b/1.d/z", "b/2", "bb"]);
    assert_eq!(keys(&store, "b/"), ["b/1", "b/1.d/z", "b/2"]);
    assert_eq!(keys(&store, "b/1"), ["b/1", "b/1.d/z"]);
    assert_eq!(keys(&store, "b"), ["b-x/1", "b/1", "b/1.d/z", "b/2", "bb"]);
    assert!(keys(&store, "none/").is_empty());
    assert!(keys(&store, "a/").is_empty());
}

#[test]
fn keys_cannot_leave_the_store() {
    let (_dir, store) = store();
    for bad in ["", "/a", "a/", "a//b", "../x", "a/../b", ".tmp/x", "a/.b", "a b", "ä", &"x".repeat(600)] {
        for result in [
            block_on(store.put(bad, b"")),
            block_on(store.put_if_absent(bad, b"")),
            block_on(store.get(bad)).map(|_| ()),
            block_on(store.delete(bad)),
        ] {
            assert!(matches!(result, Err(ObjectError::Fatal(_))), "{bad:?}: {result:?}");
        }
    }
}

#[test]
fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("objects");
    let error = block_on(DirStore::open(Blocking, &path)).err().unwrap();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    block_on(DirStore::create(Blocking, path.join("deep"))).unwrap();
    block_on(DirStore::open(Blocking, path.join("deep"))).unwrap();
}

#[test]
fn errors_say_what_to_do() {
    let io = |kind: io::ErrorKind| classify("k", &io::Error::from(kind));
    assert!(matches!(io(io::ErrorKind::StorageFull), ObjectError::Fatal(text) if text.contains("full")));
    assert!(matches!(io(io::ErrorKind::PermissionDenied), ObjectError::Fatal(_)));
    assert!(matches!(io(io::ErrorKind::TimedOut), ObjectError::Retry(_)));
    let (_dir, store) = store();
    block_on(store.put("a", b"")).unwrap();
    assert!(matches!(block_on(store.put("a/b", b"")), Err(ObjectError::Fatal(_))));
}
