//! What holds for every decision, whatever the stores are like.

use std::sync::Arc;

use proptest::prelude::*;

use super::decide::Books;
use super::tests::{GIB, MIB, batch, disk, store};
use super::*;

/// Stores with a past, several of them on one filesystem, some failing.
fn worlds() -> impl Strategy<Value = (Vec<StoreState>, Vec<Filesystem>)> {
    let disks = prop::collection::vec((20_u64..500, 0_u64..=100), 1..5);
    let disks = disks.prop_map(|all| all.iter().map(|(size, free)| disk(*size, size * free / 100)).collect::<Vec<_>>());
    disks.prop_flat_map(|disks| (prop::collection::vec(states(disks.len()), 1..8), Just(disks)))
}

fn states(disks: usize) -> impl Strategy<Value = StoreState> {
    let space = (0..disks, 0_u64..40, 0_u64..200, 0_u64..=100, 10_u32..400, prop::bool::weighted(0.1));
    let load =
        (prop::option::of(10_u64..200), 0_u64..150, 0_u64..100, 0_u64..300, any::<bool>(), 0_u64..4, any::<bool>());
    (space, load).prop_map(|((filesystem, volumes, gib, written, ratio, unlimited), load)| {
        let (share, promised, backlog, guests, shares_extents, domain, healthy) = load;
        let volume_bytes = if volumes == 0 { 0 } else { gib * GIB };
        StoreState {
            domain: Arc::from(format!("d{domain}")),
            overcommit: if unlimited { Overcommit::Unlimited } else { Overcommit::Ratio(ratio) },
            volumes,
            volume_bytes,
            allocated_bytes: volume_bytes / 100 * written,
            hydration_bandwidth: share.map(|mib| mib * MIB),
            promised_bandwidth: promised * MIB,
            backlog_bytes: backlog * GIB,
            guest_write_bandwidth: guests * MIB,
            shares_extents,
            failure: (!healthy && domain == 0).then(|| "read-only".to_string()),
            ..store("s", filesystem)
        }
    })
}

fn batches() -> impl Strategy<Value = Batch> {
    let spread = prop_oneof![Just(Spread::Store), Just(Spread::Domain)];
    let ratio = prop::option::weighted(0.3, (10_u32..400).prop_map(Overcommit::Ratio));
    (1_u64..300, 1_u64..20_000, 0_u64..=100, 0_u64..20, spread, ratio).prop_map(
        |(count, mib, data, bandwidth, spread, overcommit)| Batch {
            volume_bytes: mib * MIB,
            data_bytes: mib * MIB / 100 * data,
            bandwidth: bandwidth * MIB,
            spread,
            overcommit,
            ..batch(count)
        },
    )
}

fn labelled((mut stores, disks): (Vec<StoreState>, Vec<Filesystem>)) -> (Vec<StoreState>, Vec<Filesystem>) {
    stores.iter_mut().enumerate().for_each(|(index, store)| store.label = Arc::from(format!("s{index}")));
    (stores, disks)
}

/// What is promised and not written on each filesystem.
fn committed(stores: &[StoreState], disks: &[Filesystem]) -> Vec<u128> {
    let of = |index: usize, disk: &Filesystem| {
        let on_it = || stores.iter().filter(|store| store.filesystem == index);
        let sizes: u64 = on_it().map(|store| store.volume_bytes).sum();
        let written: u64 = on_it().map(|store| store.allocated_bytes).sum();
        u128::from(sizes.saturating_sub(written.min(disk.capacity_bytes - disk.free_bytes)))
    };
    disks.iter().enumerate().map(|(index, disk)| of(index, disk)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn never_over_capacity_and_never_less_than_asked((stores, disks) in worlds().prop_map(labelled), batch in batches()) {
        let plan = place(&stores, &disks, &batch);
        let mut promised = committed(&stores, &disks);
        let limit = |store: &StoreState| {
            batch.overcommit.unwrap_or(store.overcommit).limit(disks[store.filesystem].usable_bytes())
        };
        match &plan.outcome {
            Ok(given) => {
                prop_assert_eq!(given.len() as u64, batch.count);
                for store in given {
                    let store = &stores[*store as usize];
                    prop_assert!(store.failure.is_none());
                    promised[store.filesystem] += u128::from(batch.volume_bytes);
                    prop_assert!(promised[store.filesystem] <= limit(store));
                }
                for (index, verdict) in plan.verdicts.iter().enumerate() {
                    let given = given.iter().filter(|store| **store as usize == index).count() as u64;
                    prop_assert_eq!(given, verdict.volumes);
                }
                prop_assert_eq!(plan.refusal(&batch), None);
            }
            Err(refusal) => {
                // As many as were found fit, and then there is no room for one more.
                let healthy = || stores.iter().filter(|store| store.failure.is_none());
                prop_assert_eq!(*refusal == Refusal::NoStore, healthy().count() == 0);
                if let Refusal::NoSpace { fit } = refusal {
                    prop_assert!(*fit < batch.count);
                    let all = Batch { count: *fit, ..batch.clone() };
                    prop_assert!(place(&stores, &disks, &all).outcome.is_ok());
                    for (verdict, store) in plan.verdicts.iter().zip(&stores) {
                        promised[store.filesystem] += u128::from(verdict.volumes) * u128::from(batch.volume_bytes);
                    }
                    for store in healthy() {
                        prop_assert!(promised[store.filesystem] + u128::from(batch.volume_bytes) > limit(store));
                    }
                }
                prop_assert!(plan.refusal(&batch).is_some());
            }
        }
    }

    /// No store ends with more than another would have had in its place.
    #[test]
    fn imbalance_is_at_most_one_volume((stores, disks) in worlds().prop_map(labelled), batch in batches()) {
        let batch = Batch { spread: Spread::Store, ..batch };
        let mut books = Books::new(&stores, &disks, &batch);
        let Ok(given) = books.deal(&batch) else { return Ok(()) };
        let Some(last) = given.last() else { return Ok(()) };
        // As it was before the last one, when others were to be had.
        let mut before = Books::new(&stores, &disks, &batch);
        let without = Batch { count: given.len() as u64 - 1, ..batch.clone() };
        before.deal(&without).expect("a part of what fits");
        let chosen = before.rank(*last as usize).expect("it was chosen");
        for other in 0..stores.len() {
            prop_assert!(before.rank(other).is_none_or(|other| chosen.cmp(&other).is_le()));
        }
    }

    /// Equal stores that have been filled unequally come nearer to each other.
    #[test]
    fn unequal_stores_are_levelled(used in prop::collection::vec(0_u64..800, 2..10), count in 1_u64..3000) {
        let stores: Vec<_> = (0..used.len()).map(|index| store(&format!("s{index}"), index)).collect();
        let disks: Vec<_> = used.iter().map(|used| disk(1000, 1000 - used)).collect();
        let plan = place(&stores, &disks, &batch(count));
        let after = used.iter().zip(&plan.verdicts).map(|(used, verdict)| used + verdict.volumes);
        let (most, least) = (after.clone().max().unwrap(), after.min().unwrap());
        let (most_before, least_before) = (used.iter().max().unwrap(), used.iter().min().unwrap());
        prop_assert!(most - least <= (most_before - least_before).max(1), "{} of {}", most - least, most_before - least_before);
    }

    /// No store above its share of hydration while another with room has some left.
    #[test]
    fn shares_of_hydration_are_kept_while_others_are_idle(
        (stores, disks) in worlds().prop_map(labelled), batch in batches()
    ) {
        let batch = Batch { spread: Spread::Store, bandwidth: batch.bandwidth.max(1), ..batch };
        let plan = place(&stores, &disks, &batch);
        let share = |index: usize| stores[index].hydration_bandwidth.unwrap_or(u64::MAX);
        let promised = |index: usize, more| {
            stores[index].promised_bandwidth + (plan.verdicts[index].volumes + more) * batch.bandwidth
        };
        let above = (0..stores.len()).any(|store| plan.verdicts[store].volumes > 0 && promised(store, 0) > share(store));
        let idle = (0..stores.len()).find(|store| plan.verdicts[*store].room_after > 0 && promised(*store, 1) <= share(*store));
        prop_assert!(!(above && idle.is_some()), "{idle:?} of {:?}", plan.verdicts);
    }

    #[test]
    fn domains_differ_by_one_volume_unless_one_is_full((stores, disks) in worlds().prop_map(labelled), batch in batches()) {
        let batch = Batch { spread: Spread::Domain, ..batch };
        let plan = place(&stores, &disks, &batch);
        let of = |domain: &str| plan.verdicts.iter().filter(|v| *v.domain == *domain).map(|v| v.volumes).sum::<u64>();
        for (with_room, most) in plan.verdicts.iter().flat_map(|a| plan.verdicts.iter().map(move |b| (a, b))) {
            if with_room.room_after > 0 {
                prop_assert!(of(&most.domain) <= of(&with_room.domain) + 1);
            }
        }
    }
}
