//! The Volley wire protocol: a pure codec without I/O, clock or async, the same code on both sides.
//!
//! The byte layout is documented in `docs/wire.md`; change both in the same commit.

pub mod name;
pub mod status;

pub use name::name_tag;
pub use status::Status;
