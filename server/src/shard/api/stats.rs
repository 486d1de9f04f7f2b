//! What a shard counts.

use crate::histogram::HistogramCounts;

use super::StoreSharing;

/// A shard's part of a volume store: as in [`ShardStats`], which gets the label of the store too.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct StoreStats {
    pub store: String,
    pub counters: Vec<(&'static str, &'static str, u64)>,
    pub gauges: Vec<(&'static str, &'static str, u64)>,
    pub histograms: Vec<(&'static str, &'static str, HistogramCounts)>,
}

/// Counters of a shard since its start, and gauges of now; the source of `/metrics`. Labels are added by the control thread.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct ShardStats {
    pub shard: usize,
    pub volumes: u64,
    pub volumes_hydrated: u64,
    pub volumes_attached: u64,
    pub connections: u64,
    /// Name, help text and value of each monotonic counter, e.g. ("guest_reads_total", "...", 17).
    pub counters: Vec<(&'static str, &'static str, u64)>,
    /// Name, help text and value of each gauge, e.g. ("cache_ram_bytes", "...", 1048576).
    pub gauges: Vec<(&'static str, &'static str, u64)>,
    /// Name, help text and counts of each histogram of durations.
    pub histograms: Vec<(&'static str, &'static str, HistogramCounts)>,
    /// What this shard's volumes share in each store, in the order of the configuration.
    pub sharing: Vec<StoreSharing>,
    /// The same of each volume store.
    pub stores: Vec<StoreStats>,
    /// Snapshot names that volumes of this shard still need (not hydrated).
    pub snapshots_needed: Vec<String>,
    /// Recent events that name causes, oldest first, at most 64.
    pub events: Vec<String>,
}
