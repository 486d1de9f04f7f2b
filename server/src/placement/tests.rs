//! Single decisions, with the numbers in view.

use std::sync::Arc;

use super::*;

pub(super) const GIB: u64 = 1 << 30;
pub(super) const MIB: u64 = 1 << 20;

/// An empty store without a limit on a filesystem of its own.
pub(super) fn store(label: &str, filesystem: usize) -> StoreState {
    StoreState {
        label: Arc::from(label),
        domain: Arc::from(label),
        filesystem,
        overcommit: Overcommit::default(),
        volumes: 0,
        volume_bytes: 0,
        allocated_bytes: 0,
        hydration_bandwidth: None,
        promised_bandwidth: 0,
        backlog_bytes: 0,
        guest_write_bandwidth: 0,
        shares_extents: false,
        image_bytes: 0,
        failure: None,
    }
}

pub(super) fn disk(capacity_gib: u64, free_gib: u64) -> Filesystem {
    Filesystem { capacity_bytes: capacity_gib * GIB, free_bytes: free_gib * GIB }
}

/// Blank volumes of 1 GiB.
pub(super) fn batch(count: u64) -> Batch {
    Batch {
        count,
        volume_bytes: GIB,
        data_bytes: 0,
        bandwidth: 0,
        spread: Spread::Store,
        store: None,
        overcommit: None,
    }
}

fn counts(plan: &Plan) -> Vec<u64> {
    plan.verdicts.iter().map(|verdict| verdict.volumes).collect()
}

#[test]
fn equal_stores_take_turns() {
    let stores = [store("a", 0), store("b", 1), store("c", 2)];
    let disks = [disk(100, 100); 3];
    let plan = place(&stores, &disks, &batch(7));
    assert_eq!(plan.outcome, Ok(vec![0, 1, 2, 0, 1, 2, 0]));
    assert_eq!(counts(&plan), [3, 2, 2]);
    assert_eq!(place(&stores, &disks, &batch(7)), plan);
}

#[test]
fn a_batch_follows_free_space() {
    let stores = [store("a", 0), store("b", 1)];
    let plan = place(&stores, &[disk(1000, 900), disk(1000, 300)], &batch(100));
    let given = counts(&plan);
    assert!((65..=100).contains(&given[0]), "{given:?}");
    // The same, with the space of the second promised instead of used.
    let promised = StoreState { volumes: 6, volume_bytes: 600 * GIB, ..store("b", 1) };
    let given = counts(&place(&[store("a", 0), promised], &[disk(1000, 900); 2], &batch(100)));
    assert!((65..=100).contains(&given[0]), "{given:?}");
}

#[test]
fn a_larger_store_gets_more() {
    let plan = place(&[store("small", 0), store("large", 1)], &[disk(100, 100), disk(1000, 1000)], &batch(110));
    assert_eq!(counts(&plan), [10, 100]);
}

#[test]
fn volumes_backlog_and_guests_weigh() {
    let disks = [disk(1000, 500); 2];
    let busy = [
        StoreState { volumes: 200, ..store("a", 0) },
        StoreState { hydration_bandwidth: Some(100 * MIB), backlog_bytes: 100 * GIB, ..store("a", 0) },
        StoreState { guest_write_bandwidth: 500 * MIB, ..store("a", 0) },
    ];
    for busy in busy {
        let bandwidth = busy.hydration_bandwidth;
        let quiet = StoreState { hydration_bandwidth: bandwidth, ..store("b", 1) };
        let batch = Batch { data_bytes: 100 * MIB, ..batch(100) };
        let plan = place(&[busy.clone(), quiet], &disks, &batch);
        let given = counts(&plan);
        assert!(given[0] < given[1], "{given:?} {busy:?}");
        assert!(plan.verdicts[0].before.total > plan.verdicts[1].before.total);
    }
}

#[test]
fn full_and_failing_stores_are_skipped_and_named() {
    let failing = StoreState { failure: Some("read-only".to_string()), ..store("b", 1) };
    let stores = [store("a", 0), failing, store("c", 2)];
    let plan = place(&stores, &[disk(100, 1), disk(100, 100), disk(100, 50)], &batch(4));
    assert_eq!(plan.outcome, Ok(vec![2; 4]));
    // One GiB of 100 is held back: a has nothing to promise.
    assert_eq!(plan.verdicts[0].skipped, Some(Skip::Full { short_bytes: u128::from(GIB) }));
    let reason = plan.reason(2, &batch(4));
    let says = "the only store that takes volumes, got 4 of 4 volumes; load ";
    assert!(reason.starts_with(says), "{reason}");
    let says = "; not used: a (full: 1 GiB short of one volume), b (failing: read-only)";
    assert!(reason.ends_with(says), "{reason}");
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_what_is_missing() {
    let stores = [store("a", 0), StoreState { failure: Some("gone".to_string()), ..store("b", 1) }, store("c", 2)];
    let disks = [disk(100, 11), disk(100, 100), disk(100, 21)];
    assert_eq!(place(&stores, &disks, &batch(30)).outcome.map(|given| given.len()), Ok(30));
    let plan = place(&stores, &disks, &batch(31));
    assert_eq!(plan.outcome, Err(Refusal::NoSpace { fit: 30 }));
    assert_eq!(
        plan.refusal(&batch(31)).unwrap(),
        "31 volumes of 1 GiB do not fit: there is room for 30 (a 10, b 0, c 20), 1 GiB are missing at overcommit 1; not counted: \
         b (failing: gone). Free space, add a volume store, or promise more than there is with a higher overcommit"
    );
    let nowhere = Batch { store: Some(Arc::from("b")), ..batch(1) };
    let plan = place(&stores, &disks, &nowhere);
    assert_eq!(plan.outcome, Err(Refusal::NoStore));
    assert_eq!(plan.refusal(&nowhere).unwrap(), "no volume store takes volumes now: b (failing: gone)");
    assert_eq!(place(&[], &[], &batch(1)).outcome, Err(Refusal::NoStore));
}

#[test]
fn over_commit_is_the_stores_or_the_batchs() {
    let disks = [disk(100, 11)];
    let fits = |overcommit, of_batch| {
        let stores = [StoreState { overcommit, ..store("a", 0) }];
        match place(&stores, &disks, &Batch { overcommit: of_batch, ..batch(1000) }).outcome {
            Ok(given) => given.len() as u64,
            Err(Refusal::NoSpace { fit }) => fit,
            Err(Refusal::NoStore) => 0,
        }
    };
    assert_eq!(fits(Overcommit::Ratio(100), None), 10);
    assert_eq!(fits(Overcommit::Ratio(250), None), 25);
    assert_eq!(fits(Overcommit::Ratio(250), Some(Overcommit::Ratio(50))), 5);
    assert_eq!(fits(Overcommit::Ratio(100), Some(Overcommit::Unlimited)), 1000);
    let full = place(&[store("a", 0)], &[disk(100, 1)], &Batch { overcommit: Some(Overcommit::Unlimited), ..batch(1) });
    assert_eq!(full.outcome, Err(Refusal::NoSpace { fit: 0 }));
}

#[test]
fn what_is_written_is_no_promise_any_more() {
    // 60 GiB promised, of which 40 are written: 20 of the 59 usable GiB are spoken for.
    let half_written = StoreState { volumes: 6, volume_bytes: 60 * GIB, allocated_bytes: 40 * GIB, ..store("a", 0) };
    let plan = place(std::slice::from_ref(&half_written), &[disk(100, 60)], &batch(100));
    assert_eq!(plan.outcome, Err(Refusal::NoSpace { fit: 39 }));
    // Shared extents seem to occupy 40 GiB, but only 10 are used: the other 50 may come to be written.
    let plan = place(&[half_written], &[disk(100, 90)], &batch(100));
    assert_eq!(plan.outcome, Err(Refusal::NoSpace { fit: 39 }));
}

#[test]
fn stores_on_one_filesystem_share_its_space() {
    let stores = [store("a", 0), store("b", 0)];
    let plan = place(&stores, &[disk(100, 11)], &batch(11));
    assert_eq!(plan.outcome, Err(Refusal::NoSpace { fit: 10 }));
    let plan = place(&stores, &[disk(100, 11)], &batch(10));
    assert_eq!((counts(&plan), plan.verdicts[0].room_after), (vec![5, 5], 0));
}

#[test]
fn domains_get_the_same_as_long_as_they_have_room() {
    let in_domain =
        |label: &str, filesystem, domain: &str| StoreState { domain: Arc::from(domain), ..store(label, filesystem) };
    let stores = [in_domain("a", 0, "x"), in_domain("b", 1, "x"), in_domain("c", 2, "x"), in_domain("d", 3, "y")];
    let disks = [disk(100, 100), disk(100, 100), disk(100, 100), disk(100, 31)];
    let over_domains = |count| Batch { spread: Spread::Domain, ..batch(count) };
    let plan = place(&stores, &disks, &over_domains(30));
    assert_eq!(counts(&plan), [5, 5, 5, 15]);
    let reason = plan.reason(1, &over_domains(30));
    assert!(
        reason.starts_with("domain x got 15 of 30 volumes: least loaded of 3 stores, got 5 of 30 volumes"),
        "{reason}"
    );
    assert_eq!(counts(&place(&stores, &disks, &over_domains(90))), [20, 20, 20, 30]);
    // By load alone the full one gets less.
    assert!(counts(&place(&stores, &disks, &batch(30)))[3] < 8);
}

#[test]
fn hydration_is_promised_where_some_is_left() {
    let limited = |label, filesystem, promised_bandwidth| StoreState {
        hydration_bandwidth: Some(100 * MIB),
        promised_bandwidth,
        ..store(label, filesystem)
    };
    // a has far more space, but 9 of its 10 shares are promised.
    let stores = [limited("a", 0, 90 * MIB), limited("b", 1, 0)];
    let disks = [disk(10_000, 10_000), disk(100, 50)];
    let rated = |count| Batch { data_bytes: 100 * MIB, bandwidth: 10 * MIB, ..batch(count) };
    let plan = place(&stores, &disks, &rated(11));
    assert_eq!(counts(&plan), [1, 10]);
    assert!(plan.verdicts.iter().all(|verdict| !verdict.bandwidth_exceeded));
    let plan = place(&stores, &disks, &rated(12));
    assert!(plan.verdicts.iter().any(|verdict| verdict.bandwidth_exceeded));
}

#[test]
fn shared_extents_draw_volumes_of_their_image() {
    let sharing = |label, filesystem, image_bytes| StoreState {
        shares_extents: true,
        image_bytes,
        hydration_bandwidth: Some(100 * MIB),
        ..store(label, filesystem)
    };
    let one = Batch { data_bytes: 10 * GIB, volume_bytes: 20 * GIB, ..batch(1) };
    let disks = [disk(1000, 1000); 2];
    assert_eq!(place(&[sharing("a", 0, 0), sharing("b", 1, 10 * GIB)], &disks, &one).outcome, Ok(vec![1]));
    let copying = StoreState { shares_extents: false, ..sharing("b", 1, 10 * GIB) };
    assert_eq!(place(&[sharing("a", 0, 0), copying], &disks, &one).outcome, Ok(vec![0]));
    // The second volume of a batch shares what the first brings.
    let copying = StoreState { shares_extents: false, ..sharing("b", 1, 0) };
    let given = counts(&place(&[sharing("a", 0, 0), copying], &disks, &Batch { count: 30, ..one }));
    assert!(given[0] > given[1] && given[1] > 0, "{given:?}");
}
