//! The files of batches, and the names and ids of their volumes.

use proptest::prelude::*;

use super::{BATCHES_DIR, Common, Record, Request, State, Stored, read_all, remove, write};
use crate::types::{HydrationRate, SnapshotRef};

fn record(prefix: &str, start: u64, count: u32, seed: u64) -> Record {
    let request = Request {
        name_prefix: prefix.to_string(),
        count: u64::from(count),
        start,
        snapshot: Some("debian".to_string()),
        deadline_seconds: Some(60),
        token: Some("t".to_string()),
        ..Request::default()
    };
    let common = Common {
        snapshot: Some(SnapshotRef { name: "debian".into(), id: u128::MAX - 7 }),
        size_bytes: 1 << 30,
        chunk_bytes: 512 << 10,
        data_bytes: 3 << 20,
        rate: HydrationRate::BytesPerSecond(1 << 20),
    };
    let placed = (0..count).map(|volume| volume % 2).collect();
    Record::new(request, &common, vec!["a".to_string(), "b".to_string()], placed, [seed, seed ^ 9], 1_000)
}

#[test]
fn a_batch_is_read_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read_all(dir.path()).unwrap(), Stored::default());
    let mut batch = record("web-", 3, 6, u64::MAX);
    write(dir.path(), &batch).unwrap();
    batch.state = State::Stalled;
    batch.problem = Some("store \"a\" is full".to_string());
    batch.milestones.created_unix_ms = Some(5);
    batch.place(1, "c");
    batch.predicted = Some(super::estimate::Prediction {
        created_seconds: 0.25,
        hydrated_seconds: Some(1.5),
        limited_by: "x".to_string(),
        assumed: true,
    });
    write(dir.path(), &batch).unwrap();
    let other = record("db-", 0, 1, 5);
    write(dir.path(), &other).unwrap();
    let both = Stored { records: vec![other.clone(), batch.clone()], faults: Vec::new() };
    assert_eq!(read_all(dir.path()).unwrap(), both);
    assert_eq!((batch.store_of(1), batch.store_of(2), batch.deadline_unix_ms()), ("c", "a", Some(61_000)));
    remove(dir.path(), other.id_text()).unwrap();
    remove(dir.path(), other.id_text()).unwrap();
    assert_eq!(read_all(dir.path()).unwrap().records, [batch]);
}

#[test]
fn files_that_are_no_batches_are_told_and_never_lost() {
    let dir = tempfile::tempdir().unwrap();
    let batch = record("web-", 0, 2, 1);
    write(dir.path(), &batch).unwrap();
    let path = |name: &str| dir.path().join(BATCHES_DIR).join(name);
    let good = std::fs::read_to_string(path("0000000000000001.toml")).unwrap();
    std::fs::write(path("0000000000000002.toml"), &good).unwrap();
    std::fs::write(path("0000000000000003.toml"), &good[..good.len() / 2]).unwrap();
    std::fs::write(path("0000000000000004.toml"), good.replace("format = 1", "format = 2")).unwrap();
    std::fs::write(path("0000000000000005.tmp"), "half a wri").unwrap();
    std::fs::write(
        path("0000000000000006.toml"),
        good.replace("0000000000000001", "0000000000000006").replace("placed = [0, 1]", "placed = [0, 2]"),
    )
    .unwrap();
    std::fs::write(path("notes.txt"), "hello").unwrap();
    let Stored { records, mut faults } = read_all(dir.path()).unwrap();
    assert_eq!(records, [batch]);
    faults.sort();
    let said: Vec<&str> = faults.iter().map(|(_, fault)| fault.as_str()).collect();
    assert_eq!(said.len(), 5, "{said:?}");
    for (said, expected) in said.iter().zip([
        "under the name of another",
        "not readable",
        "format 2",
        "where its volumes belong",
        "not a file of Volley",
    ]) {
        assert!(said.contains(expected), "{said} {expected}");
    }
}

proptest! {
    #[test]
    fn names_lead_back_to_their_volumes_and_ids_are_unique(prefix in "[a-z0-9]{0,3}", start in 0_u64..2_000, count in 1_u32..500, seed: u64) {
        let batch = record(&prefix, start, count, seed);
        let mut ids = std::collections::BTreeSet::new();
        for volume in 0..count {
            let spec = batch.spec(volume);
            prop_assert_eq!(batch.index_of(&spec.name), Some(volume));
            prop_assert_eq!(&spec, &batch.spec(volume));
            prop_assert!(ids.insert(spec.id.0));
        }
        for name in [format!("{prefix}{}", start + u64::from(count)), format!("{prefix}0{start}"), format!("{prefix}+{start}"), prefix.clone(), format!("{prefix}99999999999999999999999")] {
            prop_assert_eq!(batch.index_of(&name), None, "{}", name);
        }
    }
}
