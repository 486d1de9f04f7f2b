//! Encoding: every function appends one whole frame (or its head) to a caller's buffer, so that many frames leave in
//! one write.

use rkyv::Serialize;
use rkyv::api::high::{HighSerializer, to_bytes_in};
use rkyv::rancor::Panic;
use rkyv::ser::allocator::ArenaHandle;

use crate::header::{FLAG_REPLY, FrameHeader, HEADER_BYTES, checksum};
use crate::limits::{BODY_BYTES_MAX, ERROR_BYTES_MAX, PAYLOAD_BYTES_MAX, VERSION_MAX};
use crate::messages::Body;
use crate::op::Op;
use crate::status::Status;

/// A body this crate can write.
pub trait EncodeBody: Body + for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, Panic>> {}
impl<T: Body + for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, Panic>>> EncodeBody for T {}

/// Appends a request. `flags` is 0 or [`crate::header::FLAG_FUA`].
///
/// # Panics
/// Body or payload beyond the limits: the caller splits requests first.
pub fn request<T: EncodeBody>(out: &mut Vec<u8>, request_id: u64, flags: u8, body: &T, payload: &[u8]) {
    request_head(out, request_id, flags, body, payload);
    out.extend_from_slice(payload);
}

/// Appends header and body of a request whose `payload` the caller sends itself right behind them.
///
/// # Panics
/// As [`request`].
pub fn request_head<T: EncodeBody>(out: &mut Vec<u8>, request_id: u64, flags: u8, body: &T, payload: &[u8]) {
    debug_assert_eq!(flags & FLAG_REPLY, 0);
    let start = open(out);
    put_body(out, body);
    close(out, start, Head { op: T::OP as u8, flags, status: Status::Ok, request_id }, payload);
}

/// Appends a reply with a body and no payload.
///
/// # Panics
/// Body beyond the limit.
pub fn reply<T: EncodeBody>(out: &mut Vec<u8>, op: Op, request_id: u64, body: &T) {
    let start = open(out);
    put_body(out, body);
    close(out, start, Head { op: op as u8, flags: FLAG_REPLY, status: Status::Ok, request_id }, &[]);
}

/// Appends a reply that says only: done.
pub fn reply_done(out: &mut Vec<u8>, op: Op, request_id: u64) {
    let start = open(out);
    close(out, start, Head { op: op as u8, flags: FLAG_REPLY, status: Status::Ok, request_id }, &[]);
}

/// Appends the reply to a READ.
///
/// # Panics
/// Payload beyond the limit.
pub fn reply_data(out: &mut Vec<u8>, request_id: u64, payload: &[u8]) {
    reply_data_head(out, request_id, payload);
    out.extend_from_slice(payload);
}

/// Appends the header of a reply to a READ whose `payload` the caller sends itself right behind it.
///
/// # Panics
/// Payload beyond the limit.
pub fn reply_data_head(out: &mut Vec<u8>, request_id: u64, payload: &[u8]) {
    let start = open(out);
    close(out, start, Head { op: Op::Read as u8, flags: FLAG_REPLY, status: Status::Ok, request_id }, payload);
}

/// Appends an error reply. `op` is the number in the request's header, known or not. The sentence is cut to the limit.
pub fn reply_error(out: &mut Vec<u8>, op: u8, request_id: u64, status: Status, message: &str) {
    debug_assert_ne!(status, Status::Ok);
    let start = open(out);
    let cut = message.floor_char_boundary(ERROR_BYTES_MAX);
    out.extend_from_slice(&message.as_bytes()[..cut]);
    close(out, start, Head { op, flags: FLAG_REPLY, status, request_id }, &[]);
}

struct Head {
    op: u8,
    flags: u8,
    status: Status,
    request_id: u64,
}

fn open(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.resize(start + HEADER_BYTES, 0);
    start
}

fn put_body<T: EncodeBody>(out: &mut Vec<u8>, body: &T) {
    // Relative pointers and alignment 1 make the archive independent of where in `out` it starts.
    let Ok(filled) = to_bytes_in::<Vec<u8>, Panic>(body, std::mem::take(out));
    *out = filled;
}

fn close(out: &mut [u8], start: usize, head: Head, payload: &[u8]) {
    let body = &out[start + HEADER_BYTES..];
    assert!(body.len() <= BODY_BYTES_MAX as usize, "body of {} bytes", body.len());
    assert!(payload.len() <= PAYLOAD_BYTES_MAX as usize, "payload of {} bytes", payload.len());
    let header = FrameHeader {
        version: VERSION_MAX,
        op: head.op,
        flags: head.flags,
        status: head.status as u16,
        request_id: head.request_id,
        body_len: body.len() as u32,
        payload_len: payload.len() as u32,
        body_crc: checksum(body),
        payload_crc: checksum(payload),
    };
    out[start..start + HEADER_BYTES].copy_from_slice(&header.to_bytes());
}
