//! TCP and unix sockets as byte streams with independent halves.
//!
//! A glommio stream keeps separate kernel sources and wakers for reading and writing, so both halves share one
//! stream: it is borrowed only inside a poll, never across an await.

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::poll_fn;
use futures::io::{AsyncRead, AsyncWrite};
use glommio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::plain_error;
use crate::platform::{ByteReader, ByteWriter, Connection};

/// Connections that the kernel completes before they are accepted: a node's hosts may all reconnect at once.
const BACKLOG: libc::c_int = 1024;
/// A peer that acknowledges nothing for this long is gone.
const DEAD_AFTER_SECONDS: libc::c_int = 60;

/// A bound listener of one shard.
pub struct Acceptor {
    listener: Listener,
}

enum Listener {
    /// With its descriptor, which glommio does not hand out.
    Tcp(TcpListener, RawFd),
    Unix(UnixListener),
}

impl Acceptor {
    /// Takes over a listener that is bound already. glommio's own `bind` shares the port with whoever asks for it
    /// (`SO_REUSEPORT`), which would hide that another server has it.
    ///
    /// # Errors
    /// As `listen(2)`.
    pub fn from_tcp(listener: std::net::TcpListener) -> io::Result<Acceptor> {
        // SAFETY: the descriptor is a live listening socket; listening again only changes its backlog.
        if unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = listener.into_raw_fd();
        // SAFETY: the descriptor is listening, and owned, because `into_raw_fd` has given it up.
        let listener = unsafe { TcpListener::from_raw_fd(socket) };
        Ok(Acceptor { listener: Listener::Tcp(listener, socket) })
    }

    /// Binds a path that must not exist.
    ///
    /// # Errors
    /// As `bind(2)`.
    pub fn bind_unix(path: &Path) -> io::Result<Acceptor> {
        let listener = UnixListener::bind(path).map_err(plain_error)?;
        Ok(Acceptor { listener: Listener::Unix(listener) })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// As `accept(2)`; most are about one connection or a passing lack of resources.
    pub async fn accept(&self) -> io::Result<GlommioConnection> {
        let stream = match &self.listener {
            Listener::Tcp(listener, _) => {
                let stream = listener.accept().await.map_err(plain_error)?;
                // Replies are written once and whole: Nagle would only hold them back.
                stream.set_nodelay(true).map_err(plain_error)?;
                notice_dead_peers(stream.as_raw_fd())?;
                Stream::Tcp(stream)
            }
            Listener::Unix(listener) => Stream::Unix(listener.accept().await.map_err(plain_error)?),
        };
        Ok(GlommioConnection::new(stream))
    }

    /// Stops listening at once; a pending accept fails. Closing would not do: the kernel keeps a socket, and its port,
    /// while an accept is pending in the ring, and cancels that only after the executor's end.
    pub fn close(&self) {
        if let Listener::Tcp(_, socket) = self.listener {
            // SAFETY: `self` owns the descriptor, so it is open; shutdown touches no memory of ours.
            let result = unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
            debug_assert_eq!(result, 0, "a listening socket can be shut down");
        }
    }
}

/// Lets the kernel end a connection whose host is gone: it would hold its place and its unsent replies for ever.
fn notice_dead_peers(socket: RawFd) -> io::Result<()> {
    let dead_after_ms = DEAD_AFTER_SECONDS * 1000;
    set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, DEAD_AFTER_SECONDS / 2)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, DEAD_AFTER_SECONDS / 6)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, dead_after_ms)
}

fn set_option(socket: RawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option value is an int that outlives the call, and `len` is its size.
    let result = unsafe { libc::setsockopt(socket, level, option, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

    fn shut_down(&self) {
        // glommio's futures only do the system call, at their first poll. The peer may have closed first: there is
        // nothing left to shut down then.
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both).now_or_never(),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both).now_or_never(),
        };
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

    fn hang_up(&self) -> impl Fn() + 'static {
        let stream = self.stream.clone();
        move || stream.borrow().shut_down()
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
}
