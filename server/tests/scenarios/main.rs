//! Scenarios on real shards and the simulated platform, by what they are about. One program: the shards are compiled for it once.

mod base;
mod boot;
mod isolation;
mod readahead;
mod shard;
mod snapshots;
mod support;
mod transfer;
mod wave;
