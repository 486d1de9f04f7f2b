//! The device against a model: whatever the alignment, bytes are what a plain array would hold.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::{Device, clip};
use crate::nbd::backend::{Export, Extent};
use crate::nbd::memory::{MemoryBackend, MemoryExport};

const SIZE: usize = 8 * 512;

fn device() -> Device<MemoryExport> {
    Device::new(MemoryBackend::new([("disk", vec![0x5a; SIZE])]).export("disk"))
}

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8, bool),
    Zero(usize, usize, bool),
    Trim(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE, 0..SIZE).prop_map(|(a, b)| (a.min(b), a.max(b) - a.min(b)));
    (range, any::<u8>(), any::<bool>(), 0..4).prop_map(|((at, len), fill, flag, kind)| match kind {
        0 => Step::Read(at, len),
        1 => Step::Write(at, len, fill, flag),
        2 => Step::Zero(at, len, flag),
        _ => Step::Trim(at, len),
    })
}

fn pattern(len: usize, fill: u8) -> Vec<u8> {
    (0..len).map(|i| fill.wrapping_add(i as u8)).collect()
}

async fn run(steps: &[Step]) {
    let device = device();
    let mut model = vec![0x5a; SIZE];
    for step in steps {
        match *step {
            Step::Read(at, len) => {
                let got = device.read(at as u64, len as u32).await.unwrap();
                assert_eq!(got, model[at..at + len]);
            }
            Step::Write(at, len, fill, fua) => {
                let data = pattern(len, fill);
                model[at..at + len].copy_from_slice(&data);
                device.write(at as u64, data.into(), fua).await.unwrap();
            }
            Step::Zero(at, len, allocate) => {
                model[at..at + len].fill(0);
                device.write_zeroes(at as u64, len as u32, false, allocate).await.unwrap();
            }
            Step::Trim(at, len) => {
                // Whole blocks become zeroes; bytes outside them stay.
                let (start, end) = (at.div_ceil(512) * 512, (at + len) / 512 * 512);
                model[start..end.max(start)].fill(0);
                device.trim(at as u64, len as u32, true).await.unwrap();
            }
        }
    }
    assert_eq!(device.read(0, SIZE as u32).await.unwrap(), model);
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

proptest! {
    #[test]
    fn any_alignment_equals_a_plain_array(steps in prop::collection::vec(step(), 1..40)) {
        block_on(run(&steps));
    }

    #[test]
    fn clipped_extents_cover_the_request_and_no_more(
        lens in prop::collection::vec(1u64..9, 1..10), start in 0u64..2000, len in 1u64..3000,
    ) {
        let extents: Vec<Extent> =
            lens.iter().map(|n| Extent { len_bytes: n * 512, resident: true, hole: false }).collect();
        let total: u64 = extents.iter().map(|e| e.len_bytes).sum();
        let cover_start = start / 512 * 512;
        let clipped: u64 = clip(&extents, cover_start, &(start..start + len)).iter().map(|e| e.len_bytes).sum();
        prop_assert_eq!(clipped, (cover_start + total).min(start + len).saturating_sub(start));
    }
}

/// Many writers of single bytes of the same two blocks: without the range lock, they undo each other's writes.
#[test]
fn concurrent_writers_of_one_block_lose_nothing() {
    block_on(async {
        let device = Arc::new(device());
        let writers: Vec<_> = (0..1024u64)
            .map(|at| {
                let device = Arc::clone(&device);
                tokio::spawn(async move { device.write(at, Bytes::from(vec![at as u8]), false).await })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap().unwrap();
        }
        let got = device.export().read(0, 1024).await.unwrap();
        assert_eq!(got, (0..1024u64).map(|at| at as u8).collect::<Vec<_>>());
    });
}
