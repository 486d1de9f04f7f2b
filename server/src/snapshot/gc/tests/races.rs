//! Many at once: whoever makes, deletes, collects, rewrites or reads takes turns with the others, one request each, in
//! every order of few switches and in many random orders. Some are killed on the way.

use std::cell::RefCell;
use std::rc::Rc;

use futures::executor::block_on;

use super::world::*;
use crate::object_store::ObjectError;
use crate::snapshot::claim::ClaimError;
use crate::snapshot::deletion::Outcome;
use crate::snapshot::gc::{ABANDONED_MS, condemned};
use crate::snapshot::{CatalogError, catalog};

/// What one actor does.
#[derive(Clone, Debug)]
enum Work {
    Take(&'static str, Vec<u8>),
    Delete(&'static str),
    DeleteWhenUnused(&'static str),
    Collect,
    Rewrite,
    /// Makes a volume, reads all of it, lets go.
    Volume(&'static str, &'static str),
    /// Reads without a reference, within the grace period.
    Export(&'static str),
    /// Deletes what it is going to read.
    DeleteAndExport(&'static str),
    /// Makes a snapshot of the same content as one that was read before.
    TakeOnTop(&'static str, &'static str),
}

impl Work {
    /// The name that it makes or deletes.
    fn changes(&self) -> Option<&'static str> {
        match self {
            Work::Take(name, _) | Work::TakeOnTop(name, _) => Some(name),
            Work::Delete(name) | Work::DeleteWhenUnused(name) | Work::DeleteAndExport(name) => Some(name),
            _ => None,
        }
    }
}

const GRACE_MS: u64 = 1000;

/// Three snapshots that share packs, one of them half dead, and one that was deleted before.
fn site() -> World {
    let world = World::new();
    block_on(world.take("old", &[1, 2])).unwrap();
    block_on(world.take("a", &[2, 3])).unwrap();
    block_on(world.take("b", &[4, 2])).unwrap();
    block_on(world.delete("old")).unwrap();
    world
}

/// Packs of `a` and `b` were condemned long ago, and saved by an import that had chosen them before.
fn saved() -> World {
    let world = site();
    let packs = world.store.keys("packs/");
    let opened = block_on(condemned::open(&world.store, &world.clock, packs, Vec::new())).unwrap();
    block_on(condemned::seal(&world.store, &world.clock, opened)).unwrap();
    world
}

/// `grace_ms` is that of every collection; with 0 all depends on the protocol. `shared`: others make or delete a snapshot of
/// this name, which may stop an import.
async fn run(world: World, work: Work, grace_ms: u64, shared: bool) {
    match work {
        Work::Take(name, labels) => match world.take(name, &labels).await {
            Ok(()) if !shared => drop(world.made.borrow_mut().insert(name)),
            Ok(()) | Err(ClaimError::NameTaken(_)) => {}
            Err(ClaimError::Interfered(_) | ClaimError::Store(ObjectError::AlreadyExists(_))) if shared => {}
            Err(e) => panic!("import of {name}: {e}"),
        },
        Work::TakeOnTop(name, parent) => {
            let Ok(manifest) = catalog::load(&world.store, parent).await else { return };
            match world.take_on_top(name, &[2, 3, 4], Some(&manifest)).await {
                Ok(()) | Err(ClaimError::NameTaken(_)) => {}
                Err(ClaimError::Interfered(_) | ClaimError::Store(ObjectError::AlreadyExists(_))) if shared => {}
                Err(e) => panic!("snapshot {name}: {e}"),
            }
        }
        Work::DeleteAndExport(name) => {
            let Ok(manifest) = catalog::load(&world.store, name).await else { return };
            let _ = world.delete(name).await;
            world.read(&manifest).await.unwrap_or_else(|e| panic!("export of {name}: {e}"));
        }
        Work::Delete(name) => match world.delete(name).await {
            Ok(Outcome::Deleted(_)) if !shared => drop(world.deleted.borrow_mut().insert(name)),
            Ok(_) | Err(CatalogError::Referenced { .. } | CatalogError::Announced { .. }) => {}
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_) | CatalogError::Rewriting(_)) => {}
            Err(e) => panic!("deletion of {name}: {e}"),
        },
        Work::DeleteWhenUnused(name) => {
            match crate::snapshot::deletion::delete(&world.store, &world.clock, name, true).await {
                Ok(_) => {}
                Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_) | CatalogError::Rewriting(_)) => {}
                Err(e) => panic!("deletion of {name}: {e}"),
            }
        }
        Work::Collect => drop(world.gc(grace_ms).await.unwrap()),
        Work::Rewrite => {
            let options = crate::snapshot::gc::GcOptions {
                grace: std::time::Duration::from_millis(grace_ms),
                rewrite_below_percent: Some(100),
                ..Default::default()
            };
            crate::snapshot::gc::collect(&world.store, &world.clock, &options).await.unwrap();
        }
        Work::Volume(name, node) => {
            if let Some(manifest) = world.create_volume(name, node).await.unwrap() {
                world.read(&manifest).await.unwrap_or_else(|e| panic!("volume of {name}: {e}"));
                world.let_go(name, node).await.unwrap();
            }
        }
        Work::Export(name) => {
            if let Ok(manifest) = catalog::load(&world.store, name).await {
                world.read(&manifest).await.unwrap_or_else(|e| panic!("export of {name}: {e}"));
            }
        }
    }
}

fn actors(world: &World, works: &[Work], grace_ms: u64) -> Vec<Actor> {
    let stepped = world.with(world.store.stepped());
    let names: Vec<&str> = works.iter().filter_map(Work::changes).collect();
    let is_shared = |work: &Work| names.iter().filter(|name| work.changes() == Some(name)).count() > 1;
    works.iter().map(|work| Box::pin(run(stepped.clone(), work.clone(), grace_ms, is_shared(work))) as Actor).collect()
}

/// Runs `works` in the order that `next` chooses, then checks everything there is.
fn check(site: &World, works: &[Work], grace_ms: u64, next: impl FnMut(&[usize]) -> Turns) {
    let world = World { store: site.store.fork(), ..World::new() };
    world.clock.advance(2 * GRACE_MS);
    // Ids of this run are none of the site's.
    world.clock.skip_random(1_000_000);
    interleave(actors(&world, works, grace_ms), next);
    let left = world.verify();
    for name in world.deleted.borrow().iter() {
        assert!(!left.contains_key(*name), "{name} is back after its deletion");
    }
    for name in world.made.borrow().iter() {
        assert!(left.contains_key(*name), "{name} was made and is gone");
    }
    // The killed leave markers of imports, which an operator drops, and references, which their nodes do.
    world.clock.advance(ABANDONED_MS);
    for key in world.store.keys("imports/").into_iter().chain(world.store.keys("refs/")) {
        block_on(crate::object_store::ObjectStore::delete(&world.store, &key)).unwrap();
    }
    world.settle();
}

/// Says which order it was when a check fails.
struct Order<'a> {
    works: &'a [Work],
    turns: Rc<RefCell<Vec<Turns>>>,
}

impl Drop for Order<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?} in the order {:?}", self.works, self.turns.borrow());
        }
    }
}

/// Two actors, each order with at most three switches between them.
fn every_order(works: [Work; 2], grace_ms: u64) {
    every_order_at(&site(), works, grace_ms);
}

fn every_order_at(site: &World, works: [Work; 2], grace_ms: u64) {
    let lens = [0, 1].map(|first: usize| {
        let mut steps = [0; 2];
        check(site, &works, grace_ms, |left| {
            let index = if left.contains(&first) { first } else { left[0] };
            steps[index] += 1;
            Turns::Step(index)
        });
        steps[first]
    });
    for first in [0, 1] {
        for before in 0..lens[first] {
            for between in 1..=lens[1 - first] + 8 {
                let (mut mine, mut other) = (0, 0);
                let order = Order { works: &works, turns: Rc::default() };
                check(site, &works, grace_ms, |left| {
                    let wanted = match () {
                        () if mine < before => first,
                        () if other < between => 1 - first,
                        () => first,
                    };
                    let index = if left.contains(&wanted) { wanted } else { left[0] };
                    if index == first {
                        mine += 1
                    } else {
                        other += 1
                    }
                    order.turns.borrow_mut().push(Turns::Step(index));
                    Turns::Step(index)
                });
            }
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }
}

/// Several actors in random orders; in every fourth order one is killed on the way.
fn random_orders(seeds: std::ops::Range<u64>, grace_ms: u64, choose: impl Fn(&mut Random) -> Vec<Work>) {
    random_orders_at(&site(), seeds, grace_ms, choose);
}

fn random_orders_at(
    site: &World,
    seeds: std::ops::Range<u64>,
    grace_ms: u64,
    choose: impl Fn(&mut Random) -> Vec<Work>,
) {
    for seed in seeds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let works = choose(&mut random);
        let order = Order { works: &works, turns: Rc::default() };
        let mut kill_in = if seed % 4 == 0 { Some(random.below(60)) } else { None };
        // Some stay on for a while: switches at every step hide what needs a long stretch of one.
        let mut current = 0;
        check(site, &works, grace_ms, |left| {
            if !left.contains(&current) || random.below(6) == 0 {
                current = left[random.below(left.len())];
            }
            let turn = match kill_in {
                Some(0) => Turns::Kill(current),
                _ => Turns::Step(current),
            };
            kill_in = kill_in.and_then(|left| left.checked_sub(1));
            order.turns.borrow_mut().push(turn);
            turn
        });
    }
}

fn anything(random: &mut Random) -> Vec<Work> {
    let names = ["a", "b", "c"];
    let one = |random: &mut Random| {
        let name = names[random.below(3)];
        let labels = (0..3).map(|_| u8::try_from(random.below(7)).unwrap()).collect();
        match random.below(10) {
            0..3 => Work::Take(["c", "d", "a"][random.below(3)], labels),
            3 => Work::Delete(name),
            4 => Work::DeleteWhenUnused(name),
            5..7 => Work::Collect,
            7 => Work::Rewrite,
            8 => Work::Volume(name, "node-1"),
            _ => Work::Volume(name, "node-2"),
        }
    };
    (0..3 + random.below(3)).map(|_| one(random)).collect()
}

#[test]
fn an_import_and_a_collection() {
    every_order([Work::Take("c", vec![3, 9, 1]), Work::Collect], 0);
}

#[test]
fn an_import_and_a_deletion() {
    every_order([Work::Take("c", vec![2, 3]), Work::Delete("b")], 0);
}

#[test]
fn an_import_a_deletion_and_collections() {
    random_orders(0..1500, 0, |random| {
        let shared = vec![2, 3, 4, u8::try_from(random.below(7)).unwrap()];
        let deleted = ["a", "b"][random.below(2)];
        vec![Work::Take("c", shared), Work::Delete(deleted), Work::Collect, Work::Collect]
    });
}

#[test]
fn a_chain_of_imports_each_sharing_with_one_that_is_deleted() {
    random_orders(0..1500, 0, |random| {
        let mut works = vec![Work::Take("c", vec![3, 4]), Work::Delete("a"), Work::Collect];
        works.extend([Work::Delete("c"), Work::Take("d", vec![3, 4]), Work::Collect]);
        works.truncate(4 + random.below(3));
        works
    });
}

#[test]
fn a_volume_and_a_deletion() {
    every_order([Work::Volume("a", "node-1"), Work::Delete("a")], 0);
    every_order([Work::Volume("a", "node-1"), Work::DeleteWhenUnused("a")], 0);
}

#[test]
fn a_volume_a_deletion_and_collections() {
    random_orders(0..1000, 0, |random| {
        let delete = [Work::Delete("a"), Work::DeleteWhenUnused("a")][random.below(2)].clone();
        vec![Work::Volume("a", "node-1"), Work::Volume("a", "node-2"), delete, Work::Collect, Work::Collect]
    });
}

#[test]
fn a_rewrite_and_a_deletion() {
    every_order([Work::Rewrite, Work::Delete("a")], 0);
}

#[test]
fn a_rewrite_and_a_volume() {
    every_order([Work::Rewrite, Work::Volume("a", "node-1")], 0);
}

#[test]
fn a_rewrite_and_an_import() {
    every_order([Work::Rewrite, Work::Take("c", vec![1, 2, 3])], 0);
}

#[test]
fn a_rewrite_and_all_others() {
    random_orders(0..1500, 0, |random| {
        let mut works = anything(random);
        works[0] = Work::Rewrite;
        works
    });
}

#[test]
fn anything_and_anything() {
    random_orders(0..3000, 0, anything);
}

#[test]
fn a_reader_without_a_reference_has_the_grace_period() {
    random_orders(0..1500, GRACE_MS, |random| {
        let mut works = anything(random);
        works[0] = Work::Export(["a", "b"][random.below(2)]);
        works
    });
}

#[test]
fn a_reader_of_what_was_saved_and_is_dead_again_has_the_grace_period() {
    every_order_at(&saved(), [Work::DeleteAndExport("a"), Work::Collect], GRACE_MS);
    random_orders_at(&saved(), 0..2000, GRACE_MS, |random| {
        let mut works = vec![Work::DeleteAndExport("a"), Work::Delete("b"), Work::Collect, Work::Collect];
        works.truncate(3 + random.below(2));
        works
    });
}

#[test]
fn a_snapshot_of_a_volume_and_the_deletion_of_what_it_builds_on() {
    random_orders(0..2000, 0, |random| {
        let mut works = vec![Work::TakeOnTop("c", "a"), Work::Delete("a"), Work::Collect];
        works.extend([Work::Rewrite, Work::Collect][random.below(2)..].iter().cloned());
        works
    });
}

#[test]
fn a_deletion_is_not_undone_by_a_rewrite() {
    random_orders(0..2000, 0, |_| vec![Work::Rewrite, Work::Delete("a"), Work::Delete("b")]);
}

/// Nodes that collect every so often find the same intention at the same time, and the name is free as soon as one has carried it out.
#[test]
fn collections_that_carry_out_the_same_deletion_spare_a_new_snapshot_of_the_name() {
    let site = site();
    block_on(site.create_volume("a", "node-1")).unwrap();
    block_on(crate::snapshot::deletion::delete(&site.store, &site.clock, "a", true)).unwrap();
    block_on(site.let_go("a", "node-1")).unwrap();
    random_orders_at(&site, 0..4000, 0, |random| {
        let mut works = vec![Work::Collect, Work::Collect, Work::Take("a", vec![3, 8]), Work::Take("c", vec![2, 3])];
        works.truncate(3 + random.below(2));
        works
    });
}
