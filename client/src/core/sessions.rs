//! What becomes of attachments: begun, resumed on a new connection with what was not flushed, and ended.

use volley_protocol::Status;

use super::{Core, Entry, Purpose, Ticket};
use crate::call::{Answer, Call};
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Phase, Session};

impl<T: Ticket> Core<T> {
    pub(super) fn attached(&mut self, name: String, volume: u64, generation: u64) {
        let boot_id = self.hello.as_ref().map_or(0, |h| h.boot_id);
        match self.sessions.get_mut(&volume) {
            Some(session) if session.phase == Phase::Ready => session.reattached(generation),
            _ => {
                self.sessions.insert(volume, Session::new(name, generation, boot_id));
            }
        }
    }

    pub(super) fn resume(&mut self, volume: u64) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        if matches!(session.phase, Phase::Failed(_)) {
            return;
        }
        session.phase = Phase::Resume;
        let call = Call::Attach { name: session.name.clone(), resume_generation: Some(session.generation) };
        let id = self.add(call, Purpose::Resume { volume });
        self.queue.push_front(id);
    }

    pub(super) fn resumed(&mut self, volume: u64, result: Result<Answer>) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        let boot_id = self.hello.as_ref().map_or(0, |h| h.boot_id);
        match result {
            Ok(Answer::Attached(info)) if info.volume == volume && info.generation == session.generation => {
                if session.boot_id == boot_id {
                    self.ready(volume);
                } else {
                    session.begin_replay();
                    self.replay(volume);
                }
            }
            Ok(_) => {
                let what = format!("volume {} was deleted and made again: attach it again", session.name);
                self.fail_session(volume, &Error::new(ErrorKind::Storage, what));
            }
            Err(e) if e.status.is_some_and(Status::is_retryable) => session.phase = Phase::Stalled { resumed: false },
            Err(e) if e.status == Some(Status::NotAttached) => {
                let what = format!("volume {} is not attached any more: {e}", session.name);
                self.fail_session(volume, &Error { kind: ErrorKind::Fenced, message: what, ..e });
            }
            Err(e) => self.fail_session(volume, &e),
        }
    }

    /// Sends the next batch of the log, or ends the replay.
    pub(super) fn replay(&mut self, volume: u64) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        let batch = session.next_batch();
        if batch.is_empty() {
            session.boot_id = self.hello.as_ref().map_or(0, |h| h.boot_id);
            self.ready(volume);
            return;
        }
        session.phase = Phase::Replay { outstanding: batch.len(), again: false };
        for call in batch.into_iter().rev() {
            let id = self.add(call, Purpose::Replay { volume });
            self.queue.push_front(id);
        }
    }

    pub(super) fn replayed(&mut self, volume: u64, result: Result<Answer>) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        let Phase::Replay { outstanding, again } = &mut session.phase else { return };
        *outstanding -= 1;
        match result {
            Ok(_) => {}
            Err(e) if e.status.is_some_and(Status::is_retryable) => *again = true,
            Err(e) => {
                let (name, count) = (&session.name, session.log_len());
                let what =
                    format!("volume {name}: the server restarted and {count} unflushed writes can't be repeated: {e}");
                let kind = if e.kind == ErrorKind::Fenced { ErrorKind::Fenced } else { ErrorKind::Storage };
                self.fail_session(volume, &Error { kind, status: e.status, message: what });
                return;
            }
        }
        match session.phase {
            Phase::Replay { outstanding: 0, again: true } => session.phase = Phase::Stalled { resumed: true },
            Phase::Replay { outstanding: 0, again: false } => self.replay(volume),
            _ => {}
        }
    }

    pub(super) fn ready(&mut self, volume: u64) {
        if let Some(session) = self.sessions.get_mut(&volume) {
            session.phase = Phase::Ready;
            self.unpark(volume);
        }
    }

    /// Starts a FLUSH of our own when the log is half full.
    pub(super) fn make_room(&mut self, volume: u64) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        if session.own_flush || session.log_bytes() == 0 || session.log_bytes() < self.options.unflushed_bytes_max / 2 {
            return;
        }
        session.own_flush = true;
        let call = Call::Flush { volume, generation: session.generation };
        let id = self.add(call, Purpose::OwnFlush);
        self.queue.push_front(id);
    }

    pub(super) fn own_flushed(&mut self, call: &Call, flush_point: u64, result: Result<Answer>) {
        let Some((volume, generation)) = call.attachment() else { return };
        let Some(session) = self.sessions.get_mut(&volume).filter(|s| s.generation == generation) else { return };
        session.own_flush = false;
        match result {
            Ok(_) => {
                session.flushed(flush_point);
                self.unpark(volume);
            }
            Err(e) if e.kind == ErrorKind::Fenced => self.fail_session(volume, &e),
            // The next tick tries again.
            Err(e) if e.status.is_some_and(Status::is_retryable) => {}
            Err(e) => {
                for id in std::mem::take(&mut session.parked) {
                    self.answer(id, Err(e.clone()));
                }
            }
        }
    }

    /// Lets parked requests try again.
    pub(super) fn unpark(&mut self, volume: u64) {
        if let Some(session) = self.sessions.get_mut(&volume) {
            for id in std::mem::take(&mut session.parked).into_iter().rev() {
                self.queue.push_front(id);
            }
        }
    }

    pub(super) fn drop_abandoned(&mut self, volume: u64) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        let entries = &mut self.entries;
        session.parked.retain(|id| match entries.get(id) {
            Some(Entry { purpose: Purpose::Caller(t), .. }) if t.is_abandoned() => {
                entries.remove(id);
                false
            }
            entry => entry.is_some(),
        });
    }

    /// Ends a session for ever but remembers why. Waiting ATTACHes go on: they make a new one.
    pub(super) fn fail_session(&mut self, volume: u64, error: &Error) {
        let Some(session) = self.sessions.get_mut(&volume) else { return };
        session.phase = Phase::Failed(error.clone());
        for id in std::mem::take(&mut session.parked) {
            self.queue.push_front(id);
        }
    }

    pub(super) fn end_session(&mut self, volume: u64, error: &Error) {
        self.fail_session(volume, error);
        self.sessions.remove(&volume);
    }
}
