//! The Volley storage server: everything of a node as a library. `volleyd` only wires it.

pub mod bootset;
pub mod bootstrap;
pub mod budget;
pub mod cache;
pub mod check;
pub mod config;
pub mod connection;
pub mod control;
pub mod datadir;
pub mod error;
pub mod histogram;
pub mod import;
pub mod journal;
pub mod limits;
pub mod metrics;
pub mod mutation;
pub mod notify;
pub mod object_store;
pub mod parallel;
pub mod placement;
pub mod platform;
pub mod shard;
pub mod snapshot;
pub mod transfer;
pub mod types;
pub mod units;
