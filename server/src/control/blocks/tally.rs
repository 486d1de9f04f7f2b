//! What the block API did: requests by operation, and bytes of blocks.
#![allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::MethodRouter;

use crate::control::Control;
use crate::metrics::Metric;

/// What a request of the block API asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) enum Operation {
    List,
    Changed,
    Read,
    Start,
    Put,
    Complete,
    Abandon,
}

const OPERATIONS: usize = Operation::Abandon as usize + 1;

/// Names of the metrics of each operation, in the order of [`Operation`]: answered, and of these refused or failed.
const NAMES: [(&str, &str); OPERATIONS] = [
    ("block_requests_total{operation=\"list\"}", "block_requests_failed_total{operation=\"list\"}"),
    ("block_requests_total{operation=\"changed\"}", "block_requests_failed_total{operation=\"changed\"}"),
    ("block_requests_total{operation=\"read\"}", "block_requests_failed_total{operation=\"read\"}"),
    ("block_requests_total{operation=\"start\"}", "block_requests_failed_total{operation=\"start\"}"),
    ("block_requests_total{operation=\"put\"}", "block_requests_failed_total{operation=\"put\"}"),
    ("block_requests_total{operation=\"complete\"}", "block_requests_failed_total{operation=\"complete\"}"),
    ("block_requests_total{operation=\"abandon\"}", "block_requests_failed_total{operation=\"abandon\"}"),
];

/// Counts since the start.
#[derive(Default)]
pub(in crate::control) struct BlockTally {
    answered: [AtomicU64; OPERATIONS],
    failed: [AtomicU64; OPERATIONS],
    read_bytes: AtomicU64,
    put_bytes: AtomicU64,
}

impl BlockTally {
    /// The bytes of a block are about to be sent.
    pub(in crate::control) fn note_read(&self, bytes: usize) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A block was taken.
    pub(in crate::control) fn note_put(&self, bytes: usize) {
        self.put_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn note(&self, operation: Operation, succeeded: bool) {
        self.answered[operation as usize].fetch_add(1, Ordering::Relaxed);
        if !succeeded {
            self.failed[operation as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One sample after the other of each metric.
    pub(in crate::control) fn metrics(&self) -> Vec<Metric> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let requests = "Requests of the block API that were answered.";
        let failed = "Requests of the block API that were answered with an error.";
        let answered = NAMES.iter().zip(&self.answered).map(|((name, _), n)| (*name, "counter", requests, value(n)));
        let failed = NAMES.iter().zip(&self.failed).map(|((_, name), n)| (*name, "counter", failed, value(n)));
        let read = ("block_read_bytes_total", "counter", "Bytes of blocks sent.", value(&self.read_bytes));
        let put = ("block_put_bytes_total", "counter", "Bytes of blocks taken for uploads.", value(&self.put_bytes));
        answered.chain(failed).chain([read, put]).collect()
    }
}

impl Control {
    /// Counts the requests that these handlers answer.
    pub(in crate::control) fn counted(
        &self,
        operation: Operation,
        handlers: MethodRouter<Control>,
    ) -> MethodRouter<Control> {
        handlers.route_layer(from_fn_with_state((self.0.block_tally.clone(), operation), count))
    }
}

async fn count(
    State((tally, operation)): State<(Arc<BlockTally>, Operation)>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    tally.note(operation, response.status().is_success());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_own_names() {
        let tally = BlockTally::default();
        for (operation, name) in [
            (Operation::List, "list"),
            (Operation::Changed, "changed"),
            (Operation::Read, "read"),
            (Operation::Start, "start"),
            (Operation::Put, "put"),
            (Operation::Complete, "complete"),
            (Operation::Abandon, "abandon"),
        ] {
            tally.note(operation, false);
            let label = format!("{{operation=\"{name}\"}}");
            let counted: Vec<_> = tally.metrics().into_iter().filter(|(name, ..)| name.ends_with(&label)).collect();
            assert_eq!(counted.len(), 2, "{counted:?}");
            assert!(counted.iter().all(|(.., value)| *value == 1), "{counted:?}");
        }
    }
}
