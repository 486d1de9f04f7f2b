//! Stopped at each request: the store goes away, turns read-only, or the process is killed. Nothing is lost, and what
//! comes after goes on from there.

use futures::executor::block_on;

use super::world::*;
use crate::object_store::ObjectStore;
use crate::snapshot::gc::ABANDONED_MS;
use crate::snapshot::{CatalogError, catalog, import_key, marker};

/// Snapshots that share packs, garbage of a dropped import, and a pack that is half dead.
fn site() -> World {
    let world = World::new();
    block_on(world.take("old", &[1, 2, 3, 4])).unwrap();
    block_on(world.take("a", &[2, 5, 0, 3])).unwrap();
    block_on(world.take("b", &[6, 2, 2, 7])).unwrap();
    block_on(world.delete("old")).unwrap();
    // The import of `b` could not remove its marker.
    let id = block_on(catalog::load(&world.store, "b")).unwrap().id;
    block_on(world.store.put(&import_key("b"), &marker::encode(id))).unwrap();
    world
}

/// Deletes, collects and rewrites; ends at the first error.
async fn work(world: &World) -> Result<(), CatalogError> {
    world.delete("b").await?;
    world.gc(0).await?;
    world.rewrite(90).await?;
    world.gc(0).await?;
    Ok(())
}

/// Runs `work` with the fault at each of its requests and gives the worlds it leaves.
fn each_fault(fault: fn(u64) -> Fault, mut check: impl FnMut(World, u64)) {
    let site = site();
    let whole = site.with(site.store.fork().failing(Fault::Never));
    block_on(work(&whole)).unwrap();
    let requests = whole.store.requests();
    assert!(requests > 60, "{requests}: this is a short work");
    for at in 0..requests {
        let store = site.store.fork();
        let _ = block_on(work(&site.with(store.failing(fault(at)))));
        check(site.with(store), at);
    }
}

#[test]
fn a_store_that_goes_away_at_any_request_loses_nothing_and_the_work_can_be_done_again() {
    let contents = site().verify();
    for fault in [Fault::Gone, Fault::AnswerLost, Fault::ReadOnly] {
        each_fault(fault, |world, at| {
            let found = world.verify();
            assert_eq!(found["a"], contents["a"], "request {at}");
            if let Some(b) = found.get("b") {
                assert_eq!(*b, contents["b"], "request {at}");
            }
            // At once: what a dead owner left open stays for now, and all else is done.
            if let Err(e) = block_on(work(&world)) {
                assert!(matches!(e, CatalogError::Unknown(_) | CatalogError::Rewriting(_)), "request {at}: {e}");
            }
            assert_eq!(world.verify()["a"], contents["a"], "request {at}");
            // And later.
            world.clock.advance(ABANDONED_MS);
            let _ = block_on(world.delete("b"));
            block_on(world.rewrite(90)).unwrap();
            world.settle();
            assert_eq!(world.verify().keys().collect::<Vec<_>>(), ["a"], "request {at}");
        });
    }
}

#[test]
fn a_rewrite_that_is_stopped_leaves_readers_of_the_old_manifest_their_packs() {
    let site = site();
    let manifest = block_on(site.create_volume("a", "node-1")).unwrap().unwrap();
    let whole = site.with(site.store.fork().failing(Fault::Never));
    block_on(whole.rewrite(90)).unwrap();
    for at in 0..whole.store.requests() {
        let store = site.store.fork();
        let _ = block_on(site.with(store.failing(Fault::Gone(at))).rewrite(90));
        let world = site.with(store);
        for _ in 0..3 {
            world.clock.advance(ABANDONED_MS);
            block_on(world.gc(0)).unwrap();
            block_on(world.rewrite(90)).unwrap();
            block_on(world.read(&manifest)).unwrap_or_else(|e| panic!("request {at}: {e}"));
        }
        block_on(world.let_go("a", "node-1")).unwrap();
        world.settle();
    }
}

#[test]
fn a_reader_without_a_reference_has_the_grace_period_whatever_stops_the_deletion() {
    const GRACE_MS: u64 = 1000;
    let site = site();
    let manifest = block_on(catalog::load(&site.store, "b")).unwrap();
    let whole = site.with(site.store.fork().failing(Fault::Never));
    block_on(whole.delete("b")).unwrap();
    for at in 0..=whole.store.requests() {
        let store = site.store.fork();
        let _ = block_on(site.with(store.failing(Fault::Gone(at))).delete("b"));
        let world = site.with(store);
        let deleted = block_on(catalog::load(&world.store, "b")).is_err();
        world.clock.advance(GRACE_MS - 1);
        block_on(world.gc(GRACE_MS)).unwrap();
        if deleted {
            block_on(world.read(&manifest)).unwrap_or_else(|e| panic!("request {at}: {e}"));
        }
    }
}

#[test]
fn a_pack_that_was_saved_and_is_dead_again_has_a_grace_period_of_its_own() {
    const GRACE_MS: u64 = 1000;
    let world = site();
    // An import chose the chunks of `b` before its packs were condemned, and commits after.
    let importing = world.with(world.store.stepped());
    let mut late: Actor = Box::pin(async move { importing.take("late", &[6, 7]).await.unwrap() });
    let waker = futures::task::noop_waker();
    let mut context = std::task::Context::from_waker(&waker);
    while !world.store.keys("imports/").iter().any(|key| key.ends_with("late")) {
        assert!(late.as_mut().poll(&mut context).is_pending());
    }
    for _ in 0..8 {
        assert!(late.as_mut().poll(&mut context).is_pending());
    }
    block_on(world.delete("b")).unwrap();
    block_on(late);
    let manifest = block_on(catalog::load(&world.store, "late")).unwrap();
    assert_eq!(world.store.keys("packs/").len(), 4, "it shares");
    world.clock.advance(GRACE_MS);
    block_on(world.delete("late")).unwrap();
    block_on(world.gc(GRACE_MS)).unwrap();
    block_on(world.read(&manifest)).unwrap();
    world.clock.advance(GRACE_MS);
    block_on(world.gc(GRACE_MS)).unwrap();
    assert!(block_on(world.read(&manifest)).is_err());
    world.settle();
}
