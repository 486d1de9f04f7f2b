//! What the Volley command-line programs share.

pub mod units;
