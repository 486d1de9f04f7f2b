//! The residency map of a 100 GiB volume: the question of every request, and the mark of every write.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use volley_server::shard::residency::{ResidencyMap, SectorRange};
use volley_server::types::CHUNK_BYTES_DEFAULT;

const VOLUME_BYTES: u64 = 100 << 30;

/// Every other chunk resident, as in the middle of a boot storm.
fn half_resident() -> ResidencyMap {
    let mut map = ResidencyMap::new(VOLUME_BYTES, CHUNK_BYTES_DEFAULT, 0);
    for chunk in (0..map.chunks()).step_by(2) {
        map.mark_written(map.chunk_sectors(chunk));
    }
    map
}

fn residency(c: &mut Criterion) {
    let mut group = c.benchmark_group("residency");
    let map = half_resident();
    let mut at = 0u64;
    group.bench_function("is_resident_4k", |b| {
        b.iter(|| {
            // A stride without a short period visits all of the map.
            at = (at + 7_919 * 4096) % (VOLUME_BYTES - 4096);
            black_box(map.is_resident(SectorRange::covering(at, 4096)))
        });
    });
    group.bench_function("next_absent_chunk", |b| b.iter(|| black_box(map.next_absent_chunk(black_box(4)))));
    group.bench_function("mark_written_4k", |b| {
        b.iter_batched_ref(
            half_resident,
            |map| {
                for n in 0..1024 {
                    map.mark_written(SectorRange::covering(n * 1_048_576 + 524_288, 4096));
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, residency);
criterion_main!(benches);
