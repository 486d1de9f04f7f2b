//! Encoded records on their way to a segment, cut into batches. Pure.

use std::collections::VecDeque;

use super::Lsn;
use super::frame::BATCH_PAYLOAD_MAX;

/// Whole records that are written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) payload: Vec<u8>,
    /// Every record up to this one is in this batch or in an earlier one.
    pub(super) last_lsn: Lsn,
}

/// Records in order. A batch that was taken never grows again, so that a repeated write repeats the same bytes.
#[derive(Debug, Default)]
pub(super) struct Batches {
    sealed: VecDeque<Batch>,
    open: Batch,
    bytes: usize,
}

impl Batches {
    /// Adds one encoded record, which belongs to an append that is not finished yet.
    pub(super) fn push(&mut self, record: &[u8]) {
        if self.open.payload.len() + record.len() > BATCH_PAYLOAD_MAX {
            let last_lsn = self.open.last_lsn;
            self.sealed.push_back(std::mem::replace(&mut self.open, Batch { payload: Vec::new(), last_lsn }));
        }
        self.open.payload.extend_from_slice(record);
        self.bytes += record.len();
    }

    /// All records of `lsn` have been pushed.
    pub(super) fn mark(&mut self, lsn: Lsn) {
        self.open.last_lsn = lsn;
    }

    /// The first batch; the open one only if `partial`.
    pub(super) fn take(&mut self, partial: bool) -> Option<Batch> {
        let batch = self.sealed.pop_front().or_else(|| {
            let last_lsn = self.open.last_lsn;
            let ready = partial && !self.open.payload.is_empty();
            ready.then(|| std::mem::replace(&mut self.open, Batch { payload: Vec::new(), last_lsn }))
        })?;
        self.bytes -= batch.payload.len();
        Some(batch)
    }

    /// Puts a batch that could not be written back to the front.
    pub(super) fn put_back(&mut self, batch: Batch) {
        self.bytes += batch.payload.len();
        self.sealed.push_front(batch);
    }

    /// Everything held; what is pushed from now on starts anew.
    pub(super) fn take_all(&mut self) -> Batches {
        let last_lsn = self.open.last_lsn;
        let open = Batch { payload: Vec::new(), last_lsn };
        std::mem::replace(self, Batches { open, ..Batches::default() })
    }

    /// The position of the last finished append.
    pub(super) fn last_lsn(&self) -> Lsn {
        self.open.last_lsn
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes of records held.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
