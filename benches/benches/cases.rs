//! Times of the hot work of a node, case by case: the same cases whose instructions are counted (`tools/bench instructions`).

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use volley_benches::cases;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn all(c: &mut Criterion) {
    for case in cases::all() {
        let (group, name) = case.name.split_once('/').expect("cases are named GROUP/NAME");
        let mut group = c.benchmark_group(group);
        group.throughput(Throughput::Elements(case.units.into()));
        group.bench_function(name, |b| {
            let mut work = case.prepare();
            b.iter_custom(|runs| {
                let mut sum = Duration::ZERO;
                for _ in 0..runs {
                    work.renew();
                    let begun = Instant::now();
                    work.run();
                    sum += begun.elapsed();
                }
                sum
            });
        });
        group.finish();
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
