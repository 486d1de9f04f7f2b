//! The transmission phase over a stream: one reader, one coalescing writer, and a task for each request in flight.
//!
//! Requests run side by side and are answered in any order. What a connection may have in flight is bounded in number
//! and in bytes; at the bound, its reader stops reading, so the pressure lands on the client that makes it. When the
//! peer goes away, requests already read run to their end: a write is done whole or was never begun.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::backend::{ErrorKind, Export, ExportError};
use super::exports::Lease;
use super::handshake::{Agreed, ConnectionError, skip};
use super::reply::{Encoded, Encoder, errno_of};
use super::request::{self, Action, RequestHeader, Terms};
use super::wire;

/// Requests of one connection in flight. QEMU keeps at most 16, the kernel's client 128, fio what it is told.
const IN_FLIGHT_MAX: usize = 256;
/// Payload bytes of one connection in flight: two requests of the largest size.
const IN_FLIGHT_BYTES_MAX: u32 = 2 * wire::PAYLOAD_BYTES_MAX;
/// Replies gathered into one write to the socket; larger payloads go out on their own without a copy.
const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// Serves requests until the peer leaves, the attachment is lost or the agent stops; then finishes what is in flight.
pub(crate) async fn transmit<E: Export>(
    reader: &mut (impl AsyncRead + Unpin),
    writer: impl AsyncWrite + Unpin + Send + 'static,
    agreed: Agreed<E>,
    mut stop: watch::Receiver<bool>,
) -> (Lease<E>, Result<(), ConnectionError>) {
    let (replies, queue) = mpsc::channel(IN_FLIGHT_MAX);
    let (over, mut is_over) = watch::channel(false);
    let over = Arc::new(over);
    let writer = tokio::spawn(write_replies(writer, queue, Arc::clone(&over)));
    let served = Arc::new(Served { lease: agreed.lease, encoder: agreed.encoder, over });
    let mut connection = Connection { served, replies, room: Room::default(), tasks: JoinSet::new() };
    let read = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => Ok(()),
        _ = is_over.wait_for(|over| *over) => Ok(()),
        read = connection.read_requests(reader) => read,
    };
    let Connection { served, replies, tasks, .. } = connection;
    drop(replies);
    finish(tasks).await;
    let written = writer.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    let served = Arc::into_inner(served).expect("all tasks that shared it have ended");
    (served.lease, read.and(written.map_err(ConnectionError::Io)))
}

/// What the requests of a connection share.
struct Served<E> {
    lease: Lease<E>,
    encoder: Encoder,
    /// Set when this connection has no future: its attachment or its peer is lost.
    over: Arc<watch::Sender<bool>>,
}

struct Connection<E> {
    served: Arc<Served<E>>,
    replies: mpsc::Sender<Reply>,
    room: Room,
    tasks: JoinSet<()>,
}

/// A reply and the room it occupies until it is in the socket.
struct Reply {
    encoded: Encoded,
    _room: Occupied,
}

#[derive(Debug)]
struct Occupied {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// Bounds of what is in flight.
struct Room {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Room {
        Room {
            requests: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            bytes: Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX as usize)),
        }
    }
}

impl Room {
    async fn occupy(&self, bytes: u32) -> Occupied {
        let closed = "the semaphores are never closed";
        Occupied {
            _request: Arc::clone(&self.requests).acquire_owned().await.expect(closed),
            _bytes: Arc::clone(&self.bytes).acquire_many_owned(bytes).await.expect(closed),
        }
    }
}

impl<E: Export> Connection<E> {
    async fn read_requests(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> Result<(), ConnectionError> {
        let contexts = self.served.encoder.contexts.any();
        let size_bytes = self.served.lease.device().export().size_bytes();
        let terms = Terms { size_bytes, structured: self.served.encoder.structured, contexts };
        while let Some(header) = read_header(reader).await? {
            while self.tasks.try_join_next().is_some() {}
            match request::check(&header, &terms) {
                Ok(Action::Disconnect) => return Ok(()),
                Ok(action) => self.start(reader, header, action).await?,
                Err(refusal) => {
                    debug!(export = self.served.lease.name(), "request refused: {}", refusal.message);
                    skip(reader, header.payload_bytes()).await?;
                    let encoded = self.served.encoder.error(header.cookie, refusal.errno, &refusal.message);
                    let room = self.room.occupy(0).await;
                    // A writer that has ended set `over`.
                    let _ = self.replies.send(Reply { encoded, _room: room }).await;
                }
            }
        }
        Ok(())
    }

    /// Makes room, reads the payload, and lets the request run.
    async fn start(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        header: RequestHeader,
        action: Action,
    ) -> Result<(), ConnectionError> {
        let bytes = match action {
            Action::Read { len, .. } | Action::Write { len, .. } => len,
            _ => 0,
        };
        let room = self.room.occupy(bytes).await;
        let payload = read_payload(reader, header.payload_bytes() as usize).await?;
        let served = Arc::clone(&self.served);
        let replies = self.replies.clone();
        self.tasks.spawn(async move {
            let encoded = served.execute(header.cookie, action, payload).await;
            drop(served);
            let _ = replies.send(Reply { encoded, _room: room }).await;
        });
        Ok(())
    }
}

impl<E: Export> Served<E> {
    async fn execute(&self, cookie: u64, action: Action, payload: Bytes) -> Encoded {
        match self.perform(cookie, action, payload).await {
            Ok(encoded) => encoded,
            Err(error) => {
                warn!(export = self.lease.name(), ?action, "request failed: {error}");
                self.lease.observe(&error);
                if error.kind == ErrorKind::Gone {
                    self.over.send_replace(true);
                }
                self.encoder.error(cookie, errno_of(&error), &error.message)
            }
        }
    }

    async fn perform(&self, cookie: u64, action: Action, payload: Bytes) -> Result<Encoded, ExportError> {
        let device = self.lease.device();
        match action {
            Action::Read { offset, len } => {
                return Ok(self.encoder.data(cookie, offset, device.read(offset, len).await?));
            }
            Action::BlockStatus { offset, len, one } => {
                let extents = device.extents(offset, len).await?;
                return Ok(self.encoder.block_status(cookie, &extents, one));
            }
            Action::Write { offset, fua, .. } => device.write(offset, payload, fua).await?,
            Action::Flush => device.flush().await?,
            Action::Trim { offset, len, fua } => device.trim(offset, len, fua).await?,
            Action::WriteZeroes { offset, len, fua, allocate } => {
                device.write_zeroes(offset, len, fua, allocate).await?;
            }
            Action::Cache { offset, len } => device.prefetch(offset, len).await?,
            Action::Disconnect => unreachable!("the reader ends the connection itself"),
        }
        Ok(self.encoder.done(cookie))
    }
}

/// The next request's head; `None` when the peer hung up between requests.
async fn read_header(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<RequestHeader>, ConnectionError> {
    let mut head = [0; wire::REQUEST_HEADER_BYTES];
    let first = reader.read(&mut head).await?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut head[first..]).await?;
    request::parse_request(&head).map(Some).map_err(ConnectionError::Protocol)
}

async fn read_payload(reader: &mut (impl AsyncRead + Unpin), len: usize) -> io::Result<Bytes> {
    let mut payload = BytesMut::with_capacity(len);
    let mut limited = reader.take(len as u64);
    while payload.len() < len {
        if limited.read_buf(&mut payload).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(payload.freeze())
}

/// Writes replies, as many at a time as are ready. After a failure it only empties the queue, so that requests in
/// flight end as if all were well.
async fn write_replies(
    writer: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Reply>,
    over: Arc<watch::Sender<bool>>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(WRITE_BUFFER_BYTES, writer);
    let written = write_until_closed(&mut writer, &mut queue).await;
    if written.is_err() {
        over.send_replace(true);
        while queue.recv().await.is_some() {}
    }
    written
}

async fn write_until_closed(
    writer: &mut BufWriter<impl AsyncWrite + Unpin>,
    queue: &mut mpsc::Receiver<Reply>,
) -> io::Result<()> {
    while let Some(mut reply) = queue.recv().await {
        loop {
            writer.write_all(&reply.encoded.head).await?;
            writer.write_all(&reply.encoded.payload).await?;
            match queue.try_recv() {
                Ok(next) => reply = next,
                Err(_) => break,
            }
        }
        writer.flush().await?;
    }
    writer.shutdown().await
}

async fn finish(mut tasks: JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(panic) = ended {
            warn!("a request panicked: {panic}");
        }
    }
}
