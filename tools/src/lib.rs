//! What the Volley command-line programs share.

pub mod cli;
pub mod nbd;
pub mod units;
