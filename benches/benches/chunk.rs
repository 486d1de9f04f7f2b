//! One chunk from its stored form to verified bytes (decompression and BLAKE3), and the way back at import.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use volley_benches::{compressible, noise};
use volley_server::snapshot::ChunkEntry;
use volley_server::snapshot::chunk::{EncodedChunk, decode_chunk, encode_chunk};
use volley_server::types::CHUNK_BYTES_DEFAULT;

/// Level of the importer's default.
const ZSTD_LEVEL: i32 = 3;

fn entry(chunk: &EncodedChunk) -> ChunkEntry {
    let stored_len = u32::try_from(chunk.stored.len()).expect("a chunk");
    ChunkEntry::Stored { pack: 0, offset: 32, stored_len, encoding: chunk.encoding, digest: chunk.digest }
}

fn chunk(c: &mut Criterion) {
    let len = CHUNK_BYTES_DEFAULT as usize;
    let mut group = c.benchmark_group("chunk_512k");
    group.throughput(Throughput::Bytes(len as u64));
    for (kind, raw) in [("compressible", compressible(1, len)), ("noise", noise(1, len))] {
        group.bench_function(format!("encode/{kind}"), |b| b.iter(|| encode_chunk(black_box(&raw), ZSTD_LEVEL)));
        let encoded = encode_chunk(&raw, ZSTD_LEVEL);
        let entry = entry(&encoded);
        group.bench_function(format!("decode/{kind}"), |b| {
            b.iter(|| decode_chunk(&entry, black_box(&encoded.stored), CHUNK_BYTES_DEFAULT).expect("intact"));
        });
    }
    group.finish();
}

criterion_group!(benches, chunk);
criterion_main!(benches);
