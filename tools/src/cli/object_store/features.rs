//! What Volley asks of an object store, tried one by one.

use futures::executor::block_on;
use serde::Serialize;
use volley_server::object_store::{ObjectError, ObjectStore};
use volley_server::platform::blocking::ToolStore;

/// Larger than what goes up in one request.
pub(super) const LARGE_BYTES: usize = 24 << 20;
pub(super) const SMALL_BYTES: usize = 4096;
/// Beyond this stores begin to refuse signatures after some minutes more.
const SKEW_SECONDS_MAX: i64 = 300;

/// One of the things an object store should do.
#[derive(Debug, Serialize)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) ok: bool,
    /// Volley does not work without it.
    pub(super) needed: bool,
    pub(super) detail: String,
}

type Tried = Result<String, String>;

pub(super) fn try_all(store: &ToolStore, prefix: &str) -> Vec<Feature> {
    let feature = |name, needed, tried: Tried| {
        let ok = tried.is_ok();
        let detail = tried.unwrap_or_else(|why| why);
        Feature { name, ok, needed, detail }
    };
    let mut features = vec![
        feature("put and get", true, put_and_get(store, prefix)),
        feature("ranged get", true, ranged_get(store, prefix)),
        feature("put if absent", true, put_if_absent(store, prefix)),
    ];
    if let ToolStore::S3(s3) = store {
        let atomic = match s3.honours_conditional_put() {
            Some(true) => Ok("a second If-None-Match put is refused".to_owned()),
            Some(false) => Err("a second If-None-Match put is not refused: looking before each put instead".to_owned()),
            None => Err("not found out".to_owned()),
        };
        features.push(feature("atomic put if absent", false, atomic));
    }
    features.push(feature("multipart put", true, large_put(store, prefix)));
    features.push(feature("list", true, list(store, prefix)));
    features.push(feature("delete", true, delete(store, prefix)));
    if let ToolStore::S3(s3) = store {
        let skew = match block_on(s3.clock_skew_seconds()) {
            Ok(Some(skew)) if skew.abs() > SKEW_SECONDS_MAX => {
                Err(format!("this clock is {skew} s ahead: set it (NTP)"))
            }
            Ok(Some(skew)) => Ok(format!("{skew} s ahead of the store's")),
            Ok(None) => Ok("the store sends no date".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        features.push(feature("clock", false, skew));
    }
    features
}

pub(super) fn small_key(prefix: &str) -> String {
    format!("{prefix}small")
}

pub(super) fn large_key(prefix: &str) -> String {
    format!("{prefix}large")
}

/// Bytes that tell where in the object they are.
pub(super) fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

fn put_and_get(store: &ToolStore, prefix: &str) -> Tried {
    let (key, data) = (small_key(prefix), content(SMALL_BYTES));
    run(store.put(&key, &data))?;
    let got = run(store.get(&key))?;
    if got == data { Ok(format!("{SMALL_BYTES} bytes")) } else { Err("other bytes came back".to_owned()) }
}

fn ranged_get(store: &ToolStore, prefix: &str) -> Tried {
    let (key, data) = (small_key(prefix), content(SMALL_BYTES));
    let got = run(store.get_range(&key, 1000..1500))?;
    if got[..] != data[1000..1500] {
        return Err("other bytes came back".to_owned());
    }
    match block_on(store.get_range(&key, 4000..5000)) {
        Err(ObjectError::Corrupt(_)) => Ok("also past the end".to_owned()),
        Err(error) => Err(format!("past the end: {error}")),
        Ok(_) => Err("past the end: bytes that are not there came back".to_owned()),
    }
}

fn put_if_absent(store: &ToolStore, prefix: &str) -> Tried {
    let key = format!("{prefix}once");
    run(store.put_if_absent(&key, b"first"))?;
    match block_on(store.put_if_absent(&key, b"second")) {
        Err(ObjectError::AlreadyExists(_)) => {}
        Err(error) => return Err(error.to_string()),
        Ok(()) => return Err("a second put was not refused".to_owned()),
    }
    let kept = run(store.get(&key))?;
    if kept == b"first" { Ok("a second put is refused".to_owned()) } else { Err("the second put won".to_owned()) }
}

fn large_put(store: &ToolStore, prefix: &str) -> Tried {
    let (key, data) = (large_key(prefix), content(LARGE_BYTES));
    run(store.put(&key, &data))?;
    let tail = LARGE_BYTES - SMALL_BYTES;
    let got = run(store.get_range(&key, tail as u64..LARGE_BYTES as u64))?;
    if got[..] == data[tail..] { Ok(format!("{} MiB", LARGE_BYTES >> 20)) } else { Err("other bytes came back".into()) }
}

fn list(store: &ToolStore, prefix: &str) -> Tried {
    let found = run(store.list(prefix))?;
    let found: Vec<_> = found.iter().map(|object| (object.key.clone(), object.size_bytes)).collect();
    let expected = [
        (large_key(prefix), LARGE_BYTES as u64),
        (format!("{prefix}once"), 5),
        (small_key(prefix), SMALL_BYTES as u64),
    ];
    if found == expected { Ok(format!("{} objects", found.len())) } else { Err(format!("found {found:?}")) }
}

fn delete(store: &ToolStore, prefix: &str) -> Tried {
    let key = format!("{prefix}once");
    run(store.delete(&key))?;
    // Deleting what is not there must succeed, alone and in a batch.
    run(store.delete(&key))?;
    run(store.delete_all(&[&key]))?;
    match block_on(store.get(&key)) {
        Err(ObjectError::NotFound(_)) => Ok("one by one and in batches".to_owned()),
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("the object is still there".to_owned()),
    }
}

fn run<T>(call: impl Future<Output = Result<T, ObjectError>>) -> Result<T, String> {
    block_on(call).map_err(|error| error.to_string())
}
