//! Connections that wait for their next request.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use futures::channel::oneshot;
use hashbrown::HashMap;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;

use crate::object_store::s3::transport::Origin;

/// Stores close idle connections after some ten seconds; one that is closed as we write costs another attempt.
const IDLE_MAX: Duration = Duration::from_secs(15);

/// A name may lead elsewhere while its old address still answers: by then all connections have followed it.
const LIFE_MAX: Duration = Duration::from_secs(60);

/// A connection without a request. Dropping it closes the socket.
pub(super) struct Kept {
    made: Instant,
    pub(super) sender: SendRequest<Full<Bytes>>,
    /// The connection's task ends when this is dropped.
    _open: oneshot::Sender<()>,
}

impl Kept {
    pub(super) fn new(sender: SendRequest<Full<Bytes>>, open: oneshot::Sender<()>) -> Kept {
        Kept { made: Instant::now(), sender, _open: open }
    }
}

pub(super) struct Pool {
    idle: RefCell<HashMap<Origin, Vec<(Instant, Kept)>>>,
    /// Of each origin.
    idle_max: usize,
}

impl Pool {
    pub(super) fn new(idle_max: usize) -> Pool {
        Pool { idle: RefCell::default(), idle_max }
    }

    /// The connection that was used last: the others may then grow old and be closed.
    pub(super) fn take(&self, origin: &Origin) -> Option<Kept> {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.get_mut(origin)?;
        kept.retain(|(since, connection)| since.elapsed() < IDLE_MAX && !connection.sender.is_closed());
        kept.pop().map(|(_, connection)| connection)
    }

    /// Closes what waits.
    pub(super) fn forget(&self, origin: &Origin) {
        self.idle.borrow_mut().remove(origin);
    }

    pub(super) fn keep(&self, origin: Origin, connection: Kept) {
        if connection.made.elapsed() >= LIFE_MAX {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        let kept = idle.entry(origin).or_default();
        kept.retain(|(since, connection)| since.elapsed() < IDLE_MAX && !connection.sender.is_closed());
        if kept.len() < self.idle_max {
            kept.push((Instant::now(), connection));
        }
    }
}
