//! Packs that are damaged in the bucket, and answers that are damaged on their way: never a wrong byte to a guest.

use std::os::unix::fs::FileExt;

use volley_client::Status;
use volley_server::snapshot::{ChunkEntry, catalog};
use volley_server::types::HydrationRate;

use crate::lab::{CHUNK_BYTES, Lab, attached, counter, events, stop};
use crate::proxy::Fault;

/// The chunk that is damaged.
const CHUNK: u32 = 7;
const AT: usize = CHUNK as usize * CHUNK_BYTES as usize;

/// Where a chunk is: key of its pack under the prefix, and its bytes in it.
fn place(lab: &Lab, chunk: u32) -> (String, std::ops::Range<u64>) {
    let manifest = futures::executor::block_on(catalog::load(&lab.store(), "debian")).expect("manifest");
    let ChunkEntry::Stored { pack, offset, stored_len, .. } = manifest.chunk(chunk) else { panic!("noise is stored") };
    (manifest.pack_key(pack).to_owned(), offset..offset + u64::from(stored_len))
}

/// Changes one bit of an object; once more, and it is whole again.
fn flip(lab: &Lab, key: &str, at: u64) {
    let path = lab.server.bucket().join("prod").join(key);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("the pack is a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 4], at).expect("write");
}

/// GETs in the server's log that bring these bytes.
fn gets_of(lab: &Lab, range: &std::ops::Range<u64>) -> usize {
    let covers = |got: &std::ops::Range<u64>| got.start <= range.start && got.end >= range.end;
    lab.server.log().iter().filter(|entry| entry.gets_pack() && entry.range.as_ref().is_some_and(covers)).count()
}

#[test]
fn a_chunk_that_is_damaged_in_the_bucket_is_an_error_that_names_it_and_its_neighbours_are_served() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let (key, range) = place(&lab, CHUNK);
    flip(&lab, &key, range.start + 1000);
    let node = lab.node_with_volume("node", HydrationRate::None);
    let chunk_bytes = CHUNK_BYTES as usize;
    attached(&node, async |volume| {
        let reads = [(AT, 4096), (AT + chunk_bytes / 2, 64 << 10), (AT - 4096, 8192)];
        for (n, (offset, len)) in reads.into_iter().enumerate() {
            let error = volume.read(offset as u64, len).await.expect_err("damaged data is never served");
            assert_eq!(error.status, Some(Status::Corrupt), "{error}");
            let text = error.to_string();
            assert!(text.contains(&key) && text.contains(&format!("offset {}", range.start)), "{text}");
            assert_eq!(counter(&node, "fetch_failures_total"), n as u64 + 1);
        }
        for offset in [AT - chunk_bytes, AT + chunk_bytes] {
            lab.check(offset, &volume.read(offset as u64, chunk_bytes).await.expect("a neighbour"));
        }
    });
    // Three attempts for each read: the default.
    assert_eq!((gets_of(&lab, &range), counter(&node, "corrupt_chunks_total")), (9, 9));
    let named = format!("corrupt chunk in {key} offset {}", range.start);
    assert!(events(&node).iter().any(|event| event.contains(&named)), "{:?}", events(&node));

    flip(&lab, &key, range.start + 1000);
    attached(&node, async |volume| {
        lab.check(AT, &volume.read(AT as u64, chunk_bytes).await.expect("repaired, it is served"));
    });
    assert_eq!(counter(&node, "corrupt_chunks_total"), 9);
    stop(node);
}

#[test]
fn hydration_leaves_out_a_damaged_chunk_and_brings_the_rest() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let (key, range) = place(&lab, CHUNK);
    flip(&lab, &key, range.end - 1);
    let node = lab.node_with_volume("node", HydrationRate::Unlimited);
    attached(&node, async |volume| {
        let whole = lab.content.len() as u64;
        let absent = u64::from(CHUNK_BYTES);
        let mut version = 0;
        loop {
            let now = volume.residency(0, whole).await.expect("residency");
            let resident: u64 = now.extents.iter().filter(|run| run.resident).map(|run| run.len_bytes).sum();
            if resident == whole - absent {
                break;
            }
            assert!(resident < whole - absent, "a damaged chunk never becomes resident");
            version = volume.residency_wait(version).await.expect("a change");
        }
        for offset in (0..lab.content.len()).step_by(CHUNK_BYTES as usize).filter(|offset| *offset != AT) {
            lab.check(offset, &volume.read(offset as u64, CHUNK_BYTES as usize).await.expect("read"));
        }
        volume.read(AT as u64, 4096).await.expect_err("damaged data is never served");
    });
    let named = format!("corrupt chunk in {key} offset {}", range.start);
    assert!(counter(&node, "corrupt_chunks_total") > 0 && events(&node).iter().any(|event| event.contains(&named)));
    stop(node);
}

#[test]
fn an_answer_that_is_damaged_on_its_way_is_fetched_again_and_counted() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let (key, range) = place(&lab, CHUNK);
    let node = lab.node_with_volume("node", HydrationRate::None);
    lab.proxy.fail("GET /images/prod/packs", Fault::Flip, 1);
    attached(&node, async |volume| {
        lab.check(AT, &volume.read(AT as u64, CHUNK_BYTES as usize).await.expect("read"));
    });
    assert_eq!((gets_of(&lab, &range), counter(&node, "corrupt_chunks_total")), (2, 1));
    assert_eq!(counter(&node, "fetch_failures_total"), 0);
    let named = format!("corrupt chunk in {key} offset {}", range.start);
    assert_eq!(events(&node).iter().filter(|event| event.contains(&named)).count(), 1, "{:?}", events(&node));
    stop(node);
}
