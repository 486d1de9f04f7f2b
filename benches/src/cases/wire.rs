//! The wire codec, in batches as on a socket: the hot request and its reply, and frames with a payload.

use std::hint::black_box;

use volley_protocol::messages::{PriorityFetch, Write};
use volley_protocol::{Decoded, FetchUntil, Op, Request, decode, encode};

use super::{Case, Work};
use crate::noise;

/// Frames in one read of a busy socket.
const FRAMES: u32 = 256;
const PAYLOAD_BYTES: usize = 4096;

pub(super) const CASES: [Case; 7] = [
    Case::new("wire/encode_priority_fetch", (FRAMES, "frame"), encode_priority_fetch),
    Case::new("wire/decode_priority_fetch", (FRAMES, "frame"), decode_priority_fetch),
    Case::new("wire/encode_done", (FRAMES, "frame"), encode_done),
    Case::new("wire/encode_write_4k", (FRAMES, "frame"), encode_write),
    Case::new("wire/decode_write_4k", (FRAMES, "frame"), decode_write),
    Case::new("wire/encode_read_reply_4k", (FRAMES, "frame"), encode_read_reply),
    Case::new("wire/decode_read_reply_4k", (FRAMES, "frame"), decode_read_reply),
];

/// A priority fetch of 4 KiB.
pub(super) fn fetch(volume: u64, offset: u64) -> PriorityFetch {
    PriorityFetch { volume, offset, len: 4096, until: FetchUntil::Resident }
}

fn encode_priority_fetches(out: &mut Vec<u8>) {
    for n in 0..u64::from(FRAMES) {
        encode::request(out, n, 0, &fetch(n << 48, n * 4096), &[]);
    }
}

/// Encodes into one buffer, again and again.
fn encoding(mut encode: impl FnMut(&mut Vec<u8>) + 'static) -> Box<dyn Work> {
    let mut out = Vec::new();
    Box::new(move || {
        out.clear();
        encode(&mut out);
        black_box(out.len());
    })
}

/// Decodes what `encode` makes; `look` at a frame gives a number, so that nothing is optimised away.
fn decoding(encode: impl FnOnce(&mut Vec<u8>), look: fn(&volley_protocol::Frame<'_>) -> u64) -> Box<dyn Work> {
    let mut input = Vec::new();
    encode(&mut input);
    Box::new(move || {
        let (mut rest, mut frames, mut sum) = (black_box(&input[..]), 0, 0_u64);
        while let Ok(Decoded::Frame(frame)) = decode(rest) {
            sum = sum.wrapping_add(look(&frame));
            rest = &rest[frame.len()..];
            frames += 1;
        }
        assert_eq!(frames, FRAMES);
        black_box(sum);
    })
}

fn encode_priority_fetch() -> Box<dyn Work> {
    encoding(encode_priority_fetches)
}

/// As a server does it.
fn decode_priority_fetch() -> Box<dyn Work> {
    decoding(encode_priority_fetches, |frame| match frame.request() {
        Ok(Request::PriorityFetch(body)) => body.offset.to_native(),
        _ => panic!("a priority fetch"),
    })
}

fn encode_done() -> Box<dyn Work> {
    encoding(|out| (0..u64::from(FRAMES)).for_each(|n| encode::reply_done(out, Op::PriorityFetch, n)))
}

fn encode_writes(out: &mut Vec<u8>, payload: &[u8]) {
    for n in 0..u64::from(FRAMES) {
        let body = Write { volume: n << 48, generation: 1, offset: n * PAYLOAD_BYTES as u64 };
        encode::request(out, n, 0, &body, payload);
    }
}

fn encode_write() -> Box<dyn Work> {
    let payload = noise(1, PAYLOAD_BYTES);
    encoding(move |out| encode_writes(out, &payload))
}

fn decode_write() -> Box<dyn Work> {
    decoding(
        |out| encode_writes(out, &noise(1, PAYLOAD_BYTES)),
        |frame| match frame.request() {
            Ok(Request::Write { body, data, .. }) => body.offset.to_native() + data.len() as u64,
            _ => panic!("a write"),
        },
    )
}

fn encode_read_replies(out: &mut Vec<u8>, payload: &[u8]) {
    (0..u64::from(FRAMES)).for_each(|n| encode::reply_data(out, n, payload));
}

fn encode_read_reply() -> Box<dyn Work> {
    let payload = noise(1, PAYLOAD_BYTES);
    encoding(move |out| encode_read_replies(out, &payload))
}

/// As a client does it.
fn decode_read_reply() -> Box<dyn Work> {
    decoding(|out| encode_read_replies(out, &noise(1, PAYLOAD_BYTES)), |frame| frame.payload.len() as u64)
}
