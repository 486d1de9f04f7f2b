//! NBD server of `volley-agent`: every volume of a node is an export under its own name. docs/nbd.md says what it speaks.
//!
//! What speaks the protocol is sans-I/O and pure: [`wire`] (all numbers), [`negotiation`] and [`request`] (bytes to
//! meaning), [`reply`] (meaning to bytes). What touches sockets is thin: [`listen`], [`server`], [`handshake`],
//! [`transmission`]. Between them and the volumes stand the [`backend`] trait (so that all of it is tested against
//! [`memory`]; the agent serves [`volumes`]), [`device`] (requests of any alignment over a device of 512-byte blocks) and [`exports`] (connections to
//! one export share one attachment).

pub mod backend;
pub mod device;
pub mod exports;
mod handshake;
pub mod listen;
pub mod memory;
pub mod negotiation;
mod range_lock;
pub mod reply;
pub mod request;
pub mod server;
mod transmission;
pub mod volumes;
pub mod wire;
