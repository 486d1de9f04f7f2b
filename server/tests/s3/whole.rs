//! The whole way on a sound store: import, list, verify, hydrate, restart, delete.

use std::time::Duration;

use futures::executor::block_on;
use volley_server::bootstrap;
use volley_server::object_store::{ObjectError, ObjectStore};
use volley_server::platform::blocking::Blocking;
use volley_server::snapshot::gc::{GcOptions, collect};
use volley_server::snapshot::{catalog, deletion, read};
use volley_server::types::HydrationRate;

use crate::lab::{IMAGE_BYTES, Lab, attached, counter, stop, wait_hydrated};
use crate::proxy::Fault;
use crate::server::files_below;

#[test]
fn objects_come_back_as_they_were_put() {
    let lab = Lab::new();
    let store = lab.store();
    let large = &lab.content[..20 << 20];
    block_on(store.put("packs/a", b"small")).unwrap();
    block_on(store.put_if_absent("packs/b", large)).unwrap();
    assert_eq!(block_on(store.get("packs/a")).unwrap(), b"small");
    assert!(block_on(store.get("packs/b")).unwrap() == large);
    let range = 17_000_000..17_100_000;
    assert!(block_on(store.get_range("packs/b", range.clone())).unwrap()[..] == large[17_000_000..17_100_000]);
    let past = block_on(store.get_range("packs/a", 2..9));
    assert!(matches!(past, Err(ObjectError::Corrupt(_))), "{past:?}");
    assert_eq!(block_on(store.get("packs/c")), Err(ObjectError::NotFound("packs/c".to_owned())));
    for taken in ["packs/a", "packs/b"] {
        let refused = block_on(store.put_if_absent(taken, b"other"));
        assert_eq!(refused, Err(ObjectError::AlreadyExists(taken.to_owned())));
    }
    let found = block_on(store.list("packs/")).unwrap();
    let found: Vec<_> = found.iter().map(|object| (object.key.as_str(), object.size_bytes)).collect();
    assert_eq!(found, [("packs/a", 5), ("packs/b", large.len() as u64)]);
    block_on(store.delete_all(&["packs/a", "packs/b", "packs/never"])).unwrap();
    block_on(store.delete("packs/a")).unwrap();
    assert!(files_below(&lab.server.bucket()).is_empty());
}

#[test]
fn an_image_in_a_bucket_becomes_a_hydrated_volume_and_survives_without_the_bucket() {
    let lab = Lab::new();
    let report = lab.import("debian").expect("import");
    assert_eq!(report.size_bytes, IMAGE_BYTES as u64);
    let store = lab.store();
    assert_eq!(block_on(catalog::names(&store)).unwrap(), ["debian"]);
    let manifest = block_on(catalog::load(&store, "debian")).unwrap();
    let verified = read::verify(&store, &manifest, Some(2), |_, _| {}).unwrap();
    assert!(verified.bad.is_empty() && verified.chunks == report.chunks.chunks, "{verified:?}");

    let (connections, requests) = (lab.proxy.connections(), lab.proxy.requests().len());
    let node = lab.node_with_volume("node", HydrationRate::Unlimited);
    attached(&node, async |volume| {
        for offset in (0..IMAGE_BYTES).step_by(4 << 20) {
            lab.check(offset, &volume.read(offset as u64, 256 << 10).await.expect("read"));
        }
    });
    wait_hydrated(&node, "web-0", Duration::from_secs(60));
    let gets = counter(&node, "object_gets_total");
    let asked = lab.proxy.requests().split_off(requests);
    let asked = asked.iter().filter(|line| line.starts_with("GET /images/prod/packs/")).count();
    assert_eq!(asked as u64, gets, "the node counts what it asks for");
    let connections = lab.proxy.connections() - connections;
    assert!(connections < 40, "{connections} connections for {gets} reads: they are kept");
    stop(node);

    // The store is out of reach, and everything is resident.
    lab.proxy.fail("", Fault::Reset, usize::MAX);
    let node = bootstrap::start(lab.node_config("node")).expect("a node with volumes starts without its store");
    attached(&node, async |volume| {
        for offset in (0..IMAGE_BYTES).step_by(1 << 20) {
            lab.check(offset, &volume.read(offset as u64, 1 << 20).await.expect("read"));
        }
    });
    stop(node);
}

#[test]
fn deleting_and_collecting_empties_the_bucket() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    assert!(!files_below(&lab.server.bucket()).is_empty());
    block_on(deletion::delete(&lab.store(), &Blocking, "debian", false)).unwrap();
    let options = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    let collected = block_on(collect(&lab.store(), &Blocking, &options)).unwrap();
    assert_eq!(collected.packs_removed, 1);
    assert!(files_below(&lab.server.bucket()).is_empty(), "{:?}", files_below(&lab.server.bucket()));
}

#[test]
fn an_import_that_is_cut_off_goes_on_when_it_is_run_again() {
    let lab = Lab::new();
    lab.proxy.fail("PUT /images/prod/packs", Fault::Status(403, "AccessDenied"), usize::MAX);
    lab.proxy.fail("POST /images/prod/packs", Fault::Status(403, "AccessDenied"), usize::MAX);
    let error = lab.import("debian").unwrap_err();
    assert!(error.contains("s3:PutObject") && error.contains("the same import run again"), "{error}");
    lab.proxy.heal();
    // What may pass is waited for by the import itself.
    lab.proxy.fail("PUT /images/prod/packs", Fault::Status(503, "SlowDown"), 2);
    lab.proxy.fail("PUT /images/prod/packs", Fault::Cut, 1);
    lab.proxy.fail("PUT /images/prod/snapshots", Fault::Stall, 1);
    lab.import("debian").expect("import");
    let store = lab.store();
    let manifest = block_on(catalog::load(&store, "debian")).unwrap();
    assert!(read::verify(&store, &manifest, Some(2), |_, _| {}).unwrap().bad.is_empty());
    assert!(block_on(store.list("imports/")).unwrap().is_empty());
}
