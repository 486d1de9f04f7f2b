//! How a node uses the object store.

use serde::Deserialize;

use super::{Bandwidth, ConfigError};
use crate::transfer::RetryPolicy;
use crate::units::ByteSize;

/// Further ahead than a pack is long nothing is gained.
pub const READAHEAD_BYTES_MAX: u64 = 64 << 20;

/// Budgets of the whole node, of which every shard has an equal share, and what requests cost.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransferConfig {
    /// `false`: every volume fetches for itself and nothing is cached. Only to measure what sharing saves.
    pub share: bool,
    /// Bytes received per second. Guests' reads and priority fetches go into debt that background hydration pays.
    pub bandwidth: Bandwidth,
    /// GETs per second, likewise; 0 is unlimited.
    pub gets_per_second: u64,
    /// Of 100 GETs that guests wait for so many may be sent a second time when they are slow; 0: none.
    pub hedge_percent: u32,
    /// How far ahead of a guest that reads in order absent chunks are fetched; 0: not at all.
    pub readahead_bytes_max: ByteSize,
    /// Price of 1,000,000 GETs in any unit of money (cents, say): the ledger multiplies by it.
    pub price_per_million_gets: u64,
}

impl TransferConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.hedge_percent > 100 {
            return Err(ConfigError(format!("transfer.hedge_percent: {} is more than 100", self.hedge_percent)));
        }
        if self.readahead_bytes_max.0 > READAHEAD_BYTES_MAX {
            let (given, most) = (self.readahead_bytes_max, ByteSize(READAHEAD_BYTES_MAX));
            return Err(ConfigError(format!("transfer.readahead_bytes_max: {given} is more than {most}")));
        }
        Ok(())
    }
}

impl Default for TransferConfig {
    fn default() -> TransferConfig {
        TransferConfig {
            share: true,
            bandwidth: Bandwidth(None),
            gets_per_second: 0,
            hedge_percent: RetryPolicy::default().hedge_percent,
            readahead_bytes_max: ByteSize(8 << 20),
            price_per_million_gets: 0,
        }
    }
}
