//! One after the other: what goes, what stays, and what is said about it.

use super::world::*;
use crate::object_store::ObjectStore;
use crate::snapshot::claim::Claim;
use crate::snapshot::deletion::{Outcome, deletion_key};
use crate::snapshot::gc::lease::LEASE_PREFIX;
use crate::snapshot::gc::{Clock, GcOptions, Verdict, collect, usage};
use crate::snapshot::{
    CatalogError, IMPORT_PREFIX, PACK_PREFIX, catalog, import_key, manifest_key, marker, merkle, pack_key,
};
use futures::executor::block_on;

const HOUR_MS: u64 = 3_600_000;

/// `a` and `b` share the pack of 1 and 2; each has one of its own.
fn two() -> World {
    let world = World::new();
    block_on(world.take("a", &[1, 2, 0, 3])).unwrap();
    block_on(world.take("b", &[1, 4, 4])).unwrap();
    world
}

#[test]
fn what_only_the_deleted_snapshot_references_goes_after_the_grace_period() {
    let world = two();
    assert_eq!(world.store.keys(PACK_PREFIX).len(), 3);
    let Outcome::Deleted(released) = block_on(world.delete("a")).unwrap() else { panic!("nobody needs it") };
    assert_eq!(released.packs_condemned, 1);
    let report = block_on(world.gc(HOUR_MS)).unwrap();
    assert_eq!((report.packs_removed, report.packs_waiting), (0, 1));
    world.clock.advance(HOUR_MS - 1);
    assert_eq!(block_on(world.gc(HOUR_MS)).unwrap().packs_removed, 0);
    world.clock.advance(1);
    let report = block_on(world.gc(HOUR_MS)).unwrap();
    assert_eq!((report.packs_removed, report.bytes_removed), (1, released.bytes_condemned));
    assert_eq!(world.store.keys(PACK_PREFIX).len(), 2);
    assert_eq!(world.verify().len(), 1);
    world.settle();
    assert_eq!(block_on(world.delete("a")), Err(CatalogError::Unknown("a".to_owned())));
}

#[test]
fn garbage_that_nobody_announced_is_condemned_first() {
    let world = two();
    let claim = block_on(Claim::begin(&world.store, "c", 77)).unwrap();
    block_on(world.store.put(&pack_key(77, 0), b"half an import")).unwrap();
    block_on(claim.end(&world.store)).unwrap();
    let report = block_on(world.gc(HOUR_MS)).unwrap();
    assert_eq!((report.packs_removed, report.packs_condemned), (0, 1));
    assert_eq!(block_on(world.gc(HOUR_MS)).unwrap().packs_condemned, 0, "it is condemned once");
    world.clock.advance(HOUR_MS);
    assert_eq!(block_on(world.gc(HOUR_MS)).unwrap().packs_removed, 1);
    world.settle();
}

#[test]
fn without_a_grace_period_all_goes_at_once() {
    let world = two();
    block_on(world.store.put(&pack_key(77, 0), b"garbage")).unwrap();
    block_on(world.delete("b")).unwrap();
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!((report.packs_removed, report.packs_condemned, report.packs_waiting), (2, 0, 0));
    assert!(world.store.keys("gc/").is_empty());
    world.settle();
}

#[test]
fn a_dry_run_says_all_and_does_nothing() {
    let world = two();
    block_on(world.delete("a")).unwrap();
    block_on(world.store.put(&pack_key(77, 0), b"garbage")).unwrap();
    block_on(world.store.put("packs/README", b"somebody's")).unwrap();
    let before = world.store.keys("");
    let dry = |grace_ms| GcOptions {
        grace: std::time::Duration::from_millis(grace_ms),
        dry_run: true,
        rewrite_below_percent: Some(90),
        ..GcOptions::default()
    };
    let report = block_on(collect(&world.store, &world.clock, &dry(HOUR_MS))).unwrap();
    let verdicts: Vec<_> = report.packs.iter().map(|pack| &pack.verdict).collect();
    assert_eq!(verdicts.len(), 4, "packs/README is no pack");
    assert!(verdicts.contains(&&Verdict::WaitForGrace { left_ms: HOUR_MS }), "{verdicts:?}");
    assert!(verdicts.contains(&&Verdict::Condemn), "{verdicts:?}");
    let half = |verdict: &&&Verdict| matches!(verdict, Verdict::Used { snapshots: 1, named, live_bytes: Some(65_000..66_000) } if named[..] == ["b"]);
    assert_eq!(verdicts.iter().filter(half).count(), 2, "{verdicts:?}");
    let rewritten = report.rewritten.unwrap();
    assert_eq!((rewritten.packs, rewritten.packs_written), (1, 0));
    let report = block_on(collect(&world.store, &world.clock, &dry(0))).unwrap();
    assert_eq!(report.packs_removed, 1);
    assert_eq!(world.store.keys(""), before);
}

#[test]
fn a_running_import_keeps_only_what_it_may_use() {
    let world = two();
    block_on(world.delete("a")).unwrap();
    // It begins after the deletion: what was condemned by then is not for it.
    let claim = block_on(Claim::begin(&world.store, "c", 77)).unwrap();
    block_on(world.store.put(&pack_key(77, 0), b"its first pack")).unwrap();
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!(report.packs_removed, 1);
    assert_eq!(report.imports_open, ["c"]);
    // But it may use what `b` references until now.
    block_on(world.delete("b")).unwrap();
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!((report.packs_removed, report.packs_waiting), (0, 2));
    let importing = |v: &&Verdict| matches!(v, Verdict::Importing { import } if import == "c");
    assert_eq!(report.packs.iter().map(|pack| &pack.verdict).filter(importing).count(), 1);
    block_on(claim.end(&world.store)).unwrap();
    assert_eq!(block_on(world.gc(0)).unwrap().packs_removed, 3);
    world.settle();
}

#[test]
fn an_interrupted_import_is_dropped_by_name() {
    let world = two();
    block_on(Claim::begin(&world.store, "c", 77)).unwrap();
    block_on(world.store.put(&pack_key(77, 0), b"its first pack")).unwrap();
    assert_eq!(block_on(catalog::load(&world.store, "c")), Err(CatalogError::Incomplete("c".to_owned())));
    let drop = |name: &str| {
        let grace = std::time::Duration::ZERO;
        let options = GcOptions { drop_import: Some(name.to_owned()), grace, ..GcOptions::default() };
        block_on(collect(&world.store, &world.clock, &options))
    };
    assert_eq!(drop("x"), Err(CatalogError::NoImport("x".to_owned())));
    assert!(matches!(drop("../x"), Err(CatalogError::Name(_))));
    assert_eq!(drop("c").unwrap().packs_removed, 1);
    world.settle();
}

#[test]
fn the_marker_of_a_finished_import_blocks_nothing_and_goes_with_its_snapshot() {
    let world = two();
    let id = block_on(catalog::load(&world.store, "a")).unwrap().id;
    block_on(world.store.put(&import_key("a"), &marker::encode(id))).unwrap();
    block_on(world.delete("b")).unwrap();
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!((report.packs_removed, report.imports_open.len()), (1, 0));
    block_on(world.delete("a")).unwrap();
    assert!(world.store.keys(IMPORT_PREFIX).is_empty());
    world.settle();
}

#[test]
fn a_snapshot_that_nodes_need_is_kept_and_the_nodes_are_named() {
    let world = two();
    // Another snapshot's references do not count, also when the names share a prefix.
    block_on(world.store.put("refs/a.b/node-9", b"")).unwrap();
    block_on(world.store.put("refs/a/node-7", b"")).unwrap();
    let before = world.store.keys("");
    let error = block_on(world.delete("a")).unwrap_err().to_string();
    assert!(error.contains("node-7") && !error.contains("node-9") && error.contains("--when-unused"), "{error}");
    assert_eq!(world.store.keys(""), before);
}

#[test]
fn a_deletion_for_when_it_is_unused_is_durable_and_refuses_new_volumes() {
    let world = two();
    let manifest = block_on(world.create_volume("a", "node-1")).unwrap().unwrap();
    let outcome = block_on(crate::snapshot::deletion::delete(&world.store, &world.clock, "a", true)).unwrap();
    assert_eq!(outcome, Outcome::WhenUnused { nodes: vec!["node-1".to_owned()] });
    assert_eq!(block_on(world.create_volume("a", "node-2")).unwrap(), None);
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!((report.deletions_pending[0].snapshot.as_str(), report.snapshots_deleted.len()), ("a", 0));
    block_on(world.read(&manifest)).unwrap();
    block_on(world.let_go("a", "node-1")).unwrap();
    let report = block_on(world.gc(0)).unwrap();
    assert_eq!((report.snapshots_deleted[..].len(), report.packs_removed), (1, 1));
    assert_eq!(world.verify().len(), 1);
    // The name is free again, for snapshots and for their volumes.
    block_on(world.take("a", &[9])).unwrap();
    assert!(block_on(world.create_volume("a", "node-2")).unwrap().is_some());
    block_on(world.let_go("a", "node-2")).unwrap();
    world.settle();
}

#[test]
fn an_intention_of_an_earlier_snapshot_of_the_name_harms_nobody() {
    let world = two();
    block_on(world.store.put(&deletion_key("a"), &crate::snapshot::deletion::encode(Some(1)))).unwrap();
    assert!(block_on(world.create_volume("a", "node-1")).unwrap().is_some());
    block_on(world.let_go("a", "node-1")).unwrap();
    assert!(block_on(world.gc(0)).unwrap().snapshots_deleted.is_empty());
    assert_eq!(world.verify().len(), 2);
    world.settle();
}

#[test]
fn a_left_intention_does_not_delete_what_cannot_be_read() {
    let world = two();
    block_on(world.store.put(&deletion_key("a"), &crate::snapshot::deletion::encode(Some(1)))).unwrap();
    let manifest = block_on(world.store.get("snapshots/a")).unwrap();
    let mut newer = manifest.clone();
    newer[8] = 2;
    block_on(world.store.put("snapshots/a", &newer)).unwrap();
    assert!(matches!(block_on(world.gc(0)), Err(CatalogError::Unreadable(_))));
    assert_eq!(block_on(world.store.get("snapshots/a")).unwrap(), newer);
    block_on(world.store.put("snapshots/a", &manifest)).unwrap();
    world.settle();
    assert_eq!(world.verify().len(), 2);
}

#[test]
fn a_damaged_manifest_stops_collection_and_can_be_deleted() {
    let world = two();
    let mut bytes = block_on(world.store.get("snapshots/a")).unwrap();
    bytes[100] ^= 1;
    block_on(world.store.put("snapshots/a", &bytes)).unwrap();
    let error = block_on(world.gc(0)).unwrap_err();
    assert!(matches!(error, CatalogError::Unreadable(_)) && error.to_string().contains("\"a\""), "{error}");
    // Another can be deleted; what it referenced stays until it is known what `a` did.
    block_on(world.delete("b")).unwrap();
    assert!(block_on(world.gc(0)).is_err());
    assert_eq!(world.store.keys(PACK_PREFIX).len(), 3);
    block_on(world.delete("a")).unwrap();
    assert_eq!(block_on(world.gc(0)).unwrap().packs_removed, 3);
    world.settle();
}

#[test]
fn a_damaged_condemnation_stops_collection_and_sharing() {
    let world = two();
    block_on(world.delete("a")).unwrap();
    let key = world.store.keys("gc/").remove(0);
    block_on(world.store.put(&key, b"volley-condemned 1\n")).unwrap();
    let error = block_on(world.gc(0)).unwrap_err();
    assert!(error.to_string().contains(&key), "{error}");
    assert!(block_on(crate::snapshot::claim::StoredPacks::load(&world.store)).is_err());
    block_on(world.store.delete(&key)).unwrap();
    block_on(world.gc(0)).unwrap();
    world.settle();
}

#[test]
fn objects_of_others_are_left_alone() {
    let world = two();
    let foreign = ["packs/README", "packs/0000/000001", "gc/notes", "deletions/-x", "trial/x", "refs/a"];
    foreign.iter().for_each(|key| block_on(world.store.put(key, b"?")).unwrap());
    block_on(world.delete("b")).unwrap();
    block_on(world.gc(0)).unwrap();
    foreign.iter().for_each(|key| assert_eq!(block_on(world.store.get(key)).unwrap(), b"?", "{key}"));
}

#[test]
fn packs_that_are_mostly_dead_are_rewritten() {
    let world = World::new();
    block_on(world.take("old", &[1, 2])).unwrap();
    block_on(world.take("a", &[2, 5, 0])).unwrap();
    block_on(world.take("b", &[6, 2, 2])).unwrap();
    block_on(world.delete("old")).unwrap();
    let root = |name| merkle::root(&block_on(catalog::load(&world.store, name)).unwrap());
    let (before, roots) = (world.verify(), [root("a"), root("b")]);
    let keys = world.store.keys(PACK_PREFIX);
    assert_eq!(block_on(world.rewrite(40)).unwrap().rewritten.unwrap().packs, 0, "half of it is live");
    let report = block_on(world.rewrite(60)).unwrap();
    let rewritten = report.rewritten.unwrap();
    assert_eq!((rewritten.packs, rewritten.packs_written), (1, 1));
    assert_eq!(rewritten.snapshots, ["a", "b"]);
    assert_eq!(report.packs_removed, 1);
    assert_eq!((world.verify(), [root("a"), root("b")]), (before, roots));
    let shared = |key: &&String| world.store.keys(PACK_PREFIX).contains(*key);
    assert_eq!(keys.iter().filter(shared).count(), 2, "the old pack is gone");
    assert!(world.store.keys(LEASE_PREFIX).is_empty() && world.store.keys(IMPORT_PREFIX).is_empty());
    assert_eq!(block_on(world.rewrite(60)).unwrap().rewritten.unwrap().packs, 0, "once is enough");
    world.settle();
}

#[test]
fn a_rewrite_waits_for_nodes_that_read_by_the_old_manifest() {
    let world = World::new();
    block_on(world.take("old", &[1, 2])).unwrap();
    block_on(world.take("a", &[2, 5])).unwrap();
    block_on(world.delete("old")).unwrap();
    let manifest = block_on(world.create_volume("a", "node-1")).unwrap().unwrap();
    let report = block_on(world.rewrite(60)).unwrap();
    assert_eq!((report.packs_removed, report.packs_waiting), (0, 1));
    block_on(world.read(&manifest)).unwrap();
    let dead = report.packs.iter().find(|pack| matches!(pack.verdict, Verdict::WaitForNodes { .. })).unwrap();
    assert_eq!(dead.verdict, Verdict::WaitForNodes { nodes: vec!["node-1".to_owned()] });
    // Time alone does not free the pack.
    world.clock.advance(crate::snapshot::gc::ABANDONED_MS);
    block_on(world.gc(0)).unwrap();
    block_on(world.read(&manifest)).unwrap();
    block_on(world.let_go("a", "node-1")).unwrap();
    assert_eq!(block_on(world.gc(0)).unwrap().packs_removed, 1);
    world.settle();
}

#[test]
fn readers_of_an_old_manifest_are_remembered_while_others_still_use_the_pack() {
    let world = World::new();
    block_on(world.take("old", &[1, 2])).unwrap();
    block_on(world.take("a", &[2, 5])).unwrap();
    block_on(world.take("b", &[6, 2])).unwrap();
    block_on(world.delete("old")).unwrap();
    let manifest = block_on(world.create_volume("a", "node-1")).unwrap().unwrap();
    let lease = format!("volley-rewrite 1 {:032x}\n", world.clock.timed_id());
    block_on(world.store.put(&format!("{LEASE_PREFIX}b"), lease.as_bytes())).unwrap();
    let rewritten = block_on(world.rewrite(60)).unwrap().rewritten.unwrap();
    assert_eq!((rewritten.snapshots.len(), rewritten.left.len()), (1, 1), "{:?}", rewritten.left);
    block_on(world.store.delete(&format!("{LEASE_PREFIX}b"))).unwrap();
    block_on(world.gc(0)).unwrap();
    block_on(world.delete("b")).unwrap();
    block_on(world.gc(0)).unwrap();
    block_on(world.read(&manifest)).unwrap();
    block_on(world.let_go("a", "node-1")).unwrap();
    world.settle();
    assert!(block_on(world.read(&manifest)).is_err());
}

#[test]
fn damaged_chunks_are_not_rewritten() {
    let world = World::new();
    block_on(world.take("old", &[1, 2])).unwrap();
    block_on(world.take("a", &[2, 5])).unwrap();
    block_on(world.delete("old")).unwrap();
    let manifest = block_on(catalog::load(&world.store, "a")).unwrap();
    let pack = manifest.pack_key(0).to_owned();
    let whole = block_on(world.store.get(&pack)).unwrap();
    let mut damaged = whole.clone();
    damaged[32..].iter_mut().for_each(|byte| *byte ^= 1);
    block_on(world.store.put(&pack, &damaged)).unwrap();
    let rewritten = block_on(world.rewrite(60)).unwrap().rewritten.unwrap();
    assert_eq!((rewritten.packs, rewritten.snapshots.len()), (0, 0));
    assert!(rewritten.left[0].contains(&pack), "{:?}", rewritten.left);
    assert_eq!(block_on(catalog::load(&world.store, "a")).unwrap(), manifest);
    block_on(world.store.put(&pack, &whole)).unwrap();
    world.settle();
}

#[test]
fn a_store_without_conditional_puts_is_not_rewritten() {
    let world = two();
    let before = world.store.keys("");
    let error = block_on(world.with(world.store.weak()).rewrite(100)).unwrap_err();
    assert_eq!(error, CatalogError::NoConditionalPut);
    assert_eq!(world.store.keys(""), before);
}

#[test]
fn a_snapshot_that_is_being_rewritten_is_deleted_later() {
    let world = two();
    let lease = format!("volley-rewrite 1 {:032x}\n", world.clock.timed_id());
    block_on(world.store.put(&format!("{LEASE_PREFIX}a"), lease.as_bytes())).unwrap();
    assert_eq!(block_on(world.delete("a")), Err(CatalogError::Rewriting("a".to_owned())));
    assert!(block_on(world.gc(0)).unwrap().snapshots_deleted.is_empty());
    assert_eq!(world.verify().len(), 2);
    world.clock.advance(HOUR_MS);
    assert_eq!(block_on(world.gc(0)).unwrap().snapshots_deleted, ["a"], "whoever held the lease is dead");
    world.settle();
}

#[test]
fn usage_adds_up() {
    let world = two();
    block_on(world.take("c", &[7, 8, 7])).unwrap();
    block_on(world.delete("c")).unwrap();
    block_on(world.store.put(&pack_key(77, 0), &[0; 100])).unwrap();
    block_on(world.store.put(&pack_key(78, 0), &[0; 10])).unwrap();
    let claim = block_on(Claim::begin(&world.store, "d", 78)).unwrap();
    let found = block_on(usage(&world.store)).unwrap();
    let size = |key: &String| block_on(world.store.get(key)).unwrap().len() as u64;
    let all: u64 = world.store.keys(PACK_PREFIX).iter().map(size).sum();
    let total = &found.total;
    assert_eq!((total.packs, total.bytes), (6, all));
    assert_eq!(total.live_bytes + total.dead_bytes + total.condemned_bytes + total.importing_bytes, all);
    assert_eq!((total.dead_bytes, total.importing_bytes), (100, 10), "the packs in use are live to the last byte");
    let chunk = u64::from(CHUNK);
    let [a, b] = found.snapshots.as_slice() else { panic!("{found:?}") };
    assert_eq!((a.name.as_str(), a.chunks, a.shared_bytes, a.own_in_shared_packs_bytes), ("a", 3, chunk, chunk));
    assert_eq!((b.chunks, b.shared_bytes, b.own_in_shared_packs_bytes), (2, chunk, 0));
    block_on(claim.end(&world.store)).unwrap();
    // Deleting it frees what it is said to own.
    block_on(world.delete("a")).unwrap();
    block_on(world.gc(0)).unwrap();
    let after = block_on(usage(&world.store)).unwrap();
    assert_eq!(total.bytes - total.condemned_bytes - 100 - 10 - after.total.bytes, a.own_bytes);
    assert_eq!(after.total.dead_bytes, chunk + 48, "the rest of the shared pack");
    assert!(manifest_key("b") == world.store.keys("snapshots/")[0]);
}
