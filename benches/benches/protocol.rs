//! The wire codec: the hot request, and a read's reply with its payload, encoded and decoded in batches as on a socket.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use volley_benches::noise;
use volley_protocol::messages::PriorityFetch;
use volley_protocol::{Decoded, FetchUntil, Request, decode, encode};

/// Frames in one read of a busy socket.
const FRAMES: u64 = 256;
const READ_BYTES: usize = 4096;

fn fetch(n: u64) -> PriorityFetch {
    PriorityFetch { volume: n << 48, offset: n * 4096, len: 4096, until: FetchUntil::Resident }
}

fn priority_fetch(c: &mut Criterion) {
    let mut group = c.benchmark_group("priority_fetch");
    group.throughput(Throughput::Elements(FRAMES));
    let mut out = Vec::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            out.clear();
            for n in 0..FRAMES {
                encode::request(&mut out, n, 0, &fetch(n), &[]);
            }
            black_box(out.len())
        });
    });
    group.bench_function("decode", |b| b.iter(|| requests(black_box(&out))));
    group.finish();
}

/// Parses every frame of a buffer as a server does; the sum keeps the work from being optimised away.
fn requests(mut input: &[u8]) -> u64 {
    let mut sum = 0;
    while let Ok(Decoded::Frame(frame)) = decode(input) {
        if let Ok(Request::PriorityFetch(body)) = frame.request() {
            sum += body.offset.to_native();
        }
        input = &input[frame.len()..];
    }
    sum
}

fn read_reply(c: &mut Criterion) {
    let mut group = c.benchmark_group("read_reply_4k");
    group.throughput(Throughput::Bytes(FRAMES * READ_BYTES as u64));
    let payload = noise(1, READ_BYTES);
    let mut out = Vec::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            out.clear();
            for n in 0..FRAMES {
                encode::reply_data(&mut out, n, &payload);
            }
            black_box(out.len())
        });
    });
    group.bench_function("decode", |b| b.iter(|| payload_bytes(black_box(&out))));
    group.finish();
}

fn payload_bytes(mut input: &[u8]) -> usize {
    let mut sum = 0;
    while let Ok(Decoded::Frame(frame)) = decode(input) {
        sum += frame.payload.len();
        input = &input[frame.len()..];
    }
    sum
}

criterion_group!(benches, priority_fetch, read_reply);
criterion_main!(benches);
