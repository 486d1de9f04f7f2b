//! The backend that was chosen at the start, as one type.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::dir::DirStore;
use super::s3::transport::HttpTransport;
use super::s3::{Environment, RequestPolicy, S3Config, S3Settings, S3Store};
use super::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore, ObjectStoreUrl};
use crate::platform::Platform;

/// What to open, complete: a URL with the settings that belong to it.
#[derive(Clone, Debug)]
pub enum StoreChoice {
    Dir(PathBuf),
    S3(Box<S3Settings>),
}

impl StoreChoice {
    /// # Errors
    /// One line that names the setting and what is wrong with it.
    pub fn new(url: &ObjectStoreUrl, config: &S3Config, env: &Environment) -> Result<StoreChoice, String> {
        match url {
            ObjectStoreUrl::File(path) => Ok(StoreChoice::Dir(path.clone())),
            ObjectStoreUrl::S3(location) => match S3Settings::resolve(location, config, env) {
                Ok(settings) => Ok(StoreChoice::S3(Box::new(settings))),
                Err(why) => Err(format!("object store {url}: {why}")),
            },
        }
    }

    /// What the transport must know: the authorities to trust, and the number of connections.
    #[must_use]
    pub fn http_settings(&self) -> (Option<&Path>, usize) {
        match self {
            StoreChoice::Dir(_) => (None, 1),
            StoreChoice::S3(settings) => (settings.ca_file.as_deref(), settings.connections_max),
        }
    }

    /// The store, not asked anything yet: see [`AnyStore::check`].
    ///
    /// # Errors
    /// `Fatal` where the settings make no store.
    pub fn store<P: Platform, T: HttpTransport>(
        &self,
        platform: &P,
        http: impl FnOnce() -> Result<T, String>,
        policy: RequestPolicy,
    ) -> Result<AnyStore<P, T>, ObjectError> {
        match self {
            StoreChoice::Dir(root) => Ok(AnyStore::Dir(DirStore::at(platform.clone(), root.clone()))),
            StoreChoice::S3(settings) => {
                let http = http().map_err(ObjectError::Fatal)?;
                let store = S3Store::new(platform.clone(), http, (**settings).clone(), policy)?;
                Ok(AnyStore::S3(store))
            }
        }
    }
}

/// One of the backends. Clones are the same store.
pub enum AnyStore<P, T> {
    Dir(DirStore<P>),
    S3(S3Store<P, T>),
}

impl<P: Clone, T> Clone for AnyStore<P, T> {
    fn clone(&self) -> AnyStore<P, T> {
        match self {
            AnyStore::Dir(store) => AnyStore::Dir(store.clone()),
            AnyStore::S3(store) => AnyStore::S3(store.clone()),
        }
    }
}

/// The same call on whichever backend it is.
macro_rules! on_either {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            AnyStore::Dir($store) => $call,
            AnyStore::S3($store) => $call,
        }
    };
}

impl<P: Platform, T: HttpTransport> AnyStore<P, T> {
    /// Asks the store once whether it is there, lets us in, and is ours.
    ///
    /// # Errors
    /// One line that says where, why and what to do.
    pub async fn check(&self) -> Result<(), ObjectError> {
        on_either!(self, store => store.check().await)
    }
}

impl<P: Platform, T: HttpTransport> ObjectStore for AnyStore<P, T> {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        on_either!(self, store => store.get(key).await)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        on_either!(self, store => store.get_range(key, range).await)
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        on_either!(self, store => store.put(key, data).await)
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        on_either!(self, store => store.put_if_absent(key, data).await)
    }

    fn puts_once(&self) -> bool {
        on_either!(self, store => store.puts_once())
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        on_either!(self, store => store.list(prefix).await)
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        on_either!(self, store => store.delete(key).await)
    }

    async fn delete_all(&self, keys: &[&str]) -> Result<(), ObjectError> {
        on_either!(self, store => store.delete_all(keys).await)
    }
}
