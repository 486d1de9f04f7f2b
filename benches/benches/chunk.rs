//! One chunk of the default size from its stored form to verified bytes (decompression and BLAKE3), and the way back at import.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use volley_benches::cases::entry_of;
use volley_benches::{compressible, noise};
use volley_server::snapshot::chunk::{decode_chunk, encode_chunk};
use volley_server::types::CHUNK_BYTES_DEFAULT;

/// Level of the importer's default.
const ZSTD_LEVEL: i32 = 3;

fn chunk(c: &mut Criterion) {
    let len = CHUNK_BYTES_DEFAULT as usize;
    let mut group = c.benchmark_group("chunk_512k");
    group.throughput(Throughput::Bytes(len as u64));
    for (kind, raw) in [("compressible", compressible(1, len)), ("noise", noise(1, len))] {
        group.bench_function(format!("encode/{kind}"), |b| b.iter(|| encode_chunk(black_box(&raw), ZSTD_LEVEL)));
        let encoded = encode_chunk(&raw, ZSTD_LEVEL);
        let entry = entry_of(&encoded, 32);
        group.bench_function(format!("decode/{kind}"), |b| {
            b.iter(|| decode_chunk(&entry, black_box(&encoded.stored), CHUNK_BYTES_DEFAULT).expect("intact"));
        });
    }
    group.finish();
}

criterion_group!(benches, chunk);
criterion_main!(benches);
