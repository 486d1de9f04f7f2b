//! The journal of a shard: which volumes exist and which of their sectors are their own, durably.
//!
//! One segment file holds a checkpoint (the full state of every volume) and, behind it, the records appended since.
//! Commits are grouped: whoever waits while a batch is being synced shares the next one. A checkpoint writes the next
//! segment beside the running one and takes over from it in one rename. Formats, the table of what recovery may meet,
//! and what each failure does are in docs/journal.md.
//!
//! Invariants: a batch is begun only after the one before it was synced; a record is acknowledged only after the sync of
//! its batch; no RefCell is borrowed over an await; nothing is written to a segment after a failed sync.

mod batches;
mod checkpoint;
mod current;
mod frame;
mod inspect;
mod record;
mod recovery;
mod replay;
mod scan;
mod segment;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use futures::channel::oneshot;

use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::platform::{Platform, Queue};
use crate::types::VolumeState;
use batches::{Batch, Batches};
pub use current::commit_epoch;
use frame::SegmentName;
pub use inspect::{Inspection, inspect};
pub use record::Record;
pub use recovery::{FileReport, Recovered, recover, recover_existing};
use segment::{BatchError, Segment};

/// A checkpoint is not worth its writes before the log has this many bytes: reading them takes some 20 ms.
pub const CHECKPOINT_LOG_BYTES_MIN: u64 = 16 << 20;
/// Nor before the log is this many times the last checkpoint: a checkpoint then costs at most half of what the log did,
/// and recovery reads at most three times the state.
pub const CHECKPOINT_LOG_FACTOR: u64 = 2;
/// At this many times the length at which a checkpoint is due, commits wait for the checkpoint: whatever is written
/// while one runs, a journal never takes more of the disk than docs/journal.md says.
pub const LOG_FULL_FACTOR: u64 = 2;
/// Records that may wait for their commit. A healthy disk writes them in some 10 ms; while it fails, [`Journal::admit`]
/// refuses more.
pub const PENDING_BYTES_MAX: usize = 8 << 20;

/// Position in the journal: everything appended up to it. Later appends have larger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Lsn(u64);

/// The open journal of one shard; clones are handles to the same.
pub struct Journal<P: Platform> {
    inner: Rc<Inner<P>>,
}

impl<P: Platform> Clone for Journal<P> {
    fn clone(&self) -> Self {
        Journal { inner: Rc::clone(&self.inner) }
    }
}

struct Inner<P: Platform> {
    platform: P,
    dir: PathBuf,
    state: RefCell<State<P>>,
}

struct State<P: Platform> {
    name: SegmentName,
    /// The live segment; away while the holder of the turn writes to it, gone after close.
    segment: Option<Segment<P>>,
    health: Health,
    /// Someone has the turn: the commit task, or a holder of [`Turn`].
    busy: bool,
    turns_wanted: VecDeque<oneshot::Sender<()>>,
    waiters: Vec<Waiter>,
    pending: Batches,
    /// Records for the segment that a running checkpoint writes: its states, and every append since its start.
    next: Option<Batches>,
    appended: Lsn,
    durable: Lsn,
    /// Bytes of records given to `next`.
    next_bytes: u64,
    /// What the last checkpoint took for the states of the volumes alone.
    state_bytes: u64,
    log_bytes: u64,
    /// A failed checkpoint is not due again before the log has this many bytes.
    checkpoint_retry_log_bytes: u64,
    /// The log is full and a commit waits: a checkpoint is due whatever happened to the one before.
    checkpoint_demanded: bool,
    checkpoint_calls: Vec<oneshot::Sender<()>>,
}

enum Health {
    Live,
    /// Something durable was half done. Only a restart, which reads what is really there, helps.
    Poisoned {
        stage: &'static str,
        cause: String,
    },
    Closed,
}

struct Waiter {
    lsn: Lsn,
    done: oneshot::Sender<Result<()>>,
}

impl<P: Platform> Journal<P> {
    /// Makes the journal of `shard` in `epoch`, holding `initial`; what an earlier, uncommitted start of the same
    /// epoch left for this shard is removed. Durable when it returns; it counts from [`commit_epoch`] on.
    ///
    /// # Errors
    /// `NoSpace` or `Io`, naming the file.
    pub async fn create(
        platform: &P,
        dir: &Path,
        epoch: u64,
        shard: usize,
        initial: impl Iterator<Item = VolumeState>,
    ) -> Result<Journal<P>> {
        let shard = u32::try_from(shard).expect("shards are cores");
        let name = SegmentName { epoch, shard, seq: 0 };
        let segment = checkpoint::create_first(platform, dir, name, initial).await?;
        let state = State {
            name,
            state_bytes: segment.end,
            segment: Some(segment),
            health: Health::Live,
            busy: false,
            turns_wanted: VecDeque::new(),
            waiters: Vec::new(),
            pending: Batches::default(),
            next: None,
            next_bytes: 0,
            appended: Lsn(0),
            durable: Lsn(0),
            log_bytes: 0,
            checkpoint_retry_log_bytes: 0,
            checkpoint_demanded: false,
            checkpoint_calls: Vec::new(),
        };
        let inner = Inner { platform: platform.clone(), dir: dir.to_owned(), state: RefCell::new(state) };
        Ok(Journal { inner: Rc::new(inner) })
    }

    /// Waits until there is room for more records. Called before [`Journal::append`] by whoever may wait; what is
    /// appended without it must be bounded by what was admitted before.
    ///
    /// # Errors
    /// Those of [`Journal::commit`], when the records that fill the buffer can't be written.
    pub async fn admit(&self) -> Result<()> {
        let appended = {
            let state = self.inner.state.borrow();
            if state.pending.bytes() < PENDING_BYTES_MAX {
                return Ok(());
            }
            state.appended
        };
        self.commit(appended).await
    }

    /// Buffers a record; never waits and never fails. It is durable when [`Journal::commit`] of the returned position
    /// returns. The facts it states must be durable in the volume files already.
    pub fn append(&self, record: &Record) -> Lsn {
        let mut state = self.inner.state.borrow_mut();
        let State { pending, next, next_bytes, appended, .. } = &mut *state;
        let mut any = false;
        record::encode(record, &mut |bytes| {
            any = true;
            pending.push(bytes);
            if let Some(next) = next.as_mut().filter(|_| !mutation::on(Mutation::CheckpointDropsAppends)) {
                next.push(bytes);
                *next_bytes += bytes.len() as u64;
            }
        });
        if any {
            *appended = Lsn(appended.0 + 1);
            pending.mark(*appended);
            if let Some(next) = next {
                next.mark(*appended);
            }
        }
        *appended
    }

    /// Returns when everything up to `lsn` is durable. Waits for a checkpoint when the log is full.
    ///
    /// # Errors
    /// `NoSpace` or `Io` when a batch, or the checkpoint of a full log, could not be written: the records are kept, and
    /// the next commit writes them again. `Io` naming the stage once a sync has failed: the journal is poisoned until the node restarts. `ShuttingDown`
    /// after [`Journal::close`].
    pub async fn commit(&self, lsn: Lsn) -> Result<()> {
        let waiting = {
            let mut state = self.inner.state.borrow_mut();
            assert!(lsn <= state.appended, "commit of {lsn:?}, appended {:?}", state.appended);
            if lsn <= state.durable || mutation::on(Mutation::CommitWithoutSync) {
                return Ok(());
            }
            state.check_live()?;
            let (done, waiting) = oneshot::channel();
            state.waiters.push(Waiter { lsn, done });
            state.call_for_checkpoint();
            waiting
        };
        self.inner.start_commit_task();
        waiting.await.unwrap_or_else(|_| Err(closed_error()))
    }

    /// Bytes of records appended and not yet durable. While commits fail it grows up to [`PENDING_BYTES_MAX`] and what
    /// was appended without [`Journal::admit`].
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.inner.state.borrow().pending.bytes()
    }

    /// Bytes written since the last checkpoint was begun, less its states.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.inner.state.borrow().log_bytes
    }

    /// The log has grown enough for a checkpoint to pay, and none is running.
    #[must_use]
    pub fn checkpoint_due(&self) -> bool {
        self.inner.state.borrow().checkpoint_due()
    }

    /// Returns when a checkpoint is due. Commits of a full log wait for it, so somebody must always listen.
    pub async fn checkpoint_wanted(&self) {
        let call = {
            let mut state = self.inner.state.borrow_mut();
            if state.checkpoint_due() {
                return;
            }
            let (sender, call) = oneshot::channel();
            state.checkpoint_calls.retain(|call| !call.is_canceled());
            state.checkpoint_calls.push(sender);
            call
        };
        // The sender goes away with the journal only.
        let _ = call.await;
    }

    /// Writes a new segment that starts with the state of every volume, and drops the old one. `next` gives one volume
    /// at a time, each of this shard's exactly once (those created or deleted meanwhile at will), as it is at the time
    /// of the call: with every record appended so far, and with no fact that may not be journaled yet. Commits go on.
    ///
    /// # Errors
    /// `NoSpace` or `Io`: the old segment stays in use, and another checkpoint may be tried. `Conflict` when one is
    /// running already. `Io` naming the stage if the switch itself failed: the journal is poisoned.
    pub async fn checkpoint(&self, next: impl FnMut() -> Option<VolumeState>) -> Result<()> {
        checkpoint::run(&self.inner, next).await
    }

    /// Makes everything appended durable, marks the segment as closed in good order, and closes the file. Commits and
    /// checkpoints of other handles then fail with `ShuttingDown`.
    ///
    /// # Errors
    /// Those of [`Journal::commit`]; the journal is closed all the same.
    pub async fn close(self) -> Result<()> {
        let mut turn = Turn::want(&self.inner);
        turn.taken().await;
        let (mut segment, mut pending) = {
            let mut state = self.inner.state.borrow_mut();
            state.check_live()?;
            let Some(segment) = state.segment.take() else { return Err(closed_error()) };
            state.health = Health::Closed;
            (segment, std::mem::take(&mut state.pending))
        };
        record::encode_closed(&mut |bytes| pending.push(bytes));
        let mut result = Ok(());
        while let (true, Some(batch)) = (result.is_ok(), pending.take(true)) {
            result = segment.commit(&self.inner.platform, &batch.payload).await;
            if result.is_ok() {
                self.inner.state.borrow_mut().batch_is_durable(batch.last_lsn);
            }
        }
        let result = result.map_err(|e| batch_error(&segment.path, &e));
        let rest = result.clone().and(Err(closed_error()));
        self.inner.state.borrow_mut().fail_waiters(rest);
        segment.close().await;
        result
    }
}

impl<P: Platform> Inner<P> {
    /// Commits run in a task of their own, so that a waiter that goes away abandons nothing half-way.
    fn start_commit_task(self: &Rc<Self>) {
        if !std::mem::replace(&mut self.state.borrow_mut().busy, true) {
            self.platform.spawn(Queue::Serve, Rc::clone(self).commit_task());
        }
    }

    /// Has the turn; writes batch after batch while someone waits.
    async fn commit_task(self: Rc<Self>) {
        loop {
            let (mut segment, batch) = match self.state.borrow_mut().begin_batch() {
                Some(work) => work,
                None => break,
            };
            let result = segment.commit(&self.platform, &batch.payload).await;
            self.state.borrow_mut().end_batch(segment, batch, result);
        }
        self.pass_turn();
    }

    /// The turn goes to whoever wants it alone, else to commits that wait.
    fn pass_turn(self: &Rc<Self>) {
        let commit = {
            let mut state = self.state.borrow_mut();
            while let Some(wanted) = state.turns_wanted.pop_front() {
                if wanted.send(()).is_ok() {
                    return;
                }
            }
            state.busy = state.has_work();
            state.busy
        };
        if commit {
            self.platform.spawn(Queue::Serve, Rc::clone(self).commit_task());
        }
    }
}

impl<P: Platform> State<P> {
    fn check_live(&self) -> Result<()> {
        match &self.health {
            Health::Live => Ok(()),
            Health::Closed => Err(closed_error()),
            Health::Poisoned { stage, cause } => {
                let file = self.name.file_name();
                let text = format!("journal {file} stopped: {stage} failed ({cause}); check the disk, then restart");
                Err(Error::new(Status::Io, text))
            }
        }
    }

    fn poison(&mut self, stage: &'static str, cause: String) {
        self.health = Health::Poisoned { stage, cause };
        let error = self.check_live();
        self.fail_waiters(error);
    }

    /// Length of the log at which a checkpoint is due.
    fn log_limit(&self) -> u64 {
        CHECKPOINT_LOG_BYTES_MIN.max(CHECKPOINT_LOG_FACTOR.saturating_mul(self.state_bytes))
    }

    fn log_is_full(&self) -> bool {
        self.log_bytes >= LOG_FULL_FACTOR.saturating_mul(self.log_limit())
    }

    fn checkpoint_due(&self) -> bool {
        let live = matches!(self.health, Health::Live) && self.next.is_none();
        let long = self.log_bytes > self.log_limit().max(self.checkpoint_retry_log_bytes);
        live && (long || self.checkpoint_demanded)
    }

    fn call_for_checkpoint(&mut self) {
        if self.log_is_full() && !self.waiters.is_empty() && self.next.is_none() {
            self.checkpoint_demanded = true;
        }
        if self.checkpoint_due() {
            for call in self.checkpoint_calls.drain(..) {
                // Whoever stopped listening needs no call.
                let _ = call.send(());
            }
        }
    }

    fn has_work(&self) -> bool {
        let live = matches!(self.health, Health::Live) && !self.log_is_full();
        live && !self.waiters.is_empty() && !self.pending.is_empty()
    }

    fn begin_batch(&mut self) -> Option<(Segment<P>, Batch)> {
        if !self.turns_wanted.is_empty() || !self.has_work() {
            return None;
        }
        let segment = self.segment.take()?;
        let batch = self.pending.take(true)?;
        Some((segment, batch))
    }

    fn end_batch(&mut self, segment: Segment<P>, batch: Batch, result: std::result::Result<(), BatchError>) {
        self.log_bytes += frame::batch_bytes(batch.payload.len()) as u64;
        match result {
            Ok(()) => self.batch_is_durable(batch.last_lsn),
            Err(BatchError::Sync(error)) => self.poison("sync of a batch", error.to_string()),
            Err(error) => {
                self.log_bytes -= frame::batch_bytes(batch.payload.len()) as u64;
                self.pending.put_back(batch);
                let error = batch_error(&segment.path, &error);
                self.fail_waiters(Err(error));
            }
        }
        self.segment = Some(segment);
        self.call_for_checkpoint();
    }

    fn batch_is_durable(&mut self, lsn: Lsn) {
        self.durable = self.durable.max(lsn);
        let durable = self.durable;
        for waiter in self.waiters.extract_if(.., |waiter| waiter.lsn <= durable) {
            // A waiter that went away needs no answer.
            let _ = waiter.done.send(Ok(()));
        }
    }

    fn fail_waiters(&mut self, error: Result<()>) {
        for waiter in self.waiters.drain(..) {
            let _ = waiter.done.send(error.clone());
        }
    }
}

/// The right to replace or close the live segment: no batch is in flight meanwhile. Passed on when dropped.
struct Turn<P: Platform> {
    inner: Rc<Inner<P>>,
    coming: Option<oneshot::Receiver<()>>,
}

impl<P: Platform> Turn<P> {
    fn want(inner: &Rc<Inner<P>>) -> Turn<P> {
        let mut state = inner.state.borrow_mut();
        let mut coming = None;
        if std::mem::replace(&mut state.busy, true) {
            let (sender, receiver) = oneshot::channel();
            state.turns_wanted.push_back(sender);
            coming = Some(receiver);
        }
        Turn { inner: Rc::clone(inner), coming }
    }

    async fn taken(&mut self) {
        if let Some(coming) = &mut self.coming {
            coming.await.expect("the sender stays in the journal until it is used");
            self.coming = None;
        }
    }
}

impl<P: Platform> Drop for Turn<P> {
    fn drop(&mut self) {
        let has_turn = match &mut self.coming {
            None => true,
            Some(coming) => matches!(coming.try_recv(), Ok(Some(()))),
        };
        if has_turn {
            // Closed first: a sender that is still queued must not be chosen again.
            self.coming = None;
            self.inner.pass_turn();
        }
    }
}

fn batch_error(path: &Path, error: &BatchError) -> Error {
    let (stage, error) = match error {
        BatchError::Write(error) => ("writing", error),
        BatchError::Sync(error) => ("syncing", error),
    };
    Error::from_io(&format!("journal file {}: {stage} a batch", path.display()), error)
}

fn closed_error() -> Error {
    Error::new(Status::ShuttingDown, "the journal is closed: the node is stopping")
}
