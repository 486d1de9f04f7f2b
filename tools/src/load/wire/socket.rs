//! Connections of the generator: greeted and attached with blocking calls, then not blocking any more.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mio::Interest;
use mio::event::Source;
use volley_protocol::encode::{self, EncodeBody};
use volley_protocol::limits::{VERSION_MAX, VERSION_MIN};
use volley_protocol::messages::{AttachReply, Body, Hello, HelloReply};
use volley_protocol::{Decoded, Frame, address, decode};

use crate::load::CLIENT_NAME;

/// A blocking connection that is greeted.
pub struct Greeted {
    stream: Stream,
    /// Where each shard listens.
    pub shards: Vec<String>,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Greeted {
    /// Connects to `host:port` or `unix:PATH` and says HELLO.
    ///
    /// # Errors
    /// A sentence that names the address.
    pub fn connect(server: &str, limit: Duration) -> Result<Greeted, String> {
        let failed = |error: io::Error| format!("can't reach the node at {server}: {error}");
        let stream = match server.strip_prefix("unix:") {
            Some(path) => {
                let stream = UnixStream::connect(path).map_err(failed)?;
                stream.set_read_timeout(Some(limit)).map_err(failed)?;
                Stream::Unix(stream)
            }
            None => {
                let stream = TcpStream::connect(server).map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                stream.set_read_timeout(Some(limit)).map_err(failed)?;
                Stream::Tcp(stream)
            }
        };
        let mut greeted = Greeted { stream, shards: Vec::new() };
        let client = CLIENT_NAME.to_owned();
        let hello = Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, features: 0, client };
        let shards = greeted.ask(&hello, |frame| frame.owned_body::<HelloReply>().map(|reply| reply.shards))?;
        greeted.shards = shards.iter().map(|entry| address::resolve(server, entry)).collect::<Result<_, _>>()?;
        Ok(greeted)
    }

    /// What ATTACH or LOOKUP answers.
    ///
    /// # Errors
    /// A sentence: what the server said, or how the connection failed.
    pub fn volume<T: EncodeBody + Body>(&mut self, request: &T) -> Result<AttachReply, String> {
        self.ask(request, |frame| frame.owned_body::<AttachReply>())
    }

    fn ask<T: EncodeBody, R>(
        &mut self,
        request: &T,
        read: impl Fn(&Frame<'_>) -> Result<R, volley_protocol::BodyError>,
    ) -> Result<R, String> {
        let mut bytes = Vec::new();
        encode::request(&mut bytes, 0, 0, request, &[]);
        let failed = |error: io::Error| format!("the connection failed: {error}");
        self.stream.write_all(&bytes).map_err(failed)?;
        let (mut input, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            if let Decoded::Frame(frame) = decode(&input).map_err(|error| error.to_string())? {
                frame.outcome().map_err(|error| error.message)?;
                return read(&frame).map_err(|error| error.message);
            }
            match self.stream.read(&mut piece).map_err(failed)? {
                0 => return Err("the server closed the connection".to_owned()),
                len => input.extend_from_slice(&piece[..len]),
            }
        }
    }

    /// The same connection, not blocking any more.
    ///
    /// # Errors
    /// A sentence when the kernel refuses.
    pub fn unblocked(self) -> Result<Socket, String> {
        let failed = |error: io::Error| format!("the connection failed: {error}");
        Ok(match self.stream {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(true).map_err(failed)?;
                Socket::Tcp(mio::net::TcpStream::from_std(stream))
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(true).map_err(failed)?;
                Socket::Unix(mio::net::UnixStream::from_std(stream))
            }
        })
    }
}

impl Stream {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
        }
    }
}

/// A connection that does not block.
pub enum Socket {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
}

impl Socket {
    /// # Errors
    /// When the kernel refuses.
    pub fn register(&mut self, poll: &mio::Poll, token: mio::Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self {
            Socket::Tcp(stream) => stream.register(poll.registry(), token, interest),
            Socket::Unix(stream) => stream.register(poll.registry(), token, interest),
        }
    }

    /// `None`: not now.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        not_now(match self {
            Socket::Tcp(stream) => stream.read(bytes),
            Socket::Unix(stream) => stream.read(bytes),
        })
    }

    /// `None`: not now.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        not_now(match self {
            Socket::Tcp(stream) => stream.write(bytes),
            Socket::Unix(stream) => stream.write(bytes),
        })
    }
}

fn not_now(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
