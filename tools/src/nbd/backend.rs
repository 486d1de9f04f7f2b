//! The seam between the NBD code and what it serves: volumes of a node in the agent, memory in tests.

use std::fmt;
use std::future::Future;

use bytes::Bytes;

/// Result of everything a backend does.
pub type Result<T> = std::result::Result<T, ExportError>;

/// A set of named exports.
pub trait Backend: Send + Sync + 'static {
    /// An attached export.
    type Export: Export;

    /// Names of all exports, in order.
    fn names(&self) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Describes an export without attaching it: whoever uses it elsewhere is not disturbed.
    fn describe(&self, name: &str) -> impl Future<Output = Result<Description>> + Send;

    /// Attaches an export for writing. Whoever had it attached elsewhere is fenced off.
    fn attach(&self, name: &str) -> impl Future<Output = Result<Self::Export>> + Send;
}

/// What a client is told about an export before it uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Size of the device, a multiple of 512.
    pub size_bytes: u64,
    /// One line for people.
    pub text: String,
}

/// An attached block device of 512-byte blocks. Offsets and lengths are in bytes, multiples of 512, inside the device.
pub trait Export: Send + Sync + 'static {
    /// Size of the device, a multiple of 512.
    fn size_bytes(&self) -> u64;

    /// Exactly `len` bytes from `offset`.
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = Result<Bytes>> + Send;

    /// Writes `data`; durable before it returns if `fua`.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> impl Future<Output = Result<()>> + Send;

    /// Makes every write that has returned durable.
    fn flush(&self) -> impl Future<Output = Result<()>> + Send;

    /// The range is no longer needed; it reads as zeroes afterwards.
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + Send;

    /// The range becomes zeroes; durable before it returns if `fua`.
    fn write_zeroes(&self, offset: u64, len: u64, fua: bool) -> impl Future<Output = Result<()>> + Send;

    /// Brings the range into the volume ahead of everything that waits in the background.
    fn prefetch(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + Send;

    /// Extents from `offset` on, at least one, of at most `len` bytes together.
    fn extents(&self, offset: u64, len: u64) -> impl Future<Output = Result<Vec<Extent>>> + Send;

    /// Gives the export up. Writes that were not flushed may be lost by a later power cut, not by this.
    fn detach(&self) -> impl Future<Output = Result<()>> + Send;
}

/// A run of bytes in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length, never zero.
    pub len_bytes: u64,
    /// Reads need no object store.
    pub resident: bool,
    /// Reads as zeroes and takes no storage.
    pub hole: bool,
}

/// Why a backend refused, in the terms that decide what an NBD client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No export of that name.
    UnknownExport,
    /// The request makes no sense to the backend.
    Invalid,
    /// No space left.
    NoSpace,
    /// The attachment is over (fenced by another host, volume deleted): this connection has no future.
    Gone,
    /// Everything else, deadlines included; the export keeps working.
    Io,
}

/// An error of a backend with its text for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportError {
    /// What to do about it.
    pub kind: ErrorKind,
    /// One line that names the cause.
    pub message: String,
}

impl ExportError {
    /// An error of `kind`, explained by `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> ExportError {
        ExportError { kind, message: message.into() }
    }
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ExportError {}
