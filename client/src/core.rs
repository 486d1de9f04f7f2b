//! The protocol core of one connection, without I/O, clock or async: bytes in, bytes out, answers out.
//!
//! It survives its connections: requests that were not answered when one was lost go out again on the next, after
//! every volume has been resumed and, if the server process is another one, its acknowledged but unflushed writes have
//! been repeated (see `session.rs`). The tokio driver of this crate uses it; a glommio program can too:
//!
//! 1. after connecting: [`Core::connected`]; whenever the socket can take bytes: [`Core::poll_output`], write them out;
//! 2. read from the socket into [`Core::receive_buffer`], then [`Core::process`];
//! 3. hand out answers: [`Core::poll_answer`]; new requests: [`Core::submit`]; every 100 ms or so: [`Core::tick`];
//! 4. connection lost or `process` failed: [`Core::disconnected`], back off, connect again, go to 1.
//!
//! # What is sent again, and why that is safe
//! Everything unanswered. Reads, flushes, fetches and questions have no effect that repeating changes. A write, discard
//! or write-zeroes puts the same bytes at the same place under the same generation; nobody else can write in between
//! (the generation would be stale), and the caller has not been answered, so it can't have sent anything that depends on it.
//! That needs two things. The caller must not have overlapping changes in flight at the same time (it waits for one
//! answer before it sends the other, as every block layer does). And the server must not carry out a request of the
//! *lost* connection after it has answered the resuming ATTACH on the new one: `docs/wire.md` requires this.

mod sessions;

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use volley_protocol::messages::{Hello, HelloReply};
use volley_protocol::{Decoded, Frame, FrameError, HEADER_BYTES, Op, Status, decode, encode, limits};

use crate::call::{Answer, Call};
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Phase, Session};

const HELLO_ID: u64 = 0;
/// `poll_output` stops adding frames past this: two whole payloads keep a socket busy.
const OUTPUT_BYTES_SOFT: usize = 2 << 20;
/// The receive buffer has room for about this much, so that one read may take many frames and few are cut in two.
const RECEIVE_BYTES: usize = 256 << 10;

/// Whose answer it is. Given to [`Core::submit`], handed back by [`Core::poll_answer`].
pub trait Ticket {
    /// Nobody waits any more: the request need not be sent, or sent again.
    fn is_abandoned(&self) -> bool {
        false
    }
}

impl Ticket for () {}
impl Ticket for u64 {}

/// What the core needs to know.
#[derive(Clone, Debug)]
pub struct CoreOptions {
    /// Name that the server logs.
    pub client_name: String,
    /// Most requests sent and unanswered; the server's limit applies too.
    pub in_flight_max: u32,
    /// Most bytes of acknowledged but unflushed writes kept per volume. At half of it the core flushes by itself, at
    /// the whole of it writes wait for that flush.
    pub unflushed_bytes_max: usize,
}

/// Why a connection can't be used; see [`Core::process`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// What arrived is not the protocol.
    #[error("the server sent bad bytes: {0}")]
    Frame(#[from] FrameError),
    /// A sound frame that makes no sense here.
    #[error("the server sent a senseless frame: {0}")]
    Senseless(String),
    /// The server will not talk to this client; connecting again will not help.
    #[error("the server refused the connection: {0}")]
    Refused(Error),
}

enum Purpose<T> {
    Caller(T),
    Resume { volume: u64 },
    Replay { volume: u64 },
    OwnFlush,
}

struct Entry<T> {
    call: Call,
    purpose: Purpose<T>,
    sent: bool,
    /// Of a FLUSH that is sent: what it covers.
    flush_point: u64,
}

/// See the module's text. `T` says who waits for an answer.
pub struct Core<T> {
    options: CoreOptions,
    input: BytesMut,
    greeting_due: bool,
    hello: Option<HelloReply>,
    node_id: Option<u128>,
    next_id: u64,
    entries: BTreeMap<u64, Entry<T>>,
    queue: VecDeque<u64>,
    sessions: HashMap<u64, Session>,
    sent: usize,
    answers: VecDeque<(T, Result<Answer>)>,
}

impl<T: Ticket> Core<T> {
    /// A core without a connection.
    #[must_use]
    pub fn new(options: CoreOptions) -> Core<T> {
        Core {
            options,
            input: BytesMut::new(),
            greeting_due: false,
            hello: None,
            node_id: None,
            next_id: HELLO_ID + 1,
            entries: BTreeMap::new(),
            queue: VecDeque::new(),
            sessions: HashMap::new(),
            sent: 0,
            answers: VecDeque::new(),
        }
    }

    /// A new connection is there: HELLO goes out first.
    pub fn connected(&mut self) {
        self.disconnected();
        self.greeting_due = true;
    }

    /// The connection is lost. What was unanswered waits for the next one; what nobody waits for is dropped.
    pub fn disconnected(&mut self) {
        self.input.clear();
        self.hello = None;
        self.greeting_due = false;
        self.sent = 0;
        self.queue.clear();
        for session in self.sessions.values_mut() {
            session.parked.clear();
            session.unanswered_bytes = 0;
            session.own_flush = false;
            if !matches!(session.phase, Phase::Failed(_)) {
                session.phase = Phase::Resume;
            }
        }
        self.entries.retain(|_, e| matches!(&e.purpose, Purpose::Caller(t) if !t.is_abandoned()));
        for (id, entry) in &mut self.entries {
            entry.sent = false;
            self.queue.push_back(*id);
        }
    }

    /// What the server said of itself; `None` before its HELLO.
    #[must_use]
    pub fn hello(&self) -> Option<&HelloReply> {
        self.hello.as_ref()
    }

    /// Nothing to do: no request, no volume that should be kept attached.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.entries.is_empty() && !self.sessions.values().any(|s| !matches!(s.phase, Phase::Failed(_)))
    }

    /// Requests sent and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.sent
    }

    /// Takes a request; its answer comes out of [`Core::poll_answer`].
    pub fn submit(&mut self, ticket: T, call: Call) {
        let id = self.add(call, Purpose::Caller(ticket));
        self.queue.push_back(id);
    }

    /// The owner of an attachment is gone without detaching it: it is not resumed any more.
    pub fn forget(&mut self, volume: u64, generation: u64) {
        if self.sessions.get(&volume).is_some_and(|s| s.generation == generation) {
            self.end_session(volume, &Error::new(ErrorKind::Closed, "the volume was closed"));
        }
    }

    /// The next answer.
    pub fn poll_answer(&mut self) -> Option<(T, Result<Answer>)> {
        self.answers.pop_front()
    }

    /// Answers everything with `error`: the server refuses this client.
    pub fn fail_all(&mut self, error: &Error) {
        for (_, entry) in std::mem::take(&mut self.entries) {
            if let Purpose::Caller(ticket) = entry.purpose {
                self.answers.push_back((ticket, Err(error.clone())));
            }
        }
        self.disconnected();
    }

    /// Where to read bytes into (append them).
    pub fn receive_buffer(&mut self) -> &mut BytesMut {
        if self.input.capacity() - self.input.len() < RECEIVE_BYTES / 4 {
            self.input.reserve(RECEIVE_BYTES);
        }
        &mut self.input
    }

    /// Takes all whole frames out of the receive buffer.
    ///
    /// # Errors
    /// Close the connection and call [`Core::disconnected`].
    pub fn process(&mut self) -> std::result::Result<(), ConnectionError> {
        loop {
            let header = match decode(&self.input)? {
                Decoded::Frame(frame) => frame.header,
                Decoded::NeedMore(more) => {
                    self.input.reserve(more);
                    return Ok(());
                }
            };
            let bytes = self.input.split_to(header.frame_bytes()).freeze();
            let payload_at = HEADER_BYTES + header.body_len as usize;
            let frame = Frame { header, body: &bytes[HEADER_BYTES..payload_at], payload: &bytes[payload_at..] };
            if !header.is_reply() {
                return Err(ConnectionError::Senseless(format!("a request (operation {})", header.op)));
            }
            if self.hello.is_none() {
                self.greeted(&frame)?;
            } else {
                self.reply(&frame, bytes.slice(payload_at..))?;
            }
        }
    }

    /// Appends what may be sent now: HELLO, what volumes need to resume, requests. Call it until it adds nothing.
    pub fn poll_output(&mut self, out: &mut Vec<u8>) {
        if std::mem::take(&mut self.greeting_due) {
            let (version_min, version_max) = (limits::VERSION_MIN, limits::VERSION_MAX);
            let client = self.options.client_name.clone();
            encode::request(out, HELLO_ID, 0, &Hello { version_min, version_max, features: 0, client }, &[]);
        }
        let Some(hello) = &self.hello else { return };
        let max = hello.in_flight_max.min(self.options.in_flight_max).max(1) as usize;
        while self.sent < max && out.len() < OUTPUT_BYTES_SOFT {
            let Some(id) = self.queue.pop_front() else { break };
            self.dispatch(id, out);
        }
    }

    /// Tries again what got a transient error, and drops parked requests that nobody waits for.
    pub fn tick(&mut self) {
        let volumes: Vec<u64> = self.sessions.keys().copied().collect();
        for volume in volumes {
            match self.sessions.get_mut(&volume).map(|s| (s.phase.clone(), s)) {
                Some((Phase::Stalled { resumed: false }, _)) => self.resume(volume),
                Some((Phase::Stalled { resumed: true }, session)) => {
                    session.rewind_batch();
                    self.replay(volume);
                }
                Some((Phase::Ready, _)) => {
                    self.make_room(volume);
                    self.unpark(volume);
                }
                _ => self.drop_abandoned(volume),
            }
        }
    }

    fn add(&mut self, call: Call, purpose: Purpose<T>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.entries.insert(id, Entry { call, purpose, sent: false, flush_point: 0 });
        id
    }

    fn greeted(&mut self, frame: &Frame<'_>) -> std::result::Result<(), ConnectionError> {
        if frame.header.request_id != HELLO_ID || frame.header.op != Op::Hello as u8 {
            return Err(ConnectionError::Senseless("a reply before the one to HELLO".into()));
        }
        frame.outcome().map_err(|e| match e.status {
            Status::ShuttingDown | Status::Busy => ConnectionError::Senseless(e.message),
            status => ConnectionError::Refused(Error::from_status(status, e.message)),
        })?;
        let hello = frame.owned_body::<HelloReply>().map_err(|e| ConnectionError::Senseless(e.message))?;
        if !(limits::VERSION_MIN..=limits::VERSION_MAX).contains(&hello.version) || hello.shards.is_empty() {
            let message = format!("protocol version {} and {} shards in HELLO", hello.version, hello.shards.len());
            return Err(ConnectionError::Refused(Error::new(ErrorKind::Protocol, message)));
        }
        if self.node_id.is_some_and(|known| known != hello.node_id) {
            let what = "another node answers at this address: attach the volume again";
            let volumes: Vec<u64> = self.sessions.keys().copied().collect();
            volumes.into_iter().for_each(|v| self.fail_session(v, &Error::new(ErrorKind::Storage, what)));
        }
        self.node_id = Some(hello.node_id);
        self.hello = Some(hello);
        let volumes: Vec<u64> = self.sessions.keys().copied().collect();
        volumes.into_iter().for_each(|volume| self.resume(volume));
        Ok(())
    }

    /// Sends a request, or parks it, or answers it at once.
    fn dispatch(&mut self, id: u64, out: &mut Vec<u8>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if matches!(&entry.purpose, Purpose::Caller(t) if t.is_abandoned()) {
            self.entries.remove(&id);
            return;
        }
        if let (Call::Attach { name, .. }, Purpose::Caller(_)) = (&entry.call, &entry.purpose) {
            let busy = |s: &&mut Session| s.name == *name && !matches!(s.phase, Phase::Ready | Phase::Failed(_));
            if let Some(session) = self.sessions.values_mut().find(busy) {
                session.parked.push_back(id);
                return;
            }
        }
        let internal = !matches!(entry.purpose, Purpose::Caller(_));
        if let (Some((volume, generation)), false) = (entry.call.attachment(), internal) {
            let limit = self.options.unflushed_bytes_max;
            let refused = match self.sessions.get_mut(&volume) {
                None => Some(Error::new(ErrorKind::Closed, "the volume is not attached")),
                Some(s) if s.generation != generation => {
                    Some(Error::new(ErrorKind::Fenced, format!("volume {} was attached again", s.name)))
                }
                Some(Session { phase: Phase::Failed(error), .. }) => Some(error.clone()),
                Some(s) if s.phase != Phase::Ready || !s.has_room(&entry.call, limit) => {
                    s.parked.push_back(id);
                    if s.phase == Phase::Ready {
                        self.make_room(volume);
                    }
                    return;
                }
                Some(s) => {
                    s.unanswered_bytes += Session::cost(&entry.call);
                    entry.flush_point = s.flush_point();
                    None
                }
            };
            if let Some(error) = refused {
                self.answer(id, Err(error));
                return;
            }
        } else if let Call::Flush { volume, .. } = entry.call {
            entry.flush_point = self.sessions.get(&volume).map_or(0, Session::flush_point);
        }
        entry.sent = true;
        entry.call.encode(id, out);
        self.sent += 1;
    }

    /// Removes an entry and answers whoever waits for it.
    fn answer(&mut self, id: u64, result: Result<Answer>) {
        if let Some(Entry { purpose: Purpose::Caller(ticket), .. }) = self.entries.remove(&id) {
            self.answers.push_back((ticket, result));
        }
    }

    fn reply(&mut self, frame: &Frame<'_>, payload: Bytes) -> std::result::Result<(), ConnectionError> {
        let id = frame.header.request_id;
        let Some(entry) = self.entries.remove(&id).filter(|e| e.sent) else {
            return Err(ConnectionError::Senseless(format!("a reply to request {id}, which was not sent")));
        };
        self.sent -= 1;
        let result = entry.call.answer(frame, payload);
        if let Err(error) = &result
            && error.kind == ErrorKind::Protocol
            && error.status.is_none()
        {
            let message = error.message.clone();
            self.entries.insert(id, entry);
            return Err(ConnectionError::Senseless(message));
        }
        match entry.purpose {
            Purpose::Caller(ticket) => {
                self.caller_answered(&entry.call, entry.flush_point, &result);
                self.answers.push_back((ticket, result));
            }
            Purpose::Resume { volume } => self.resumed(volume, result),
            Purpose::Replay { volume } => self.replayed(volume, result),
            Purpose::OwnFlush => self.own_flushed(&entry.call, entry.flush_point, result),
        }
        Ok(())
    }

    /// Keeps the sessions' books when a caller's request is answered.
    fn caller_answered(&mut self, call: &Call, flush_point: u64, result: &Result<Answer>) {
        if let (Call::Attach { name, .. }, Ok(Answer::Attached(info))) = (call, result) {
            self.attached(name.clone(), info.volume, info.generation);
            return;
        }
        let Some((volume, generation)) = call.attachment() else { return };
        let Some(session) = self.sessions.get_mut(&volume).filter(|s| s.generation == generation) else { return };
        session.unanswered_bytes = session.unanswered_bytes.saturating_sub(Session::cost(call));
        match (call, result) {
            (_, Err(e)) if e.kind == ErrorKind::Fenced => self.fail_session(volume, &e.clone()),
            (_, Err(_)) => self.unpark(volume),
            (Call::Detach { .. }, Ok(_)) => {
                self.end_session(volume, &Error::new(ErrorKind::Closed, "the volume was detached"));
            }
            (Call::Flush { .. }, Ok(_)) => {
                session.flushed(flush_point);
                self.unpark(volume);
            }
            (call, Ok(_)) if call.changes().is_some() => {
                session.acknowledged(call);
                self.make_room(volume);
                self.unpark(volume);
            }
            _ => {}
        }
    }
}
