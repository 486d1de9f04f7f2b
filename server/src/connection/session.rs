//! What the tasks of one connection share: unsent replies, what is in flight, attachments, and how it ends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::task::Poll;

use futures::task::AtomicWaker;
use volley_protocol::limits::IN_FLIGHT_MAX;

use crate::limits::CONNECTION_BYTES_MAX;
use crate::types::VolumeId;

/// State of one connection. Only its own shard's tasks touch it; no borrow lives across an await.
#[derive(Default)]
pub(super) struct Session {
    output: RefCell<Vec<u8>>,
    /// Bytes of output that the writer is sending now.
    sending_bytes: Cell<usize>,
    in_flight: Cell<usize>,
    in_flight_bytes: Cell<usize>,
    attached: RefCell<BTreeSet<VolumeId>>,
    greeted: Cell<bool>,
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
    pub(super) fn awaits_hello(&self) -> bool {
        !self.greeted.get() && !self.read_ended.get()
    }

    pub(super) fn set_greeted(&self) {
        self.greeted.set(true);
    }

    /// Appends reply frames; the writer sends them with whatever else has gathered.
    pub(super) fn reply(&self, encode: impl FnOnce(&mut Vec<u8>)) {
        if self.write_ended.get() {
            return;
        }
        encode(&mut self.output.borrow_mut());
        self.writer.wake();
    }

    /// Counts a request in. `bytes`: its payload and its expected reply.
    pub(super) fn begin(&self, bytes: usize) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.in_flight_bytes.set(self.in_flight_bytes.get() + bytes);
    }

    /// Counts a request out, after its reply was appended.
    pub(super) fn end(&self, bytes: usize) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.in_flight_bytes.set(self.in_flight_bytes.get() - bytes);
        self.reader.wake();
        if self.read_ended.get() {
            self.writer.wake();
        }
    }

    fn has_room(&self) -> bool {
        let held = self.in_flight_bytes.get() + self.output.borrow().len() + self.sending_bytes.get();
        self.in_flight.get() < IN_FLIGHT_MAX as usize && held < CONNECTION_BYTES_MAX
    }

    /// Waits until another request may be taken on. `false`: the connection is ending.
    pub(super) async fn room(&self) -> bool {
        poll_fn(|context| {
            self.reader.register(context.waker());
            if self.closing.get() || self.write_ended.get() {
                return Poll::Ready(false);
            }
            if self.has_room() { Poll::Ready(true) } else { Poll::Pending }
        })
        .await
    }

    /// Waits for replies to send and swaps them into `sending`, which is empty: what it held has been sent. `false`:
    /// there will be no more.
    pub(super) async fn next_output(&self, sending: &mut Vec<u8>) -> bool {
        self.sending_bytes.set(0);
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

    /// The writer has ended.
    pub(super) fn broken(&self) {
        self.write_ended.set(true);
        self.output.take();
        self.reader.wake();
    }

    /// The reader has ended: hands out what was attached.
    pub(super) fn end_reading(&self) -> BTreeSet<VolumeId> {
        self.read_ended.set(true);
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
