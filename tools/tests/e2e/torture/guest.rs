//! A guest of our own over NBD: one connection, one request at a time, nothing hidden behind a library's retries.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use volley_tools::nbd::wire::{self, command, command_flag, option};

/// No request takes longer, whatever happens to the servers: beyond every deadline of the tests.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(100);

/// Why a request has no good answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The server answered with this errno.
    Errno(u32),
    /// The connection ended first.
    Gone,
}

pub(crate) struct NbdGuest {
    stream: UnixStream,
    cookie: u64,
}

impl NbdGuest {
    /// Connects and opens `export`.
    pub(crate) fn connect(socket: &Path, export: &str) -> std::io::Result<NbdGuest> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        // Fixed newstyle without padding, then EXPORT_NAME: answered by size and flags.
        stream.write_all(&3u32.to_be_bytes())?;
        stream.write_all(&wire::OPTION_MAGIC.to_be_bytes())?;
        stream.write_all(&option::EXPORT_NAME.to_be_bytes())?;
        stream.write_all(&(export.len() as u32).to_be_bytes())?;
        stream.write_all(export.as_bytes())?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        Ok(NbdGuest { stream, cookie: 0 })
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
        self.request(command::READ, 0, offset, len, &[])?;
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data).map_err(gone)?;
        Ok(data)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), Failure> {
        let flags = if fua { command_flag::FUA } else { 0 };
        self.request(command::WRITE, flags, offset, data.len(), data)
    }

    pub(crate) fn zero(&mut self, offset: u64, len: usize) -> Result<(), Failure> {
        self.request(command::WRITE_ZEROES, 0, offset, len, &[])
    }

    pub(crate) fn trim(&mut self, offset: u64, len: usize) -> Result<(), Failure> {
        self.request(command::TRIM, 0, offset, len, &[])
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.request(command::FLUSH, 0, 0, 0, &[])
    }

    fn request(&mut self, kind: u16, flags: u16, offset: u64, len: usize, data: &[u8]) -> Result<(), Failure> {
        self.cookie += 1;
        let mut bytes = Vec::with_capacity(wire::REQUEST_HEADER_BYTES + data.len());
        bytes.extend_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).map_err(gone)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).map_err(gone)?;
        assert_eq!(reply[..4], wire::SIMPLE_REPLY_MAGIC.to_be_bytes(), "no simple reply");
        assert_eq!(reply[8..], self.cookie.to_be_bytes(), "the answer to another request");
        match u32::from_be_bytes(reply[4..8].try_into().expect("four bytes")) {
            0 => Ok(()),
            errno => Err(Failure::Errno(errno)),
        }
    }
}

fn gone(error: std::io::Error) -> Failure {
    assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer within {ANSWER_TIMEOUT:?}");
    Failure::Gone
}
