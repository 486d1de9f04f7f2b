//! The codec from outside: frozen bytes, round trips, and what damaged, cut or random input gets.

use proptest::prelude::*;
use volley_protocol::messages::*;
use volley_protocol::{BodyError, Decoded, FLAG_FUA, Frame, FrameError, Op, Request, Status, decode, encode};

fn whole(bytes: &[u8]) -> Frame<'_> {
    match decode(bytes) {
        Ok(Decoded::Frame(frame)) => {
            assert_eq!(frame.len(), bytes.len());
            frame
        }
        other => panic!("{other:?}"),
    }
}

fn hello() -> Hello {
    Hello { version_min: 1, version_max: 1, features: 0, client: "volley-agent 0.1".into() }
}

#[test]
fn the_bytes_of_hello_are_frozen() {
    let mut out = Vec::new();
    encode::request(&mut out, 7, 0, &hello(), &[]);
    let want: Vec<u8> = [
        b"VLLY".as_slice(),
        &[1, 0, 1, 0, 0, 0, 0, 0],
        &[36, 0, 0, 0],
        &[7, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 0, 0],
        &FROZEN_HELLO_BODY_CRC.to_le_bytes(),
        &[0, 0, 0, 0],
        &FROZEN_HELLO_HEADER_CRC.to_le_bytes(),
        b"volley-agent 0.1",
        &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // The string: length 16 with the out-of-line mark, then where its bytes start, relative to itself.
        &[0x90, 0, 0, 0, 0xe4, 0xff, 0xff, 0xff],
    ]
    .concat();
    assert_eq!(out, want, "{out:02x?}");
}

const FROZEN_HELLO_BODY_CRC: u32 = 0x25a60260;
const FROZEN_HELLO_HEADER_CRC: u32 = 0x4409393b;

/// Every kind of frame, with values from `seed`.
fn frames(seed: u64, text: &str, data: &[u8]) -> Vec<Vec<u8>> {
    let (volume, generation, offset, len) = (seed, seed.rotate_left(7), (seed >> 20) << 9, ((seed & 0xffff) + 1) << 9);
    let text = text.to_owned();
    let payload = [data, &vec![7; (512 - data.len() % 512) % 512]].concat();
    let payload = if payload.is_empty() { vec![1; 512] } else { payload };
    let mut all = Vec::new();
    let mut push = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        f(&mut out);
        all.push(out);
    };
    let hello = Hello { version_min: 1, version_max: seed as u16, features: seed, client: text.clone() };
    push(&|o| encode::request(o, seed, 0, &hello, &[]));
    push(&|o| {
        let body = HelloReply {
            version: 1,
            features: 0,
            node_id: u128::from(seed) << 70,
            boot_id: !seed,
            shard: 1,
            shards: vec![":7400".into(), text.clone()],
            payload_bytes_max: 1 << 20,
            in_flight_max: 9,
        };
        encode::reply(o, Op::Hello, seed, &body);
    });
    push(&|o| encode::request(o, seed, 0, &Attach { name: text.clone(), resume_generation: Some(seed) }, &[]));
    push(&|o| encode::request(o, seed, 0, &Attach { name: text.clone(), resume_generation: None }, &[]));
    let attached = AttachReply { volume, generation, size_bytes: offset, chunk_bytes: 1 << 19 };
    push(&|o| encode::reply(o, Op::Attach, seed, &attached));
    push(&|o| encode::request(o, seed, 0, &Detach { volume, generation }, &[]));
    push(&|o| encode::request(o, seed, 0, &Read { volume, generation, offset, len: 4096 }, &[]));
    push(&|o| encode::reply_data(o, seed, &payload));
    push(&|o| encode::request(o, seed, FLAG_FUA, &Write { volume, generation, offset }, &payload));
    push(&|o| encode::request(o, seed, 0, &Flush { volume, generation }, &[]));
    push(&|o| encode::request(o, seed, 0, &Discard { volume, generation, offset, len }, &[]));
    push(&|o| encode::request(o, seed, 0, &WriteZeroes { volume, generation, offset, len }, &[]));
    for until in [FetchUntil::Readable, FetchUntil::Resident, FetchUntil::Durable] {
        push(&|o| encode::request(o, seed, 0, &PriorityFetch { volume, offset, len, until }, &[]));
    }
    push(&|o| encode::request(o, seed, 0, &Residency { volume, offset, len }, &[]));
    push(&|o| encode::request(o, seed, 0, &ResidencyWait { volume, seen_version: seed }, &[]));
    let extents = vec![Extent { len_bytes: len, resident: true, hole: seed & 1 == 0 }; 3];
    push(&|o| encode::reply(o, Op::Residency, seed, &ResidencyReply { version: seed, extents: extents.clone() }));
    push(&|o| encode::request(o, seed, 0, &Stat { volume }, &[]));
    push(&|o| encode::reply(o, Op::Stat, seed, &stat(seed, &text)));
    push(&|o| encode::request(o, seed, 0, &List { after: text.clone() }, &[]));
    push(&|o| encode::reply(o, Op::List, seed, &ListReply { names: vec![text.clone(); 3] }));
    push(&|o| encode::request(o, seed, 0, &Lookup { name: text.clone() }, &[]));
    push(&|o| encode::reply_done(o, Op::Flush, seed));
    push(&|o| encode::reply_error(o, 200, seed, Status::Busy, &text));
    all
}

fn stat(seed: u64, text: &str) -> StatReply {
    StatReply {
        id: text.into(),
        name: text.into(),
        size_bytes: seed,
        chunk_bytes: 3,
        snapshot: Some(text.into()),
        store: text.into(),
        rate: "none".into(),
        batch: None,
        created_unix_ms: seed,
        shard: 1,
        generation: 4,
        attached: true,
        hydrated: false,
        resident_bytes: 5,
        remaining_bytes: 6,
        eta_seconds: Some(1.5),
        hydration_bytes_per_second: 7,
        hydration_state: "running".into(),
        last_error: Some(text.into()),
        reads: 8,
        read_bytes: 9,
        writes: 10,
        written_bytes: 11,
        flushes: 12,
        read_misses: 13,
        priority_fetches: 14,
    }
}

/// Reads every field a receiver could: must never panic, whatever the bytes.
fn touch(frame: &Frame<'_>) -> Result<(), BodyError> {
    let read = frame.request().map(|_| ());
    let _ = frame.outcome();
    let _ = frame.owned_body::<HelloReply>();
    let _ = frame.body::<AttachReply>();
    let _ = frame.owned_body::<ResidencyReply>();
    let _ = frame.owned_body::<StatReply>();
    let _ = frame.owned_body::<ListReply>();
    read
}

proptest! {
    #[test]
    fn messages_round_trip(seed: u64, text in "\\PC{0,40}", data in proptest::collection::vec(any::<u8>(), 0..1500)) {
        for bytes in frames(seed, &text, &data) {
            let frame = whole(&bytes);
            prop_assert_eq!(frame.header.request_id, seed);
            if !frame.header.is_reply() {
                prop_assert!(frame.request().is_ok(), "{:?}", frame.request().err());
            }
        }
        let (volume, generation, offset) = (seed, !seed, (seed >> 20) << 9);
        let mut out = Vec::new();
        encode::request(&mut out, 1, 0, &Read { volume, generation, offset, len: 512 }, &[]);
        let Ok(Request::Read(read)) = whole(&out).request() else { panic!() };
        prop_assert_eq!((read.volume.to_native(), read.generation.to_native()), (volume, generation));
        prop_assert_eq!((read.offset.to_native(), read.len.to_native()), (offset, 512));

        let mut out = Vec::new();
        let payload = vec![9; 1024];
        encode::request(&mut out, 1, FLAG_FUA, &Write { volume, generation, offset }, &payload);
        let Ok(Request::Write { body, data, fua }) = whole(&out).request() else { panic!() };
        prop_assert_eq!((body.offset.to_native(), data, fua), (offset, payload.as_slice(), true));

        let mut out = Vec::new();
        let sent = PriorityFetch { volume, offset, len: 512, until: FetchUntil::Durable };
        encode::request(&mut out, 1, 0, &sent, &[]);
        prop_assert_eq!(whole(&out).owned_body::<PriorityFetch>().unwrap(), sent);

        let mut out = Vec::new();
        encode::reply(&mut out, Op::Stat, 1, &stat(seed, &text));
        prop_assert_eq!(whole(&out).owned_body::<StatReply>().unwrap(), stat(seed, &text));

        let mut out = Vec::new();
        let sent = Attach { name: text.clone(), resume_generation: Some(seed) };
        encode::request(&mut out, 1, 0, &sent, &[]);
        prop_assert_eq!(whole(&out).owned_body::<Attach>().unwrap(), sent);

        let mut out = Vec::new();
        encode::reply_error(&mut out, Op::Read as u8, 1, Status::NoSpace, &text);
        let error = whole(&out).outcome().unwrap_err();
        prop_assert_eq!((error.status, error.message), (Status::NoSpace, text));
    }

    #[test]
    fn frames_follow_each_other_at_any_offset(seed: u64, text in "[a-z]{0,30}") {
        let all = frames(seed, &text, &[1, 2, 3]);
        let stream = all.concat();
        let (mut at, mut seen) = (0, 0);
        while let Decoded::Frame(frame) = decode(&stream[at..]).unwrap() {
            at += frame.len();
            seen += 1;
        }
        prop_assert_eq!((at, seen), (stream.len(), all.len()));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
    }

    /// Sound checksums around random bodies: what an attacker would send.
    #[test]
    fn random_bodies_never_panic(op: u8, flags in 0u8..4, status: u16, body in proptest::collection::vec(any::<u8>(), 0..200), data in 0usize..3) {
        let payload = vec![0; data * 256];
        let header = volley_protocol::FrameHeader {
            version: 1, op, flags, status, request_id: 1,
            body_len: body.len() as u32, payload_len: payload.len() as u32,
            body_crc: crc32fast::hash(&body), payload_crc: crc32fast::hash(&payload),
        };
        let bytes = [header.to_bytes().as_slice(), &body, &payload].concat();
        let _ = touch(&whole(&bytes));
    }

    /// Damaged archives behind sound checksums: validation has to find every one or read something harmless.
    #[test]
    fn damaged_bodies_never_panic(seed: u64, text in "\\PC{0,40}", which in 0usize..26, at: prop::sample::Index, to: u8) {
        let all = frames(seed, &text, &[]);
        let bytes = &all[which % all.len()];
        let frame = whole(bytes);
        let mut body = frame.body.to_vec();
        if !body.is_empty() {
            let at = at.index(body.len());
            body[at] = to;
        }
        let header = volley_protocol::FrameHeader { body_crc: crc32fast::hash(&body), ..frame.header };
        let damaged = [header.to_bytes().as_slice(), &body, frame.payload].concat();
        let _ = touch(&whole(&damaged));
    }
}

#[test]
fn every_truncation_needs_more_and_says_a_possible_amount() {
    for bytes in frames(0x1234_5678_9abc_def0, "a name that is out of line", &[5; 700]) {
        for cut in 0..bytes.len() {
            match decode(&bytes[..cut]) {
                Ok(Decoded::NeedMore(more)) => assert!(more > 0 && cut + more <= bytes.len(), "{cut} + {more}"),
                other => panic!("cut at {cut}: {other:?}"),
            }
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    for bytes in frames(0x0fed_cba9_8765_4321, "web-7", &[5; 40]) {
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = decode(&bytes).expect_err("a flip went unnoticed");
            let fits = match bit / 8 {
                0..4 => matches!(error, FrameError::Magic { .. }),
                4..40 => matches!(error, FrameError::HeaderCrc { .. }),
                _ => matches!(error, FrameError::BodyCrc { .. } | FrameError::PayloadCrc { .. }),
            };
            assert!(fits, "bit {bit}: {error:?}");
        }
    }
}

fn with_header(change: impl FnOnce(&mut volley_protocol::FrameHeader)) -> Vec<u8> {
    let mut out = Vec::new();
    encode::request(&mut out, 3, 0, &Stat { volume: 1 }, &[]);
    let mut header = whole(&out).header;
    change(&mut header);
    out[..40].copy_from_slice(&header.to_bytes());
    out
}

#[test]
fn bad_headers_are_named() {
    assert_eq!(decode(b"GET "), Err(FrameError::Magic { got: *b"GET " }));
    assert_eq!(decode(b"VX"), Err(FrameError::Magic { got: *b"VX\0\0" }));
    assert_eq!(decode(&with_header(|h| h.version = 2)), Err(FrameError::Version { got: 2 }));
    assert_eq!(decode(&with_header(|h| h.flags = 8)), Err(FrameError::Reserved { flags: 8, reserved: 0 }));
    let max = volley_protocol::limits::BODY_BYTES_MAX;
    assert_eq!(decode(&with_header(|h| h.body_len = u32::MAX)), Err(FrameError::BodyTooLong { got: u32::MAX, max }));
    let max = volley_protocol::limits::PAYLOAD_BYTES_MAX;
    let got = max + 1;
    assert_eq!(decode(&with_header(|h| h.payload_len = got)), Err(FrameError::PayloadTooLong { got, max }));
}

#[test]
fn bad_requests_cost_the_request_only() {
    let status = |bytes: &[u8]| whole(bytes).request().err().map(|e| e.status);
    let build = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        f(&mut out);
        out
    };
    assert_eq!(status(&with_header(|h| h.op = 77)), Some(Status::Unsupported));
    assert_eq!(status(&with_header(|h| h.op = Op::Read as u8)), Some(Status::Invalid));
    assert_eq!(status(&with_header(|h| h.flags = 1)), Some(Status::Invalid));
    assert_eq!(status(&with_header(|h| h.flags = FLAG_FUA)), Some(Status::Invalid));
    let read = |offset, len| build(&|o| encode::request(o, 1, 0, &Read { volume: 1, generation: 1, offset, len }, &[]));
    assert_eq!(status(&read(0, 512)), None);
    assert_eq!(status(&read(0, 0)), Some(Status::Invalid));
    assert_eq!(status(&read(1, 512)), Some(Status::Misaligned));
    assert_eq!(status(&read(512, 511)), Some(Status::Misaligned));
    assert_eq!(status(&read(0, (1 << 20) + 512)), Some(Status::TooLarge));
    assert_eq!(status(&read(u64::MAX - 511, 512)), Some(Status::OutOfRange));
    let write =
        |data: &[u8]| build(&|o| encode::request(o, 1, 0, &Write { volume: 1, generation: 1, offset: 0 }, data));
    assert_eq!(status(&write(&[])), Some(Status::Invalid));
    assert_eq!(status(&write(&[0; 100])), Some(Status::Misaligned));
    let payload = build(&|o| encode::request(o, 1, 0, &Stat { volume: 1 }, &[0; 512]));
    assert_eq!(status(&payload), Some(Status::Invalid));
}

#[test]
fn long_errors_are_cut_between_characters() {
    let mut out = Vec::new();
    encode::reply_error(&mut out, 4, 1, Status::Io, &"ä".repeat(1000));
    assert_eq!(whole(&out).outcome().unwrap_err().message, "ä".repeat(512));
    let mut out = Vec::new();
    encode::reply_error(&mut out, 4, 1, Status::Io, &format!("x{}", "ä".repeat(1000)));
    assert_eq!(whole(&out).outcome().unwrap_err().message.len(), 1023);
}
