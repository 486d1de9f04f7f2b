//! Making segments: the first one of a journal, and the fuzzy checkpoint that replaces the live one.

use std::io;
use std::path::Path;
use std::rc::Rc;

use super::batches::Batches;
use super::frame::SegmentName;
use super::segment::Segment;
use super::{CHECKPOINT_LOG_BYTES_MIN, Inner, Lsn, Turn, closed_error, record};
use crate::error::{Error, Result, Status};
use crate::platform::Platform;
use crate::types::VolumeState;

/// Makes the first segment of a journal, durable under its final name.
pub(super) async fn create_first<P: Platform>(
    platform: &P,
    dir: &Path,
    name: SegmentName,
    initial: impl Iterator<Item = VolumeState>,
) -> Result<Segment<P>> {
    let what = format!("journal file {}", dir.join(name.file_name()).display());
    let made = write_first(platform, dir, name, initial).await;
    made.map_err(|error| Error::from_io(&what, &error))
}

async fn write_first<P: Platform>(
    platform: &P,
    dir: &Path,
    name: SegmentName,
    initial: impl Iterator<Item = VolumeState>,
) -> io::Result<Segment<P>> {
    // A start that crashed before its epoch was committed may have left higher sequence numbers than ours.
    for entry in platform.list_dir(dir).await? {
        if SegmentName::parse(&entry.name).is_some_and(|old| (old.epoch, old.shard) == (name.epoch, name.shard)) {
            platform.remove_file(&dir.join(&entry.name)).await?;
        }
    }
    let mut segment = Segment::create_tmp(platform, dir, name).await?;
    let (mut batches, mut volumes) = (Batches::default(), 0);
    for state in initial {
        volumes += 1;
        record::encode_state(&state, &mut |bytes| batches.push(bytes));
        while let Some(batch) = batches.take(false) {
            segment.write(platform, &batch.payload).await?;
        }
    }
    record::encode_checkpoint_complete(volumes, &mut |bytes| batches.push(bytes));
    while let Some(batch) = batches.take(true) {
        segment.write(platform, &batch.payload).await?;
    }
    segment.sync().await?;
    segment.publish(platform, dir, name).await?;
    Ok(segment)
}

/// The checkpoint of a live journal.
pub(super) async fn run<P: Platform>(
    inner: &Rc<Inner<P>>,
    mut next: impl FnMut() -> Option<VolumeState>,
) -> Result<()> {
    let mut running = Running::start(inner)?;
    let created = Segment::create_tmp(&inner.platform, &inner.dir, running.name).await;
    let mut segment = created.map_err(|error| running.failed("creating", &error))?;
    let mut result = running.dump(&mut segment, &mut next).await;
    let mut turn = Turn::want(inner);
    turn.taken().await;
    if result.is_ok() {
        result = running.complete(&mut segment).await;
    }
    if let Err(error) = result {
        drop(turn);
        segment.remove(&inner.platform).await;
        return Err(error);
    }
    let old = running.switch(segment).await?;
    drop(turn);
    old.remove(&inner.platform).await;
    Ok(())
}

/// A checkpoint under way. Dropped before the switch, it leaves the journal with the old segment; dropped inside the
/// switch, when the disk may have either, it poisons the journal.
struct Running<'a, P: Platform> {
    inner: &'a Rc<Inner<P>>,
    name: SegmentName,
    volumes: u64,
    /// Once complete: everything appended up to here is in the new segment, and its records have this many bytes.
    durable: Lsn,
    tail_bytes: u64,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Writing,
    Switching,
    Done,
}

const SWITCH: &str = "switching to a new segment";

impl<'a, P: Platform> Running<'a, P> {
    /// From here on every append also goes to the new segment. What was appended before is in the states.
    fn start(inner: &'a Rc<Inner<P>>) -> Result<Running<'a, P>> {
        let mut state = inner.state.borrow_mut();
        state.check_live()?;
        if state.next.is_some() {
            return Err(Error::new(Status::Conflict, "a checkpoint of this journal is running already"));
        }
        let mut batches = Batches::default();
        batches.mark(state.appended);
        state.next = Some(batches);
        state.next_bytes = 0;
        state.checkpoint_demanded = false;
        let name = SegmentName { seq: state.name.seq + 1, ..state.name };
        Ok(Running { inner, name, volumes: 0, durable: Lsn(0), tail_bytes: 0, stage: Stage::Writing })
    }

    /// Writes the states, between them the records appended meanwhile, and syncs: most of the work, without the turn.
    async fn dump(&mut self, segment: &mut Segment<P>, next: &mut impl FnMut() -> Option<VolumeState>) -> Result<()> {
        while let Some(volume) = next() {
            self.volumes += 1;
            self.with_next(|batches| record::encode_state(&volume, &mut |bytes| batches.push(bytes)));
            while let Some(batch) = self.with_next(|batches| batches.take(false)) {
                let written = segment.write(&self.inner.platform, &batch.payload).await;
                written.map_err(|error| self.failed("writing", &error))?;
            }
            self.inner.platform.yield_now().await;
            self.inner.state.borrow().check_live()?;
        }
        segment.sync().await.map_err(|error| self.failed("syncing", &error))
    }

    /// With the turn: the last records and the mark that makes the segment whole. Appends that come meanwhile stay
    /// buffered.
    async fn complete(&mut self, segment: &mut Segment<P>) -> Result<()> {
        self.inner.state.borrow().check_live()?;
        let volumes = self.volumes;
        let mut last = self.with_next(|batches| {
            record::encode_checkpoint_complete(volumes, &mut |bytes| batches.push(bytes));
            batches.take_all()
        });
        self.tail_bytes = self.inner.state.borrow().next_bytes;
        while let Some(batch) = last.take(true) {
            let written = segment.write(&self.inner.platform, &batch.payload).await;
            written.map_err(|error| self.failed("writing", &error))?;
        }
        segment.sync().await.map_err(|error| self.failed("syncing", &error))?;
        self.durable = last.last_lsn();
        Ok(())
    }

    /// With the turn: the new segment takes its name and the place of the old one, which is returned.
    async fn switch(mut self, mut segment: Segment<P>) -> Result<Segment<P>> {
        self.stage = Stage::Switching;
        let published = segment.publish(&self.inner.platform, &self.inner.dir, self.name).await;
        self.stage = Stage::Done;
        let mut state = self.inner.state.borrow_mut();
        if let Err(error) = published {
            state.next = None;
            state.poison(SWITCH, error.to_string());
            return Err(state.check_live().err().unwrap_or_else(closed_error));
        }
        state.name = self.name;
        state.pending = state.next.take().unwrap_or_default();
        state.state_bytes = segment.end.saturating_sub(self.tail_bytes);
        state.log_bytes = self.tail_bytes;
        state.checkpoint_retry_log_bytes = 0;
        state.batch_is_durable(self.durable);
        Ok(state.segment.replace(segment).expect("the holder of the turn finds the live segment"))
    }

    fn with_next<T>(&self, act: impl FnOnce(&mut Batches) -> T) -> T {
        act(self.inner.state.borrow_mut().next.as_mut().expect("set until the checkpoint ends"))
    }

    /// The old segment stays; the next try waits for more log, so that a full disk is not hammered. Commits that waited
    /// for room in a full log fail; a later one asks for a checkpoint again.
    fn failed(&self, stage: &str, error: &io::Error) -> Error {
        let mut state = self.inner.state.borrow_mut();
        state.checkpoint_retry_log_bytes = state.log_bytes + CHECKPOINT_LOG_BYTES_MIN;
        let path = self.inner.dir.join(self.name.tmp_file_name());
        let error = Error::from_io(&format!("checkpoint {}: {stage}", path.display()), error);
        if state.log_is_full() {
            let text = format!("the journal's log is full ({} bytes): {}", state.log_bytes, error.message);
            state.fail_waiters(Err(Error::new(error.status, text)));
        }
        error
    }
}

impl<P: Platform> Drop for Running<'_, P> {
    fn drop(&mut self) {
        let mut state = self.inner.state.borrow_mut();
        match self.stage {
            Stage::Writing => {
                state.next = None;
                state.call_for_checkpoint();
            }
            Stage::Switching => {
                state.next = None;
                state.poison(SWITCH, "it was abandoned half-way".to_owned());
            }
            Stage::Done => {}
        }
    }
}
