//! A glommio socket, with or without TLS, as hyper wants to read and write it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::io::{AsyncRead, AsyncWrite};
use futures_rustls::client::TlsStream;
use glommio::net::TcpStream;
use hyper::rt::ReadBufCursor;

/// One read of the socket. hyper's buffer is uninitialised memory, which sockets here don't take, so bytes pass through
/// this one: a copy in the cache instead of unsafe code.
const READ_BYTES: usize = 256 << 10;

pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

pub(super) struct Wire {
    stream: Stream,
    read: Box<[u8]>,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Wire {
        Wire { stream, read: vec![0; READ_BYTES].into_boxed_slice() }
    }
}

impl hyper::rt::Read for Wire {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let Wire { stream, read } = self.get_mut();
        let room = buf.remaining().min(read.len());
        let got = match stream {
            Stream::Tcp(stream) => ready!(Pin::new(stream).poll_read(context, &mut read[..room])),
            Stream::Tls(stream) => ready!(Pin::new(stream).poll_read(context, &mut read[..room])),
        }?;
        buf.put_slice(&read[..got]);
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_close(context),
            Stream::Tls(stream) => Pin::new(stream).poll_close(context),
        }
    }
}
