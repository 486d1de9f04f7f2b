//! Nodes and tools on a real S3 server, directly and through a proxy that breaks things.
//!
//! Server and proxy live in the test's process, on free ports of 127.0.0.1, and end with it.
#![allow(clippy::disallowed_methods)] // The test stands outside of the node, as a client and an operator do.

mod clock;
mod damage;
mod faults;
mod lab;
mod names;
mod proxy;
mod refusals;
#[allow(dead_code, reason = "the end-to-end tests use all of it")]
mod server;
mod tls;
mod whole;
