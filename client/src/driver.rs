//! The tokio side: one task per shard connection that moves bytes between a socket and a [`Core`].
//!
//! A link connects when it has something to do, and again, with bounded and jittered back-off, while it has
//! requests or attached volumes. All output of a round leaves in one write.

use std::collections::hash_map::RandomState;
use std::future::pending;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::Options;
use crate::call::{Answer, Call};
use crate::core::{ConnectionError, Core, CoreOptions, Ticket};
use crate::error::{Error, ErrorKind, Result};

/// First and longest pause between attempts to connect, and between attempts of a refused request.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a core may try again what got a transient error.
const TICK: Duration = Duration::from_millis(100);
/// A core that comes back later than this after it was yielded has others who want it, and then a connection that looks for its
/// answers only waits behind them: for so long it sleeps instead, and is woken ahead of them.
const ALONE_MAX: Duration = Duration::from_millis(1);
const CROWDED_PAUSE: Duration = Duration::from_millis(100);

/// A way to reach one shard; clones share the connection.
#[derive(Clone)]
pub(crate) struct Link {
    commands: mpsc::UnboundedSender<Command>,
    permits: Arc<Semaphore>,
    problem: Arc<Mutex<String>>,
    deadline: Duration,
}

enum Command {
    Submit { ticket: Waiting, call: Call },
    Forget { volume: u64, generation: u64 },
}

/// A caller that waits. The permit bounds what a link holds: it is given back when the core lets go of the request.
struct Waiting {
    answer: oneshot::Sender<Result<Answer>>,
    _permit: OwnedSemaphorePermit,
}

impl Ticket for Waiting {
    fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }
}

impl Link {
    /// A link that dials `addresses` in turn until one answers. Must be called inside a tokio runtime.
    pub(crate) fn start(addresses: Vec<String>, options: &Options) -> Link {
        let (commands, inbox) = mpsc::unbounded_channel();
        let problem = Arc::new(Mutex::new(String::new()));
        let driver = Driver {
            core: Core::new(core_options(options)),
            addresses,
            inbox: Some(inbox),
            problem: problem.clone(),
            silence_max: options.deadline,
            idle_poll: options.idle_poll,
            attempt: 0,
        };
        tokio::spawn(driver.run());
        let permits = Arc::new(Semaphore::new(options.in_flight_max.max(1) as usize));
        Link { commands, permits, problem, deadline: options.deadline }
    }

    /// When a request that starts now has to be answered.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.deadline
    }

    /// Sends a request and waits for its answer; sends it again when the server was only busy or stopping.
    pub(crate) async fn call(&self, call: Call, deadline: Instant) -> Result<Answer> {
        let pending = self.submit(call, deadline).await?;
        self.finish(pending, deadline).await
    }

    /// First half of [`Link::call`]: the request is on its way when this returns.
    pub(crate) async fn submit(&self, call: Call, deadline: Instant) -> Result<Pending> {
        let permit = timeout_at(deadline, self.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| self.timed_out(&call))?.map_err(|_| closed())?;
        let (answer, receiver) = oneshot::channel();
        let command = Command::Submit { ticket: Waiting { answer, _permit: permit }, call: call.clone() };
        self.commands.send(command).map_err(|_| closed())?;
        Ok(Pending { receiver, call })
    }

    /// Second half of [`Link::call`].
    pub(crate) async fn finish(&self, mut pending: Pending, deadline: Instant) -> Result<Answer> {
        for attempt in 0.. {
            let answer = timeout_at(deadline, &mut pending.receiver).await;
            match answer.map_err(|_| self.timed_out(&pending.call))?.map_err(|_| closed())? {
                Err(e) if e.is_transient() => {
                    self.note(&e.message);
                    let again = Instant::now() + backoff(attempt);
                    if again >= deadline {
                        return Err(e);
                    }
                    sleep_until(again).await;
                    pending = self.submit(pending.call, deadline).await?;
                }
                result => return result,
            }
        }
        Err(closed())
    }

    pub(crate) fn forget(&self, volume: u64, generation: u64) {
        // Fails only when the driver is gone, and the session with it.
        let _ = self.commands.send(Command::Forget { volume, generation });
    }

    fn note(&self, problem: &str) {
        problem.clone_into(&mut self.problem.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn timed_out(&self, call: &Call) -> Error {
        let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (op, seconds) = (call.op().name(), self.deadline.as_secs_f64());
        let cause = if problem.is_empty() { "the server did not answer".to_owned() } else { problem };
        Error::new(ErrorKind::Timeout, format!("{op} was not done within {seconds} s: {cause}"))
    }
}

/// A request on its way.
pub(crate) struct Pending {
    receiver: oneshot::Receiver<Result<Answer>>,
    call: Call,
}

pub(crate) fn core_options(options: &Options) -> CoreOptions {
    CoreOptions {
        client_name: options.client_name.clone(),
        in_flight_max: options.in_flight_max,
        unflushed_bytes_max: options.unflushed_bytes_max,
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the client is closed (its tokio runtime is gone)")
}

/// Doubling from [`BACKOFF_MIN`] to [`BACKOFF_MAX`]; a random half of it, so that a thousand clients of a restarted
/// server do not come in step.
fn backoff(attempt: u32) -> Duration {
    let full = BACKOFF_MIN.saturating_mul(1 << attempt.min(10)).min(BACKOFF_MAX);
    let random = RandomState::new().build_hasher().finish() % 1024;
    full / 2 + full.mul_f64(random as f64 / 2048.0)
}

/// A socket of either kind.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Socket for S {}

/// Dials `host:port` or `unix:/path`.
pub(crate) async fn dial(address: &str) -> io::Result<Box<dyn Socket>> {
    let attempt = async {
        if let Some(path) = address.strip_prefix("unix:") {
            return Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Socket>);
        }
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream) as Box<dyn Socket>)
    };
    timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

struct Driver {
    core: Core<Waiting>,
    addresses: Vec<String>,
    inbox: Option<mpsc::UnboundedReceiver<Command>>,
    problem: Arc<Mutex<String>>,
    silence_max: Duration,
    idle_poll: Duration,
    attempt: u32,
}

/// Why a connection's loop ended.
enum End {
    /// All handles are gone and nothing is left to do.
    Closed,
    Lost(String),
}

impl Driver {
    async fn run(mut self) {
        loop {
            if self.core.is_idle() {
                match self.next_command().await {
                    Some(command) => self.take(command),
                    None => return,
                }
            }
            let address = self.addresses[self.attempt as usize % self.addresses.len()].clone();
            let end = match dial(&address).await {
                Ok(socket) => self.converse(socket).await,
                Err(e) => End::Lost(e.to_string()),
            };
            self.core.disconnected();
            match end {
                End::Closed => return,
                End::Lost(why) => self.note(format!("connection to {address}: {why}")),
            }
            self.pause().await;
            if self.inbox.is_none() {
                return;
            }
        }
    }

    fn note(&mut self, problem: String) {
        tracing::debug!(%problem, "connection lost");
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Waits before the next attempt, and takes commands meanwhile.
    async fn pause(&mut self) {
        let until = Instant::now() + backoff(self.attempt);
        self.attempt = self.attempt.saturating_add(1);
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                command = self.next_command() => match command {
                    Some(command) => self.take(command),
                    None => return,
                },
            }
        }
    }

    /// The next command; `None` for good once all handles are gone.
    async fn next_command(&mut self) -> Option<Command> {
        let command = self.inbox.as_mut()?.recv().await;
        if command.is_none() {
            self.inbox = None;
        }
        command
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { ticket, call } => self.core.submit(ticket, call),
            Command::Forget { volume, generation } => self.core.forget(volume, generation),
        }
    }

    /// Runs one connection to its end.
    async fn converse(&mut self, socket: Box<dyn Socket>) -> End {
        let (mut reader, mut writer) = tokio::io::split(socket);
        let (mut out, mut written) = (Vec::new(), 0);
        let (mut heard, mut active, mut crowded_until) = (Instant::now(), Instant::now(), Instant::now());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.core.connected();
        loop {
            if written == out.len() {
                out.clear();
                written = 0;
                self.core.poll_output(&mut out);
            }
            self.deliver();
            let waiting_for_hello = self.core.hello().is_none();
            let looks_again = self.core.in_flight() > 0 && {
                let now = Instant::now();
                now < active + self.idle_poll && crowded_until <= now
            };
            let inbox = self.inbox.as_mut();
            tokio::select! {
                read = reader.read_buf(self.core.receive_buffer()) => match read {
                    Ok(0) => return End::Lost("closed by the server".into()),
                    Ok(_) => {
                        heard = Instant::now();
                        active = heard;
                        if let Err(end) = self.process() {
                            return end;
                        }
                    }
                    Err(e) => return End::Lost(e.to_string()),
                },
                wrote = writer.write(&out[written..]), if written < out.len() => match wrote {
                    Ok(n) => {
                        written += n;
                        active = Instant::now();
                    }
                    Err(e) => return End::Lost(e.to_string()),
                },
                alone = look_again(), if looks_again => {
                    if !alone {
                        crowded_until = Instant::now() + CROWDED_PAUSE;
                    }
                }
                command = async { match inbox { Some(inbox) => inbox.recv().await, None => pending().await } } => {
                    let Some(command) = command else { return End::Closed };
                    if self.core.in_flight() == 0 && !waiting_for_hello {
                        heard = Instant::now();
                    }
                    self.take(command);
                    while let Some(Ok(command)) = self.inbox.as_mut().map(mpsc::UnboundedReceiver::try_recv) {
                        self.take(command);
                    }
                }
                _ = tick.tick(), if waiting_for_hello || !self.core.is_idle() => {
                    let silent = heard.elapsed() > self.silence_max;
                    if silent && (waiting_for_hello || self.core.in_flight() > 0) {
                        return End::Lost("no answer".into());
                    }
                    self.core.tick();
                }
            }
        }
    }

    fn process(&mut self) -> std::result::Result<(), End> {
        let result = self.core.process();
        if self.core.hello().is_some() {
            self.attempt = 0;
        }
        self.deliver();
        result.map_err(|error| {
            if let ConnectionError::Refused(error) = &error {
                self.core.fail_all(error);
                self.deliver();
            }
            End::Lost(error.to_string())
        })
    }

    fn deliver(&mut self) {
        while let Some((ticket, result)) = self.core.poll_answer() {
            // A caller that went away does not want it.
            let _ = ticket.answer.send(result);
        }
    }
}

/// Lets other threads have the core, then the runtime's other tasks, which look at all sockets. `false`: the core came back late.
async fn look_again() -> bool {
    let yielded = Instant::now();
    std::thread::yield_now();
    let alone = yielded.elapsed() < ALONE_MAX;
    tokio::task::yield_now().await;
    alone
}

/// One short-lived connection for a question to a given shard: HELLO, and pages of LIST.
pub(crate) struct Probe {
    core: Core<()>,
    socket: Box<dyn Socket>,
}

impl Probe {
    /// Dials and greets, once.
    pub(crate) async fn open(address: &str, options: &Options) -> Result<Probe> {
        let unavailable = |e: String| Error::new(ErrorKind::Unavailable, format!("can't connect to {address}: {e}"));
        let socket = dial(address).await.map_err(|e| unavailable(e.to_string()))?;
        let mut probe = Probe { core: Core::new(core_options(options)), socket };
        probe.core.connected();
        while probe.core.hello().is_none() {
            let stepped = timeout(CONNECT_TIMEOUT.min(options.deadline), probe.step()).await;
            stepped.map_err(|_| unavailable("no answer to HELLO".into()))?.map_err(|e| match e {
                Error { kind: ErrorKind::Unavailable, message, .. } => unavailable(message),
                other => Error { message: format!("{address}: {other}"), ..other },
            })?;
        }
        Ok(probe)
    }

    /// Addresses of all shards.
    pub(crate) fn shards(&self) -> Vec<String> {
        self.core.hello().map(|h| h.shards.clone()).unwrap_or_default()
    }

    /// The largest payload both sides take.
    pub(crate) fn payload_bytes_max(&self) -> u32 {
        let limit = volley_protocol::limits::PAYLOAD_BYTES_MAX;
        self.core.hello().map_or(limit, |h| h.payload_bytes_max.min(limit) / 512 * 512).max(512)
    }

    pub(crate) async fn call(&mut self, call: Call, deadline: Duration) -> Result<Answer> {
        self.core.submit((), call);
        let work = async {
            loop {
                if let Some(((), answer)) = self.core.poll_answer() {
                    return answer;
                }
                self.step().await?;
            }
        };
        timeout(deadline, work)
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "no answer from the server")))
    }

    async fn step(&mut self) -> Result<()> {
        let lost = |e: io::Error| Error::new(ErrorKind::Unavailable, e.to_string());
        let mut out = Vec::new();
        self.core.poll_output(&mut out);
        self.socket.write_all(&out).await.map_err(lost)?;
        if self.socket.read_buf(self.core.receive_buffer()).await.map_err(lost)? == 0 {
            return Err(Error::new(ErrorKind::Unavailable, "closed by the server"));
        }
        self.core.process().map_err(|e| match e {
            ConnectionError::Refused(error) => error,
            other => Error::new(ErrorKind::Protocol, other.to_string()),
        })
    }
}
