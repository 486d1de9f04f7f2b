//! The reading half of a connection: bytes to frames to requests.

use std::ops::ControlFlow;
use std::rc::Rc;

use volley_protocol::header::{OP_AT, REQUEST_ID_AT};
use volley_protocol::limits::{
    CLIENT_NAME_BYTES_MAX, FRAME_BYTES_MAX, IN_FLIGHT_MAX, PAYLOAD_BYTES_MAX, VERSION_MAX, VERSION_MIN,
};
use volley_protocol::messages::{ArchivedHello, HelloReply};
use volley_protocol::{self as wire, Decoded, Frame, FrameError, HEADER_BYTES, Op, Status, encode};

use super::session::Session;
use super::{Connections, Refusal, convert};
use crate::error::Result;
use crate::limits::{CONNECTIONS_BYTES_MAX, RECEIVE_BUFFER_BYTES, RECEIVE_BUFFER_FIRST_BYTES};
use crate::platform::{ByteReader, Platform, Queue};
use crate::shard::api::{ConnectionId, Handler, Reply, Request};
use crate::types::VolumeId;

/// Reads requests until the peer closes, breaks the protocol, or the session ends.
pub(super) async fn read_requests<P: Platform, H: Handler>(
    platform: P,
    connections: &Connections,
    handler: &H,
    session: &Rc<Session>,
    mut reader: impl ByteReader,
    id: ConnectionId,
) {
    let dispatcher = Dispatcher { platform: &platform, connections, handler, session, id };
    let mut buffer = ReceiveBuffer::new();
    loop {
        if dispatcher.take_frames(&mut buffer).await.is_break() {
            return;
        }
        if buffer.is_large() && connections.held_bytes() > CONNECTIONS_BYTES_MAX / 2 {
            session.release(buffer.shrink());
        }
        session.hold(buffer.grow());
        match reader.read(buffer.free_space()).await {
            Ok(0) => return,
            Ok(len) => buffer.filled(len),
            Err(error) => {
                tracing::debug!(peer = session.peer(), %error, "connection lost");
                return;
            }
        }
        // A peer that always has more to say lets the other tasks in between.
        platform.yield_now().await;
    }
}

/// Received bytes that are not parsed yet: `bytes[start..end]`.
struct ReceiveBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Length that the frame at the start needs.
    wanted: usize,
}

impl ReceiveBuffer {
    fn new() -> ReceiveBuffer {
        ReceiveBuffer { bytes: vec![0; RECEIVE_BUFFER_FIRST_BYTES], start: 0, end: 0, wanted: HEADER_BYTES }
    }

    fn unparsed(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn need(&mut self, more: usize) {
        self.wanted = self.end - self.start + more;
        debug_assert!(self.wanted <= FRAME_BYTES_MAX, "the decoder bounds lengths");
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
    }

    fn is_large(&self) -> bool {
        self.bytes.len() > RECEIVE_BUFFER_BYTES
    }

    /// Gives back what an earlier frame needed, unless another one has begun; returns how many bytes.
    fn shrink(&mut self) -> usize {
        if self.start < self.end {
            return 0;
        }
        let held = self.bytes.len() - RECEIVE_BUFFER_BYTES;
        *self = ReceiveBuffer::new();
        held
    }

    /// Makes room for the frame at the start, and for more requests where many come at once; returns how many bytes of it
    /// count as held.
    fn grow(&mut self) -> usize {
        let len = self.bytes.len();
        // The last read left no room: the peer says more at once than fits.
        let roomier = if self.end == len { (4 * len).min(RECEIVE_BUFFER_BYTES) } else { 0 };
        self.bytes.resize(len.max(self.wanted).max(roomier), 0);
        self.bytes.len().saturating_sub(len.max(RECEIVE_BUFFER_BYTES))
    }

    /// Never empty: the frame at the start fits, with at least one byte to come.
    fn free_space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    fn filled(&mut self, len: usize) {
        self.end += len;
    }
}

struct Dispatcher<'a, P, H> {
    platform: &'a P,
    connections: &'a Connections,
    handler: &'a H,
    session: &'a Rc<Session>,
    id: ConnectionId,
}

impl<P: Platform, H: Handler> Dispatcher<'_, P, H> {
    /// Serves every whole frame in the buffer, with room for each.
    async fn take_frames(&self, buffer: &mut ReceiveBuffer) -> ControlFlow<()> {
        loop {
            if !self.session.room(buffer.is_large()).await {
                return ControlFlow::Break(());
            }
            let consumed = match wire::decode(buffer.unparsed()) {
                Ok(Decoded::Frame(frame)) => {
                    self.session.set_receiving(None);
                    self.frame(&frame)?;
                    frame.len()
                }
                Ok(Decoded::NeedMore(more)) => {
                    buffer.need(more);
                    let begun = !buffer.unparsed().is_empty();
                    self.session.set_receiving(begun.then(|| self.platform.now()));
                    return ControlFlow::Continue(());
                }
                Err(error) => {
                    self.broken_stream(buffer.unparsed(), &error);
                    return ControlFlow::Break(());
                }
            };
            buffer.consume(consumed);
        }
    }

    fn frame(&self, frame: &Frame<'_>) -> ControlFlow<()> {
        let (op, request_id) = (frame.header.op, frame.header.request_id);
        if self.session.awaits_hello() && op != Op::Hello as u8 {
            self.connections.refuse(Refusal::NoHello);
            return self.refuse_and_close(op, request_id, Status::NotAttached, "the first frame must be HELLO");
        }
        match frame.request() {
            Ok(wire::Request::Hello(hello)) => self.hello(hello, request_id),
            Ok(request) => {
                let (op, request) = convert::request(request).expect("everything but HELLO is for the shard");
                self.request(op, request_id, request);
                ControlFlow::Continue(())
            }
            Err(error) => {
                self.connections.refuse(Refusal::BadRequest);
                self.session.reply_error(op, request_id, error.status, &error.message);
                if self.session.awaits_hello() {
                    self.session.close_when_flushed();
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            }
        }
    }

    fn hello(&self, hello: &ArchivedHello, request_id: u64) -> ControlFlow<()> {
        let op = Op::Hello as u8;
        if !self.session.awaits_hello() {
            self.connections.refuse(Refusal::BadRequest);
            let message = "HELLO was said before on this connection";
            self.session.reply_error(op, request_id, Status::Invalid, message);
            return ControlFlow::Continue(());
        }
        let (oldest, newest) = (hello.version_min.to_native(), hello.version_max.to_native());
        let version = newest.min(VERSION_MAX);
        if version < oldest.max(VERSION_MIN) {
            self.connections.refuse(Refusal::UnsupportedVersion);
            let message = format!(
                "client speaks protocol versions {oldest} to {newest}, this server {VERSION_MIN} to {VERSION_MAX}: \
                 upgrade the older side"
            );
            return self.refuse_and_close(op, request_id, Status::Unsupported, &message);
        }
        let client = hello.client.as_str();
        if client.len() > CLIENT_NAME_BYTES_MAX {
            self.connections.refuse(Refusal::BadRequest);
            let message = format!("client name of {} bytes exceeds {CLIENT_NAME_BYTES_MAX}", client.len());
            return self.refuse_and_close(op, request_id, Status::Invalid, &message);
        }
        tracing::debug!(peer = self.session.peer(), client, version, "connected");
        self.session.set_greeted();
        let reply = HelloReply {
            version,
            // None are defined yet.
            features: 0,
            node_id: self.handler.node_id(),
            boot_id: self.handler.boot_id(),
            shard: u32::try_from(self.handler.shard()).unwrap_or(u32::MAX),
            shards: self.handler.shard_map().to_vec(),
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            in_flight_max: IN_FLIGHT_MAX,
        };
        self.session.reply(|out| encode::reply(out.frames(), Op::Hello, request_id, &reply));
        ControlFlow::Continue(())
    }

    fn request(&self, op: Op, request_id: u64, request: Request) {
        if let Some(outcome) = self.handler.try_now(&request, self.id) {
            self.session.note_outcome(&outcome);
            self.session.reply(|out| convert::reply(out, op, request_id, outcome));
            return;
        }
        let bytes = convert::pinned_bytes(&request);
        self.session.begin(bytes);
        let (handler, session, from) = (self.handler.clone(), self.session.clone(), self.id);
        self.platform.spawn(Queue::Serve, async move {
            let detached = match &request {
                Request::Detach { volume, .. } => Some(*volume),
                _ => None,
            };
            let outcome = handler.handle(request, from).await;
            note_attachment(&handler, &session, (op, from), detached, &outcome);
            session.note_outcome(&outcome);
            session.reply(|out| convert::reply(out, op, request_id, outcome));
            session.end(bytes);
        });
    }

    /// The stream holds no further frame borders: says why where the sender can still be told, and closes.
    fn broken_stream(&self, unparsed: &[u8], error: &FrameError) {
        tracing::warn!(peer = self.session.peer(), %error, "closing a connection that broke the protocol");
        let (refusal, status) = match error {
            FrameError::Magic { .. } => (Refusal::BadMagic, Status::Invalid),
            FrameError::HeaderCrc { .. } | FrameError::BodyCrc { .. } | FrameError::PayloadCrc { .. } => {
                (Refusal::DamagedFrame, Status::Invalid)
            }
            FrameError::Version { .. } => (Refusal::UnsupportedVersion, Status::Unsupported),
            FrameError::Reserved { .. } => (Refusal::UndefinedBits, Status::Invalid),
            FrameError::BodyTooLong { .. } | FrameError::PayloadTooLong { .. } => {
                (Refusal::FrameTooLong, Status::TooLarge)
            }
        };
        self.connections.refuse(refusal);
        // With a sound header checksum the request is known, whatever else is wrong.
        let header_is_sound = !matches!(error, FrameError::Magic { .. } | FrameError::HeaderCrc { .. });
        if let Some((op, request_id)) = identity(unparsed).filter(|_| header_is_sound) {
            self.session.reply_error(op, request_id, status, &error.to_string());
        }
        self.session.close_when_flushed();
    }

    fn refuse_and_close(&self, op: u8, request_id: u64, status: Status, message: &str) -> ControlFlow<()> {
        tracing::warn!(peer = self.session.peer(), message, "connection refused");
        self.session.reply_error(op, request_id, status, message);
        self.session.close_when_flushed();
        ControlFlow::Break(())
    }
}

/// Keeps account of which volumes lose their host when this connection ends.
fn note_attachment<H: Handler>(
    handler: &H,
    session: &Session,
    (op, from): (Op, ConnectionId),
    detached: Option<VolumeId>,
    outcome: &Result<Reply>,
) {
    match outcome {
        Ok(Reply::Attached(info)) if op == Op::Attach => {
            if !session.attach(info.volume) {
                handler.connection_lost(info.volume, from);
            }
        }
        Ok(_) => detached.into_iter().for_each(|volume| session.detach(volume)),
        Err(_) => {}
    }
}

/// Operation and request id of a header: an error reply repeats them even when the rest is unreadable.
fn identity(header: &[u8]) -> Option<(u8, u64)> {
    let id = header.get(REQUEST_ID_AT..)?.first_chunk::<8>()?;
    Some((*header.get(OP_AT)?, u64::from_le_bytes(*id)))
}
