//! The Volley wire protocol: a pure codec without I/O, clock or async, the same code on both sides.
//!
//! The byte layout is documented in `docs/wire.md`; change both in the same commit.
//!
//! A receiver keeps one buffer, calls [`decode`] in a loop and moves on by [`Frame::len`]; a server then reads
//! [`Frame::request`], a client [`Frame::outcome`] and [`Frame::body`]. A sender appends frames with the functions of
//! [`encode`] to one buffer and writes it out at once.
#![deny(missing_docs)]

pub mod address;
pub mod decode;
pub mod encode;
pub mod header;
pub mod limits;
pub mod messages;
pub mod name;
pub mod op;
pub mod status;

pub use decode::{BodyError, Decoded, Frame, Request, decode};
pub use header::{FLAG_FUA, FrameError, FrameHeader, HEADER_BYTES};
pub use messages::FetchUntil;
pub use name::name_tag;
pub use op::Op;
pub use status::Status;
