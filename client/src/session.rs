//! One attached volume as its connection's core sees it: the write log, and whether requests may go out now.
//!
//! **Why a log.** The server may lose a write that it acknowledged but that no FLUSH covered when its process dies:
//! the bytes may be on disk, but the knowledge that they are the guest's is not. A guest that never saw an error must
//! not then get a successful FLUSH. So what was acknowledged and not flushed is kept here, and sent again, in order,
//! to a server whose boot id is new, before anything else of the volume.
//!
//! **FUA** writes are durable when acknowledged and are not kept, except when they overlap an entry of the log:
//! repeating the older entry would undo them, so they are then repeated behind it.

use std::collections::VecDeque;

use crate::call::Call;
use crate::error::Error;

/// What an entry costs besides its data, so that a stream of discards is bounded too.
const ENTRY_BYTES: usize = 128;
/// Entries repeated at once: enough to fill a connection, few enough to compare with each other.
const REPLAY_BATCH: usize = 64;

/// What a session waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The connection is new: the attachment has to be resumed.
    Resume,
    /// Acknowledged writes are being repeated; `outstanding` of the batch are unanswered. `again`: one of them got a
    /// transient error, so the batch has to be repeated.
    Replay { outstanding: usize, again: bool },
    /// Requests may go out.
    Ready,
    /// Resuming (`resumed` false) or repeating got a transient error; the next tick tries it again.
    Stalled { resumed: bool },
    /// Fenced, deleted, or its log could not be repeated. For ever.
    Failed(Error),
}

#[derive(Debug)]
struct Entry {
    seq: u64,
    call: Call,
}

/// State of one attached volume.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) name: String,
    pub(crate) generation: u64,
    pub(crate) phase: Phase,
    /// The server process that holds everything in the log.
    pub(crate) boot_id: u64,
    /// Requests that wait for `Ready`, or for room in the log.
    pub(crate) parked: VecDeque<u64>,
    /// A FLUSH of our own is under way to make room.
    pub(crate) own_flush: bool,
    /// Bytes of changes sent and not answered: they may all enter the log.
    pub(crate) unanswered_bytes: usize,
    log: VecDeque<Entry>,
    log_bytes: usize,
    next_seq: u64,
    replay_from: u64,
    batch_from: u64,
}

impl Session {
    pub(crate) fn new(name: String, generation: u64, boot_id: u64) -> Session {
        Session {
            name,
            generation,
            phase: Phase::Ready,
            boot_id,
            parked: VecDeque::new(),
            own_flush: false,
            unanswered_bytes: 0,
            log: VecDeque::new(),
            log_bytes: 0,
            next_seq: 0,
            replay_from: 0,
            batch_from: 0,
        }
    }

    /// Bytes a change may take in the log.
    pub(crate) fn cost(call: &Call) -> usize {
        if call.changes().is_some() { ENTRY_BYTES + call.payload_bytes() } else { 0 }
    }

    /// Whether `call` may go out: its bytes might have to enter the log, which must not grow past `limit`.
    pub(crate) fn has_room(&self, call: &Call, limit: usize) -> bool {
        let held = self.log_bytes + self.unanswered_bytes;
        held == 0 || held + Session::cost(call) <= limit || call.changes().is_none()
    }

    /// The server acknowledged a change.
    pub(crate) fn acknowledged(&mut self, call: &Call) {
        if call.is_fua() && !self.log.iter().any(|e| overlap(&e.call, call)) {
            return;
        }
        self.log_bytes += Session::cost(call);
        self.log.push_back(Entry { seq: self.next_seq, call: call.clone() });
        self.next_seq += 1;
    }

    /// Everything acknowledged up to now is below this: what a FLUSH sent now will cover.
    pub(crate) fn flush_point(&self) -> u64 {
        self.next_seq
    }

    /// A FLUSH that was sent at `point` is acknowledged.
    pub(crate) fn flushed(&mut self, point: u64) {
        while self.log.front().is_some_and(|e| e.seq < point) {
            if let Some(entry) = self.log.pop_front() {
                self.log_bytes -= Session::cost(&entry.call);
            }
        }
    }

    pub(crate) fn log_bytes(&self) -> usize {
        self.log_bytes
    }

    /// Starts to repeat the log from its first entry.
    pub(crate) fn begin_replay(&mut self) {
        self.replay_from = self.log.front().map_or(self.next_seq, |e| e.seq);
        self.batch_from = self.replay_from;
    }

    /// Goes back to the start of the batch that failed.
    pub(crate) fn rewind_batch(&mut self) {
        self.replay_from = self.batch_from;
    }

    /// The next entries to repeat: none of them overlap, so their order does not matter. Empty: all are repeated.
    pub(crate) fn next_batch(&mut self) -> Vec<Call> {
        self.batch_from = self.replay_from;
        let mut batch: Vec<Call> = Vec::new();
        for entry in self.log.iter().filter(|e| e.seq >= self.batch_from) {
            if batch.len() == REPLAY_BATCH || batch.iter().any(|sent| overlap(sent, &entry.call)) {
                break;
            }
            batch.push(entry.call.clone());
            self.replay_from = entry.seq + 1;
        }
        batch
    }

    /// Changes in the log, for error messages.
    pub(crate) fn log_len(&self) -> usize {
        self.log.len()
    }

    /// Rebinds the log to a newer generation of the same client.
    pub(crate) fn reattached(&mut self, generation: u64) {
        self.generation = generation;
        for entry in &mut self.log {
            match &mut entry.call {
                Call::Write { generation: g, .. }
                | Call::Discard { generation: g, .. }
                | Call::WriteZeroes { generation: g, .. } => *g = generation,
                _ => {}
            }
        }
    }
}

fn overlap(a: &Call, b: &Call) -> bool {
    match (a.changes(), b.changes()) {
        (Some((a_start, a_end)), Some((b_start, b_end))) => a_start < b_end && b_start < a_end,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::Session;
    use crate::call::Call;

    fn write(offset: u64, len: usize, fua: bool) -> Call {
        Call::Write { volume: 1, generation: 1, offset, data: Bytes::from(vec![0; len]), fua }
    }

    #[test]
    fn a_flush_clears_what_it_covers_and_no_more() {
        let mut s = Session::new("v".into(), 1, 1);
        s.acknowledged(&write(0, 512, false));
        let point = s.flush_point();
        s.acknowledged(&write(512, 512, false));
        s.flushed(point);
        assert_eq!((s.log_len(), s.log_bytes()), (1, 640));
        s.flushed(s.flush_point());
        assert_eq!((s.log_len(), s.log_bytes()), (0, 0));
    }

    #[test]
    fn fua_is_kept_only_over_an_older_entry() {
        let mut s = Session::new("v".into(), 1, 1);
        s.acknowledged(&write(0, 512, true));
        assert_eq!(s.log_len(), 0);
        s.acknowledged(&write(0, 1024, false));
        s.acknowledged(&write(4096, 512, true));
        assert_eq!(s.log_len(), 1);
        s.acknowledged(&write(512, 512, true));
        assert_eq!(s.log_len(), 2);
    }

    #[test]
    fn batches_never_overlap_and_keep_order() {
        let mut s = Session::new("v".into(), 1, 1);
        let calls = [write(0, 512, false), write(512, 512, false), write(0, 1024, false), write(2048, 512, false)];
        calls.iter().for_each(|c| s.acknowledged(c));
        s.begin_replay();
        assert_eq!(s.next_batch(), calls[..2]);
        assert_eq!(s.next_batch(), calls[2..]);
        s.rewind_batch();
        assert_eq!(s.next_batch(), calls[2..]);
        assert!(s.next_batch().is_empty());
    }
}
