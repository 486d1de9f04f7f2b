//! What the Volley command-line programs share.

pub mod cli;
pub mod load;
pub mod nbd;
pub mod units;
