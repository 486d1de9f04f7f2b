//! Simulated connections: bytes arrive late, in arbitrary pieces, or not at all once the connection is killed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::SimWorld;
use super::executor::Executor;
use super::random::SimRng;
use crate::platform::{ByteReader, ByteWriter, Connection, Time};

/// Time on the wire in nanoseconds.
const WIRE_NANOS: std::ops::Range<u64> = 5_000..200_000;
/// Bytes in flight in one direction: beyond it a writer waits, as with a socket buffer.
const WINDOW_BYTES: usize = 256 << 10;

/// One direction of a connection.
struct Pipe {
    /// Bytes with the time at which they arrive, in order.
    segments: VecDeque<(Time, Vec<u8>)>,
    buffered: usize,
    /// No more bytes will be sent.
    closed: bool,
    /// Reset: bytes in flight are lost.
    killed: bool,
    waiting: Vec<Waker>,
}

type PipeRc = Rc<RefCell<Pipe>>;

/// One end of a connection.
pub struct SimConnection {
    reader: SimReader,
    writer: SimWriter,
    peer: &'static str,
}

pub struct SimReader {
    executor: Rc<Executor>,
    rng: Rc<RefCell<SimRng>>,
    incoming: PipeRc,
}

pub struct SimWriter {
    executor: Rc<Executor>,
    rng: Rc<RefCell<SimRng>>,
    outgoing: PipeRc,
    incoming: PipeRc,
}

/// Resets a connection from outside.
pub struct SimKill {
    pipes: [PipeRc; 2],
}

impl SimKill {
    /// Both ends see a reset; bytes in flight are lost.
    pub fn kill(&self) {
        for pipe in &self.pipes {
            let mut state = pipe.borrow_mut();
            state.killed = true;
            state.segments.clear();
            drop(state);
            wake_all(pipe);
        }
    }
}

impl SimConnection {
    /// The two ends of a fresh connection: client, server.
    #[must_use]
    pub fn pair(world: &SimWorld) -> (SimConnection, SimConnection) {
        let rng = SimRng::new(world.core.program_rng.borrow_mut().next_u64());
        let (rng, executor) = (Rc::new(RefCell::new(rng)), world.core.executor.clone());
        let (up, down) = (new_pipe(), new_pipe());
        let end = |incoming: &PipeRc, outgoing: &PipeRc, peer| SimConnection {
            reader: SimReader { executor: executor.clone(), rng: rng.clone(), incoming: incoming.clone() },
            writer: SimWriter {
                executor: executor.clone(),
                rng: rng.clone(),
                outgoing: outgoing.clone(),
                incoming: incoming.clone(),
            },
            peer,
        };
        (end(&down, &up, "sim-server"), end(&up, &down, "sim-client"))
    }

    #[must_use]
    pub fn killer(&self) -> SimKill {
        SimKill { pipes: [self.writer.outgoing.clone(), self.writer.incoming.clone()] }
    }
}

impl Connection for SimConnection {
    type Reader = SimReader;
    type Writer = SimWriter;

    fn split(self) -> (SimReader, SimWriter) {
        (self.reader, self.writer)
    }

    fn peer(&self) -> String {
        self.peer.to_owned()
    }

    fn hang_up(&self) -> impl Fn() + 'static {
        let pipes = [self.writer.outgoing.clone(), self.writer.incoming.clone()];
        move || {
            for pipe in &pipes {
                pipe.borrow_mut().closed = true;
                wake_all(pipe);
            }
        }
    }
}

impl ByteReader for SimReader {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let arrival = self.first_arrival().await?;
        let Some(arrival) = arrival else { return Ok(0) };
        self.executor.sleep_until(arrival).await;
        let now = self.executor.now();
        let count = {
            let mut pipe = self.incoming.borrow_mut();
            if pipe.killed {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let available: usize = pipe.segments.iter().take_while(|(at, _)| *at <= now).map(|(_, s)| s.len()).sum();
            let most = available.min(buf.len());
            let rng = &mut *self.rng.borrow_mut();
            // Half of the reads take what there is, half any part of it.
            let count = if rng.coin() { most } else { 1 + rng.index(most) };
            take_bytes(&mut pipe, &mut buf[..count]);
            count
        };
        wake_all(&self.incoming);
        self.executor.note("receive", &[count as u64]);
        Ok(count)
    }
}

impl SimReader {
    /// When the next bytes arrive; `None` at the end of the stream.
    async fn first_arrival(&self) -> io::Result<Option<Time>> {
        poll_fn(|cx| {
            let mut pipe = self.incoming.borrow_mut();
            if pipe.killed {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if let Some((at, _)) = pipe.segments.front() {
                return Poll::Ready(Ok(Some(*at)));
            }
            if pipe.closed {
                return Poll::Ready(Ok(None));
            }
            pipe.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl ByteWriter for SimWriter {
    async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        for part in buf.chunks(WINDOW_BYTES) {
            self.wait_for_room().await?;
            let wire = Duration::from_nanos(self.rng.borrow_mut().within(WIRE_NANOS));
            let mut pipe = self.outgoing.borrow_mut();
            let earliest = pipe.segments.back().map_or(Time(0), |(at, _)| *at);
            let arrival = self.executor.now().after(wire).max(earliest);
            pipe.segments.push_back((arrival, part.to_vec()));
            pipe.buffered += part.len();
            drop(pipe);
            wake_all(&self.outgoing);
        }
        Ok(())
    }
}

impl SimWriter {
    async fn wait_for_room(&self) -> io::Result<()> {
        poll_fn(|cx| {
            let mut pipe = self.outgoing.borrow_mut();
            if pipe.killed || pipe.closed {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if pipe.buffered < WINDOW_BYTES {
                return Poll::Ready(Ok(()));
            }
            pipe.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A writer that goes away ends its direction, as a closed socket does.
impl Drop for SimWriter {
    fn drop(&mut self) {
        self.outgoing.borrow_mut().closed = true;
        wake_all(&self.outgoing);
    }
}

fn new_pipe() -> PipeRc {
    let pipe = Pipe { segments: VecDeque::new(), buffered: 0, closed: false, killed: false, waiting: Vec::new() };
    Rc::new(RefCell::new(pipe))
}

fn wake_all(pipe: &PipeRc) {
    let waiting = std::mem::take(&mut pipe.borrow_mut().waiting);
    for waker in waiting {
        waker.wake();
    }
}

fn take_bytes(pipe: &mut Pipe, buf: &mut [u8]) {
    let mut filled = 0;
    while filled < buf.len() {
        let Some((_, segment)) = pipe.segments.front_mut() else { break };
        let count = segment.len().min(buf.len() - filled);
        buf[filled..filled + count].copy_from_slice(&segment[..count]);
        segment.drain(..count);
        filled += count;
        if segment.is_empty() {
            pipe.segments.pop_front();
        }
    }
    pipe.buffered -= filled;
}
