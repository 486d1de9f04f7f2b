//! End-to-end tests: the real binaries, driven by clients we did not write, killed and restarted.
//!
//! One test binary, so that it links once. Every test has its own [`harness::Site`]: an object store, a node's data and
//! sockets in temporary folders that go away with it, and processes that die with it.

mod batch;
mod batches;
mod blocks;
mod boot;
mod bootset;
mod crash;
mod disk;
mod errors;
mod faults;
mod foreign;
mod gc;
mod harness;
mod hostile;
mod image_file;
mod images;
mod ledger;
mod lifecycle;
mod load;
mod one_get;
mod proof;
mod recovery;
mod reflink;
mod s3;
mod scrub;
mod snapshots;
mod storm;
mod torture;
