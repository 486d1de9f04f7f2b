//! The data port's protocol (docs/wire.md), both directions: the frames of a byte stream, the bodies of every request
//! and reply, and the client's core, which must stay in order whatever a server says.

use std::collections::BTreeSet;
use std::fmt::Debug;

use bytes::Bytes;
use volley_client::core::{Core, CoreOptions};
use volley_client::{Answer, Call};
use volley_protocol::encode::EncodeBody;
use volley_protocol::limits::{ERROR_BYTES_MAX, FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use volley_protocol::messages::*;
use volley_protocol::{
    BodyError, Decoded, FLAG_FUA, FetchUntil, Frame, HEADER_BYTES, Op, Request, Status, decode, encode,
};

use super::assert_one_line;
use super::measure::within;

/// Decoding borrows; what is owned afterwards is the bodies, some of them twice.
const DECODED_PER_BYTE: usize = 16;
/// The client's receive buffer, and room for one frame of the largest size.
const CLIENT_BYTES: usize = 4 << 20;

/// Any bytes, as they are and with their checksums repaired.
pub fn run(input: &[u8]) {
    for bytes in [input, &sealed(input)] {
        within((64 << 10) + DECODED_PER_BYTE * bytes.len(), || stream(bytes));
        within(CLIENT_BYTES + 2 * DECODED_PER_BYTE * bytes.len(), || client(bytes));
    }
}

/// The input with the checksums its lengths and bytes ask for: hardly a mutation would get past them otherwise.
fn sealed(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    let mut at = 0;
    while let Some((head, rest)) = bytes.get_mut(at..).and_then(|rest| rest.split_first_chunk_mut::<HEADER_BYTES>()) {
        let len_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
        let (body_len, payload_len) = (len_at(12), len_at(24));
        if let Some(body) = rest.get(..body_len) {
            head[28..32].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        }
        if let Some(payload) = rest.get(body_len..body_len + payload_len) {
            head[32..36].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        }
        let crc = crc32fast::hash(&head[..36]);
        head[36..].copy_from_slice(&crc.to_le_bytes());
        at += HEADER_BYTES + body_len + payload_len;
    }
    bytes
}

fn stream(mut rest: &[u8]) {
    loop {
        match decode(rest) {
            Ok(Decoded::Frame(found)) => {
                frame(&found, rest);
                rest = &rest[found.len()..];
            }
            Ok(Decoded::NeedMore(more)) => {
                assert!(more > 0 && rest.len() + more <= FRAME_BYTES_MAX, "{more} more than {}", rest.len());
                return;
            }
            Err(error) => return assert_one_line(&error.to_string(), ERROR_BYTES_MAX),
        }
    }
}

fn frame(frame: &Frame<'_>, bytes: &[u8]) {
    let header = &frame.header;
    assert_eq!(bytes[..HEADER_BYTES], header.to_bytes(), "a header has one spelling");
    assert_eq!(header.body_crc, crc32fast::hash(frame.body));
    assert_eq!(header.payload_crc, crc32fast::hash(frame.payload));
    assert_eq!(frame.len(), HEADER_BYTES + frame.body.len() + frame.payload.len());
    for cut in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, frame.len() - 1] {
        match decode(&bytes[..cut.min(frame.len() - 1)]) {
            Ok(Decoded::NeedMore(more)) => assert!(more > 0 && cut.min(frame.len() - 1) + more <= frame.len()),
            other => panic!("{cut} bytes of a frame are {other:?}"),
        }
    }
    match frame.request() {
        Ok(request) => check_request(frame, &request),
        Err(error) => check_error(&error),
    }
    if header.is_reply() {
        if let Err(error) = frame.outcome() {
            assert_ne!(error.status, Status::Ok);
        }
        replies(frame);
    }
}

fn check_error(error: &BodyError) {
    use Status::{Invalid, Misaligned, OutOfRange, TooLarge, Unsupported};
    assert!(matches!(error.status, Invalid | Unsupported | Misaligned | TooLarge | OutOfRange), "{error:?}");
    assert_one_line(&error.message, ERROR_BYTES_MAX);
}

/// What a server may rely on, and that the request is what a client would have sent.
fn check_request(frame: &Frame<'_>, request: &Request<'_>) {
    assert!(!frame.header.is_reply() && frame.header.status == 0);
    let range = |offset: u64, len: u64| {
        assert!(len > 0 && offset.is_multiple_of(512) && len.is_multiple_of(512) && offset.checked_add(len).is_some());
    };
    let mut fua_allowed = false;
    let mut payload = 0;
    match request {
        Request::Read(body) => {
            range(body.offset.to_native(), body.len.to_native().into());
            assert!(body.len.to_native() <= PAYLOAD_BYTES_MAX);
        }
        Request::Write { body, data, .. } => {
            range(body.offset.to_native(), data.len() as u64);
            (fua_allowed, payload) = (true, data.len());
        }
        Request::Discard(body) => range(body.offset.to_native(), body.len.to_native()),
        Request::WriteZeroes { body, .. } => {
            range(body.offset.to_native(), body.len.to_native());
            fua_allowed = true;
        }
        Request::PriorityFetch(body) => range(body.offset.to_native(), body.len.to_native()),
        _ => {}
    }
    assert!(fua_allowed || frame.header.flags & FLAG_FUA == 0);
    assert_eq!(payload, frame.payload.len());
    macro_rules! same {
        ($($op:ident),*) => {
            match request {
                Request::Write { .. } => round_trip(frame, |f| f.owned_body::<Write>()),
                Request::WriteZeroes { .. } => round_trip(frame, |f| f.owned_body::<WriteZeroes>()),
                $(Request::$op(_) => round_trip(frame, |f| f.owned_body::<$op>()),)*
            }
        };
    }
    let sound =
        same!(Hello, Attach, Detach, Read, Flush, Discard, PriorityFetch, Residency, ResidencyWait, Stat, List, Lookup);
    assert!(sound, "a request was accepted whose body can't be read");
}

/// The body as every kind of reply: a client reads it as what it asked for.
fn replies(frame: &Frame<'_>) {
    round_trip(frame, |f| f.owned_body::<HelloReply>());
    round_trip(frame, |f| f.owned_body::<AttachReply>());
    round_trip(frame, |f| f.owned_body::<ResidencyReply>());
    round_trip(frame, |f| f.owned_body::<StatReply>());
    round_trip(frame, |f| f.owned_body::<ListReply>());
}

/// Whether the body is a `T`. If so, it can be sent on and stays the same, it is no larger than the bytes it came from
/// (nothing in it is counted twice), and a body of fixed length has one spelling.
fn round_trip<T: EncodeBody + Debug>(frame: &Frame<'_>, read: impl Fn(&Frame<'_>) -> Result<T, BodyError>) -> bool {
    let value = match read(frame) {
        Ok(value) => value,
        Err(error) => {
            check_error(&error);
            return false;
        }
    };
    let encoded = |value: &T| {
        let mut out = Vec::new();
        encode::request(&mut out, frame.header.request_id, 0, value, &[]);
        out
    };
    let once = encoded(&value);
    let Ok(Decoded::Frame(again)) = decode(&once) else { panic!("{value:?} is encoded as no frame") };
    let twice = encoded(&read(&again).expect("what was encoded is decoded"));
    assert_eq!(once, twice, "{value:?}");
    assert!(again.body.len() <= frame.body.len(), "{} bytes became {value:?}", frame.body.len());
    if T::FIXED_BYTES.is_some() {
        assert_eq!(again.body, frame.body, "{value:?}");
    }
    true
}

/// A client that asks for everything and gets these bytes for an answer, in pieces.
fn client(input: &[u8]) {
    let options = CoreOptions { client_name: "fuzz".into(), in_flight_max: 64, unflushed_bytes_max: 4096 };
    let mut core: Core<u64> = Core::new(options);
    let mut open = BTreeSet::new();
    let mut asked = 0;
    let mut submit = |core: &mut Core<u64>, open: &mut BTreeSet<u64>, call: Call| {
        open.insert(asked);
        core.submit(asked, call);
        asked += 1;
    };
    core.connected();
    for call in questions() {
        submit(&mut core, &mut open, call);
    }
    let piece = 1 + input.first().map_or(0, |byte| usize::from(*byte)) * 7;
    for piece in input.chunks(piece) {
        core.receive_buffer().extend_from_slice(piece);
        let processed = core.process();
        while let Some((ticket, answer)) = core.poll_answer() {
            assert!(open.remove(&ticket), "request {ticket} was answered twice");
            match answer {
                Ok(Answer::Attached(info)) if open.len() < 64 => {
                    for call in work(info.volume, info.generation) {
                        submit(&mut core, &mut open, call);
                    }
                }
                Ok(Answer::Data(data)) => assert_eq!(data.len(), READ_BYTES as usize),
                Ok(_) => {}
                Err(error) => assert!(!error.message.is_empty()),
            }
        }
        if let Err(error) = processed {
            assert!(!error.to_string().is_empty());
            core.disconnected();
            assert_eq!(core.in_flight(), 0);
            return;
        }
        core.tick();
        sent(&mut core);
    }
}

/// What a client sends is sound whatever it was told.
fn sent(core: &mut Core<u64>) {
    let mut out = Vec::new();
    core.poll_output(&mut out);
    let mut rest = &out[..];
    while !rest.is_empty() {
        let Ok(Decoded::Frame(frame)) = decode(rest) else { panic!("the client sent no frame") };
        assert!(frame.request().is_ok(), "the client sent a bad request: {:?}", frame.request().err());
        rest = &rest[frame.len()..];
    }
}

const READ_BYTES: u32 = 512;

fn questions() -> Vec<Call> {
    vec![
        Call::Attach { name: "v".into(), resume_generation: None },
        Call::Lookup { name: "v".into() },
        Call::List { after: String::new() },
        Call::Stat { volume: 1 },
        Call::Residency { volume: 1, offset: 0, len: 1 << 20 },
        Call::ResidencyWait { volume: 1, seen_version: 1 },
        Call::PriorityFetch { volume: 1, offset: 0, len: 4096, until: FetchUntil::Durable },
    ]
}

fn work(volume: u64, generation: u64) -> Vec<Call> {
    let data = Bytes::from_static(&[7; 512]);
    vec![
        Call::Read { volume, generation, offset: 0, len: READ_BYTES },
        Call::Write { volume, generation, offset: 512, data, fua: false },
        Call::WriteZeroes { volume, generation, offset: 0, len: 512, fua: true },
        Call::Discard { volume, generation, offset: 1024, len: 512 },
        Call::Flush { volume, generation },
        Call::Detach { volume, generation },
    ]
}

/// Every request, every reply, a whole answered session, and replies that are errors.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut add = |name: &str, write: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        seeds.push((name.to_owned(), out));
    };
    let (volume, generation, offset, len) = (0x1234 << 48 | 7, 3, 4096, 8192);
    let name = || "web-7".to_owned();
    let hello = Hello { version_min: 1, version_max: 1, features: 0, client: "volley-agent 0.1".into() };
    add("hello", &|o| encode::request(o, 0, 0, &hello, &[]));
    for (text, resume_generation) in [("attach", None), ("attach-resume", Some(3))] {
        add(text, &|o| encode::request(o, 1, 0, &Attach { name: name(), resume_generation }, &[]));
    }
    add("detach", &|o| encode::request(o, 1, 0, &Detach { volume, generation }, &[]));
    add("read", &|o| encode::request(o, 1, 0, &Read { volume, generation, offset, len: 4096 }, &[]));
    add("write", &|o| encode::request(o, 1, 0, &Write { volume, generation, offset }, &[5; 512]));
    add("write-fua", &|o| encode::request(o, 1, FLAG_FUA, &Write { volume, generation, offset }, &[5; 512]));
    add("flush", &|o| encode::request(o, 1, 0, &Flush { volume, generation }, &[]));
    add("discard", &|o| encode::request(o, 1, 0, &Discard { volume, generation, offset, len }, &[]));
    add("write-zeroes", &|o| encode::request(o, 1, FLAG_FUA, &WriteZeroes { volume, generation, offset, len }, &[]));
    for until in [FetchUntil::Readable, FetchUntil::Resident, FetchUntil::Durable] {
        let text = format!("priority-fetch-{until:?}").to_lowercase();
        add(&text, &|o| encode::request(o, 1, 0, &PriorityFetch { volume, offset, len, until }, &[]));
    }
    add("residency", &|o| encode::request(o, 1, 0, &Residency { volume, offset, len }, &[]));
    add("residency-wait", &|o| encode::request(o, 1, 0, &ResidencyWait { volume, seen_version: 9 }, &[]));
    add("stat", &|o| encode::request(o, 1, 0, &Stat { volume }, &[]));
    add("list", &|o| encode::request(o, 1, 0, &List { after: "web-1234567890".into() }, &[]));
    add("lookup", &|o| encode::request(o, 1, 0, &Lookup { name: name() }, &[]));
    add("two-requests", &|o| {
        encode::request(o, 1, 0, &Stat { volume }, &[]);
        encode::request(o, 2, 0, &Flush { volume, generation }, &[]);
    });
    add("reply-error", &|o| encode::reply_error(o, 200, 1, Status::Busy, "a queue is full"));
    add("session", &session);
    add("session-refused", &|o| {
        encode::reply_error(o, Op::Hello as u8, 0, Status::Unsupported, "protocol version 9 is not spoken here");
    });
    add("session-attach-refused", &|o| {
        encode::reply(o, Op::Hello, 0, &hello_reply());
        encode::reply_error(o, Op::Attach as u8, 1, Status::UnknownVolume, "no such volume");
    });
    seeds
}

fn hello_reply() -> HelloReply {
    HelloReply {
        version: 1,
        features: 0,
        node_id: 5 << 70,
        boot_id: 6,
        shard: 0,
        shards: vec![":7400".into(), "unix:/run/volley.sock.1".into()],
        payload_bytes_max: 1 << 20,
        in_flight_max: 1024,
    }
}

/// The answers to [`questions`] and to the [`work`] that follows, by request id.
fn session(out: &mut Vec<u8>) {
    let attached = AttachReply { volume: 1, generation: 4, size_bytes: 1 << 20, chunk_bytes: 512 << 10 };
    let extents = vec![
        Extent { len_bytes: 512 << 10, resident: true, hole: false },
        Extent { len_bytes: 512 << 10, resident: false, hole: false },
    ];
    encode::reply(out, Op::Hello, 0, &hello_reply());
    encode::reply(out, Op::Attach, 1, &attached);
    encode::reply(out, Op::Lookup, 2, &attached);
    encode::reply(out, Op::List, 3, &ListReply { names: vec!["web-1".into(), "a-name-of-many-bytes".into()] });
    encode::reply(out, Op::Stat, 4, &stat_reply());
    encode::reply(out, Op::Residency, 5, &ResidencyReply { version: 2, extents });
    encode::reply(out, Op::ResidencyWait, 6, &ResidencyReply { version: 3, extents: Vec::new() });
    encode::reply_done(out, Op::PriorityFetch, 7);
    encode::reply_data(out, 8, &[9; READ_BYTES as usize]);
    for (op, id) in [(Op::Write, 9), (Op::WriteZeroes, 10), (Op::Discard, 11), (Op::Flush, 12), (Op::Detach, 13)] {
        encode::reply_done(out, op, id);
    }
}

fn stat_reply() -> StatReply {
    StatReply {
        id: "1234000000000007".into(),
        name: "web-7".into(),
        size_bytes: 1 << 20,
        chunk_bytes: 512 << 10,
        snapshot: Some("debian-12".into()),
        store: "default".into(),
        rate: "unlimited".into(),
        batch: None,
        created_unix_ms: 1_700_000_000_000,
        shard: 1,
        generation: 4,
        attached: true,
        hydrated: false,
        resident_bytes: 4096,
        remaining_bytes: 1 << 19,
        eta_seconds: Some(1.5),
        hydration_bytes_per_second: 7,
        hydration_state: "running".into(),
        last_error: Some("the object store cannot be reached".into()),
        reads: 8,
        read_bytes: 9,
        writes: 10,
        written_bytes: 11,
        flushes: 12,
        read_misses: 13,
        priority_fetches: 14,
    }
}
