//! One GET with all that can go wrong: second attempts, repetitions, damaged answers.

use std::sync::Arc;
use std::time::Duration;

use super::gate::Pace;
use super::{ChunkSource, FetchClass, GetPlan, Transfer};
use crate::cache::ChunkData;
use crate::error::{Error, Result, Status};
use crate::object_store::{ObjectBytes, ObjectError, ObjectStore};
use crate::platform::{Platform, Queue, Time};
use crate::shard::signal::within;
use crate::snapshot::ChunkDecoder;

type Attempt = std::result::Result<ObjectBytes, ObjectError>;

impl<P: Platform, O: ObjectStore> Transfer<P, O> {
    /// One ranged GET, repeated with jittered exponential back-off until the deadline.
    pub(super) async fn get(&self, plan: &GetPlan, deadline: Time) -> Result<ObjectBytes> {
        let mut backoff = self.0.retry.backoff_min;
        loop {
            let error = match self.attempt(plan).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            let wait = self.jittered(backoff);
            if !error.may_pass() || self.0.platform.now().after(wait) >= deadline {
                return Err(Error::new(status_of(&error), format!("object store: {error}")));
            }
            self.0.counters.object_retries.add(1);
            self.account(&plan.sources[0].origin).retries.add(1);
            self.0.platform.sleep(wait).await;
            backoff = (backoff * 2).min(self.0.retry.backoff_max);
            self.0.queue.borrow_mut().gate.charge(plan.bytes(), self.0.platform.now());
        }
    }

    /// Asks once, and a second time when a priority GET is slow: the first good answer counts.
    async fn attempt(&self, plan: &GetPlan) -> Attempt {
        let slow_after = match plan.class {
            FetchClass::Priority => self.0.hedge.borrow_mut().begin(),
            FetchClass::ReadAhead | FetchClass::BootSet | FetchClass::Background => None,
        };
        let Some(slow_after) = slow_after else { return self.ask(plan).await };
        let (sender, answers) = flume::bounded(2);
        self.ask_aside(plan, sender.clone());
        if let Some(Ok(answer)) = within(&self.0.platform, slow_after, answers.recv_async()).await {
            return answer;
        }
        if self.0.hedge.borrow_mut().take() {
            self.0.counters.object_hedges.add(1);
            self.account(&plan.sources[0].origin).hedges.add(1);
            self.0.queue.borrow_mut().gate.charge(plan.bytes(), self.0.platform.now());
            self.ask_aside(plan, sender);
        } else {
            drop(sender);
        }
        let mut failed = ObjectError::Retry(format!("{}: the request was given up", plan.pack_key));
        while let Ok(answer) = answers.recv_async().await {
            match answer {
                Ok(bytes) => return Ok(bytes),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Asks in a task of its own: a request in flight is never dropped half-way.
    fn ask_aside(&self, plan: &GetPlan, answer: flume::Sender<Attempt>) {
        let (transfer, plan) = (self.clone(), plan.clone());
        self.0.platform.spawn(Queue::Serve, async move { drop(answer.send(transfer.ask(&plan).await)) });
    }

    async fn ask(&self, plan: &GetPlan) -> Attempt {
        let account = self.account(&plan.sources[0].origin);
        self.0.counters.object_gets.add(1);
        account.gets.add(1);
        let begun = self.0.platform.now();
        let answer = match self.0.objects.get_range(&plan.pack_key, plan.range.clone()).await {
            Ok(bytes) if bytes.len() as u64 != plan.bytes() => {
                Err(ObjectError::Corrupt(format!("{}: short answer of {} bytes", plan.pack_key, bytes.len())))
            }
            answer => answer,
        };
        let now = self.0.platform.now();
        let pace = match &answer {
            Ok(bytes) => {
                self.0.counters.object_get_bytes.add(bytes.len() as u64);
                account.object_bytes.add(bytes.len() as u64);
                Pace::Answered
            }
            Err(error) => {
                self.0.counters.object_errors.add(1);
                if matches!(error, ObjectError::SlowDown(_)) { Pace::Throttled } else { Pace::Answered }
            }
        };
        if pace == Pace::Throttled {
            self.0.counters.object_throttles.add(1);
            account.throttles.add(1);
        }
        if plan.class == FetchClass::Priority && answer.is_ok() {
            self.0.hedge.borrow_mut().note(now.since(begun));
        }
        if self.0.queue.borrow_mut().gate.note(pace, now) {
            let window = self.0.queue.borrow().gate.window();
            let text = format!("the object store is slow or asks to slow down: {window} GETs at once from now on");
            self.0.counters.event(self.0.platform.wall_clock_ms(), &text);
        }
        answer
    }

    /// Half to the whole of the back-off, so that shards do not retry in step.
    fn jittered(&self, backoff: Duration) -> Duration {
        backoff / 2 + backoff.mul_f64(self.0.platform.random_u64() as f64 / u64::MAX as f64) / 2
    }

    /// Checks a chunk against its digest (P3); fetches it again alone when it is corrupt.
    pub(super) async fn verify(&self, source: &ChunkSource, stored: &[u8], deadline: Time) -> Result<ChunkData> {
        let mut again;
        let mut stored = stored;
        for attempt in 1.. {
            match ChunkDecoder::new(&source.entry, stored, source.chunk_len).run(&self.0.platform).await {
                Ok(data) => {
                    self.keep_on_disk(source, stored);
                    return Ok(Arc::new(data));
                }
                Err(corrupt) => {
                    self.0.counters.corrupt_chunks.add(1);
                    let at = format!("{} offset {}", source.pack_key, source.offset);
                    self.0
                        .counters
                        .event(self.0.platform.wall_clock_ms(), &format!("corrupt chunk in {at}: {corrupt}"));
                    if attempt >= self.0.retry.corrupt_attempts || self.0.platform.now() >= deadline {
                        return Err(Error::new(Status::Corrupt, format!("chunk in {at} is corrupt: {corrupt}")));
                    }
                }
            }
            again = self.get(&GetPlan::single(source.clone()), deadline).await?;
            stored = &again;
        }
        unreachable!("the loop ends by returning")
    }
}

fn status_of(error: &ObjectError) -> Status {
    match error {
        ObjectError::NotFound(_) | ObjectError::Corrupt(_) => Status::Corrupt,
        ObjectError::Retry(_) | ObjectError::SlowDown(_) | ObjectError::Fatal(_) | ObjectError::AlreadyExists(_) => {
            Status::ObjectStore
        }
    }
}
