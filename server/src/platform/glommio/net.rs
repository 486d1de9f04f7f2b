//! TCP and unix sockets as byte streams with independent halves.
//!
//! A glommio stream keeps separate kernel sources and wakers for reading and writing, so both halves share one
//! stream: it is borrowed only inside a poll, never across an await.

use std::cell::RefCell;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use futures::future::poll_fn;
use futures::io::{AsyncRead, AsyncWrite};
use glommio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::plain_error;
use crate::platform::{ByteReader, ByteWriter, Connection};

/// A bound listener of one shard.
pub enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Acceptor {
    /// Binds a TCP address. The socket shares its port with other sockets that ask for it (`SO_REUSEPORT`), so the
    /// caller checks beforehand that no other process has it.
    ///
    /// # Errors
    /// As `bind(2)`.
    pub fn bind_tcp(address: SocketAddr) -> io::Result<Acceptor> {
        TcpListener::bind(address).map(Acceptor::Tcp).map_err(plain_error)
    }

    /// Binds a path that must not exist.
    ///
    /// # Errors
    /// As `bind(2)`.
    pub fn bind_unix(path: &Path) -> io::Result<Acceptor> {
        UnixListener::bind(path).map(Acceptor::Unix).map_err(plain_error)
    }

    /// The port of a TCP listener.
    #[must_use]
    pub fn tcp_port(&self) -> Option<u16> {
        match self {
            Acceptor::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Acceptor::Unix(_) => None,
        }
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// As `accept(2)`; most are about one connection or a passing lack of resources.
    pub async fn accept(&self) -> io::Result<GlommioConnection> {
        let stream = match self {
            Acceptor::Tcp(listener) => {
                let stream = listener.accept().await.map_err(plain_error)?;
                // Replies are written once and whole: Nagle would only hold them back.
                stream.set_nodelay(true).map_err(plain_error)?;
                Stream::Tcp(stream)
            }
            Acceptor::Unix(listener) => Stream::Unix(listener.accept().await.map_err(plain_error)?),
        };
        Ok(GlommioConnection::new(stream))
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn poll_read(&mut self, context: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buf),
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, buf),
        }
    }

    fn poll_shutdown(&self, context: &mut Context<'_>) -> Poll<()> {
        // The peer may have closed first: there is nothing left to shut down then.
        match self {
            Stream::Tcp(stream) => stream.poll_shutdown(context, Shutdown::Both).map(drop),
            // For unix sockets glommio has only the future, which is ready at its first poll.
            Stream::Unix(stream) => {
                let mut shutdown = std::pin::pin!(stream.shutdown(Shutdown::Both));
                shutdown.as_mut().poll(context).map(drop)
            }
        }
    }
}

/// An accepted connection.
pub struct GlommioConnection {
    stream: Rc<RefCell<Stream>>,
    peer: String,
}

impl GlommioConnection {
    fn new(stream: Stream) -> GlommioConnection {
        let peer = match &stream {
            Stream::Tcp(stream) => stream.peer_addr().map_or_else(|_| "closed".to_owned(), |peer| peer.to_string()),
            Stream::Unix(_) => "unix socket".to_owned(),
        };
        GlommioConnection { stream: Rc::new(RefCell::new(stream)), peer }
    }
}

impl Connection for GlommioConnection {
    type Reader = StreamReader;
    type Writer = StreamWriter;

    fn split(self) -> (StreamReader, StreamWriter) {
        (StreamReader { stream: self.stream.clone() }, StreamWriter { stream: self.stream })
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}

pub struct StreamReader {
    stream: Rc<RefCell<Stream>>,
}

impl ByteReader for StreamReader {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        poll_fn(|context| self.stream.borrow_mut().poll_read(context, buf)).await
    }
}

pub struct StreamWriter {
    stream: Rc<RefCell<Stream>>,
}

impl ByteWriter for StreamWriter {
    async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            let written = poll_fn(|context| self.stream.borrow_mut().poll_write(context, rest)).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = &rest[written..];
        }
        Ok(())
    }

    async fn shutdown(&mut self) {
        poll_fn(|context| self.stream.borrow_mut().poll_shutdown(context)).await;
    }
}
