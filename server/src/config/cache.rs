//! The chunk cache's keys.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;
use crate::units::{ByteSize, Span};

/// Below this a shard could not even hold the chunks in flight.
pub const CACHE_RAM_BYTES_MIN: u64 = 8 << 20;
/// What was not asked for in an hour is no longer a wave's.
const PIN_WAVES_MAX: Duration = Duration::from_secs(3600);
/// Below this a shard's part could not hold the chunks of one large read.
const CACHE_DISK_BYTES_MIN: u64 = 64 << 20;

/// The chunk cache.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// RAM for chunks of the whole node, split evenly over the shards.
    pub ram_bytes: ByteSize,
    /// What guests of a batch of volumes ask for stays in RAM until none has asked for so long; 0s: not at all.
    pub pin_waves: Span,
    /// Disk for chunks of the whole node, split evenly over the shards; 0: no disk cache.
    pub disk_bytes: ByteSize,
    /// Where the disk cache lies; `<data>/cache` if not given.
    pub dir: Option<PathBuf>,
}

impl CacheConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let fail = |message: String| Err(ConfigError(message));
        if self.ram_bytes.0 < CACHE_RAM_BYTES_MIN {
            return fail(format!("cache.ram_bytes: {} is less than {}", self.ram_bytes, ByteSize(CACHE_RAM_BYTES_MIN)));
        }
        if self.pin_waves.0 > PIN_WAVES_MAX {
            return fail(format!("cache.pin_waves: {} is more than {}", self.pin_waves, Span(PIN_WAVES_MAX)));
        }
        if self.disk_bytes.0 != 0 && self.disk_bytes.0 < CACHE_DISK_BYTES_MIN {
            let min = ByteSize(CACHE_DISK_BYTES_MIN);
            return fail(format!("cache.disk_bytes: {} is less than {min}, and not 0", self.disk_bytes));
        }
        if self.dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
            return fail("cache.dir: the directory of the disk cache must not be empty".to_string());
        }
        Ok(())
    }
}

impl Default for CacheConfig {
    fn default() -> CacheConfig {
        CacheConfig {
            ram_bytes: ByteSize(1 << 30),
            pin_waves: Span(Duration::from_secs(60)),
            disk_bytes: ByteSize(0),
            dir: None,
        }
    }
}
