//! The NBD server against clients we did not write (libnbd's tools, QEMU's), and against hostile bytes.
//!
//! The exports are in memory, so these tests need no node. A test whose client is not installed says SKIPPED; with
//! `CI=true` in the environment it fails instead.

mod foreign;
mod harness;
mod hostile;
mod own;
