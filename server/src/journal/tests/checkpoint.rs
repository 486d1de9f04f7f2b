//! Checkpoints of a live journal: changes and commits go on meanwhile, and every failure leaves a journal to trust.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::rc::Rc;

use futures::future::join;
use proptest::prelude::*;

use super::super::{CHECKPOINT_LOG_BYTES_MIN, Journal, Lsn, Record};
use super::commit::{empty, recovered};
use super::harness::{Call, TestPlatform, run, yield_once};
use super::model::{Change, Model, change, spec, state};
use crate::error::Status;
use crate::platform::Platform;
use crate::types::VolumeState;

/// A shard: its facts and their journal.
struct Shard {
    model: Model,
    journal: Journal<TestPlatform>,
    last: Lsn,
}

impl Shard {
    fn change(&mut self, change: &Change) {
        if let Some(record) = self.model.change(change) {
            self.last = self.journal.append(&record);
        }
    }
}

/// Dumps by id, making some of `during` before each volume.
fn dump(shard: &Rc<RefCell<Shard>>, during: Vec<Vec<Change>>) -> impl FnMut() -> Option<VolumeState> {
    let (shard, mut during, mut reached) = (Rc::clone(shard), during.into_iter(), None);
    move || {
        let mut shard = shard.borrow_mut();
        during.next().unwrap_or_default().iter().for_each(|change| shard.change(change));
        let id = shard.model.ids().into_iter().find(|id| reached.is_none_or(|last| *id > last))?;
        reached = Some(id);
        shard.model.state(id)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The whole journal on real files: two checkpoints with changes and commits in their midst, then a tail.
    #[test]
    fn checkpoint_and_tail_is_the_model(
        before in prop::collection::vec(change(), 0..25),
        during in prop::collection::vec(prop::collection::vec(change(), 0..6), 0..6),
        again in prop::collection::vec(prop::collection::vec(change(), 0..6), 0..6),
        after in prop::collection::vec(change(), 0..10),
        commits in prop::collection::vec(0usize..4, 0..12),
    ) {
        run(|platform, dir| async move {
            let journal = empty(&platform, &dir).await;
            let shard = Shard { model: Model::default(), journal: journal.clone(), last: Lsn(0) };
            let shard = Rc::new(RefCell::new(shard));
            before.iter().for_each(|change| shard.borrow_mut().change(change));
            for during in [during, again] {
                let checkpoint = journal.checkpoint(dump(&shard, during));
                let committing = async {
                    for pause in &commits {
                        for _ in 0..*pause {
                            yield_once().await;
                        }
                        shard.borrow_mut().change(&Change::Attach(*pause as u64));
                        let lsn = shard.borrow().last;
                        journal.commit(lsn).await.expect("commit");
                    }
                };
                join(checkpoint, committing).await.0.expect("checkpoint");
            }
            after.iter().for_each(|change| shard.borrow_mut().change(change));
            let lsn = shard.borrow().last;
            journal.commit(lsn).await.expect("commit");
            assert_eq!(recovered(&platform, &dir).await, shard.borrow().model.states());
            let names = platform.list_dir(&dir).await.expect("list");
            assert_eq!(names.len(), 2, "one segment and the superblock: {names:?}");
        });
    }
}

#[test]
fn a_checkpoint_makes_what_was_appended_before_it_durable() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let lsn = journal.append(&Record::Created(spec(1)));
        let state = state(1, 0);
        let mut dump = [state.clone()].into_iter();
        journal.checkpoint(|| dump.next()).await.expect("checkpoint");
        assert_eq!(journal.pending_bytes(), 0);
        let syncs = platform.syncs();
        journal.commit(lsn).await.expect("durable already");
        assert_eq!(platform.syncs(), syncs);
        assert_eq!(recovered(&platform, &dir).await, [state]);
    });
}

#[test]
fn a_checkpoint_is_due_when_the_log_outgrows_it() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let record = Record::Created(spec(1));
        while !journal.checkpoint_due() {
            assert!(journal.log_bytes() <= CHECKPOINT_LOG_BYTES_MIN);
            (1..5000).for_each(|_| _ = journal.append(&record));
            let lsn = journal.append(&record);
            journal.commit(lsn).await.expect("commit");
        }
        assert!(journal.log_bytes() > CHECKPOINT_LOG_BYTES_MIN);
        // A checkpoint that fails is not tried again at once.
        platform.fail(Call::Write, 0, ErrorKind::StorageFull);
        assert_eq!(journal.checkpoint(|| None).await.expect_err("injected").status, Status::NoSpace);
        platform.heal();
        assert!(!journal.checkpoint_due());
        journal.checkpoint(|| None).await.expect("checkpoint");
        assert_eq!(journal.log_bytes(), 0);
        assert!(!journal.checkpoint_due());
    });
}

#[test]
fn a_failed_checkpoint_leaves_the_old_segment_in_use() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let shard = Shard { model: Model::default(), journal: journal.clone(), last: Lsn(0) };
        let shard = Rc::new(RefCell::new(shard));
        (0..4).for_each(|id| shard.borrow_mut().change(&Change::Create(id)));
        for (call, after) in [(Call::Write, 0), (Call::Write, 1), (Call::Sync, 0), (Call::Sync, 1)] {
            platform.fail(call, after, ErrorKind::StorageFull);
            let changes = vec![vec![Change::Attach(1)]; 3];
            let error = journal.checkpoint(dump(&shard, changes)).await.expect_err("injected");
            assert!(error.status == Status::NoSpace && error.message.contains(".vj.tmp"), "{error}");
            platform.heal();
            let lsn = shard.borrow().last;
            journal.commit(lsn).await.expect("the old segment goes on");
            assert_eq!(recovered(&platform, &dir).await, shard.borrow().model.states());
            assert_eq!(platform.list_dir(&dir).await.expect("list").len(), 2, "no temporary file is left");
        }
        journal.checkpoint(dump(&shard, Vec::new())).await.expect("checkpoint");
        assert_eq!(recovered(&platform, &dir).await, shard.borrow().model.states());
    });
}

#[test]
fn a_switch_that_fails_poisons_the_journal() {
    for call in [Call::Rename, Call::SyncDir] {
        run(|platform, dir| async move {
            let journal = empty(&platform, &dir).await;
            let shard = Shard { model: Model::default(), journal: journal.clone(), last: Lsn(0) };
            let shard = Rc::new(RefCell::new(shard));
            shard.borrow_mut().change(&Change::Create(1));
            platform.fail(call, 0, ErrorKind::Other);
            let waiting = journal.append(&Record::Created(spec(1)));
            let both = join(journal.checkpoint(dump(&shard, Vec::new())), async {
                // Long enough for the checkpoint to have the turn.
                while journal.inner.state.borrow().next.is_none() || !journal.inner.state.borrow().busy {
                    yield_once().await;
                }
                journal.commit(waiting).await
            });
            let (checkpoint, commit) = both.await;
            platform.heal();
            for error in [checkpoint.expect_err("injected"), commit.expect_err("poisoned")] {
                assert!(error.message.contains("switching to a new segment failed (injected)"), "{error}");
            }
            assert_eq!(recovered(&platform, &dir).await.len(), usize::from(call == Call::SyncDir));
        });
    }
}

/// The checkpoint's future may be dropped at any await: before the switch nothing happened, inside it the journal stops.
#[test]
fn an_abandoned_checkpoint_is_safe_at_every_step() {
    let mut stopped = 0;
    for steps in 0.. {
        let finished = run(|platform, dir| async move {
            let journal = empty(&platform, &dir).await;
            let shard = Shard { model: Model::default(), journal: journal.clone(), last: Lsn(0) };
            let shard = Rc::new(RefCell::new(shard));
            (0..3).for_each(|id| shard.borrow_mut().change(&Change::Create(id)));
            let finished = {
                let mut checkpoint = std::pin::pin!(journal.checkpoint(dump(&shard, vec![vec![Change::Attach(0)]; 3])));
                let mut finished = false;
                for _ in 0..steps {
                    finished = finished || futures::poll!(checkpoint.as_mut()).is_ready();
                    if finished {
                        break;
                    }
                    yield_once().await;
                }
                finished
            };
            shard.borrow_mut().change(&Change::Attach(2));
            let lsn = shard.borrow().last;
            match journal.commit(lsn).await {
                Ok(()) => assert_eq!(recovered(&platform, &dir).await, shard.borrow().model.states()),
                Err(error) => {
                    assert!(error.message.contains("abandoned half-way"), "{error}");
                    return None;
                }
            }
            Some(finished)
        });
        match finished {
            Some(true) => break,
            Some(false) => {}
            None => stopped += 1,
        }
    }
    assert!(stopped > 0, "the switch has awaits");
}

#[test]
fn only_one_checkpoint_runs_at_a_time() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let (first, second) = join(journal.checkpoint(|| None), journal.checkpoint(|| None)).await;
        first.expect("checkpoint");
        assert_eq!(second.expect_err("running").status, Status::Conflict);
        journal.checkpoint(|| None).await.expect("the next one");
    });
}

#[test]
fn closing_ends_a_running_checkpoint() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let lsn = journal.append(&Record::Created(spec(1)));
        let state = state(1, 0);
        let endless = journal.checkpoint(|| Some(state.clone()));
        let (checkpoint, closed) = join(endless, journal.clone().close()).await;
        closed.expect("close");
        assert_eq!(checkpoint.expect_err("closed").status, Status::ShuttingDown);
        journal.commit(lsn).await.expect("durable through the close");
        assert_eq!(platform.list_dir(&dir).await.expect("list").len(), 2);
        assert_eq!(recovered(&platform, &dir).await.len(), 1);
    });
}

/// Committers that never pause do not keep a checkpoint from its turn.
#[test]
fn a_checkpoint_ends_under_constant_commits() {
    run(|platform, dir| async move {
        let journal = empty(&platform, &dir).await;
        let done = Rc::new(RefCell::new(false));
        let committers = (0..4u64).map(|id| {
            let (journal, done) = (journal.clone(), Rc::clone(&done));
            async move {
                while !*done.borrow() {
                    let lsn = journal.append(&Record::Generation { volume: spec(id).id, generation: 1 });
                    journal.commit(lsn).await.expect("commit");
                }
            }
        });
        let checkpoint = async {
            journal.checkpoint(|| None).await.expect("checkpoint");
            *done.borrow_mut() = true;
        };
        join(futures::future::join_all(committers), checkpoint).await;
    });
}
