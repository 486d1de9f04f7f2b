//! An NBD server of memory exports in a thread, the foreign clients' command lines, and a bare-bones client of our own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use volley_tools::nbd::exports::Exports;
use volley_tools::nbd::listen::{Address, Listener};
use volley_tools::nbd::memory::MemoryBackend;
use volley_tools::nbd::negotiation::greeting;
use volley_tools::nbd::server;
use volley_tools::nbd::wire::{self, command, option};

/// No foreign client may take longer.
const CLIENT_SECONDS_MAX: &str = "60";
/// No answer on a socket of ours may take longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A running server. Dropping it stops it and waits until every connection has ended.
pub(crate) struct Server {
    pub(crate) backend: MemoryBackend,
    pub(crate) dir: tempfile::TempDir,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(backend: &MemoryBackend) -> Server {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let address = Address::Unix(dir.path().join("nbd.sock"));
        let (stop, stopped) = watch::channel(false);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let exports = Arc::new(Exports::new(backend.clone()));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = Listener::bind(&address).await.expect("a fresh socket");
                ready.send(()).expect("the test waits");
                server::serve(vec![listener], exports, stopped).await;
            });
        });
        is_ready.recv().expect("the server listens");
        Server { backend: backend.clone(), dir, stop, thread: Some(thread) }
    }

    /// A server of one disk named `disk`.
    pub(crate) fn of(data: Vec<u8>) -> Server {
        Server::start(&MemoryBackend::new([("disk", data)]))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Stops in order and waits for the end.
    pub(crate) fn stop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server ends without a panic");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

/// Whether a foreign client is here. If not: says SKIPPED, or fails in CI.
pub(crate) fn installed(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{tool} is not installed, and CI=true");
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Runs a foreign client, with a limit on its time.
pub(crate) fn run(tool: &str, args: &[&str]) -> Output {
    // System paths first: nbdsh is a script of the system's Python, and another one before it lacks the module.
    let path = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("timeout");
    command.env("PATH", path).arg(CLIENT_SECONDS_MAX).arg(tool).args(args).output().expect("timeout(1)")
}

/// Runs a foreign client that must succeed; its standard output.
pub(crate) fn succeed(tool: &str, args: &[&str]) -> String {
    let output = run(tool, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Bytes that don't compress and differ at every place.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

/// A client that sends whatever bytes a test likes.
pub(crate) struct RawClient {
    stream: UnixStream,
}

/// A simple reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SimpleReply {
    pub(crate) errno: u32,
    pub(crate) cookie: u64,
}

impl RawClient {
    /// Connects and answers the greeting.
    pub(crate) fn connect(server: &Server) -> RawClient {
        let stream = UnixStream::connect(server.socket()).expect("the server listens");
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        let mut client = RawClient { stream };
        assert_eq!(client.receive::<18>(), greeting());
        client.send(&3u32.to_be_bytes());
        client
    }

    /// Connects and opens `disk` the old way: simple replies, no contexts.
    pub(crate) fn open(server: &Server) -> RawClient {
        let mut client = RawClient::connect(server);
        client.option(option::EXPORT_NAME, b"disk");
        client.receive::<10>();
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    pub(crate) fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    pub(crate) fn receive_vec(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Whether the server has closed the connection and sent nothing more.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }

    pub(crate) fn option(&mut self, number: u32, data: &[u8]) {
        let head = [&wire::OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
        self.send(&[&head.concat(), data].concat());
    }

    /// Type and data of a reply to an option.
    pub(crate) fn option_reply(&mut self) -> (u32, Vec<u8>) {
        let head = self.receive::<20>();
        assert_eq!(head[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
        let u32_at = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        (u32_at(12), self.receive_vec(u32_at(16) as usize))
    }

    pub(crate) fn request(&mut self, command: u16, cookie: u64, offset: u64, len: u32) {
        let flags = 0u16;
        let head = [&wire::REQUEST_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
        self.send(&[&head[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat());
    }

    pub(crate) fn simple_reply(&mut self) -> SimpleReply {
        let head = self.receive::<16>();
        assert_eq!(head[..4], wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        let errno = u32::from_be_bytes(head[4..8].try_into().expect("four bytes"));
        SimpleReply { errno, cookie: u64::from_be_bytes(head[8..].try_into().expect("eight bytes")) }
    }

    /// Writes and returns the error number.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.request(command::WRITE, 1, offset, data.len() as u32);
        self.send(data);
        self.simple_reply().errno
    }

    /// Reads; the data, or the error number.
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.request(command::READ, 2, offset, len);
        match self.simple_reply().errno {
            0 => Ok(self.receive_vec(len as usize)),
            errno => Err(errno),
        }
    }
}
