//! The one error that leaves a shard: a wire status that tells the caller what to do, and a sentence.

pub use volley_protocol::Status;

/// An operating error. `message` names the thing and the cause; `status` says what the caller should do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub status: Status,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// Classifies an I/O error of a volume store: full disks are told apart from failing ones.
    pub fn from_io(what: &str, error: &std::io::Error) -> Error {
        let status = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Status::NoSpace,
            _ => Status::Io,
        };
        Error::new(status, format!("{what}: {error}"))
    }
}
