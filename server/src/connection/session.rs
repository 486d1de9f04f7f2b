//! What the tasks of one connection share: unsent replies, what is in flight, attachments, and how it ends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use futures::task::AtomicWaker;
use volley_protocol::limits::IN_FLIGHT_MAX;
use volley_protocol::{Status, encode};

use super::Connections;
use super::output::Output;
use crate::error::Result;
use crate::limits::{CONNECTION_BYTES_MAX, CONNECTIONS_BYTES_MAX, LIGHT_CONNECTION_BYTES_MAX};
use crate::platform::Time;
use crate::shard::api::Reply;
use crate::types::VolumeId;

/// State of one connection. Only its own shard's tasks touch it; no borrow lives across an await.
pub(super) struct Session {
    connections: Rc<Connections>,
    peer: String,
    /// Closes the socket in both directions, whatever is waiting for it.
    hang_up: Box<dyn Fn()>,
    opened: Time,
    output: RefCell<Output>,
    /// Bytes of output that the writer is sending now.
    sending_bytes: Cell<usize>,
    in_flight: Cell<usize>,
    /// Payloads in flight, replies expected, replies not sent, and the receive buffer where it grew.
    held_bytes: Cell<usize>,
    attached: RefCell<BTreeSet<VolumeId>>,
    greeted: Cell<bool>,
    /// Since when the peer owes the rest of a frame.
    receiving_since: Cell<Option<Time>>,
    /// Since when the peer owes room for the bytes that are being sent.
    sending_since: Cell<Option<Time>>,
    hung_up: Cell<bool>,
    /// The reader has ended: no further requests.
    read_ended: Cell<bool>,
    /// The writer has ended: replies go nowhere.
    write_ended: Cell<bool>,
    /// Close as soon as the output is sent, whatever is in flight.
    closing: Cell<bool>,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Session {
    pub(super) fn new(connections: &Rc<Connections>, peer: String, now: Time, hang_up: Box<dyn Fn()>) -> Session {
        Session {
            connections: connections.clone(),
            peer,
            hang_up,
            opened: now,
            output: RefCell::default(),
            sending_bytes: Cell::default(),
            in_flight: Cell::default(),
            held_bytes: Cell::default(),
            attached: RefCell::default(),
            greeted: Cell::default(),
            receiving_since: Cell::default(),
            sending_since: Cell::default(),
            hung_up: Cell::default(),
            read_ended: Cell::default(),
            write_ended: Cell::default(),
            closing: Cell::default(),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
        }
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn awaits_hello(&self) -> bool {
        !self.greeted.get() && !self.read_ended.get() && !self.hung_up.get()
    }

    pub(super) fn set_greeted(&self) {
        self.greeted.set(true);
    }

    /// Since when the peer owes its HELLO.
    pub(super) fn greeting_since(&self) -> Option<Time> {
        self.awaits_hello().then_some(self.opened)
    }

    pub(super) fn receiving_since(&self) -> Option<Time> {
        self.receiving_since.get().filter(|_| !self.hung_up.get())
    }

    /// `Some`: a frame has begun; `None`: nothing is expected of the peer. A frame's later parts do not renew the time.
    pub(super) fn set_receiving(&self, now: Option<Time>) {
        self.receiving_since.set(now.and_then(|now| self.receiving_since.get().or(Some(now))));
    }

    pub(super) fn sending_since(&self) -> Option<Time> {
        self.sending_since.get().filter(|_| !self.hung_up.get())
    }

    pub(super) fn set_sending(&self, now: Option<Time>) {
        self.sending_since.set(now);
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes.get()
    }

    /// Counts bytes that the shard now holds for this connection.
    pub(super) fn hold(&self, bytes: usize) {
        self.held_bytes.set(self.held_bytes.get() + bytes);
        self.connections.hold(bytes);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.held_bytes.set(self.held_bytes.get() - bytes);
        self.connections.release(bytes);
    }

    /// Appends reply frames; the writer sends them with whatever else has gathered.
    pub(super) fn reply(&self, encode: impl FnOnce(&mut Output)) {
        if self.write_ended.get() {
            return;
        }
        let mut output = self.output.borrow_mut();
        let before = output.len();
        encode(&mut output);
        self.hold(output.len() - before);
        // Whoever put the first bytes there has woken it.
        if before == 0 {
            self.writer.wake();
        }
    }

    pub(super) fn reply_error(&self, op: u8, request_id: u64, status: Status, message: &str) {
        self.connections.tally.fail(status);
        self.reply(|out| encode::reply_error(out.frames(), op, request_id, status, message));
    }

    /// Counts a failure of a request.
    pub(super) fn note_outcome(&self, outcome: &Result<Reply>) {
        if let Err(error) = outcome {
            self.connections.tally.fail(error.status);
        }
    }

    /// Counts a request in. `bytes`: its payload and its expected reply.
    pub(super) fn begin(&self, bytes: usize) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.hold(bytes);
    }

    /// Counts a request out, after its reply was appended.
    pub(super) fn end(&self, bytes: usize) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.release(bytes);
        self.reader.wake();
        if self.read_ended.get() {
            self.writer.wake();
        }
    }

    /// `admitted`: the frame has its buffer, so the shard's bound was asked before.
    fn has_room(&self, admitted: bool) -> bool {
        let (held, of_all) = (self.held_bytes.get(), self.connections.held_bytes());
        let light = held < LIGHT_CONNECTION_BYTES_MAX;
        let most = if light { 2 * CONNECTIONS_BYTES_MAX } else { CONNECTIONS_BYTES_MAX };
        self.in_flight.get() < IN_FLIGHT_MAX as usize && held < CONNECTION_BYTES_MAX && (admitted || of_all < most)
    }

    /// Waits until another request may be taken on. `false`: the connection is ending.
    pub(super) async fn room(&self, admitted: bool) -> bool {
        let ending = || self.closing.get() || self.write_ended.get();
        if !ending() && self.has_room(admitted) {
            return true;
        }
        poll_fn(|context| {
            self.reader.register(context.waker());
            if ending() {
                return Poll::Ready(false);
            }
            if self.has_room(admitted) {
                return Poll::Ready(true);
            }
            // Now it is the peer that waits.
            self.set_receiving(None);
            Poll::Pending
        })
        .await
    }

    /// The shard holds fewer bytes than it may again.
    pub(super) fn look_for_room(&self) {
        self.reader.wake();
    }

    /// Waits for replies to send and swaps them into `sending`, which is empty: what it held has been sent. `false`:
    /// there will be no more.
    pub(super) async fn next_output(&self, sending: &mut Output) -> bool {
        self.release(self.sending_bytes.take());
        self.reader.wake();
        poll_fn(|context| {
            self.writer.register(context.waker());
            let mut output = self.output.borrow_mut();
            if !output.is_empty() {
                std::mem::swap(&mut *output, sending);
                self.sending_bytes.set(sending.len());
                return Poll::Ready(true);
            }
            let done = self.closing.get() || (self.read_ended.get() && self.in_flight.get() == 0);
            if done { Poll::Ready(false) } else { Poll::Pending }
        })
        .await
    }

    /// Ends the connection once what is in the output has been sent.
    pub(super) fn close_when_flushed(&self) {
        self.closing.set(true);
        self.reader.wake();
        self.writer.wake();
    }

    /// Ends the connection now: what waits for the peer fails.
    pub(super) fn hang_up(&self) {
        self.hung_up.set(true);
        (self.hang_up)();
        self.close_when_flushed();
    }

    /// The writer has ended.
    pub(super) fn broken(&self) {
        self.write_ended.set(true);
        self.release(self.output.take().len() + self.sending_bytes.take());
        self.set_sending(None);
        self.hang_up();
    }

    /// The reader has ended: hands out what was attached.
    pub(super) fn end_reading(&self) -> BTreeSet<VolumeId> {
        self.read_ended.set(true);
        self.set_receiving(None);
        self.writer.wake();
        self.attached.take()
    }

    /// Notes an attachment. `false`: the connection has ended already, so nobody will end the attachment with it and
    /// the caller must at once.
    #[must_use]
    pub(super) fn attach(&self, volume: VolumeId) -> bool {
        if self.read_ended.get() {
            return false;
        }
        self.attached.borrow_mut().insert(volume);
        true
    }

    pub(super) fn detach(&self, volume: VolumeId) {
        self.attached.borrow_mut().remove(&volume);
    }
}

/// The receive buffer goes with the last task.
impl Drop for Session {
    fn drop(&mut self) {
        self.connections.release(self.held_bytes.get());
    }
}
