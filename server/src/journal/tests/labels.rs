//! One test for each label of the recovery table in docs/journal.md that concerns the inside of a segment, and the
//! two properties behind it: every torn end, and every flipped bit.

use proptest::prelude::*;

use super::super::frame::{self, BATCH_BYTES_MAX, BLOCK_BYTES, HeaderError, SegmentHeader, SegmentName};
use super::super::record::{self, Record};
use super::super::scan::{Fault, Scan, ScanError, Scanned, WINDOW_BYTES};
use super::model::{Model, spec};
use crate::types::{VolumeId, VolumeState};

const NAME: SegmentName = SegmentName { epoch: 3, shard: 1, seq: 2 };
const ID: u64 = 0xfeed_beef_1234_5678;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// A segment file in memory, and the states after each of its batches.
struct Built {
    file: Vec<u8>,
    /// Offset of each batch.
    batches: Vec<usize>,
    states: Vec<Vec<VolumeState>>,
}

impl Built {
    /// A checkpoint (one batch), then three batches: of one block, of three, of one.
    fn new() -> Built {
        let mut built = Built { file: vec![0; BLOCK_BYTES], batches: Vec::new(), states: Vec::new() };
        SegmentHeader { name: NAME, segment_id: ID }.encode(&mut built.file);
        let mut model = Model::default();
        let mut payload = Vec::new();
        record::encode_checkpoint_complete(0, &mut |bytes| payload.extend_from_slice(bytes));
        built.push(&payload, &model);
        for volumes in [0..2, 2..90, 90..92u64] {
            payload.clear();
            for index in volumes {
                let record = model.change(&super::model::Change::Create(index)).expect("a record");
                record::encode(&record, &mut |bytes| payload.extend_from_slice(bytes));
            }
            built.push(&payload, &model);
        }
        built
    }

    fn push(&mut self, payload: &[u8], model: &Model) {
        let number = self.batches.len() as u64;
        self.batches.push(self.file.len());
        self.states.push(model.states());
        self.file.extend(batch(ID, number, payload));
    }

    /// Offset and length of the last batch.
    fn last(&self) -> (usize, usize) {
        let start = self.batches[self.batches.len() - 1];
        (start, self.file.len() - start)
    }
}

fn batch(id: u64, number: u64, payload: &[u8]) -> Vec<u8> {
    let mut batch = vec![0xa5; frame::batch_bytes(payload.len())];
    frame::encode_batch(id, number, payload, &mut batch);
    batch
}

fn created(index: u64) -> Vec<u8> {
    let mut payload = Vec::new();
    record::encode(&Record::Created(spec(index)), &mut |bytes| payload.extend_from_slice(bytes));
    payload
}

/// Reads `file` as recovery does.
fn scan(file: &[u8]) -> Result<Scanned, ScanError> {
    let mut scan = Scan::start(NAME, &file[..file.len().min(BLOCK_BYTES)])?;
    while let Some(offset) = scan.wants() {
        let rest = &file[file.len().min(offset as usize)..];
        let window = &rest[..rest.len().min(WINDOW_BYTES)];
        scan.feed(window)?;
        if window.len() < WINDOW_BYTES {
            break;
        }
    }
    scan.finish()
}

fn fault(file: &[u8]) -> (u64, Fault) {
    let error = scan(file).expect_err("refused");
    (error.offset, error.fault)
}

#[test]
fn h1_b1_b2_sound_segment_with_and_without_reserved_space() {
    let mut built = Built::new();
    let good = built.file.len() as u64;
    for reserved in [0, 4096, 100 * 4096, BATCH_BYTES_MAX] {
        built.file.resize(good as usize + reserved, 0);
        let scanned = scan(&built.file).expect("sound");
        assert_eq!(scanned.volumes, built.states[3]);
        assert_eq!((scanned.good_bytes, scanned.torn_bytes, scanned.records), (good, 0, 93));
        assert!(!scanned.closed);
    }
}

#[test]
fn batches_that_cross_windows_are_read() {
    let mut built = Built::new();
    let mut model = Model::default();
    (0..92).for_each(|index| drop(model.change(&super::model::Change::Create(index))));
    let record = created(0);
    // The header block and the small batches shift these against the windows.
    for _ in 0..3 {
        let payload = record.repeat(frame::BATCH_PAYLOAD_MAX / record.len());
        built.push(&payload, &model);
    }
    let scanned = scan(&built.file).expect("sound");
    assert_eq!(scanned.good_bytes, built.file.len() as u64);
    assert_eq!(scanned.volumes, built.states[6]);
}

#[test]
fn h2_missing_or_damaged_header_is_refused() {
    let built = Built::new();
    assert_eq!(fault(&[]), (0, Fault::NoHeader));
    assert_eq!(fault(&built.file[..4095]), (0, Fault::NoHeader));
    let mut file = built.file.clone();
    file[0] ^= 1;
    assert_eq!(fault(&file), (0, Fault::Header(HeaderError::Magic)));
    file = built.file;
    file[4000] ^= 1;
    assert_eq!(fault(&file), (0, Fault::Header(HeaderError::Checksum)));
}

#[test]
fn h3_future_version_is_refused_by_its_number() {
    let mut file = Built::new().file;
    file[8] = 2;
    frame::seal_block(&mut file[..BLOCK_BYTES], 12);
    let error = scan(&file).expect_err("refused");
    assert_eq!(error.fault, Fault::Header(HeaderError::Version(2)));
    assert!(error.fault.is_newer_version());
    assert!(error.to_string().contains("version 2, this build reads 1"), "{error}");
}

#[test]
fn h4_header_of_another_segment_is_refused() {
    let mut file = Built::new().file;
    let other = SegmentName { seq: 1, ..NAME };
    SegmentHeader { name: other, segment_id: ID }.encode(&mut file[..BLOCK_BYTES]);
    assert_eq!(fault(&file), (0, Fault::Misnamed(other)));
}

/// Every length a crash may leave of the last batch, at sector granularity, with and without space reserved behind.
#[test]
fn b3_torn_last_batch_is_truncated_and_reported() {
    let mut built = Built::new();
    built.push(&created(500).repeat(100), &Model::default());
    let (start, len) = built.last();
    // Behind the records the batch is zeroes, as the disk was: a tear there is none.
    let records_end = built.file.iter().rposition(|byte| *byte != 0).expect("not empty") + 1 - start;
    for written in (512..records_end).step_by(512) {
        let mut short = built.file[..start + written].to_vec();
        for reserved in [0, len - written, len - written + 65536] {
            short.resize(start + written + reserved, 0);
            let scanned = scan(&short).expect("torn is no damage");
            assert_eq!(scanned.volumes, built.states[3], "{written}");
            assert_eq!(scanned.good_bytes, start as u64);
            assert!(scanned.torn_bytes > 0 && scanned.torn_bytes <= len as u64, "{}", scanned.torn_bytes);
        }
    }
}

#[test]
fn b4_stale_blocks_of_another_file_are_not_ours() {
    let mut built = Built::new();
    let end = built.file.len() as u64;
    built.file.extend(batch(ID ^ 1, 4, &created(600)));
    built.file.extend(batch(ID ^ 1, 5, &created(601)));
    let scanned = scan(&built.file).expect("no damage");
    assert_eq!(scanned.volumes, built.states[3]);
    assert_eq!((scanned.good_bytes, scanned.torn_bytes), (end, 2 * BLOCK));
}

#[test]
fn b5_damage_before_a_later_batch_is_refused() {
    for damage in [[0xffu8; 4096], [0; 4096]] {
        let mut built = Built::new();
        let at = built.batches[2];
        built.file[at..at + 4096].copy_from_slice(&damage);
        let later = Fault::MidLog { later_number: 3, later_offset: built.batches[3] as u64 };
        assert_eq!(fault(&built.file), (at as u64, later));
        // The later batch is torn itself: its header is proof enough.
        let last = built.file.len() - 1;
        built.file[last] ^= 1;
        assert!(matches!(fault(&built.file), (_, Fault::MidLog { .. })));
    }
}

#[test]
fn b6_missing_batch_is_refused() {
    let built = Built::new();
    let mut file = built.file[..built.batches[2]].to_vec();
    file.extend(&built.file[built.batches[3]..]);
    assert_eq!(fault(&file), (built.batches[2] as u64, Fault::OutOfSequence { expected: 2, found: 3 }));
}

#[test]
fn b7_unfinished_checkpoint_is_refused() {
    let built = Built::new();
    // Nothing behind the header, or a checkpoint that is damaged or cut: it was synced before the file was named.
    assert_eq!(fault(&built.file[..BLOCK_BYTES]), (BLOCK, Fault::CheckpointIncomplete));
    let mut file = built.file.clone();
    file[BLOCK_BYTES + 50] ^= 1;
    assert_eq!(fault(&file), (BLOCK, Fault::CheckpointIncomplete));
    file.truncate(BLOCK_BYTES);
    file.extend(batch(ID, 0, &created(0)));
    assert_eq!(fault(&file), (2 * BLOCK, Fault::CheckpointIncomplete));
}

#[test]
fn r1_r2_r3_record_faults_name_their_offset() {
    for (bad, newer) in [(b"\0\0\0\0\x63\0\0\0".to_vec(), true), (b"\x01\0\0\0\x03\0\0\0\0".to_vec(), false)] {
        let mut built = Built::new();
        let end = built.file.len() as u64;
        built.push(&[created(0), bad].concat(), &Model::default());
        let (offset, fault) = fault(&built.file);
        assert_eq!(offset, end + 40 + created(0).len() as u64);
        assert_eq!(fault.is_newer_version(), newer);
    }
    let mut built = Built::new();
    let residency =
        Record::Residency { volume: VolumeId(0), chunks: vec![(4, crate::types::ChunkResidency::Resident)] };
    let mut payload = Vec::new();
    record::encode(&residency, &mut |bytes| payload.extend_from_slice(bytes));
    built.push(&payload, &Model::default());
    assert!(matches!(fault(&built.file).1, Fault::Replay(_)));
}

#[test]
fn r4_closed_ends_the_segment() {
    let mut built = Built::new();
    let mut payload = Vec::new();
    record::encode_closed(&mut |bytes| payload.extend_from_slice(bytes));
    built.push(&payload, &Model::default());
    let (good, last_data) = (built.file.len() as u64, built.batches[3]);
    built.file.extend([0xff; 4096]);
    let scanned = scan(&built.file).expect("sound");
    assert!(scanned.closed);
    assert_eq!((scanned.volumes, scanned.good_bytes, scanned.torn_bytes), (built.states[3].clone(), good, 0));
    // After a clean stop even the last batch of records is guarded by a later one.
    built.file[last_data + 60] ^= 1;
    assert!(matches!(fault(&built.file).1, Fault::MidLog { .. }));
}

/// One flipped bit in every byte: the segment is refused, or the last batch counts as torn; never other states.
#[test]
fn every_flipped_bit_is_noticed() {
    let built = Built::new();
    let (last, len) = built.last();
    for at in 0..built.file.len() {
        let mut file = built.file.clone();
        file[at] ^= 1 << (at % 8);
        match scan(&file) {
            Err(error) => assert!(at < last && error.offset <= at as u64, "byte {at}: {error}"),
            Ok(scanned) => {
                assert!(at >= last, "byte {at} was not noticed");
                assert_eq!(scanned.volumes, built.states[2]);
                assert_eq!((scanned.good_bytes, scanned.torn_bytes), (last as u64, len as u64));
            }
        }
    }
}

proptest! {
    /// Any subset of the sectors of the last batch reached the disk; the others are as they were: zeroes.
    #[test]
    fn b3_any_sectors_of_the_last_batch_may_be_missing(mask in prop::collection::vec(any::<bool>(), 64), whole in any::<bool>()) {
        let mut built = Built::new();
        built.push(&created(500).repeat(100), &Model::default());
        let (start, _) = built.last();
        let mut torn = false;
        for (sector, kept) in built.file[start..].chunks_mut(512).zip(mask) {
            if !(kept || whole) && sector.iter().any(|byte| *byte != 0) {
                sector.fill(0);
                torn = true;
            }
        }
        let scanned = scan(&built.file);
        if torn {
            let scanned = scanned.expect("torn is no damage");
            prop_assert_eq!(scanned.volumes, built.states[3].clone());
            prop_assert_eq!(scanned.good_bytes, start as u64);
        } else {
            prop_assert_eq!(scanned.expect("whole").good_bytes, built.file.len() as u64);
        }
    }
}
