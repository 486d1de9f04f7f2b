//! Tests of the data directory on a real file system: identity, lock, and stores of other nodes.
#![allow(clippy::disallowed_methods)] // Tests run outside of any shard.

use super::*;
use crate::config::Bandwidth;

fn store(label: &str, path: PathBuf) -> StoreConfig {
    StoreConfig { hydration_bandwidth: Bandwidth(Some(7)), ..StoreConfig::new(label, path) }
}

fn open_error(path: &Path, stores: &[StoreConfig]) -> String {
    let message = DataDir::open(path, stores).map(|_| ()).expect_err("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn identity_and_stores_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a/b");
    let stores = [store("x", dir.path().join("x")), store("y", dir.path().join("y"))];
    let first = DataDir::open(&data, &stores).unwrap();
    let (node_id, opened) = (first.node_id, first.stores.clone());
    assert!(dir.path().join("x/volumes").is_dir());
    assert_eq!(opened[1].hydration_bandwidth, Some(7));
    drop(first);
    let second = DataDir::open(&data, &stores).unwrap();
    assert_eq!((second.node_id, second.stores.clone()), (node_id, opened));
}

#[test]
fn a_second_server_is_refused_and_told_the_pid() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [store("x", dir.path().join("x"))];
    let data = dir.path().join("data");
    let first = DataDir::open(&data, &stores).unwrap();
    let message = open_error(&data, &stores);
    assert!(message.contains("is locked by a running volleyd"), "{message}");
    assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
    drop(first);
    assert!(DataDir::open(&data, &stores).is_ok());
}

#[test]
fn a_store_of_another_node_is_refused_with_both_ids() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [store("x", dir.path().join("x"))];
    let first = DataDir::open(&dir.path().join("one"), &stores).unwrap();
    let message = open_error(&dir.path().join("two"), &stores);
    assert!(message.contains(&format!("{:032x}", first.node_id)), "{message}");
    assert!(message.contains("--data"), "{message}");
}

#[test]
fn an_unmounted_store_is_refused_instead_of_recreated() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [store("x", dir.path().join("x"))];
    drop(DataDir::open(&dir.path().join("data"), &stores).unwrap());
    fs::rename(dir.path().join("x"), dir.path().join("elsewhere")).unwrap();
    fs::create_dir(dir.path().join("x")).unwrap();
    let message = open_error(&dir.path().join("data"), &stores);
    assert!(message.contains("mount its filesystem"), "{message}");
    assert!(DataDir::open(&dir.path().join("data"), &[store("x", dir.path().join("elsewhere"))]).is_ok());
}

#[test]
fn relabelled_and_swapped_stores_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    drop(DataDir::open(&data, &[store("x", dir.path().join("x")), store("y", dir.path().join("y"))]).unwrap());
    let message = open_error(&data, &[store("x", dir.path().join("y"))]);
    assert!(message.contains("was created with label \"y\""), "{message}");
    let file = dir.path().join("x").join(STORE_FILE);
    let mut other: StoreFile = read_file(&file).unwrap().unwrap();
    other.store_id = format!("{:032x}", 1);
    write_file(&file, &other).unwrap();
    let message = open_error(&data, &[store("x", dir.path().join("x"))]);
    assert!(message.contains("is another store"), "{message}");
}

#[test]
fn future_formats_and_garbage_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [store("x", dir.path().join("x"))];
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join(NODE_FILE), "format = 2\nwhatever = 1\n").unwrap();
    assert!(open_error(&data, &stores).contains("has format 2"));
    for garbage in ["", "\0\0\0", "format = 1\nnode_id = \"zz\"\ncreated_unix_ms = 1\n"] {
        fs::write(data.join(NODE_FILE), garbage).unwrap();
        assert!(open_error(&data, &stores).contains("restore it from a backup"));
    }
    assert!(!dir.path().join("x").exists());
}

#[test]
fn a_file_in_the_place_of_the_directory_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let message = open_error(file.path(), &[]);
    assert!(message.contains(&file.path().display().to_string()), "{message}");
}

#[test]
fn directories_of_others_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let photos = dir.path().join("photos");
    fs::create_dir(&photos).unwrap();
    fs::write(photos.join("cat.jpg"), b"cat").unwrap();
    assert!(open_error(&photos, &[]).contains("is not empty"));
    assert!(open_error(&dir.path().join("data"), &[store("x", photos.clone())]).contains("is not empty"));
    assert_eq!(fs::read_dir(&photos).unwrap().count(), 1);
}

#[test]
fn every_directory_that_gets_an_entry_is_synced_from_above() {
    let dir = tempfile::tempdir().unwrap();
    let mut synced = Vec::new();
    let mut sync = |dir: &Path| {
        synced.push(dir.to_path_buf());
        Ok(())
    };
    create_dir_with(&dir.path().join("a/b/c"), &mut sync).unwrap();
    // Again: a crash may have come between making and syncing it.
    create_dir_with(&dir.path().join("a/b/c"), &mut sync).unwrap();
    let expected = ["", "a", "a/b", "a/b"].map(|parent| dir.path().join(parent));
    assert_eq!(
        synced.iter().map(|dir| dir.components().as_path()).collect::<Vec<_>>(),
        expected.each_ref().map(|dir| dir.components().as_path())
    );
    let refused = create_dir_with(&dir.path().join("x"), &mut |_| Err(io::Error::other("no sync")));
    assert!(refused.unwrap_err().to_string().contains("no sync"));
}

#[test]
fn the_journal_and_the_places_of_the_stores_are_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let stores = [store("x", dir.path().join("x"))];
    let mut first = DataDir::open(&data, &stores).unwrap();
    assert!(!first.has_journal());
    first.remember_journal().unwrap();
    drop(first);
    fs::rename(dir.path().join("x"), dir.path().join("moved")).unwrap();
    let second = DataDir::open(&data, &[store("x", dir.path().join("moved"))]).unwrap();
    assert!(second.has_journal());
    let text = fs::read_to_string(data.join(NODE_FILE)).unwrap();
    assert!(text.contains("journal = true") && text.contains("/moved\""), "{text}");
}
