//! Changes and cuts against a disk of one number for each chunk.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{Changes, ChunkSet, Staged, Where};
use crate::types::{Changed, Lineage, SnapshotRef};

const CHUNKS: u32 = 130;

fn snapshot(id: u64) -> SnapshotRef {
    SnapshotRef { name: format!("s{id}").into(), id: id.into() }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u32),
    Begin,
    Capture(u32),
    Commit,
    GiveUp,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..CHUNKS).prop_map(Step::Write),
        2 => Just(Step::Begin),
        4 => (0..CHUNKS).prop_map(Step::Capture),
        1 => Just(Step::Commit),
        1 => Just(Step::GiveUp),
        1 => Just(Step::Restart),
    ]
}

/// Of a cut: what the disk was, what has to be captured, what was captured, what was staged.
type Expected = (Vec<u64>, BTreeSet<u32>, BTreeMap<u32, u64>, BTreeMap<u32, u64>);

proptest! {
    /// A disk of one number for each chunk, and what it was when each snapshot was cut: what is captured is that, and what differs from
    /// the base is always among what is said to have changed.
    #[test]
    fn a_snapshot_is_the_volume_at_its_cut(steps in proptest::collection::vec(step(), 1..200)) {
        let mut changes = Changes::new(Lineage::new(None));
        let (mut disk, mut base) = (vec![0_u64; CHUNKS as usize], vec![0_u64; CHUNKS as usize]);
        let mut cut: Option<Expected> = None;
        let mut next = 0;
        for step in steps {
            next += 1;
            match step {
                Step::Write(chunk) => {
                    if changes.is_pending(chunk) {
                        changes.staged(chunk, Staged { own: Vec::new() }, 1);
                        cut.as_mut().expect("pending").3.insert(chunk, disk[chunk as usize]);
                    }
                    changes.write(chunk);
                    disk[chunk as usize] = next;
                }
                Step::Begin => {
                    let begun = changes.begin(next, None::<std::ops::Range<u32>>, None);
                    prop_assert_eq!(begun.is_some(), cut.is_none());
                    if let Some(chunks) = begun {
                        cut = Some((disk.clone(), chunks.into_iter().collect(), BTreeMap::new(), BTreeMap::new()));
                    }
                }
                Step::Capture(chunk) => {
                    let id = changes.cut();
                    let Some((_, wanted, captured, staging)) = &mut cut else { continue };
                    if !wanted.contains(&chunk) || captured.contains_key(&chunk) {
                        continue;
                    }
                    let id = id.expect("a cut");
                    let value = match changes.find(id, chunk).expect("not failed") {
                        Where::Volume => disk[chunk as usize],
                        Where::Staging(_) => staging[&chunk],
                    };
                    changes.captured(id, chunk);
                    captured.insert(chunk, value);
                }
                Step::Commit => {
                    let Some((was, wanted, mut captured, staging)) = cut.take() else { continue };
                    let id = changes.cut().expect("a cut");
                    for chunk in wanted.into_iter().filter(|chunk| !captured.contains_key(chunk)).collect::<Vec<_>>() {
                        let value = match changes.find(id, chunk).expect("not failed") {
                            Where::Volume => disk[chunk as usize],
                            Where::Staging(_) => staging[&chunk],
                        };
                        captured.entry(chunk).or_insert(value);
                    }
                    let mut taken = base.clone();
                    captured.into_iter().for_each(|(chunk, value)| taken[chunk as usize] = value);
                    prop_assert_eq!(&taken, &was);
                    prop_assert!(changes.end(id, Some(snapshot(id))));
                    base = taken;
                }
                Step::GiveUp => {
                    let id = changes.cut();
                    cut = None;
                    prop_assert_eq!(id.is_some_and(|id| changes.end(id, None)), id.is_some());
                }
                Step::Restart => {
                    cut = None;
                    changes = Changes::new(changes.lineage());
                }
            }
            for chunk in 0..CHUNKS {
                let differs = disk[chunk as usize] != base[chunk as usize];
                prop_assert!(!differs || changes.is_changed(chunk) == Some(true), "chunk {}", chunk);
            }
        }
    }

    #[test]
    fn runs_are_the_set(chunks in proptest::collection::btree_set(0..300_u32, 0..80)) {
        let set: ChunkSet = chunks.iter().copied().collect();
        prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), chunks.clone());
        let runs = set.runs();
        prop_assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0));
        let lineage = Lineage { base: None, changed: Changed::Runs(runs) };
        prop_assert_eq!(Changes::new(lineage.clone()).lineage(), lineage);
        for chunk in 0..310 {
            prop_assert_eq!(set.contains(chunk), chunks.contains(&chunk));
        }
    }
}

#[test]
fn a_failed_cut_holds_nobody_up_and_forgets_nothing() {
    let mut changes = Changes::new(Lineage::new(Some(snapshot(1))));
    changes.write(5);
    assert_eq!(changes.begin(9, None::<std::ops::Range<u32>>, None), Some(vec![5]));
    assert!(changes.is_pending(5));
    changes.fail("staging is full".to_owned());
    assert!(!changes.is_pending(5));
    changes.write(6);
    assert_eq!(changes.find(9, 5), Err("staging is full".to_owned()));
    assert!(changes.end(9, None));
    assert_eq!(changes.lineage(), Lineage { base: Some(snapshot(1)), changed: Changed::Runs(vec![(5, 2)]) });
}

#[test]
fn of_an_unknown_past_everything_is_looked_at() {
    let mut changes = Changes::new(Lineage::unknown());
    changes.write(3);
    assert_eq!(changes.begin(1, None::<std::ops::Range<u32>>, None), None, "nobody knows what has changed");
    assert_eq!(changes.begin(1, Some(0..4), None), Some(vec![0, 1, 2, 3]));
    changes.write(2);
    assert!(changes.end(1, Some(snapshot(2))));
    assert_eq!(changes.lineage(), Lineage { base: Some(snapshot(2)), changed: Changed::Runs(vec![(2, 1)]) });
}
