//! One test for each label of the recovery table that concerns the files of the journal directory.

use std::path::Path;

use super::super::{Journal, Record, commit_epoch, recover, recover_existing};
use super::harness::{Call, TestPlatform, run};
use super::model::{self, spec};
use crate::error::Status;
use crate::platform::{File, OpenMode, Platform};
use crate::types::VolumeState;

fn state(index: u64) -> VolumeState {
    model::state(index, index)
}

/// A node with two shards in epoch 1: volume 0 on shard 0, volume 1 on shard 1.
async fn two_shards(platform: &TestPlatform, dir: &Path) {
    let recovered = recover(platform, dir).await.expect("first start");
    assert!(recovered.fresh && recovered.epoch == 0 && recovered.shards == 0);
    two_shards_in(platform, dir).await;
}

async fn two_shards_in(platform: &TestPlatform, dir: &Path) {
    for shard in 0..2 {
        let journal =
            Journal::create(platform, dir, 1, shard, [state(shard as u64)].into_iter()).await.expect("create");
        journal.close().await.expect("close");
    }
    commit_epoch(platform, dir, 1, 2).await.expect("commit");
}

async fn names(platform: &TestPlatform, dir: &Path) -> Vec<String> {
    platform.list_dir(dir).await.expect("list").into_iter().map(|entry| entry.name).collect()
}

async fn put(platform: &TestPlatform, path: &Path, bytes: &[u8]) {
    let _ = platform.remove_file(path).await;
    let mut block = vec![0; bytes.len().next_multiple_of(4096)];
    block[..bytes.len()].copy_from_slice(bytes);
    let file = platform.open(path, OpenMode::CreateNew).await.expect("create");
    file.write_at(0, block).await.expect("write");
}

async fn refusal(platform: &TestPlatform, dir: &Path) -> (Status, String) {
    let error = recover(platform, dir).await.expect_err("refused");
    assert!(!error.message.contains('\n'));
    (error.status, error.message)
}

#[test]
fn d1_first_start_makes_the_superblock() {
    run(|platform, dir| async move {
        assert!(recover(&platform, &dir).await.expect("first").fresh);
        assert_eq!(names(&platform, &dir).await, ["CURRENT"]);
        // A start that crashed after making its journals, before it committed them, is as if it had not been.
        Journal::create(&platform, &dir, 1, 0, [state(0)].into_iter()).await.expect("create");
        let again = recover(&platform, &dir).await.expect("second");
        assert!(!again.fresh && again.epoch == 0 && again.volumes.is_empty());
    });
}

#[test]
fn d2_missing_superblock_with_segments_is_refused() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        platform.remove_file(&dir.join("CURRENT")).await.expect("remove");
        let (status, text) = refusal(&platform, &dir).await;
        assert_eq!(status, Status::Corrupt);
        assert!(text.contains("CURRENT is missing") && text.contains("0000000001-0000-0000000000.vj"), "{text}");
    });
}

#[test]
fn d3_damaged_or_newer_superblock_is_refused() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        let path = dir.join("CURRENT");
        let file = platform.open(&path, OpenMode::Read).await.expect("open");
        let good = file.read_at(0, 4096).await.expect("read");
        for (at, want) in [(0, "no magic"), (16, "checksum"), (4095, "checksum")] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            put(&platform, &path, &bad).await;
            let (status, text) = refusal(&platform, &dir).await;
            assert!(status == Status::Corrupt && text.contains(want) && text.contains("CURRENT"), "{text}");
        }
        put(&platform, &path, &[good.clone(), good.clone()].concat()).await;
        assert!(refusal(&platform, &dir).await.1.contains("one block"));
        let mut newer = good;
        newer[8] = 9;
        super::super::frame::seal_block(&mut newer, 12);
        put(&platform, &path, &newer).await;
        let (status, text) = refusal(&platform, &dir).await;
        assert!(status == Status::Unsupported && text.contains("version 9"), "{text}");
    });
}

#[test]
fn d4_missing_segment_is_refused_by_shard() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        platform.remove_file(&dir.join("0000000001-0001-0000000000.vj")).await.expect("remove");
        let (status, text) = refusal(&platform, &dir).await;
        assert!(status == Status::Corrupt && text.contains("shard 1 is missing"), "{text}");
    });
}

#[test]
fn d5_uncommitted_epoch_is_ignored_and_replaced() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        // A start with three shards got as far as a checkpoint, and crashed before its epoch was committed.
        for shard in 0..3 {
            let journal = Journal::create(&platform, &dir, 2, shard, [state(7)].into_iter()).await.expect("create");
            journal.checkpoint(|| None).await.expect("checkpoint");
        }
        let recovered = recover(&platform, &dir).await.expect("recover");
        assert_eq!((recovered.epoch, recovered.shards), (1, 2));
        assert_eq!(recovered.volumes, [state(0), state(1)]);
        // The next start takes the same epoch, with one shard: nothing of the crashed one may show.
        Journal::create(&platform, &dir, 2, 0, recovered.volumes.into_iter()).await.expect("create");
        commit_epoch(&platform, &dir, 2, 1).await.expect("commit");
        assert_eq!(names(&platform, &dir).await, ["0000000002-0000-0000000000.vj", "CURRENT"]);
        let recovered = recover(&platform, &dir).await.expect("recover");
        assert_eq!((recovered.epoch, recovered.shards), (2, 1));
        assert_eq!(recovered.volumes, [state(0), state(1)]);
    });
}

#[test]
fn d6_older_segment_left_by_a_crash_is_ignored() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        let journal = Journal::create(&platform, &dir, 2, 0, [state(0)].into_iter()).await.expect("create");
        commit_epoch(&platform, &dir, 2, 1).await.expect("commit");
        let old = dir.join("0000000002-0000-0000000000.vj");
        let kept = dir.join("kept");
        platform.hard_link(&old, &kept).await.expect("link");
        journal.append(&Record::Deleted(spec(0).id));
        journal.append(&Record::Created(spec(4)));
        let mut dump = vec![VolumeState { generation: 0, ..state(4) }].into_iter();
        journal.checkpoint(|| dump.next()).await.expect("checkpoint");
        platform.rename(&kept, &old).await.expect("the crash brings it back");
        let recovered = recover(&platform, &dir).await.expect("recover");
        assert_eq!(recovered.volumes, [VolumeState { generation: 0, ..state(4) }]);
        assert_eq!(recovered.files[0].file, "0000000002-0000-0000000001.vj");
    });
}

#[test]
fn d7_volume_in_two_journals_is_refused() {
    run(|platform, dir| async move {
        recover(&platform, &dir).await.expect("first start");
        for shard in 0..2 {
            Journal::create(&platform, &dir, 1, shard, [state(3)].into_iter()).await.expect("create");
        }
        commit_epoch(&platform, &dir, 1, 2).await.expect("commit");
        let (status, text) = refusal(&platform, &dir).await;
        assert!(status == Status::Corrupt && text.contains("web-3 (0000000000000003)"), "{text}");
        assert!(text.contains("shard 0 and shard 1"), "{text}");
    });
}

#[test]
fn d8_unfinished_and_foreign_files_are_ignored() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        for name in ["0000000001-0000-0000000001.vj.tmp", "CURRENT.tmp", "1-0-5.vj", "notes.txt"] {
            put(&platform, &dir.join(name), b"rubbish").await;
        }
        assert_eq!(recover(&platform, &dir).await.expect("recover").volumes.len(), 2);
        Journal::create(&platform, &dir, 2, 0, [].into_iter()).await.expect("create");
        commit_epoch(&platform, &dir, 2, 1).await.expect("commit");
        // Ours are gone, others' stay.
        let expected = ["0000000002-0000-0000000000.vj", "1-0-5.vj", "CURRENT", "notes.txt"];
        assert_eq!(names(&platform, &dir).await, expected);
    });
}

/// A node that has run before and whose journals are gone is not a new node.
#[test]
fn d9_lost_journal_of_a_known_node_is_refused_and_nothing_is_made() {
    run(|platform, dir| async move {
        let refused = async |platform: &TestPlatform| {
            let error = recover_existing(platform, &dir).await.expect_err("refused");
            assert_eq!(error.status, Status::Corrupt);
            assert!(error.message.contains("restore it from a backup"), "{error}");
            error.message
        };
        assert!(refused(&platform).await.contains("the journal of this node is gone"));
        assert!(platform.list_dir(&dir).await.is_err(), "the directory was made");
        platform.create_dir_all(&dir).await.expect("mkdir");
        assert!(refused(&platform).await.contains("the journal of this node is gone"));
        assert_eq!(names(&platform, &dir).await, Vec::<String>::new());
        // As made by a start that did not know better.
        recover(&platform, &dir).await.expect("first start");
        assert!(refused(&platform).await.contains("the journal of this node is gone"));
        two_shards_in(&platform, &dir).await;
        assert_eq!(recover_existing(&platform, &dir).await.expect("recover").volumes, [state(0), state(1)]);
        platform.remove_file(&dir.join("CURRENT")).await.expect("remove");
        assert!(refused(&platform).await.contains("CURRENT is missing"));
    });
}

/// The superblock says one epoch or the other, whatever fails while it is replaced.
#[test]
fn a_failed_commit_of_an_epoch_can_be_tried_again() {
    run(|platform, dir| async move {
        two_shards(&platform, &dir).await;
        Journal::create(&platform, &dir, 2, 0, [state(0), state(1)].into_iter()).await.expect("create");
        for call in [Call::Write, Call::Sync, Call::Rename] {
            platform.fail(call, 0, std::io::ErrorKind::StorageFull);
            let error = commit_epoch(&platform, &dir, 2, 1).await.expect_err("injected");
            assert!(error.status == Status::NoSpace && error.message.contains("CURRENT"), "{error}");
            platform.heal();
            assert_eq!(recover(&platform, &dir).await.expect("recover").epoch, 1);
        }
        commit_epoch(&platform, &dir, 2, 1).await.expect("commit");
        assert_eq!(recover(&platform, &dir).await.expect("recover").volumes, [state(0), state(1)]);
    });
}
