//! The connections of the HTTP API: bounded in number and in patience, so that they take neither the descriptors nor the
//! memory of the data path.
#![allow(clippy::disallowed_methods)] // Runs on the control thread, outside of the platform seam.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::limits::ACCEPT_RETRY;
use crate::metrics::Metric;

/// Operators, managers and scrapers hold a few each; past it a new connection is closed at once.
pub(super) const CONNECTIONS_MAX: usize = 512;
/// A client that has not sent the head of its (next) request by then is closed.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// What happened on the API's connections.
#[derive(Default)]
pub(super) struct Tally {
    open: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
}

impl Tally {
    /// Metric name, kind, help text and value of each.
    pub(super) fn metrics(&self) -> [Metric; 4] {
        let refused = "Connections to the HTTP API closed at once: it had its maximum.";
        let broken = "Connections to the HTTP API that ended by an error: no HTTP, or no request in time.";
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("http_connections", "gauge", "Open connections to the HTTP API.", value(&self.open)),
            ("http_connections_accepted_total", "counter", "Connections to the HTTP API.", value(&self.accepted)),
            ("http_connections_refused_total", "counter", refused, value(&self.refused)),
            ("http_connections_broken_total", "counter", broken, value(&self.broken)),
        ]
    }
}

/// Accepts and serves until dropped; connections end with it.
pub(super) async fn serve(listener: TcpListener, router: Router, tally: Arc<Tally>) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => {
                tally.open.store(connections.len() as u64, Ordering::Relaxed);
                continue;
            }
        };
        match accepted {
            Ok((stream, peer)) if connections.len() >= CONNECTIONS_MAX => {
                tally.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%peer, max = CONNECTIONS_MAX, "HTTP connection refused: too many");
                drop(stream);
            }
            Ok((stream, peer)) => {
                tally.accepted.fetch_add(1, Ordering::Relaxed);
                let (router, broken) = (router.clone(), tally.clone());
                connections.spawn(async move {
                    if let Err(error) = serve_one(stream, router).await {
                        broken.broken.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!(%peer, %error, "HTTP connection lost");
                    }
                });
                tally.open.store(connections.len() as u64, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::warn!(%error, "accepting an HTTP connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_one(stream: TcpStream, router: Router) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut http = http1::Builder::new();
    // A client that has said all it has to say, and closes its side, is still answered.
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE).half_close(true);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    connection.await.map_err(io::Error::other)
}
