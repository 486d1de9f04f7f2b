//! The one error of the client: a kind that says what to do, the server's status if it gave one, and a sentence.

use volley_protocol::Status;

/// What the caller should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The deadline passed. Whether a write took effect is unknown; the volume may be used on.
    Timeout,
    /// The first connection could not be made: check the address and the server.
    Unavailable,
    /// The server can't do it now (object store away, its own deadline passed): retry later.
    Retry,
    /// Another host attached the volume: stop using it. Every later request fails alike.
    Fenced,
    /// No such volume or snapshot: look it up again.
    NotFound,
    /// Malformed, misaligned or out of range: fix the caller.
    Invalid,
    /// Contradicts the present state, e.g. the name is taken.
    Conflict,
    /// The volume store is full: free space, then retry.
    NoSpace,
    /// The store failed, data are corrupt, or acknowledged writes could not be repeated on a restarted server: an operator is
    /// needed.
    Storage,
    /// The two sides do not speak the same protocol: upgrade one of them.
    Protocol,
    /// The volume was detached or the client is gone.
    Closed,
    /// A bug in the server or in this crate: report it.
    Bug,
}

/// An error of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What to do.
    pub kind: ErrorKind,
    /// The status the server answered, if it was the server that refused.
    pub status: Option<Status>,
    /// What happened, naming the thing.
    pub message: String,
}

/// Result of the client's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, status: None, message: message.into() }
    }

    pub(crate) fn from_status(status: Status, message: String) -> Error {
        let kind = match status {
            Status::Unsupported => ErrorKind::Protocol,
            Status::UnknownVolume | Status::UnknownSnapshot => ErrorKind::NotFound,
            Status::NameTaken | Status::Conflict => ErrorKind::Conflict,
            Status::StaleGeneration => ErrorKind::Fenced,
            Status::NotAttached => ErrorKind::Closed,
            Status::Invalid | Status::OutOfRange | Status::Misaligned | Status::TooLarge => ErrorKind::Invalid,
            Status::DeadlineExceeded | Status::ObjectStore | Status::Busy | Status::ShuttingDown => ErrorKind::Retry,
            Status::Corrupt | Status::Io => ErrorKind::Storage,
            Status::NoSpace => ErrorKind::NoSpace,
            Status::Ok | Status::Internal => ErrorKind::Bug,
        };
        Error { kind, status: Some(status), message }
    }

    /// Whether the request should simply be sent again after a pause, without troubling the caller.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self.status, Some(Status::Busy | Status::ShuttingDown))
    }
}
