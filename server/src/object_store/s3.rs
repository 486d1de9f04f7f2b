//! Objects in a bucket of an S3-compatible service, `s3://bucket/prefix`.
//!
//! Everything here is plain: requests are signed by `rusty-s3`, which does no I/O, and go out through the seam of
//! [`transport`]. What a store must offer is in `docs/object-store.md`. Keys are those of [`ObjectStore`], with the prefix put
//! before them in the bucket.

mod credentials;
mod failure;
mod get;
mod listing;
mod multipart;
mod open;
mod profile;
mod put;
mod request;
mod settings;
mod sources;
#[cfg(test)]
mod tests;
pub mod transport;
mod xml;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use rusty_s3::{Bucket, UrlStyle};

use super::url::S3Location;
use super::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore, check_key};
use crate::platform::Platform;
use credentials::Provider;
pub use open::TRIAL_PREFIX;
use request::Call;
pub use settings::{Addressing, ConditionalPut, Environment, S3Config, S3Settings};
use transport::{HttpTransport, Method};

/// How often requests are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestPolicy {
    /// Attempts of a ranged read.
    pub range_attempts: u32,
    /// Attempts of everything else.
    pub attempts: u32,
}

impl RequestPolicy {
    /// On a shard ranged reads are retried by `transfer`, which counts them and slows down.
    pub const SHARD: RequestPolicy = RequestPolicy { range_attempts: 1, attempts: 3 };
    /// A tool has nobody else to retry for it.
    pub const TOOL: RequestPolicy = RequestPolicy { range_attempts: 6, attempts: 6 };
}

/// A bucket, or the part of it under a prefix. Clones are the same store.
pub struct S3Store<P, T> {
    inner: Arc<Inner<P, T>>,
}

struct Inner<P, T> {
    platform: P,
    transport: T,
    settings: S3Settings,
    bucket: Bucket,
    /// Empty, or ends with a slash.
    prefix: String,
    /// `s3://bucket/prefix at endpoint`, the beginning of every error line.
    place: String,
    policy: RequestPolicy,
    credentials: Provider,
    /// What is known of conditional puts, a [`put::Conditional`].
    conditional: AtomicU8,
}

impl<P, T> Clone for S3Store<P, T> {
    fn clone(&self) -> S3Store<P, T> {
        S3Store { inner: self.inner.clone() }
    }
}

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    /// A store that has not been asked anything yet; see [`S3Store::check`].
    ///
    /// # Errors
    /// `Fatal` where endpoint and bucket make no URL.
    pub fn new(platform: P, transport: T, settings: S3Settings, policy: RequestPolicy) -> Result<Self, ObjectError> {
        let S3Location { bucket, prefix } = &settings.location;
        let style = if settings.path_style { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let place = format!("{} at {}", settings.location, settings.endpoint);
        let endpoint = settings.endpoint.parse();
        let endpoint = endpoint.map_err(|e| ObjectError::Fatal(format!("{place}: the endpoint is no URL: {e}")))?;
        let bucket = Bucket::new(endpoint, style, bucket.clone(), settings.region.clone());
        let bucket = bucket
            .map_err(|e| ObjectError::Fatal(format!("{place}: no bucket URL: {e}: correct endpoint or addressing")))?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let credentials = Provider::new(settings.credentials.clone());
        let conditional = AtomicU8::new(put::Conditional::at_start(settings.conditional_put) as u8);
        let inner = Inner { platform, transport, settings, bucket, prefix, place, policy, credentials, conditional };
        Ok(S3Store { inner: Arc::new(inner) })
    }

    /// `s3://bucket/prefix at endpoint`.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.inner.place
    }

    #[must_use]
    pub fn transport(&self) -> &T {
        &self.inner.transport
    }

    fn full_key(&self, key: &str) -> Result<String, ObjectError> {
        check_key(key)?;
        Ok(format!("{}{key}", self.inner.prefix))
    }

    /// The key as the rest of Volley knows it.
    fn own_key<'a>(&self, full: &'a str) -> &'a str {
        full.strip_prefix(self.inner.prefix.as_str()).unwrap_or(full)
    }
}

impl<P: Platform, T: HttpTransport> ObjectStore for S3Store<P, T> {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        let key = self.full_key(key)?;
        Ok(self.get_whole(&key).await?)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        let key = self.full_key(key)?;
        Ok(self.get_part(&key, range).await?)
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        let key = self.full_key(key)?;
        Ok(self.put_object(&key, data).await?)
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        let key = self.full_key(key)?;
        Ok(self.put_new(&key, data).await?)
    }

    fn puts_once(&self) -> bool {
        self.honours_conditional_put() == Some(true)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        Ok(self.list_all(prefix).await?)
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        let key = self.full_key(key)?;
        let call = Call::new(Method::Delete, Some(&key), "delete", "s3:DeleteObject");
        match self.send_patiently(&call).await {
            Ok(_) => Ok(()),
            Err(failure) if matches!(failure.error, ObjectError::NotFound(_)) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn delete_all(&self, keys: &[&str]) -> Result<(), ObjectError> {
        self.delete_batches(keys).await
    }
}
