//! Accepts connections, carries each from handshake to end, and stops them all in order.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::backend::Backend;
use super::exports::Exports;
use super::handshake::{self, ConnectionError};
use super::listen::{Listener, Socket};
use super::transmission;

/// Connections at once: thousands of guests with several connections each do not fit one host, while a runaway client
/// would eat every file descriptor.
const CONNECTIONS_MAX: usize = 4096;
/// Pause after a failed accept (out of descriptors): long enough not to spin, short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Requests are read through a buffer of this size: hundreds of headers in one system call.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// A silent TCP peer is probed after a minute and given up a minute later, so that a dead host lets go of its volumes.
const KEEPALIVE: [(libc::c_int, libc::c_int, libc::c_int); 4] = [
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 60),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 10),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 6),
];

/// Serves `exports` on `listeners` until `stop` is true; then stops accepting, finishes what is in flight, detaches,
/// and returns. The listeners' unix sockets are removed before the connections are finished.
pub async fn serve<B: Backend>(listeners: Vec<Listener>, exports: Arc<Exports<B>>, stop: watch::Receiver<bool>) {
    let mut acceptors = JoinSet::new();
    for listener in listeners {
        acceptors.spawn(accept(listener, Arc::clone(&exports), stop.clone()));
    }
    while let Some(ended) = acceptors.join_next().await {
        if let Err(panic) = ended {
            warn!("an acceptor panicked: {panic}");
        }
    }
}

async fn accept<B: Backend>(listener: Listener, exports: Arc<Exports<B>>, mut stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                report_panic(ended);
                continue;
            }
            accepted = accept_one(&listener) => accepted,
        };
        match accepted {
            Ok((_, _, peer)) if connections.len() >= CONNECTIONS_MAX => {
                warn!(peer, "refused: {CONNECTIONS_MAX} connections are open");
            }
            Ok((reader, writer, peer)) => {
                connections.spawn(serve_one(reader, writer, peer, Arc::clone(&exports), stop.clone()));
            }
            Err(error) => {
                warn!("accepting on {listener} failed: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        report_panic(ended);
    }
}

type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

async fn accept_one(listener: &Listener) -> io::Result<(Reader, Writer, String)> {
    match &listener.socket {
        Socket::Unix(socket) => {
            let (stream, _) = socket.accept().await?;
            let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
            let peer = pid.map_or_else(|| "unix".to_owned(), |pid| format!("process {pid}"));
            let (reader, writer) = stream.into_split();
            Ok((Box::new(reader), Box::new(writer), peer))
        }
        Socket::Tcp(socket) => {
            let (stream, peer) = socket.accept().await?;
            if let Err(error) = stream.set_nodelay(true).and_then(|()| keep_alive(&stream)) {
                // The peer may be gone already; reading will tell.
                debug!(%peer, "socket options: {error}");
            }
            let (reader, writer) = stream.into_split();
            Ok((Box::new(reader), Box::new(writer), peer.to_string()))
        }
    }
}

/// One connection from handshake to end. Whatever ends it, its lease is given back.
pub async fn serve_one<B: Backend>(
    reader: impl AsyncRead + Send + Unpin,
    mut writer: impl AsyncWrite + Send + Unpin + 'static,
    peer: String,
    exports: Arc<Exports<B>>,
    mut stop: watch::Receiver<bool>,
) {
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let agreed = match handshake::negotiate(&mut reader, &mut writer, &exports, &mut stop).await {
        Ok(Some(agreed)) => agreed,
        Ok(None) => return debug!(peer, "left in the handshake"),
        // A peer that only looked whether somebody listens.
        Err(ConnectionError::Io(error)) => return debug!(peer, "lost in the handshake: {error}"),
        Err(ConnectionError::Protocol(message)) => return warn!(peer, "closed in the handshake: {message}"),
    };
    let export = agreed.lease.name().to_owned();
    info!(peer, export, "connected");
    let (lease, ended) = transmission::transmit(&mut reader, writer, agreed, stop).await;
    match ended {
        Ok(()) => info!(peer, export, "disconnected"),
        Err(ConnectionError::Io(error)) => info!(peer, export, "connection lost: {error}"),
        Err(ConnectionError::Protocol(message)) => warn!(peer, export, "connection closed: {message}"),
    }
    exports.leave(lease).await;
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(panic) = ended {
        warn!("a connection panicked: {panic}");
    }
}

fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    for (level, name, value) in KEEPALIVE {
        // SAFETY: the descriptor is open for as long as `stream` is borrowed, and the option's value is a live c_int
        // whose size is passed. std and tokio offer no safe call for these options on an accepted stream.
        let result = unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
