//! The record codec: what is encoded is decoded, and no bytes make it panic.

use proptest::prelude::*;

use super::super::record::{self, Entry, HEAD_BYTES, RECORD_BYTES_MAX, Record, RecordError};
use super::super::replay::Replay;
use super::model::{Model, change, partial, spec};
use crate::types::{Changed, ChunkResidency, HydrationRate, Lineage, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

fn encoded(record: &Record) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    record::encode(record, &mut |bytes| records.push(bytes.to_vec()));
    records
}

#[test]
fn layouts_are_frozen() {
    let generation = Record::Generation { volume: VolumeId(0x1122_3344_5566_7788), generation: 7 };
    let bytes = encoded(&generation).concat();
    assert_eq!(bytes, b"\x10\0\0\0\x04\0\0\0\x88\x77\x66\x55\x44\x33\x22\x11\x07\0\0\0\0\0\0\0");
    let rate = Record::Rate { volume: VolumeId(1), rate: HydrationRate::BytesPerSecond(2) };
    assert_eq!(encoded(&rate).concat(), b"\x11\0\0\0\x05\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x02");
    let chunks = vec![(4, ChunkResidency::Resident), (5, ChunkResidency::Resident), (9, partial(&spec(0), [0, 3]))];
    let residency = Record::Residency { volume: VolumeId(1), chunks };
    let expected = b"\x28\0\0\0\x06\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x01\0\0\0\x04\0\0\0\x02\0\0\0\
        \x09\0\0\0\x01\0\0\0\x09\0\0\0\0\0\0\0";
    assert_eq!(encoded(&residency).concat(), expected);
    let created = encoded(&Record::Created(spec(2))).concat();
    // id at 8, sizes of the three strings at the end of the fixed part, then the strings.
    assert_eq!(created[8], 2);
    assert_eq!(created[HEAD_BYTES + 62..HEAD_BYTES + 68], [5, 0, 4, 0, 9, 0]);
    assert!(created.ends_with(b"web-2maindebian-12"));
}

#[test]
fn residency_of_a_large_volume_is_cut_into_records_of_bounded_size() {
    let spec = VolumeSpec { size_bytes: 40 << 30, ..spec(0) };
    let chunks: Vec<_> = (0..spec.chunks()).map(|chunk| (chunk, partial(&spec, [chunk % 16]))).collect();
    let state = VolumeState { spec, generation: 3, residency: chunks, hydrated: false, lineage: Lineage::new(None) };
    let (mut replay, mut records) = (Replay::default(), 0);
    record::encode_state(&state, &mut |bytes| {
        assert!(bytes.len() <= RECORD_BYTES_MAX);
        let (entry, len) = record::decode(bytes).expect("just encoded");
        assert_eq!(len, bytes.len());
        replay.apply(entry).expect("fits");
        records += 1;
    });
    assert!(records > 100, "{records}");
    assert_eq!(replay.finish(), [state]);
}

#[test]
fn a_lineage_of_many_runs_is_cut_into_records_that_go_on() {
    let spec = VolumeSpec { size_bytes: 40 << 30, ..spec(2) };
    let runs: Vec<(u32, u32)> = (0..10_000).map(|run| (run * 3, 1 + run % 2)).collect();
    let lineage = Lineage { base: Some(SnapshotRef { name: "before".into(), id: 9 }), changed: Changed::Runs(runs) };
    let state = VolumeState { spec, generation: 1, residency: Vec::new(), hydrated: true, lineage };
    let mut replay = Replay::default();
    record::encode_state(&state, &mut |bytes| {
        replay.apply(record::decode(bytes).expect("just encoded").0).expect("fits")
    });
    assert_eq!(replay.finish(), std::slice::from_ref(&state));
    // A part of it without its beginning is refused, and so are chunks past the end.
    let Changed::Runs(runs) = &state.lineage.changed else { unreachable!() };
    let mut replay = Replay::default();
    replay.apply(Entry::Created(state.spec.clone())).expect("sound");
    let part = Lineage { changed: Changed::Runs(runs[1..2].to_vec()), ..state.lineage.clone() };
    let volume = state.spec.id;
    replay.apply(Entry::Lineage { volume, lineage: part, continued: true }).expect_err("not begun");
    let beyond = Lineage { changed: Changed::Runs(vec![(state.spec.chunks() - 1, 2)]), ..state.lineage };
    replay.apply(Entry::Lineage { volume, lineage: beyond, continued: false }).expect_err("past the end");
    replay.apply(Entry::Changing { volume, run: (state.spec.chunks() - 1, 2) }).expect_err("past the end");
}

#[test]
fn residency_of_nothing_is_no_record() {
    let record = Record::Residency { volume: VolumeId(1), chunks: vec![(3, ChunkResidency::Absent)] };
    assert!(encoded(&record).is_empty());
}

/// R1
#[test]
fn r1_unknown_kind_is_told_apart_from_damage() {
    let error = record::decode(b"\xff\xff\xff\xff\x63\0\0\0").expect_err("kind 99");
    assert_eq!(error, RecordError::UnknownKind(99));
    assert!(error.to_string().contains("newer volleyd"), "{error}");
}

/// R2
#[test]
fn r2_malformed_records_are_refused() {
    let check = |bytes: &[u8], want: &str| {
        let error = record::decode(bytes).expect_err(want).to_string();
        assert!(error.contains(want), "{error} should say {want}");
    };
    check(b"\0\0\0", "head is cut short");
    check(b"\x08\0\0\0\x03\0\0\0\0\0", "past the end");
    check(b"\x08\0\0\0\x03\x01\0\0\0\0\0\0\0\0\0\0", "reserved");
    check(b"\xff\xff\0\0\x03\0\0\0", "longer than the limit");
    check(b"\x04\0\0\0\x03\0\0\0\0\0\0\0", "cut short");
    check(b"\x09\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0", "longer than its fields");
    let mut created = encoded(&Record::Created(spec(1))).concat();
    created[HEAD_BYTES + 8] = 1;
    check(&created, "device size");
    created[HEAD_BYTES + 56] = 1;
    check(&created, "chunk size");
    created[HEAD_BYTES + 61] = 0x80;
    check(&created, "unknown flags");
}

proptest! {
    #[test]
    fn facts_round_trip(changes in prop::collection::vec(change(), 1..20)) {
        let mut model = Model::default();
        let records = changes.iter().filter_map(|change| model.change(change));
        // What replaces a volume is several records, which replay puts together.
        for record in records.filter(|record| !matches!(record, Record::Replaced(_))) {
            for bytes in encoded(&record) {
                let (entry, len) = record::decode(&bytes).expect("just encoded");
                prop_assert_eq!(len, bytes.len());
                prop_assert_eq!(as_record(entry), record.clone());
                for cut in 0..bytes.len() {
                    prop_assert!(record::decode(&bytes[..cut]).is_err());
                }
            }
        }
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(kind in 0u8..14, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend([kind, 0, 0, 0]);
        bytes.extend(body);
        if let Ok((entry, len)) = record::decode(&bytes) {
            prop_assert_eq!(len, bytes.len());
            let mut replay = Replay::default();
            replay.apply(Entry::Created(spec(0))).expect("sound");
            // Whatever it says, it is refused or applied.
            let _ = replay.apply(entry);
        }
    }
}

fn as_record(entry: Entry) -> Record {
    match entry {
        Entry::Created(spec) => Record::Created(spec),
        Entry::Deleted(volume) => Record::Deleted(volume),
        Entry::Generation { volume, generation } => Record::Generation { volume, generation },
        Entry::Rate { volume, rate } => Record::Rate { volume, rate },
        Entry::Hydrated(volume) => Record::Hydrated { volume },
        Entry::Lineage { volume, lineage, .. } => Record::Lineage { volume, lineage },
        Entry::Changing { volume, run } => Record::Changing { volume, run },
        Entry::Residency { volume, runs, partials } => {
            let whole = runs.into_iter().flat_map(|(start, len)| start..start + len);
            let mut chunks: Vec<_> = whole.map(|chunk| (chunk, ChunkResidency::Resident)).collect();
            chunks.extend(partials.into_iter().map(|(chunk, words)| (chunk, ChunkResidency::Partial(words))));
            Record::Residency { volume, chunks }
        }
        other => panic!("not a fact: {other:?}"),
    }
}
