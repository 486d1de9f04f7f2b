//! Group commit: what waiters are told, what they share, and what each failure does.

use std::io::ErrorKind;
use std::path::Path;

use futures::future::join_all;

use super::super::{Journal, Lsn, Record, commit_epoch, recover};
use super::harness::{Call, TestPlatform, run, yield_once};
use super::model::{Change, Model, spec};
use crate::error::Status;
use crate::types::{VolumeId, VolumeState};

/// An empty journal of a node with one shard.
pub(super) async fn empty(platform: &TestPlatform, dir: &Path) -> Journal<TestPlatform> {
    recover(platform, dir).await.expect("first start");
    let journal = Journal::create(platform, dir, 1, 0, [].into_iter()).await.expect("create");
    commit_epoch(platform, dir, 1, 1).await.expect("commit");
    journal
}

pub(super) async fn recovered(platform: &TestPlatform, dir: &Path) -> Vec<VolumeState> {
    recover(platform, dir).await.expect("recover").volumes
}

fn create(model: &mut Model, id: u64) -> Record {
    model.change(&Change::Create(id)).expect("a record")
}

#[test]
fn committed_records_are_recovered_and_buffered_ones_are_not() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let mut model = Model::default();
        let lsn = journal.append(&create(&mut model, 1));
        journal.commit(lsn).await.expect("commit");
        journal.append(&Record::Created(spec(2)));
        assert!(journal.pending_bytes() > 0);
        assert_eq!(recovered(&platform, &dir).await, model.states());
        // What was acknowledged needs no second sync.
        let syncs = platform.syncs();
        journal.commit(lsn).await.expect("durable already");
        journal.commit(Lsn(0)).await.expect("nothing");
        assert_eq!(platform.syncs(), syncs);
    });
}

#[test]
fn waiters_share_batches() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let before = platform.syncs();
        let commits = (0..100u64).map(|id| {
            let journal = journal.clone();
            async move {
                let lsn = journal.append(&Record::Created(spec(id)));
                journal.commit(lsn).await
            }
        });
        assert!(join_all(commits).await.iter().all(Result::is_ok));
        assert!(platform.syncs() - before <= 2, "{} syncs for 100 commits", platform.syncs() - before);
        assert_eq!(recovered(&platform, &dir).await.len(), 100);
    });
}

#[test]
fn more_than_a_batch_is_committed_in_order() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let mut model = Model::default();
        for round in 0..30_000u64 {
            journal.append(&create(&mut model, round % 7));
            if let Some(record) = model.change(&Change::Attach(round % 7)) {
                journal.append(&record);
            }
        }
        assert!(journal.pending_bytes() > 3 << 20);
        let lsn = journal.append(&model.change(&Change::Delete(3)).expect("a record"));
        journal.commit(lsn).await.expect("commit");
        assert_eq!(journal.pending_bytes(), 0);
        assert_eq!(recovered(&platform, &dir).await, model.states());
    });
}

#[test]
fn a_waiter_that_goes_away_abandons_nothing() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        for id in 0..20u64 {
            let lsn = journal.append(&Record::Created(spec(id)));
            {
                let mut commit = std::pin::pin!(journal.commit(lsn));
                for _ in 0..id % 5 {
                    if futures::poll!(commit.as_mut()).is_ready() {
                        break;
                    }
                    yield_once().await;
                }
            }
        }
        let lsn = journal.append(&Record::Created(spec(20)));
        journal.commit(lsn).await.expect("commit");
        assert_eq!(recovered(&platform, &dir).await.len(), 21);
    });
}

/// A full disk: everyone who waits is told; once there is space, the same records are written to the same place.
#[test]
fn a_failed_write_is_reported_and_repeated() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let first = journal.append(&Record::Created(spec(1)));
        journal.commit(first).await.expect("commit");
        // With and without space reserved behind the log: the second call is the batch itself.
        for (round, after) in [0, 0, 1].into_iter().enumerate() {
            let id = 10 + round as u64;
            let lsn = journal.append(&Record::Created(spec(id)));
            platform.fail(Call::Write, 0, ErrorKind::StorageFull);
            let waits = [journal.commit(lsn), journal.commit(lsn)];
            for error in join_all(waits).await {
                let error = error.expect_err("injected");
                assert_eq!(error.status, Status::NoSpace);
                assert!(error.message.contains("-0000-") && error.message.contains("writing"), "{error}");
            }
            assert!(journal.pending_bytes() > 0);
            let later = journal.append(&Record::Generation { volume: VolumeId(id), generation: 5 });
            platform.fail(Call::Write, after, ErrorKind::StorageFull);
            let _ = journal.commit(lsn).await;
            platform.heal();
            journal.commit(later).await.expect("space again");
            let states = recovered(&platform, &dir).await;
            assert_eq!(states.len(), 2 + round);
            assert_eq!(states[1 + round].generation, 5);
        }
    });
}

/// After a failed sync nobody knows what is on the disk: nothing is acknowledged until a restart has read it.
#[test]
fn a_failed_sync_poisons_the_journal() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let good = journal.append(&Record::Created(spec(1)));
        journal.commit(good).await.expect("commit");
        let bad = journal.append(&Record::Created(spec(2)));
        platform.fail(Call::Sync, 0, ErrorKind::Other);
        let error = journal.commit(bad).await.expect_err("injected");
        platform.heal();
        assert!(error.status == Status::Io && error.message.contains("sync of a batch failed"), "{error}");
        for lsn in [bad, journal.append(&Record::Created(spec(3)))] {
            let error = journal.commit(lsn).await.expect_err("poisoned");
            assert!(error.message.contains("sync of a batch failed (injected)"), "{error}");
        }
        journal.commit(good).await.expect("was durable");
        assert!(!journal.checkpoint_due());
        assert!(journal.checkpoint(|| None).await.is_err());
        assert!(journal.close().await.is_err());
        assert!(recovered(&platform, &dir).await.len() <= 2);
    });
}

#[test]
fn close_commits_everything_and_ends_the_segment() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let other = journal.clone();
        let lsn = journal.append(&Record::Created(spec(1)));
        let late = other.commit(lsn);
        journal.close().await.expect("close");
        late.await.expect("durable through the close");
        let late = other.append(&Record::Created(spec(2)));
        assert_eq!(other.commit(late).await.expect_err("closed").status, Status::ShuttingDown);
        assert_eq!(other.checkpoint(|| None).await.expect_err("closed").status, Status::ShuttingDown);
        assert_eq!(other.close().await.expect_err("closed").status, Status::ShuttingDown);
        let recovered = recover(&platform, &dir).await.expect("recover");
        assert!(recovered.files[0].closed && recovered.files[0].torn_bytes == 0);
        assert_eq!(recovered.volumes.len(), 1);
    });
}

#[test]
fn create_names_the_file_that_fails() {
    run(|platform, dir| async move {
        recover(&platform, &dir).await.expect("first start");
        for call in [Call::Write, Call::Sync, Call::Rename, Call::SyncDir] {
            platform.fail(call, 0, ErrorKind::StorageFull);
            let result = Journal::create(&platform, &dir, 1, 0, [].into_iter()).await;
            let error = result.err().expect("injected");
            assert_eq!(error.status, Status::NoSpace);
            assert!(error.message.contains("0000000001-0000-0000000000.vj"), "{error}");
            platform.heal();
        }
        empty(&platform, &dir).await;
    });
}
