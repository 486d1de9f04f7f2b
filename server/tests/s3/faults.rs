//! Every fault of the proxy under a guest: right data or an error by the deadline, and recovery afterwards.

use std::time::{Duration, Instant};

use volley_server::bootstrap::Node;
use volley_server::types::HydrationRate;

use crate::lab::{GUEST_DEADLINE, IMAGE_BYTES, Lab, attached, bounded_read, counter, stop, wait_hydrated};
use crate::proxy::Fault;

const PACKS: &str = "GET /images/prod/packs";

/// Reads of a volume that nobody hydrates, each of a place that is not resident yet.
struct Guest<'a> {
    lab: &'a Lab,
    node: &'a Node,
    next: std::cell::Cell<usize>,
}

impl Guest<'_> {
    /// A fresh place: far enough from the last one that no read brings it along.
    fn place(&self) -> usize {
        let at = self.next.get();
        self.next.set(at + (1 << 20));
        assert!(at < IMAGE_BYTES, "the image is large enough for all faults");
        at
    }

    /// Reads a fresh place under a fault; `true` if data came, which is right then.
    fn reads(&self, fault: Fault, times: usize) -> bool {
        self.lab.proxy.fail(PACKS, fault, times);
        let at = self.place();
        let got = attached(self.node, async |volume| bounded_read(&volume, at, 64 << 10).await);
        if let Some(bytes) = &got {
            self.lab.check(at, bytes);
        }
        self.lab.proxy.heal();
        got.is_some()
    }
}

#[test]
fn a_guest_gets_right_data_or_an_error_by_its_deadline_and_the_node_recovers() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let node = lab.node_with_volume("node", HydrationRate::None);
    let guest = Guest { lab: &lab, node: &node, next: std::cell::Cell::new(0) };
    let ever = usize::MAX;
    // Once: the fetch is repeated, and the guest sees nothing but time.
    for fault in [
        Fault::Delay(Duration::from_millis(400)),
        Fault::Throttle(4 << 20),
        Fault::Cut,
        Fault::Status(503, "SlowDown"),
        Fault::Status(500, "InternalError"),
        Fault::Flip,
        Fault::Stall,
        Fault::StallBody,
        Fault::Reset,
    ] {
        assert!(guest.reads(fault, 1), "{fault:?} once");
    }
    assert!(counter(&node, "corrupt_chunks_total") > 0, "the flipped bit was noticed");
    assert!(counter(&node, "object_retries_total") > 0);
    // For good: an error, and data as soon as the store is well again.
    for fault in [
        Fault::Status(403, "AccessDenied"),
        Fault::Status(404, "NoSuchKey"),
        Fault::Status(503, "SlowDown"),
        Fault::WrongRange,
        Fault::Flip,
        Fault::Cut,
        Fault::Stall,
        Fault::Reset,
    ] {
        assert!(!guest.reads(fault, ever), "{fault:?} for good");
        let at = guest.next.get() - (1 << 20);
        let begun = Instant::now();
        let again = || attached(&node, async |volume| bounded_read(&volume, at, 64 << 10).await);
        let mut got = again();
        while got.is_none() && begun.elapsed() < Duration::from_secs(45) {
            got = again();
        }
        lab.check(at, &got.unwrap_or_else(|| panic!("no recovery after {fault:?}")));
    }
    stop(node);
}

#[test]
fn resident_data_is_served_while_the_store_is_gone_and_hydration_goes_on_when_it_is_back() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let node = lab.node_with_volume("node", HydrationRate::Unlimited);
    attached(&node, async |volume| {
        lab.check(0, &volume.read(0, 4096).await.expect("read"));
        lab.proxy.fail("", Fault::Stall, usize::MAX);
        let begun = Instant::now();
        lab.check(0, &volume.read(0, 4096).await.expect("resident"));
        assert!(begun.elapsed() < GUEST_DEADLINE, "resident data waits for no store");
    });
    lab.proxy.heal();
    wait_hydrated(&node, "web-0", Duration::from_secs(90));
    attached(&node, async |volume| {
        for offset in (0..IMAGE_BYTES).step_by(1 << 20) {
            lab.check(offset, &volume.read(offset as u64, 1 << 20).await.expect("read"));
        }
    });
    stop(node);
}

#[test]
fn a_store_that_closes_kept_connections_costs_no_retry() {
    let lab = Lab::new();
    lab.import("debian").expect("import");
    let node = lab.node_with_volume("node", HydrationRate::None);
    lab.proxy.fail(PACKS, Fault::Close, usize::MAX);
    let connections = lab.proxy.connections();
    attached(&node, async |volume| {
        for offset in (0..IMAGE_BYTES).step_by(2 << 20) {
            lab.check(offset, &volume.read(offset as u64, 4096).await.expect("read"));
        }
    });
    assert!(lab.proxy.connections() - connections >= 10, "connections were closed");
    assert_eq!((counter(&node, "object_retries_total"), counter(&node, "object_errors_total")), (0, 0));
    stop(node);
}
