//! What a journal takes of the disk and of memory is bounded, whatever is written and whatever fails.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::path::Path;
use std::rc::Rc;

use futures::future::{join, join_all};

use super::super::frame::BATCH_BYTES_MAX;
use super::super::{
    CHECKPOINT_LOG_BYTES_MIN, CHECKPOINT_LOG_FACTOR, Journal, LOG_FULL_FACTOR, Lsn, PENDING_BYTES_MAX, Record,
};
use super::commit::{empty, recovered};
use super::harness::{Call, TestPlatform, run, yield_once};
use super::model::{partial, spec};
use crate::error::Status;
use crate::platform::Platform;
use crate::types::{ChunkResidency, Lineage, VolumeState};

const MIB: u64 = 1 << 20;

/// A volume of 4 MiB chunks whose residency is `chunks` bitmaps: a record of some KiB.
fn scattered(index: u64, chunks: u32) -> VolumeState {
    let mut spec = spec(2 * index + 1);
    spec.size_bytes = u64::from(chunks) * u64::from(spec.chunk_bytes);
    spec.snapshot = Some(crate::types::SnapshotRef { name: "debian-12".into(), id: 1 });
    let bitmap = partial(&spec, (0..1024).step_by(2));
    let residency = (0..chunks).map(|chunk| (chunk, bitmap.clone())).collect();
    VolumeState { spec, generation: 0, residency, hydrated: false, lineage: Lineage::new(None) }
}

async fn disk_bytes(platform: &TestPlatform, dir: &Path) -> u64 {
    platform.list_dir(dir).await.expect("list").iter().map(|entry| entry.len).sum()
}

/// docs/journal.md, "Bounds": the live segment and the one a checkpoint writes, each with a full log, a batch begun
/// just before it was full, and the space reserved behind it.
fn disk_bytes_max(state_bytes: u64) -> u64 {
    let log = LOG_FULL_FACTOR * CHECKPOINT_LOG_BYTES_MIN.max(CHECKPOINT_LOG_FACTOR * state_bytes);
    2 * (state_bytes + log + 2 * BATCH_BYTES_MAX as u64) + PENDING_BYTES_MAX as u64
}

/// Three writers that never pause, against checkpoints that are due all the time.
#[test]
fn the_disk_space_of_a_journal_is_bounded_under_constant_writes() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let states: Rc<Vec<VolumeState>> = Rc::new((0..600).map(|index| scattered(index, 24)).collect());
        for state in &*states {
            journal.append(&Record::Created(state.spec.clone()));
        }
        let (written, done, most) = (Cell::new(0u64), Cell::new(false), Cell::new(0u64));
        // Enough for several checkpoints; three times this without back-pressure.
        let goal = 160 * MIB;
        let writers = (0..3usize).map(|writer| {
            let (journal, states, platform, dir) = (journal.clone(), Rc::clone(&states), platform.clone(), dir.clone());
            let (written, most, done) = (&written, &most, &done);
            async move {
                let mut at = writer;
                while written.get() < goal {
                    journal.admit().await.expect("admit");
                    let mut lsn = Lsn::default();
                    for _ in 0..40 {
                        let state = &states[at % states.len()];
                        let chunks = state.residency.clone();
                        lsn = journal.append(&Record::Residency { volume: state.spec.id, chunks });
                        written.set(written.get() + 24 * 136);
                        at += 7;
                    }
                    journal.commit(lsn).await.expect("commit");
                    assert!(journal.pending_bytes() < 2 * PENDING_BYTES_MAX);
                    most.set(most.get().max(disk_bytes(&platform, &dir).await));
                }
                done.set(true);
            }
        });
        let checkpoints = RefCell::new(0);
        let upkeep = async {
            while !done.get() {
                let wanted = std::pin::pin!(journal.checkpoint_wanted());
                let ended = std::pin::pin!(async {
                    while !done.get() {
                        yield_once().await;
                    }
                });
                futures::future::select(wanted, ended).await;
                if !journal.checkpoint_due() {
                    continue;
                }
                let mut dump = states.iter().cloned();
                journal.checkpoint(|| dump.next()).await.expect("checkpoint");
                *checkpoints.borrow_mut() += 1;
            }
        };
        join(join_all(writers), upkeep).await;
        assert!(*checkpoints.borrow() >= 2, "{} checkpoints", checkpoints.borrow());
        let bound = disk_bytes_max(600 * (24 * 136 + 200));
        assert!(most.get() <= bound, "{} bytes on the disk, the bound is {bound}", most.get());
        assert!(platform.list_dir(&dir).await.expect("list").len() <= 2, "old segments are removed");
        assert_eq!(recovered(&platform, &dir).await.len(), states.len());
    });
}

/// A full log and a disk that takes no checkpoint: commits end with the reason, and go on once there is space.
#[test]
fn commits_of_a_full_log_fail_with_the_checkpoint_and_go_on_after_the_next() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let state = scattered(1, 400);
        journal.append(&Record::Created(state.spec.clone()));
        let record = Record::Residency { volume: state.spec.id, chunks: state.residency.clone() };
        while journal.log_bytes() < LOG_FULL_FACTOR * CHECKPOINT_LOG_BYTES_MIN {
            let lsn = (0..16).fold(Lsn::default(), |_, _| journal.append(&record));
            journal.commit(lsn).await.expect("commit");
        }
        let lsn = journal.append(&record);
        let log_bytes = journal.log_bytes();
        for round in 0..3 {
            let checkpoint = async {
                journal.checkpoint_wanted().await;
                platform.fail(Call::Write, 1, ErrorKind::StorageFull);
                let mut dump = [state.clone()].into_iter();
                journal.checkpoint(|| dump.next()).await.expect_err("injected");
                platform.heal();
            };
            let (committed, ()) = join(journal.commit(lsn), checkpoint).await;
            let error = committed.expect_err("no room in the log");
            assert!(error.status == Status::NoSpace && error.message.contains("log is full"), "{round}: {error}");
            assert_eq!(journal.log_bytes(), log_bytes, "nothing was written to a full log");
            assert!(!journal.checkpoint_due(), "a full disk is not hammered");
        }
        let checkpoint = async {
            journal.checkpoint_wanted().await;
            let mut dump = [state.clone()].into_iter();
            journal.checkpoint(|| dump.next()).await.expect("space again");
        };
        join(journal.commit(lsn), checkpoint).await.0.expect("committed by the checkpoint");
        assert!(journal.log_bytes() < log_bytes);
        assert!(recovered(&platform, &dir).await == [state]);
    });
}

/// Every guest of a node whose disk is full flushes again and again: the records that can't be written do not pile up.
#[test]
fn records_that_can_not_be_written_are_refused_beyond_a_bound() {
    run(|platform, dir| async move {
        let journal: Journal<TestPlatform> = empty(&platform, &dir).await;
        let state = scattered(1, 400);
        journal.append(&Record::Created(state.spec.clone()));
        let record = Record::Residency { volume: state.spec.id, chunks: state.residency.clone() };
        platform.fail(Call::Write, 0, ErrorKind::StorageFull);
        let (mut refused, mut most) = (0, 0);
        for _ in 0..1000 {
            let flushed = async {
                journal.admit().await.inspect_err(|_| refused += 1)?;
                journal.commit(journal.append(&record)).await
            };
            assert_eq!(flushed.await.expect_err("a full disk").status, Status::NoSpace);
            most = most.max(journal.pending_bytes());
        }
        assert!(refused > 0 && most < PENDING_BYTES_MAX + (1 << 20), "{refused} refused, {most} bytes pending");
        platform.heal();
        journal.admit().await.expect("space again");
        assert_eq!(journal.pending_bytes(), 0);
        let whole = ChunkResidency::Resident;
        let lsn = journal.append(&Record::Residency { volume: state.spec.id, chunks: vec![(0, whole.clone())] });
        journal.commit(lsn).await.expect("commit");
        let lineage = Lineage::new(state.spec.snapshot.clone());
        let mut expected = VolumeState { lineage, ..state };
        expected.residency[0].1 = whole;
        assert!(recovered(&platform, &dir).await == [expected]);
    });
}
