//! The least that a server of the wire protocol's frames does on glommio: it takes whatever has come, answers every frame in
//! it with an empty reply, and sends the answers in one write. No checksum of what came is looked at, nothing is looked up,
//! nothing is bounded. `tools/bench peers` measures how far the server is from this.

use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::process::ExitCode;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use glommio::net::TcpStream;
use glommio::{LocalExecutorBuilder, Placement, spawn_local};
use volley_protocol::header::{BODY_LEN_AT, OP_AT, PAYLOAD_LEN_AT, REQUEST_ID_AT};
use volley_protocol::limits::{IN_FLIGHT_MAX, PAYLOAD_BYTES_MAX, VERSION_MAX};
use volley_protocol::messages::{AttachReply, HelloReply};
use volley_protocol::{Decoded, HEADER_BYTES, Op, decode, encode};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As the server's.
const RECEIVE_BYTES: usize = 64 << 10;
const SPIN: Duration = Duration::from_micros(100);
const BACKLOG: libc::c_int = 8192;
const VOLUME_BYTES: u64 = 256 << 20;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("volley-floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let descriptor = listener.into_raw_fd();
    // SAFETY: the descriptor is a live listening socket; listening again only changes its backlog.
    unsafe { libc::listen(descriptor, BACKLOG) };
    println!("floor ready: data 127.0.0.1:{port}");
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spin_before_park(SPIN);
    let executor = executor.make().map_err(|error| io::Error::other(error.to_string()))?;
    executor.run(async move {
        // SAFETY: the descriptor is listening, and owned, because `into_raw_fd` has given it up.
        let listener = unsafe { glommio::net::TcpListener::from_raw_fd(descriptor) };
        loop {
            let stream = listener.accept().await.map_err(|error| io::Error::other(error.to_string()))?;
            stream.set_nodelay(true).map_err(|error| io::Error::other(error.to_string()))?;
            spawn_local(async move { drop(answer(stream, port).await) }).detach();
        }
    })
}

async fn answer(mut stream: TcpStream, port: u16) -> io::Result<()> {
    let (mut input, mut received, mut output) = (vec![0; RECEIVE_BYTES], 0, Vec::new());
    loop {
        match stream.read(&mut input[received..]).await? {
            0 => return Ok(()),
            len => received += len,
        }
        let mut at = 0;
        while let Some(len) = frame_len(&input[at..received]) {
            answer_one(&input[at..at + len], port, &mut output);
            at += len;
        }
        input.copy_within(at..received, 0);
        received -= at;
        stream.write_all(&output).await?;
        output.clear();
        glommio::yield_if_needed().await;
    }
}

fn number(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

/// Of a whole frame at the start.
fn frame_len(bytes: &[u8]) -> Option<usize> {
    (bytes.len() >= HEADER_BYTES)
        .then(|| HEADER_BYTES + number(bytes, BODY_LEN_AT) + number(bytes, PAYLOAD_LEN_AT))
        .filter(|len| *len <= bytes.len())
}

fn answer_one(frame: &[u8], port: u16, out: &mut Vec<u8>) {
    let op = frame[OP_AT];
    if op == Op::PriorityFetch as u8 {
        let mut id = [0; 8];
        id.copy_from_slice(&frame[REQUEST_ID_AT..REQUEST_ID_AT + 8]);
        return encode::reply_done(out, Op::PriorityFetch, u64::from_le_bytes(id));
    }
    let Ok(Decoded::Frame(frame)) = decode(frame) else { return };
    let id = frame.header.request_id;
    if op == Op::Hello as u8 {
        let reply = HelloReply {
            version: VERSION_MAX,
            features: 0,
            node_id: 1,
            boot_id: 1,
            shard: 0,
            shards: vec![format!(":{port}")],
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            in_flight_max: IN_FLIGHT_MAX,
        };
        encode::reply(out, Op::Hello, id, &reply);
    } else {
        let reply = AttachReply { volume: 1, generation: 1, size_bytes: VOLUME_BYTES, chunk_bytes: 1 << 19 };
        encode::reply(out, Op::Lookup, id, &reply);
    }
}
