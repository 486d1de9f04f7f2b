//! The server side of the wire protocol: one reader task and one writer task per connection, generic over the platform
//! so that the simulator runs it too.
//!
//! The reader parses every frame of a read at once; what needs no waiting is answered straight into the output buffer,
//! the rest becomes a task each. The writer sends whatever has gathered in one write. Requests in flight, their bytes,
//! and unsent replies are bounded, for each connection and for all of a shard: past a bound the reader stops reading, so
//! the peer's socket fills, not our memory. A peer that stalls is closed.
//! No bytes a peer sends may panic or stall the shard: they cost the sender its request or its connection.

mod convert;
mod output;
mod reader;
mod session;
mod tally;
mod watch;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures::future::{Either, poll_fn, select};
use futures::task::AtomicWaker;

use crate::limits::{CONNECTIONS_BYTES_MAX, CONNECTIONS_MAX};
use crate::platform::{ByteWriter, Connection, Platform, Queue};
use crate::shard::api::{ConnectionId, Handler};
use output::Output;
use session::Session;
pub use tally::Refusal;
use tally::Tally;

/// All connections of one shard, and what happened on them.
#[derive(Default)]
pub struct Connections {
    sessions: RefCell<BTreeMap<u64, Weak<Session>>>,
    next: Cell<u64>,
    changed: AtomicWaker,
    tally: Tally,
    held_bytes: Cell<usize>,
    /// The task that looks for stalled peers is running.
    watched: Cell<bool>,
}

impl Connections {
    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.sessions.borrow().len() as u64
    }

    /// Bytes that the shard holds for all of them; [`CONNECTIONS_BYTES_MAX`] bounds them.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held_bytes.get()
    }

    /// Metric name with labels, help text and value of each counter.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, &'static str, u64)> {
        self.tally.counters()
    }

    /// How often something was refused for this reason.
    #[must_use]
    pub fn count(&self, refusal: Refusal) -> u64 {
        self.tally.refused(refusal)
    }

    fn refuse(&self, refusal: Refusal) {
        self.tally.refuse(refusal);
    }

    fn sessions(&self) -> Vec<Rc<Session>> {
        self.sessions.borrow().values().filter_map(Weak::upgrade).collect()
    }

    fn hold(&self, bytes: usize) {
        self.held_bytes.set(self.held_bytes.get() + bytes);
    }

    fn release(&self, bytes: usize) {
        let before = self.held_bytes.get();
        self.held_bytes.set(before - bytes);
        let falls_below = |bound: usize| before >= bound && self.held_bytes.get() < bound;
        if falls_below(CONNECTIONS_BYTES_MAX) || falls_below(2 * CONNECTIONS_BYTES_MAX) {
            self.sessions().iter().for_each(|session| session.look_for_room());
        }
    }

    /// Closes every connection once its replies have left, or after `limit`.
    pub async fn close_all<P: Platform>(&self, platform: &P, limit: Duration) {
        self.sessions().iter().for_each(|session| session.close_when_flushed());
        let all_closed = poll_fn(|context| {
            self.changed.register(context.waker());
            if self.sessions.borrow().is_empty() { Poll::Ready(()) } else { Poll::Pending }
        });
        if let Either::Right(_) = select(all_closed, std::pin::pin!(platform.sleep(limit))).await {
            tracing::warn!(connections = self.open(), "stopping with replies that peers did not take");
        }
    }

    /// `false`: there are too many, and every one of them has said HELLO. Of those that have not, the oldest makes room:
    /// strangers that connect and say nothing keep no host away.
    fn make_room(&self) -> bool {
        if self.sessions.borrow().len() < CONNECTIONS_MAX {
            return true;
        }
        self.refuse(Refusal::TooManyConnections);
        let silent = self.sessions().into_iter().find(|session| session.awaits_hello());
        silent.inspect(|session| session.hang_up()).is_some()
    }

    fn admit(&self, session: &Rc<Session>) -> u64 {
        let id = self.next.get();
        self.next.set(id + 1);
        self.sessions.borrow_mut().insert(id, Rc::downgrade(session));
        self.tally.accept();
        id
    }

    fn leave(&self, id: u64) {
        self.sessions.borrow_mut().remove(&id);
        self.changed.wake();
    }
}

/// Serves one accepted connection to its end, in tasks of its own.
pub fn serve<P: Platform, H: Handler>(
    platform: &P,
    connections: &Rc<Connections>,
    handler: &H,
    connection: impl Connection,
) {
    let peer = connection.peer();
    if !connections.make_room() {
        tracing::warn!(peer, max = CONNECTIONS_MAX, "connection refused: too many");
        return;
    }
    let hang_up = Box::new(connection.hang_up());
    let session = Rc::new(Session::new(connections, peer, platform.now(), hang_up));
    let id = connections.admit(&session);
    let from = ConnectionId::new(handler.shard(), id);
    let (reader, writer) = connection.split();
    platform.spawn(Queue::Serve, {
        let (platform, connections, handler, session) =
            (platform.clone(), connections.clone(), handler.clone(), session.clone());
        async move {
            reader::read_requests(platform, &connections, &handler, &session, reader, from).await;
            for volume in session.end_reading() {
                handler.connection_lost(volume, from);
            }
        }
    });
    if !connections.watched.replace(true) {
        platform.spawn(Queue::Serve, watch::watch(platform.clone(), connections.clone()));
    }
    platform.spawn(Queue::Serve, {
        let (platform, connections) = (platform.clone(), connections.clone());
        async move {
            write_replies(&platform, &session, writer).await;
            connections.leave(id);
        }
    });
}

/// Sends all replies that have gathered in one go, until there will be no more.
async fn write_replies<P: Platform>(platform: &P, session: &Session, mut writer: impl ByteWriter) {
    let mut sending = Output::default();
    'replies: while session.next_output(&mut sending).await {
        for piece in sending.pieces() {
            session.set_sending(Some(platform.now()));
            if let Err(error) = writer.write_all(piece).await {
                tracing::debug!(%error, "connection lost while writing");
                break 'replies;
            }
        }
        session.set_sending(None);
        sending.clear();
    }
    // Both directions, so that a reader waiting for the peer ends too.
    session.broken();
}
