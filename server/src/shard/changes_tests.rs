//! Changes and cuts against a disk of a few numbers for each chunk, and a journal of which a crash keeps the beginning.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;

use super::{Announcement, Changes, ChunkSet, Staged};
use crate::types::{Changed, Lineage, SnapshotRef};

const CHUNKS: u32 = 130;
const SECTORS: u32 = 4;

fn snapshot(id: u64) -> SnapshotRef {
    SnapshotRef { name: format!("s{id}").into(), id: id.into() }
}

#[derive(Clone, Debug)]
enum Step {
    /// Chunk and sector of it.
    Write(u32, u32),
    /// The journal is synced.
    Sync,
    Checkpoint,
    Begin,
    Capture(u32),
    Commit,
    GiveUp,
    Stop,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..CHUNKS, 0..SECTORS).prop_map(|(chunk, sector)| Step::Write(chunk, sector)),
        4 => Just(Step::Sync),
        1 => Just(Step::Checkpoint),
        2 => Just(Step::Begin),
        4 => (0..CHUNKS).prop_map(Step::Capture),
        1 => Just(Step::Commit),
        1 => Just(Step::GiveUp),
        1 => Just(Step::Stop),
        1 => Just(Step::Crash),
    ]
}

type Disk = Vec<[u64; SECTORS as usize]>;

/// A cut, what the disk was, and what has been captured of it.
struct Cut {
    id: u64,
    was: Disk,
    wanted: BTreeSet<u32>,
    captured: BTreeMap<u32, [u64; SECTORS as usize]>,
    staging: Disk,
}

enum Written {
    Lineage(Lineage),
    Changing(Range<u32>),
}

struct World {
    changes: Changes,
    disk: Disk,
    /// What the volume was at each snapshot, by its id; 0: what it began with.
    snapshots: BTreeMap<u128, Disk>,
    cut: Option<Cut>,
    journal: Vec<Written>,
    synced: usize,
    announcements: Vec<Announcement>,
}

impl World {
    fn new() -> World {
        let lineage = Lineage::new(None);
        let disk = vec![[0; SECTORS as usize]; CHUNKS as usize];
        World {
            changes: Changes::new(lineage.clone()),
            disk: disk.clone(),
            snapshots: [(0, disk)].into(),
            cut: None,
            journal: vec![Written::Lineage(lineage)],
            synced: 1,
            announcements: Vec::new(),
        }
    }

    /// A guest waits for its announcement: the write is not made before a later one finds the chunk announced.
    fn write(&mut self, chunk: u32, sector: u32, value: u64) {
        if let Some(run) = self.changes.unannounced(&(chunk..=chunk), CHUNKS) {
            self.journal.push(Written::Changing(run.clone()));
            self.announcements.push(self.changes.announce(run));
            return;
        }
        if let Some(cut) = &mut self.cut {
            let mut staged = Staged::default();
            for sector in self.changes.needed(chunk, sector..sector + 1) {
                cut.staging[chunk as usize][sector as usize] = self.disk[chunk as usize][sector as usize];
                staged.own.insert(sector);
            }
            self.changes.staged(cut.id, chunk, &staged, 1);
        }
        self.changes.write(chunk);
        self.disk[chunk as usize][sector as usize] = value;
    }

    fn sync(&mut self) {
        self.synced = self.journal.len();
        self.announcements.drain(..).for_each(|announcement| self.changes.announced(announcement));
    }

    fn record(&mut self) {
        let lineage = self.changes.recorded();
        self.journal.push(Written::Lineage(lineage));
    }

    fn begin(&mut self, id: u64) {
        let begun = self.changes.begin(id, None::<Range<u32>>, None);
        assert_eq!(begun.is_some(), self.cut.is_none());
        if let Some(chunks) = begun {
            let wanted = chunks.into_iter().collect();
            let (was, staging) = (self.disk.clone(), self.disk.clone());
            self.cut = Some(Cut { id, was, wanted, captured: BTreeMap::new(), staging });
        }
    }

    fn capture(&mut self, chunk: u32) {
        let Some(cut) = &mut self.cut else { return };
        if !cut.wanted.contains(&chunk) || cut.captured.contains_key(&chunk) {
            return;
        }
        let staged = self.changes.find(cut.id, chunk).expect("not failed");
        let mut value = self.disk[chunk as usize];
        staged.own.iter().for_each(|sector| value[sector as usize] = cut.staging[chunk as usize][sector as usize]);
        self.changes.captured(cut.id, chunk);
        cut.captured.insert(chunk, value);
    }

    fn commit(&mut self) {
        (0..CHUNKS).for_each(|chunk| self.capture(chunk));
        let Some(cut) = self.cut.take() else { return };
        let mut taken = self.base().clone();
        cut.captured.into_iter().for_each(|(chunk, value)| taken[chunk as usize] = value);
        assert!(taken == cut.was, "the snapshot is the volume at its cut");
        let snapshot = snapshot(cut.id);
        self.snapshots.insert(snapshot.id, taken);
        assert!(self.changes.end(cut.id, Some(snapshot)));
        self.record();
    }

    fn base(&self) -> &Disk {
        &self.snapshots[&self.changes.base().map_or(0, |base| base.id)]
    }

    /// All that was written is on the disk, flushed or not: the worst case for who has to know of it.
    fn crash(&mut self) {
        self.journal.truncate(self.synced);
        let mut lineage = Lineage::new(None);
        for written in &self.journal {
            match written {
                Written::Lineage(new) => lineage = new.clone(),
                Written::Changing(run) => {
                    let Changed::Runs(runs) = &lineage.changed else { unreachable!("known") };
                    let set = runs.iter().flat_map(|(start, len)| *start..start + len).chain(run.clone());
                    lineage.changed = Changed::Runs(set.collect::<ChunkSet>().runs());
                }
            }
        }
        self.changes = Changes::new(lineage);
        self.announcements.clear();
        self.cut = None;
    }
}

proptest! {
    /// What is captured is the volume at the cut, and what differs from the base is always among what is said to have changed, also after
    /// a crash.
    #[test]
    fn a_snapshot_is_the_volume_at_its_cut(steps in proptest::collection::vec(step(), 1..200)) {
        let mut world = World::new();
        for (at, step) in (1..).zip(steps) {
            match step {
                Step::Write(chunk, sector) => world.write(chunk, sector, at),
                Step::Sync => world.sync(),
                Step::Checkpoint => world.record(),
                Step::Begin => world.begin(at),
                Step::Capture(chunk) => world.capture(chunk),
                Step::Commit => world.commit(),
                Step::GiveUp => {
                    let cut = world.cut.take();
                    let ended = world.changes.cut().is_some_and(|id| world.changes.end(id, None));
                    prop_assert_eq!(ended, cut.is_some());
                }
                Step::Stop => {
                    world.record();
                    world.sync();
                    world.crash();
                }
                Step::Crash => world.crash(),
            }
            let base = world.base();
            for chunk in 0..CHUNKS {
                let differs = world.disk[chunk as usize] != base[chunk as usize];
                prop_assert!(!differs || world.changes.is_changed(chunk) == Some(true), "chunk {}", chunk);
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
    assert_eq!(changes.begin(9, None::<Range<u32>>, None), Some(vec![5]));
    assert_eq!(changes.needed(5, 0..3), [0, 1, 2]);
    assert!(changes.staged(9, 5, &Staged { own: [1].into_iter().collect(), ..Staged::default() }, 1));
    assert_eq!(changes.needed(5, 0..3), [0, 2]);
    changes.fail("staging is full".to_owned());
    assert!(changes.needed(5, 0..3).is_empty());
    assert!(!changes.staged(9, 5, &Staged::default(), 1));
    changes.write(6);
    assert_eq!(changes.find(9, 5), Err("staging is full".to_owned()));
    assert!(changes.end(9, None));
    assert_eq!(changes.lineage(), Lineage { base: Some(snapshot(1)), changed: Changed::Runs(vec![(5, 2)]) });
}

#[test]
fn a_region_is_announced_once_and_again_after_a_record_that_replaced_it() {
    let mut changes = Changes::new(Lineage::new(Some(snapshot(1))));
    assert_eq!(changes.unannounced(&(127..=128), 200), Some(0..200));
    let announcement = changes.announce(0..128);
    changes.announced(announcement);
    assert_eq!(changes.unannounced(&(3..=127), 200), None);
    changes.write(3);
    let late = changes.announce(128..200);
    changes.recorded();
    changes.announced(late);
    assert_eq!(changes.unannounced(&(3..=3), 200), None, "it is in the record");
    assert_eq!(changes.unannounced(&(4..=4), 200), Some(0..128));
    assert_eq!(changes.unannounced(&(130..=130), 200), Some(128..200), "the record came after the announcement");
}

#[test]
fn of_an_unknown_past_everything_is_looked_at() {
    let mut changes = Changes::new(Lineage::unknown());
    assert_eq!(changes.unannounced(&(3..=3), 200), None, "a restart takes all for changed anyway");
    changes.write(3);
    assert_eq!(changes.begin(1, None::<Range<u32>>, None), None, "nobody knows what has changed");
    assert_eq!(changes.begin(1, Some(0..4), None), Some(vec![0, 1, 2, 3]));
    changes.write(2);
    assert!(changes.end(1, Some(snapshot(2))));
    assert_eq!(changes.lineage(), Lineage { base: Some(snapshot(2)), changed: Changed::Runs(vec![(2, 1)]) });
}
