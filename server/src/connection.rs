//! The server side of the wire protocol: one reader task and one writer task per connection, generic over the platform
//! so that the simulator runs it too.
//!
//! The reader parses every frame of a read at once; what needs no waiting is answered straight into the output buffer,
//! the rest becomes a task each. The writer sends whatever has gathered in one write. Requests in flight, their bytes,
//! and unsent replies are bounded: past a bound the reader stops reading, so the peer's socket fills, not our memory.
//! No bytes a peer sends may panic or stall the shard: they cost the sender its request or its connection.

mod convert;
mod reader;
mod session;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures::future::{Either, poll_fn, select};
use futures::task::AtomicWaker;

use crate::limits::{CONNECTIONS_MAX, HELLO_DEADLINE, OUTPUT_BUFFER_KEPT_BYTES};
use crate::platform::{ByteWriter, Connection, Platform, Queue};
use crate::shard::api::{ConnectionId, Handler};
use session::Session;

/// All connections of one shard, and what happened on them.
#[derive(Default)]
pub struct Connections {
    sessions: RefCell<BTreeMap<u64, Weak<Session>>>,
    next: Cell<u64>,
    changed: AtomicWaker,
    accepted: Cell<u64>,
    refused: [Cell<u64>; Refusal::ALL.len()],
}

/// Why a frame or a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManyConnections,
    NoHello,
    HelloLate,
    UnsupportedVersion,
    BadMagic,
    DamagedFrame,
    UndefinedBits,
    FrameTooLong,
    BadRequest,
}

impl Refusal {
    const ALL: [Refusal; 9] = [
        Refusal::TooManyConnections,
        Refusal::NoHello,
        Refusal::HelloLate,
        Refusal::UnsupportedVersion,
        Refusal::BadMagic,
        Refusal::DamagedFrame,
        Refusal::UndefinedBits,
        Refusal::FrameTooLong,
        Refusal::BadRequest,
    ];

    const fn metric(self) -> (&'static str, &'static str) {
        match self {
            Refusal::TooManyConnections => {
                ("connections_refused_limit_total", "Connections closed at once: the shard has its maximum.")
            }
            Refusal::NoHello => ("connections_refused_no_hello_total", "Connections whose first frame was not HELLO."),
            Refusal::HelloLate => ("connections_refused_hello_late_total", "Connections without HELLO in time."),
            Refusal::UnsupportedVersion => {
                ("connections_refused_version_total", "Connections of a protocol version not spoken here.")
            }
            Refusal::BadMagic => ("frames_refused_magic_total", "Connections closed: not the data port protocol."),
            Refusal::DamagedFrame => ("frames_refused_checksum_total", "Frames that failed a checksum."),
            Refusal::UndefinedBits => ("frames_refused_bits_total", "Frames with undefined bits set."),
            Refusal::FrameTooLong => ("frames_refused_length_total", "Frames longer than the limits."),
            Refusal::BadRequest => ("requests_malformed_total", "Sound frames whose content was no proper request."),
        }
    }
}

impl Connections {
    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.sessions.borrow().len() as u64
    }

    /// Metric name, help text and value of each counter.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, &'static str, u64)> {
        let accepted = ("connections_accepted_total", "Connections accepted on the data port.", self.accepted.get());
        let refused = Refusal::ALL.iter().map(|&refusal| {
            let (name, help) = refusal.metric();
            (name, help, self.count(refusal))
        });
        std::iter::once(accepted).chain(refused).collect()
    }

    /// How often something was refused for this reason.
    #[must_use]
    pub fn count(&self, refusal: Refusal) -> u64 {
        self.refused[refusal as usize].get()
    }

    fn refuse(&self, refusal: Refusal) {
        let counter = &self.refused[refusal as usize];
        counter.set(counter.get() + 1);
    }

    /// Closes every connection once its replies have left, or after `limit`.
    pub async fn close_all<P: Platform>(&self, platform: &P, limit: Duration) {
        for session in self.sessions.borrow().values().filter_map(Weak::upgrade) {
            session.close_when_flushed();
        }
        let all_closed = poll_fn(|context| {
            self.changed.register(context.waker());
            if self.sessions.borrow().is_empty() { Poll::Ready(()) } else { Poll::Pending }
        });
        if let Either::Right(_) = select(all_closed, std::pin::pin!(platform.sleep(limit))).await {
            tracing::warn!(connections = self.open(), "stopping with replies that peers did not take");
        }
    }

    fn admit(&self, session: &Rc<Session>) -> Option<u64> {
        let mut sessions = self.sessions.borrow_mut();
        if sessions.len() >= CONNECTIONS_MAX {
            return None;
        }
        let id = self.next.get();
        self.next.set(id + 1);
        sessions.insert(id, Rc::downgrade(session));
        self.accepted.set(self.accepted.get() + 1);
        Some(id)
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
    let session = Rc::new(Session::default());
    let peer = connection.peer();
    let Some(id) = connections.admit(&session) else {
        connections.refuse(Refusal::TooManyConnections);
        tracing::warn!(peer, max = CONNECTIONS_MAX, "connection refused: too many");
        return;
    };
    let from = ConnectionId::new(handler.shard(), id);
    let (reader, writer) = connection.split();
    platform.spawn(Queue::Serve, {
        let (platform, connections, handler, session) =
            (platform.clone(), connections.clone(), handler.clone(), session.clone());
        async move {
            reader::read_requests(platform, &connections, &handler, &session, reader, (from, &peer)).await;
            for volume in session.end_reading() {
                handler.connection_lost(volume, from);
            }
        }
    });
    platform.spawn(Queue::Serve, watch_hello(platform.clone(), connections.clone(), Rc::downgrade(&session)));
    let connections = connections.clone();
    platform.spawn(Queue::Serve, async move {
        write_replies(&session, writer).await;
        connections.leave(id);
    });
}

/// Closes a connection that has not said HELLO in time.
async fn watch_hello<P: Platform>(platform: P, connections: Rc<Connections>, session: Weak<Session>) {
    platform.sleep(HELLO_DEADLINE).await;
    if let Some(session) = session.upgrade().filter(|session| session.awaits_hello()) {
        connections.refuse(Refusal::HelloLate);
        session.close_when_flushed();
    }
}

/// Sends all replies that have gathered in one write, until there will be no more.
async fn write_replies(session: &Session, mut writer: impl ByteWriter) {
    let mut sending = Vec::new();
    while session.next_output(&mut sending).await {
        if let Err(error) = writer.write_all(&sending).await {
            tracing::debug!(%error, "connection lost while writing");
            break;
        }
        sending.clear();
        if sending.capacity() > OUTPUT_BUFFER_KEPT_BYTES {
            sending = Vec::new();
        }
    }
    session.broken();
    // Both directions, so that a reader waiting for the peer ends too.
    writer.shutdown().await;
}
