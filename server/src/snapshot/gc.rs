//! Garbage collection of packs: which are needed, which are condemned, which may go, and which are worth rewriting.
//!
//! `docs/snapshot.md`, "Garbage collection", says which orders matter and proves that they suffice: whoever changes an
//! order of requests here changes the proof there.

pub mod collect;
pub mod condemned;
pub mod lease;
pub mod mark;
pub mod rewrite;
#[cfg(test)]
mod tests;
pub mod usage;

pub use collect::{GcOptions, GcReport, Verdict, collect};
pub use usage::{Usage, usage};

use super::{CatalogError, catalog, marker, reference_prefix};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::platform::blocking::Blocking;

/// An owner that has not come to an end for so long is dead: others finish or drop its open condemnation and the marker
/// of its rewrite. The owner gives up after half of it, so that the two never overlap.
pub const ABANDONED_MS: u64 = 6 * 3_600_000;

/// The wall clock, and numbers that nobody else has.
pub trait Clock {
    fn now_ms(&self) -> u64;
    fn random_u64(&self) -> u64;

    /// A new id: the time in its upper 48 bits, which [`id_ms`] gives back, and 80 random ones.
    fn timed_id(&self) -> u128 {
        let random = u128::from(self.random_u64()) << 64 | u128::from(self.random_u64());
        u128::from(self.now_ms()) << 80 | random >> 48
    }
}

impl Clock for Blocking {
    fn now_ms(&self) -> u64 {
        self.wall_clock_ms()
    }

    fn random_u64(&self) -> u64 {
        Platform::random_u64(self)
    }
}

/// When an id of [`Clock::timed_id`] was made.
#[must_use]
pub fn id_ms(id: u128) -> u64 {
    u64::try_from(id >> 80).expect("48 bits")
}

/// An import whose snapshot does not exist yet: running, or interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenImport {
    pub name: String,
    /// `None`: its marker is damaged.
    pub id: Option<u128>,
}

/// Imports with a marker, less those whose snapshot exists: they have ended, and only their marker is left or about to go.
///
/// # Errors
/// When the object store fails.
pub async fn open_imports<S: ObjectStore>(store: &S) -> Result<Vec<OpenImport>, CatalogError> {
    let mut open = Vec::new();
    for marker in marker::list(store).await? {
        match catalog::load(store, &marker.name).await {
            Ok(manifest) if marker.id == Some(manifest.id) => {}
            Err(e @ CatalogError::Store(_)) => return Err(e),
            _ => open.push(OpenImport { name: marker.name, id: marker.id }),
        }
    }
    Ok(open)
}

/// Ids of the nodes that need the snapshot.
///
/// # Errors
/// When the object store fails.
pub async fn references<S: ObjectStore>(store: &S, name: &str) -> Result<Vec<String>, CatalogError> {
    let prefix = reference_prefix(name);
    let objects = store.list(&prefix).await?;
    Ok(objects.iter().filter_map(|o| o.key.strip_prefix(&prefix)).map(str::to_owned).collect())
}
