//! A peer of the data port that sends whatever it likes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use volley_protocol::encode::{self, EncodeBody};
use volley_protocol::messages as m;
use volley_protocol::{Decoded, FrameHeader, Op, Status, decode};

/// Beyond every deadline of the server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct Peer {
    stream: TcpStream,
    received: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) request_id: u64,
    pub(super) status: Status,
    pub(super) payload_len: usize,
    /// The whole frame.
    bytes: Vec<u8>,
}

impl Peer {
    pub(super) fn connect(address: &str) -> Peer {
        let stream = TcpStream::connect(address).expect("the data port listens");
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Peer { stream, received: Vec::new() }
    }

    /// A connection that has said HELLO.
    pub(super) fn greeted(address: &str) -> Peer {
        let mut peer = Peer::connect(address);
        peer.send(&hello());
        assert_eq!(peer.answer().expect("an answer to HELLO").status, Status::Ok);
        peer
    }

    /// Sends what the server takes before it closes.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends without waiting for the server to take it; returns whether it took all.
    pub(super) fn offer(&mut self, bytes: &[u8]) -> bool {
        self.stream.set_nonblocking(true).expect("non-blocking");
        self.stream.write(bytes).is_ok_and(|len| len == bytes.len())
    }

    pub(super) fn end_sending(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next answer; `None`: the server closed.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Decoded::Frame(frame) = decode(&self.received).expect("the server sends sound frames") {
                let answer = Answer {
                    request_id: frame.header.request_id,
                    status: Status::from_wire(frame.header.status).expect("a known status"),
                    payload_len: frame.payload.len(),
                    bytes: self.received[..frame.len()].to_vec(),
                };
                let len = answer.bytes.len();
                self.received.drain(..len);
                return Some(answer);
            }
            let mut part = [0; 64 << 10];
            match self.stream.read(&mut part) {
                Ok(0) => return None,
                Ok(len) => self.received.extend_from_slice(&part[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("neither answered nor closed"),
                Err(_) => return None,
            }
        }
    }

    /// Reads until the server closes; returns the answers before that.
    pub(super) fn closed(&mut self) -> Vec<Answer> {
        std::iter::from_fn(|| self.answer()).collect()
    }

    pub(super) fn ask<T: EncodeBody>(&mut self, request_id: u64, body: &T, payload: &[u8]) -> Answer {
        self.send(&frame(request_id, body, payload));
        let answer = self.answer().expect("an answer");
        assert_eq!(answer.request_id, request_id);
        answer
    }

    /// Attaches a volume; returns its id and generation.
    pub(super) fn attach(&mut self, name: &str) -> (u64, u64) {
        let answer = self.ask(2, &m::Attach { name: name.to_owned(), resume_generation: None }, &[]);
        assert_eq!(answer.status, Status::Ok);
        let Ok(Decoded::Frame(frame)) = decode(&answer.bytes) else { panic!("it was one before") };
        let reply = frame.body::<m::AttachReply>().expect("an attach reply");
        (reply.volume.to_native(), reply.generation.to_native())
    }

    /// Closes with a reset: what is unsent is lost.
    pub(super) fn reset(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let socket = std::os::fd::AsRawFd::as_raw_fd(&self.stream);
        let len = size_of::<libc::linger>() as libc::socklen_t;
        // SAFETY: the socket is open, the option value outlives the call, and `len` is its size.
        unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len) };
    }
}

pub(super) fn hello() -> Vec<u8> {
    frame(1, &m::Hello { version_min: 1, version_max: 1, features: 0, client: "mallory".to_owned() }, &[])
}

pub(super) fn frame<T: EncodeBody>(request_id: u64, body: &T, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode::request(&mut out, request_id, 0, body, payload);
    out
}

/// A frame of any content with sound checksums.
pub(super) fn sound_frame(op: u8, flags: u8, body: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader {
        version: 1,
        op,
        flags,
        status: 0,
        request_id: 77,
        body_len: body.len() as u32,
        payload_len: payload.len() as u32,
        body_crc: crc32fast::hash(body),
        payload_crc: crc32fast::hash(payload),
    };
    [&header.to_bytes()[..], body, payload].concat()
}

/// A request of every operation, as a host sends them.
pub(super) fn every_request(volume: u64, generation: u64) -> Vec<(Op, Vec<u8>)> {
    let name = || "web-0".to_owned();
    let (offset, len) = (0, 4096);
    let until = volley_protocol::FetchUntil::Resident;
    vec![
        (Op::Hello, hello()),
        (Op::Attach, frame(3, &m::Attach { name: name(), resume_generation: Some(1 << 40) }, &[])),
        (Op::Lookup, frame(4, &m::Lookup { name: name() }, &[])),
        (Op::Detach, frame(5, &m::Detach { volume, generation }, &[])),
        (Op::Read, frame(6, &m::Read { volume, generation, offset, len: 4096 }, &[])),
        (Op::Write, frame(7, &m::Write { volume, generation, offset }, &[9; 512])),
        (Op::Flush, frame(8, &m::Flush { volume, generation }, &[])),
        (Op::Discard, frame(9, &m::Discard { volume, generation, offset, len }, &[])),
        (Op::WriteZeroes, frame(10, &m::WriteZeroes { volume, generation, offset, len }, &[])),
        (Op::PriorityFetch, frame(11, &m::PriorityFetch { volume, offset, len, until }, &[])),
        (Op::Residency, frame(12, &m::Residency { volume, offset, len }, &[])),
        (Op::ResidencyWait, frame(13, &m::ResidencyWait { volume, seen_version: 0 }, &[])),
        (Op::Stat, frame(14, &m::Stat { volume }, &[])),
        (Op::List, frame(15, &m::List { after: String::new() }, &[])),
    ]
}
