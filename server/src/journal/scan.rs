//! Reading a segment file: tells good batches, a never-written end, a torn end and corruption apart. Pure; the caller
//! brings the bytes. The labels are those of the table in docs/journal.md.
//!
//! What a crash can leave follows from how a segment is written: a batch is begun only after the one before it was
//! synced, so at most the last one begun is torn, and nothing of ours can lie behind it. And everything up to
//! `CheckpointComplete` was synced before the file got its name, so nothing there is ever torn.

use super::frame::{BATCH_BYTES_MAX, BLOCK_BYTES, BatchHeader, HeaderError, SegmentHeader, SegmentName};
use super::record::{self, RecordError};
use super::replay::{Replay, ReplayError};
use crate::types::VolumeState;

/// Bytes the caller reads at once: the largest batch fits.
pub(super) const WINDOW_BYTES: usize = BATCH_BYTES_MAX;

/// A segment file that must not be used: where, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {offset}: {fault}")]
pub(super) struct ScanError {
    pub(super) offset: u64,
    pub(super) fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// H2, H3
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// H2
    #[error("the file is shorter than its header block")]
    NoHeader,
    /// H4
    #[error("the header names segment {}, the file is another", .0.file_name())]
    Misnamed(SegmentName),
    /// B5
    #[error(
        "a batch is unreadable, but batch {later_number} was written after it at byte {later_offset}: \
         committed records are damaged"
    )]
    MidLog { later_number: u64, later_offset: u64 },
    /// B6
    #[error("batch {found} stands where batch {expected} belongs: committed records are missing")]
    OutOfSequence { expected: u64, found: u64 },
    /// B7
    #[error("the checkpoint is unreadable from here, but was complete when the file got its name")]
    CheckpointIncomplete,
    /// R1, R2
    #[error(transparent)]
    Record(#[from] RecordError),
    /// R3
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

/// What a sound segment gave.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) volumes: Vec<VolumeState>,
    pub(super) records: u64,
    /// Header block and good batches.
    pub(super) good_bytes: u64,
    /// Begun but never acknowledged, from `good_bytes` on; 0 when the end is clean.
    pub(super) torn_bytes: u64,
    pub(super) closed: bool,
}

pub(super) struct Scan {
    segment_id: u64,
    next_number: u64,
    /// Where the next window starts.
    offset: u64,
    replay: Replay,
    tail: Option<Tail>,
}

/// Blocks behind the last good batch.
struct Tail {
    start: u64,
    /// End of the last block that is not all zeroes.
    written_end: u64,
}

/// How the bytes at a batch boundary read.
enum Slot<'a> {
    /// B1
    Good {
        payload: &'a [u8],
        bytes: usize,
    },
    /// The window ends inside the batch.
    Beyond,
    /// B2, B3, B4: no batch of ours, or one that was not finished.
    Unfinished,
    OutOfSequence(u64),
}

impl Fault {
    /// The file is sound, but of a newer version.
    pub(super) fn is_newer_version(&self) -> bool {
        matches!(self, Fault::Header(HeaderError::Version(_)) | Fault::Record(RecordError::UnknownKind(_)))
    }
}

impl Scan {
    /// Starts with the first block of the file of segment `name`.
    pub(super) fn start(name: SegmentName, block: &[u8]) -> Result<Scan, ScanError> {
        let at_start = |fault| ScanError { offset: 0, fault };
        if block.len() < BLOCK_BYTES {
            return Err(at_start(Fault::NoHeader));
        }
        let header = SegmentHeader::decode(block).map_err(|e| at_start(e.into()))?;
        if header.name != name {
            return Err(at_start(Fault::Misnamed(header.name)));
        }
        Ok(Scan {
            segment_id: header.segment_id,
            next_number: 0,
            offset: BLOCK_BYTES as u64,
            replay: Replay::default(),
            tail: None,
        })
    }

    /// Offset the next window must start at; `None` when the rest of the file does not matter.
    pub(super) fn wants(&self) -> Option<u64> {
        (!self.replay.closed).then_some(self.offset)
    }

    /// Takes a window that starts where [`Scan::wants`] says; shorter than [`WINDOW_BYTES`] only at the end of the file.
    /// Always advances.
    pub(super) fn feed(&mut self, window: &[u8]) -> Result<(), ScanError> {
        let mut at = 0;
        while at < window.len() && !self.replay.closed {
            let rest = &window[at..];
            if self.tail.is_some() {
                at += self.feed_tail(rest)?;
                continue;
            }
            match self.slot(rest, at == 0 || window.len() < WINDOW_BYTES) {
                Slot::Good { payload, bytes } => {
                    self.apply(payload)?;
                    self.next_number += 1;
                    self.offset += bytes as u64;
                    at += bytes;
                }
                Slot::Beyond => return Ok(()),
                Slot::OutOfSequence(found) => {
                    return Err(self.fault(Fault::OutOfSequence { expected: self.next_number, found }));
                }
                Slot::Unfinished if !self.replay.complete => return Err(self.fault(Fault::CheckpointIncomplete)),
                Slot::Unfinished => self.begin_tail(rest, &mut at),
            }
        }
        Ok(())
    }

    /// The end of the file.
    pub(super) fn finish(self) -> Result<Scanned, ScanError> {
        if !self.replay.complete {
            return Err(self.fault(Fault::CheckpointIncomplete));
        }
        let good_bytes = self.tail.as_ref().map_or(self.offset, |tail| tail.start);
        let torn_bytes = self.tail.as_ref().map_or(0, |tail| tail.written_end - tail.start);
        let (records, closed) = (self.replay.records, self.replay.closed);
        Ok(Scanned { volumes: self.replay.finish(), records, good_bytes, torn_bytes, closed })
    }

    /// `whole`: a batch that ends past `rest` ends past the end of the file.
    fn slot<'a>(&self, rest: &'a [u8], whole: bool) -> Slot<'a> {
        let Some(header) = BatchHeader::decode(rest).filter(|header| header.segment_id == self.segment_id) else {
            return Slot::Unfinished;
        };
        if header.number != self.next_number {
            return Slot::OutOfSequence(header.number);
        }
        let bytes = header.batch_bytes();
        match rest.get(..bytes) {
            None if whole => Slot::Unfinished,
            None => Slot::Beyond,
            Some(batch) => header.payload(batch).map_or(Slot::Unfinished, |payload| Slot::Good { payload, bytes }),
        }
    }

    fn apply(&mut self, payload: &[u8]) -> Result<(), ScanError> {
        let mut at = 0;
        while at < payload.len() {
            let (entry, bytes) = record::decode(&payload[at..]).map_err(|e| self.fault_in_batch(at, e.into()))?;
            self.replay.apply(entry).map_err(|e| self.fault_in_batch(at, e.into()))?;
            at += bytes;
        }
        Ok(())
    }

    /// The first block of the tail may hold the header of the torn batch itself: it is no sign of a later one.
    fn begin_tail(&mut self, rest: &[u8], at: &mut usize) {
        let block = &rest[..rest.len().min(BLOCK_BYTES)];
        let start = self.offset;
        self.offset += block.len() as u64;
        *at += block.len();
        let written_end = if is_zero(block) { start } else { self.offset };
        self.tail = Some(Tail { start, written_end });
    }

    /// One block behind the end: a header of ours here means that the batch at the start of the tail was synced once.
    fn feed_tail(&mut self, rest: &[u8]) -> Result<usize, ScanError> {
        let block = &rest[..rest.len().min(BLOCK_BYTES)];
        let later_offset = self.offset;
        self.offset += block.len() as u64;
        let Some(tail) = &mut self.tail else { return Ok(block.len()) };
        if let Some(header) = BatchHeader::decode(block).filter(|header| header.segment_id == self.segment_id) {
            let fault = Fault::MidLog { later_number: header.number, later_offset };
            return Err(ScanError { offset: tail.start, fault });
        }
        if !is_zero(block) {
            tail.written_end = self.offset;
        }
        Ok(block.len())
    }

    fn fault(&self, fault: Fault) -> ScanError {
        ScanError { offset: self.offset, fault }
    }

    fn fault_in_batch(&self, payload_at: usize, fault: Fault) -> ScanError {
        let offset = self.offset + (super::frame::BATCH_HEADER_BYTES + payload_at) as u64;
        ScanError { offset, fault }
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}
