//! Replay as a property: a dump at any moment, volume by volume while changes go on, plus what was appended meanwhile
//! and later, gives what the straightforward model has.

use proptest::prelude::*;

use super::super::record::{self, Entry};
use super::super::replay::{Replay, ReplayError};
use super::model::{Change, Model, change, spec};
use crate::types::VolumeId;

/// Replays encoded records.
fn replayed(log: &[Vec<u8>]) -> Replay {
    let mut replay = Replay::default();
    for bytes in log {
        replay.apply(record::decode(bytes).expect("just encoded").0).expect("sound");
    }
    replay
}

/// Makes changes and appends their records to a log.
fn make(model: &mut Model, log: &mut Vec<Vec<u8>>, changes: &[Change]) {
    for record in changes.iter().filter_map(|change| model.change(change)) {
        record::encode(&record, &mut |bytes| log.push(bytes.to_vec()));
    }
}

/// Its second record may be in a batch that a crash took: a blank volume has nothing to fetch all the same.
#[test]
fn a_created_volume_without_snapshot_is_hydrated() {
    for (index, blank) in [(0, true), (1, false), (3, true)] {
        let mut log = Vec::new();
        record::encode(&super::super::Record::Created(spec(index)), &mut |bytes| log.push(bytes.to_vec()));
        let states = replayed(&log).finish();
        assert_eq!((states[0].spec.snapshot.is_none(), states[0].hydrated), (blank, blank));
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(), 0..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn replay_of_every_record_is_the_model(changes in changes()) {
        let (mut model, mut log) = (Model::default(), Vec::new());
        make(&mut model, &mut log, &changes);
        prop_assert_eq!(replayed(&log).finish(), model.states());
    }

    #[test]
    fn fuzzy_dump_and_tail_is_the_model(
        before in changes(),
        during in prop::collection::vec(changes(), 0..8),
        after in changes(),
    ) {
        let (mut model, mut log) = (Model::default(), Vec::new());
        make(&mut model, &mut log, &before);
        // The checkpoint begins: the old log is forgotten, the new one starts empty.
        log.clear();
        let (mut reached, mut states, mut during) = (None, 0, during.into_iter());
        // By id: volumes made meanwhile are dumped if they lie ahead, and only logged if they lie behind.
        while let Some(id) = model.ids().into_iter().find(|id| reached.is_none_or(|last| *id > last)) {
            record::encode_state(&model.state(id).expect("listed"), &mut |bytes| log.push(bytes.to_vec()));
            states += 1;
            reached = Some(id);
            make(&mut model, &mut log, &during.next().unwrap_or_default());
        }
        record::encode_checkpoint_complete(states, &mut |bytes| log.push(bytes.to_vec()));
        make(&mut model, &mut log, &after);
        let replay = replayed(&log);
        prop_assert!(replay.complete);
        prop_assert_eq!(replay.finish(), model.states());
    }

    #[test]
    fn repeating_facts_that_only_grow_changes_nothing(changes in changes()) {
        let (mut model, mut log) = (Model::default(), Vec::new());
        let changes: Vec<_> = changes.into_iter().filter(|c| !matches!(c, Change::Delete(_) | Change::Rate(..))).collect();
        make(&mut model, &mut log, &changes);
        let twice: Vec<_> = log.iter().chain(&log).cloned().collect();
        prop_assert_eq!(replayed(&twice).finish(), model.states());
    }
}

fn refused(entries: Vec<Entry>) -> ReplayError {
    let mut replay = Replay::default();
    entries.into_iter().find_map(|entry| replay.apply(entry).err()).expect("the last one is refused")
}

/// R3
#[test]
fn r3_facts_that_cannot_be_are_refused() {
    let volume = VolumeId(0);
    let runs = |runs: Vec<(u32, u32)>| {
        let residency = Entry::Residency { volume, runs, partials: Vec::new() };
        refused(vec![Entry::Created(spec(0)), residency])
    };
    assert_eq!(runs(vec![(0, 1), (3, 2)]), ReplayError::ChunkOutOfRange { volume, chunk: 4, chunks: 4 });
    assert_eq!(
        runs(vec![(u32::MAX, u32::MAX)]),
        ReplayError::ChunkOutOfRange { volume, chunk: 2 * u64::from(u32::MAX) - 1, chunks: 4 }
    );
    for words in [vec![0u64, 0], vec![1 << 16]] {
        let partials = vec![(2, words.into_boxed_slice())];
        let residency = Entry::Residency { volume, runs: Vec::new(), partials };
        assert_eq!(refused(vec![Entry::Created(spec(0)), residency]), ReplayError::Bitmap { volume, chunk: 2 });
    }
    let state = Entry::State { spec: spec(0), generation: 1, hydrated: false };
    let short = vec![state, Entry::CheckpointComplete { volumes: 2 }];
    assert_eq!(refused(short), ReplayError::VolumeCount { said: 2, found: 1 });
    let twice = vec![Entry::CheckpointComplete { volumes: 0 }, Entry::CheckpointComplete { volumes: 0 }];
    assert_eq!(refused(twice), ReplayError::SecondComplete);
}

#[test]
fn facts_of_unknown_volumes_are_skipped() {
    let mut replay = Replay::default();
    let residency = Entry::Residency { volume: VolumeId(9), runs: vec![(77, 1)], partials: Vec::new() };
    for entry in [residency, Entry::Hydrated(VolumeId(9)), Entry::Generation { volume: VolumeId(9), generation: 1 }] {
        replay.apply(entry).expect("skipped");
    }
    assert!(replay.finish().is_empty());
}
