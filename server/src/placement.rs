//! Where new volumes go: a pure function from what the volume stores are like now to one store for each volume.
//!
//! A store's load in a dimension is relative: 1.0 is what it would have if the whole batch were spread perfectly.
//!
//! | dimension | what is compared |
//! |---|---|
//! | space | used and promised part of the filesystem; a promise counts by the over-commit ratio |
//! | volumes | volumes there, for each free byte |
//! | hydration | seconds until everything still to come is hydrated at the store's share, or the part of it that is promised |
//! | guests | bytes per second that guests write now |
//!
//! The four make one figure, their weighted root mean square, so that the dimension that stands out counts most. Each volume
//! goes where that figure is smallest *with* it. Three things come before: a store that is failing or full gets nothing,
//! a batch that is to survive the loss of a domain is dealt evenly over the domains, and no store is promised more
//! hydration than its share while another has some left. Image data that a store shares by extents costs it no hydration: that
//! is all there is to locality, because the chunk cache belongs to the node and is as near to one store as to the other.
//!
//! Capacity is a hard limit: what is promised and not yet written is at most the free space times the over-commit ratio.
//! A batch that does not fit as a whole is refused as a whole. Same inputs, same decision.

mod decide;
mod explain;
mod overcommit;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use decide::place;
pub use overcommit::{OVERCOMMIT_MAX, Overcommit};

/// Taken for the hydration bandwidth of a store that has no limit: an ordinary local disk.
pub const BANDWIDTH_ASSUMED: u64 = 1 << 30;
/// Never promised: a filesystem without any free space fails more than writes.
pub const RESERVE_BYTES_MAX: u64 = 1 << 30;
/// Of small filesystems one part in so many is held back instead.
const RESERVE_PART: u64 = 50;

/// A filesystem; stores on the same one share its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
}

impl Filesystem {
    /// Free bytes that may be promised.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.free_bytes.saturating_sub((self.capacity_bytes / RESERVE_PART).min(RESERVE_BYTES_MAX))
    }
}

/// A volume store as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreState {
    pub label: Arc<str>,
    /// What fails together with it.
    pub domain: Arc<str>,
    /// Index of its filesystem.
    pub filesystem: usize,
    pub overcommit: Overcommit,
    pub volumes: u64,
    /// Device sizes of its volumes.
    pub volume_bytes: u64,
    /// What their files occupy.
    pub allocated_bytes: u64,
    /// What hydration may write per second; `None`: no limit.
    pub hydration_bandwidth: Option<u64>,
    /// Rates of its volumes that are not hydrated yet.
    pub promised_bandwidth: u64,
    /// What background hydration still has to write.
    pub backlog_bytes: u64,
    /// What guests wrote per second lately.
    pub guest_write_bandwidth: u64,
    /// Files of this store can share extents, so an image's data is written once.
    pub shares_extents: bool,
    /// Bytes of the image that it has already; counts where extents are shared.
    pub image_bytes: u64,
    /// Why it takes no volumes.
    pub failure: Option<String>,
}

/// How a batch is spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// Over all stores, as their load allows.
    #[default]
    Store,
    /// Evenly over the failure domains, and inside of each as the load of its stores allows.
    Domain,
}

/// Equal volumes that are to be created together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub count: u64,
    /// Device size of each.
    pub volume_bytes: u64,
    /// What background hydration will write into each.
    pub data_bytes: u64,
    /// What each is promised per second; 0: nothing.
    pub bandwidth: u64,
    pub spread: Spread,
    /// Label of the only store that will do.
    pub store: Option<Arc<str>>,
    /// In place of the stores' own ratios.
    pub overcommit: Option<Overcommit>,
}

/// Loads of a store relative to a perfect spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Load {
    pub total: f64,
    pub space: f64,
    pub volumes: f64,
    pub hydration: f64,
    pub guests: f64,
}

/// Why a store gets none of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skip {
    OtherStoreAsked,
    Failing(String),
    /// Not even one more volume fits; so much is missing.
    Full {
        short_bytes: u128,
    },
}

/// What a batch means to one store.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub label: Arc<str>,
    pub domain: Arc<str>,
    pub skipped: Option<Skip>,
    /// Volumes of the batch that it gets.
    pub volumes: u64,
    /// Such volumes it could take alone before, and still after.
    pub room_before: u64,
    pub room_after: u64,
    pub before: Load,
    pub after: Load,
    pub overcommit: Overcommit,
    /// It is promised more hydration than its share.
    pub bandwidth_exceeded: bool,
}

/// Why nothing of a batch is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No store takes volumes, whatever their size.
    NoStore,
    /// Only so many fit.
    NoSpace { fit: u64 },
}

/// A decision with its reasons.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In the order of the stores.
    pub verdicts: Vec<Verdict>,
    /// Index of the store of each volume of the batch.
    pub outcome: Result<Vec<u32>, Refusal>,
}
