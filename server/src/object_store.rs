//! The object store seam: immutable objects by key. Backends are chosen at start and used on the shard.

pub mod any;
pub mod dir;
pub mod s3;
pub mod url;

pub use any::AnyStore;
pub use url::ObjectStoreUrl;

use std::future::Future;
use std::ops::{Deref, Range};

/// Why an object request failed, in the three classes of retry, corrupt and fatal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    #[error("{0}: no such object")]
    NotFound(String),
    #[error("{0}: object exists already")]
    AlreadyExists(String),
    /// The object is shorter than the range asked for, or fails a checksum of the store.
    #[error("{0}")]
    Corrupt(String),
    /// May succeed later: an unreachable store, an error of its own.
    #[error("{0}")]
    Retry(String),
    /// May succeed later, if we ask less: the store asks to slow down, or did not answer in time.
    #[error("{0}")]
    SlowDown(String),
    /// Will not succeed by itself: denied, misconfigured.
    #[error("{0}")]
    Fatal(String),
}

impl ObjectError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, ObjectError::Retry(_) | ObjectError::SlowDown(_))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    pub key: String,
    pub size_bytes: u64,
}

/// Bytes of an object as they arrived: a part of a larger buffer, so that cutting it out copies nothing.
#[derive(Clone, Debug)]
pub struct ObjectBytes {
    buffer: Vec<u8>,
    part: Range<usize>,
}

impl ObjectBytes {
    /// `part` of `buffer`; `None` where it does not lie inside.
    #[must_use]
    pub fn part(buffer: Vec<u8>, part: Range<usize>) -> Option<ObjectBytes> {
        buffer.get(part.clone())?;
        Some(ObjectBytes { buffer, part })
    }
}

impl From<Vec<u8>> for ObjectBytes {
    fn from(buffer: Vec<u8>) -> ObjectBytes {
        let part = 0..buffer.len();
        ObjectBytes { buffer, part }
    }
}

impl From<ObjectBytes> for Vec<u8> {
    fn from(bytes: ObjectBytes) -> Vec<u8> {
        let ObjectBytes { mut buffer, part } = bytes;
        buffer.truncate(part.end);
        buffer.drain(..part.start);
        buffer
    }
}

impl Deref for ObjectBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.part.clone()]
    }
}

/// Keys are `/`-separated paths of `[A-Za-z0-9._-]` components. Objects are immutable once put, except by `put`.
pub trait ObjectStore: Clone + 'static {
    fn get(&self, key: &str) -> impl Future<Output = Result<Vec<u8>, ObjectError>>;
    /// Exactly `range.end - range.start` bytes, or `Corrupt` if the object is shorter.
    fn get_range(&self, key: &str, range: Range<u64>) -> impl Future<Output = Result<ObjectBytes, ObjectError>>;
    /// Durable and atomic when it returns: a reader sees the whole object or none.
    fn put(&self, key: &str, data: &[u8]) -> impl Future<Output = Result<(), ObjectError>>;
    /// Like `put`, but exactly one of any number of racing callers succeeds.
    fn put_if_absent(&self, key: &str, data: &[u8]) -> impl Future<Output = Result<(), ObjectError>>;
    /// Whether `put_if_absent` keeps its word. A store without conditional puts looks first, so that two racing callers
    /// may both succeed. Known after the first `put_if_absent` of a small object.
    fn puts_once(&self) -> bool {
        true
    }
    /// Objects whose key starts with `prefix`, sorted by key.
    fn list(&self, prefix: &str) -> impl Future<Output = Result<Vec<ObjectMeta>, ObjectError>>;
    /// Deleting an absent object succeeds.
    fn delete(&self, key: &str) -> impl Future<Output = Result<(), ObjectError>>;
    /// Deletes all of them, in any order; after an error some are left.
    fn delete_all(&self, keys: &[&str]) -> impl Future<Output = Result<(), ObjectError>> {
        async move {
            for key in keys {
                self.delete(key).await?;
            }
            Ok(())
        }
    }
}

const KEY_BYTES_MAX: usize = 512;

/// Checks that a key is a `/`-separated path of `[A-Za-z0-9._-]` components that don't start with a dot.
fn check_key(key: &str) -> Result<(), ObjectError> {
    let component = |c: &str| {
        !c.is_empty() && !c.starts_with('.') && c.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    if key.len() > KEY_BYTES_MAX || !key.split('/').all(component) {
        return Err(ObjectError::Fatal(format!("{key:?} is not an object key")));
    }
    Ok(())
}
