//! A proxy that does to HTTP what networks and object stores do: it delays, throttles, cuts, lies, stalls and resets.
//!
//! One thread for each connection, blocking I/O, HTTP/1.1 with bodies of known length or until the end. It can speak TLS to its
//! clients. Requests go on as they came, so signatures stay right.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What happens to a request.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Delay(Duration),
    /// Bytes per second of the body.
    Throttle(u64),
    /// Half of the body, then the end of the connection.
    Cut,
    /// Answered by the proxy, with this status and code.
    Status(u16, &'static str),
    /// The bytes of another range under a matching header.
    WrongRange,
    /// One bit of the body is another.
    Flip,
    /// No answer until the client goes away.
    Stall,
    /// Half of the body, and then nothing until the client goes away.
    StallBody,
    /// The connection is reset.
    Reset,
    /// A whole answer, and then the end of the connection without a word about it.
    Close,
}

struct Rule {
    /// Part of the request's first line.
    part: String,
    fault: Fault,
    times: usize,
}

struct Shared {
    upstream: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    rules: Mutex<Vec<Rule>>,
    /// First lines, without the query.
    requests: Mutex<Vec<String>>,
    connections: AtomicUsize,
    stopped: AtomicBool,
}

/// Ends with the test.
pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

trait Duplex: Read + Write {}
impl<T: Read + Write> Duplex for T {}

impl Proxy {
    pub fn start(upstream: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("address");
        let shared = Arc::new(Shared {
            upstream,
            tls,
            rules: Mutex::default(),
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if of_thread.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let shared = of_thread.clone();
                shared.connections.fetch_add(1, Ordering::SeqCst);
                // A connection that breaks is what this program is for.
                std::thread::spawn(move || drop(connection(&shared, socket)));
            }
        });
        Proxy { address, shared }
    }

    /// The next `times` requests whose first line contains `part` meet this fault.
    pub fn fail(&self, part: &str, fault: Fault, times: usize) {
        self.shared.rules.lock().expect("rules").push(Rule { part: part.to_owned(), fault, times });
    }

    /// All is well from now on.
    pub fn heal(&self) {
        self.shared.rules.lock().expect("rules").clear();
    }

    /// First lines of the requests so far, without their queries.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().expect("requests").clone()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn fault_of(&self, line: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().expect("rules");
        let rule = rules.iter_mut().find(|rule| rule.times > 0 && line.contains(&rule.part))?;
        rule.times -= 1;
        Some(rule.fault)
    }
}

fn connection(shared: &Shared, socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let handle = socket.try_clone()?;
    match &shared.tls {
        None => serve(shared, &mut &socket, &handle),
        Some(config) => {
            let session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
            serve(shared, &mut StreamOwned::new(session, socket), &handle)
        }
    }
}

fn serve(shared: &Shared, client: &mut dyn Duplex, socket: &TcpStream) -> io::Result<()> {
    loop {
        let Some((head, body)) = read_message(client, false)? else { return Ok(()) };
        let line = head.lines().next().unwrap_or_default().to_owned();
        let shown = line.split(['?', ' ']).take(2).collect::<Vec<_>>().join(" ");
        shared.requests.lock().expect("requests").push(shown);
        let fault = shared.fault_of(&line);
        match fault {
            Some(Fault::Reset) => return reset(socket),
            Some(Fault::Stall) => return hold(shared, socket),
            Some(Fault::Delay(time)) => std::thread::sleep(time),
            Some(Fault::Status(status, code)) => {
                let body = format!("<Error><Code>{code}</Code><Message>by the proxy</Message></Error>");
                let length = if line.starts_with("HEAD") { 0 } else { body.len() };
                write!(client, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{}", &body[..length])?;
                client.flush()?;
                continue;
            }
            _ => {}
        }
        let (head, mut body) = forward(shared.upstream, &head, &body)?;
        let half = body.len() / 2;
        match fault {
            Some(Fault::Flip) if !body.is_empty() => body[half] ^= 1,
            // As long as before, but other bytes.
            Some(Fault::WrongRange) => body.rotate_left(half / 2 + 1),
            _ => {}
        }
        client.write_all(answer_head(&head, body.len(), line.starts_with("HEAD"), fault).as_bytes())?;
        match fault {
            Some(Fault::Cut) => {
                client.write_all(&body[..half])?;
                client.flush()?;
                return socket.shutdown(Shutdown::Both);
            }
            Some(Fault::StallBody) => {
                client.write_all(&body[..half])?;
                client.flush()?;
                return hold(shared, socket);
            }
            Some(Fault::Throttle(rate)) => {
                let tenth = usize::try_from(rate / 10).unwrap_or(usize::MAX).max(1);
                for piece in body.chunks(tenth) {
                    client.write_all(piece)?;
                    client.flush()?;
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            _ => client.write_all(&body)?,
        }
        client.flush()?;
        if matches!(fault, Some(Fault::Close)) {
            return socket.shutdown(Shutdown::Both);
        }
    }
}

/// The head to the client: its own framing, and the lie of a wrong range.
fn answer_head(head: &str, body_len: usize, to_head: bool, fault: Option<Fault>) -> String {
    let mut lines = head.lines();
    let mut out = format!("{}\r\n", lines.next().unwrap_or_default());
    for line in lines {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        match name.as_str() {
            "connection" | "transfer-encoding" => {}
            "content-length" if !to_head => {}
            "content-range" if matches!(fault, Some(Fault::WrongRange)) => {
                out.push_str("content-range: bytes 0-0/1\r\n");
            }
            _ => out.push_str(&format!("{line}\r\n")),
        }
    }
    if !to_head && !head.contains(" 204 ") {
        out.push_str(&format!("content-length: {body_len}\r\n"));
    }
    out.push_str("\r\n");
    out
}

fn forward(upstream: SocketAddr, head: &str, body: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let mut socket = TcpStream::connect(upstream)?;
    let to_head = head.starts_with("HEAD");
    // `connection` is not among the signed headers.
    let head: String = head
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with("connection:"))
        .collect::<Vec<_>>()
        .join("\r\n");
    write!(socket, "{head}\r\nconnection: close\r\n\r\n")?;
    socket.write_all(body)?;
    socket.flush()?;
    let answer = read_message(&mut socket, !to_head)?;
    answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Head without its empty line, and body; `None` at a clean end. `to_end`: without a length the body ends with the
/// connection.
fn read_message(stream: &mut dyn Duplex, to_end: bool) -> io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        match stream.read(&mut buffer)? {
            0 if bytes.is_empty() => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => bytes.extend_from_slice(&buffer[..got]),
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut body = bytes.split_off(end + 4);
    let header = |name: &str| {
        let found = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")));
        found.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_ascii_lowercase())
    };
    let length = header("content-length").and_then(|text| text.parse::<usize>().ok());
    let chunked = header("transfer-encoding").is_some_and(|value| value.contains("chunked"));
    let whole = |body: &Vec<u8>| match length {
        Some(length) => body.len() >= length,
        None => !to_end,
    };
    while !whole(&body) {
        match stream.read(&mut buffer)? {
            0 => break,
            got => body.extend_from_slice(&buffer[..got]),
        }
    }
    Ok(Some((head, if chunked { dechunked(&body) } else { body })))
}

fn dechunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size = String::from_utf8_lossy(&bytes[..at]);
        let Ok(size) = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16) else { break };
        if size == 0 || bytes.len() < at + 2 + size {
            break;
        }
        out.extend_from_slice(&bytes[at + 2..at + 2 + size]);
        bytes = &bytes[(at + 4 + size).min(bytes.len())..];
    }
    out
}

/// Until the client goes away, or the test ends.
fn hold(shared: &Shared, socket: &TcpStream) -> io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let end = Instant::now() + Duration::from_secs(120);
    while !shared.stopped.load(Ordering::SeqCst) && Instant::now() < end {
        match (&mut &*socket).read(&mut [0; 1024]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn reset(socket: &TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the option value is a linger struct that outlives the call, and `len` is its size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
    };
    assert_eq!(result, 0, "SO_LINGER");
    // The close that follows sends a reset, once no clone of the socket is left.
    Ok(())
}
