//! Asking the shards: commands over flume, replies awaited on the control thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::{join_all, try_join_all};

use crate::error::{Error, Result, Status};
use crate::object_store::{ObjectError, ObjectMeta};
use crate::shard::api::{Command, ObjectOp, ObjectOpReply, ReplyTo};

/// A shard answers questions from memory, so this long without an answer means that it is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Object operations have their own deadline behind this one.
const OBJECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How soon a shard that ended without an answer is noticed.
const GONE_CHECK_PERIOD: Duration = Duration::from_millis(500);
/// Manifests and references are reached through this shard.
const OBJECT_SHARD: usize = 0;

#[derive(Clone)]
pub(super) struct Shards {
    commands: Arc<[flume::Sender<Command>]>,
    /// The shard that reads the next part of a pack.
    next_reader: Arc<AtomicUsize>,
}

impl Shards {
    pub(super) fn new(commands: &[flume::Sender<Command>]) -> Shards {
        Shards { commands: commands.into(), next_reader: Arc::default() }
    }

    pub(super) fn count(&self) -> usize {
        self.commands.len()
    }

    /// The shard that owns the volume of this name.
    pub(super) fn owner_of(&self, volume_name: &str) -> usize {
        usize::from(volley_protocol::name_tag(volume_name)) % self.count()
    }

    /// Sends a command and waits as long as the shard takes; for what changes something, where giving up half-way
    /// would leave the outcome unknown.
    pub(super) async fn ask<T>(&self, shard: usize, command: impl FnOnce(ReplyTo<T>) -> Command) -> Result<T> {
        let gone = || Error::new(Status::ShuttingDown, format!("shard {shard} has stopped"));
        let (reply, answer) = flume::bounded(1);
        let commands = &self.commands[shard];
        commands.send_async(command(reply)).await.map_err(|_| gone())?;
        loop {
            match tokio::time::timeout(GONE_CHECK_PERIOD, answer.recv_async()).await {
                Ok(answered) => return answered.map_err(|_| gone()),
                // A command queued while the shard ended stays in the channel, with its reply sender.
                Err(_) if commands.is_disconnected() => return Err(gone()),
                Err(_) => {}
            }
        }
    }

    /// [`Shards::ask`] for a thread that may block.
    pub(super) fn ask_now<T>(&self, shard: usize, command: impl FnOnce(ReplyTo<T>) -> Command) -> Result<T> {
        let gone = || Error::new(Status::ShuttingDown, format!("shard {shard} has stopped"));
        let (reply, answer) = flume::bounded(1);
        let commands = &self.commands[shard];
        commands.send(command(reply)).map_err(|_| gone())?;
        loop {
            match answer.recv_timeout(GONE_CHECK_PERIOD) {
                Ok(answered) => return Ok(answered),
                Err(flume::RecvTimeoutError::Timeout) if !commands.is_disconnected() => {}
                Err(_) => return Err(gone()),
            }
        }
    }

    /// Sends a question; a shard that does not answer soon is an error.
    pub(super) async fn query<T>(&self, shard: usize, command: impl FnOnce(ReplyTo<T>) -> Command) -> Result<T> {
        within(ANSWER_TIMEOUT, &format!("shard {shard}"), self.ask(shard, command)).await
    }

    /// Asks all shards the same; answers in shard order.
    pub(super) async fn query_all<T>(&self, command: impl Fn(ReplyTo<T>) -> Command) -> Result<Vec<T>> {
        try_join_all((0..self.count()).map(|shard| self.query(shard, &command))).await
    }

    /// The whole object, or `None` if there is none.
    pub(super) async fn get_object(&self, key: &str) -> Result<Option<Vec<u8>>> {
        data_of(self.objects(ObjectOp::Get { key: key.to_string() }).await?)
    }

    /// Exactly these bytes of the object, or `None` if there is none. The shards take turns.
    pub(super) async fn get_object_range(&self, key: &str, range: Range<u64>) -> Result<Option<Vec<u8>>> {
        let shard = self.next_reader.fetch_add(1, Ordering::Relaxed) % self.count();
        let op = ObjectOp::GetRange { key: key.to_string(), range };
        let asked = self.ask(shard, |reply| Command::Objects { op, reply });
        data_of(within(OBJECT_TIMEOUT, "the object store", asked).await?)
    }

    pub(super) async fn list_objects(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        match self.objects(ObjectOp::List { prefix: prefix.to_string() }).await? {
            Ok(ObjectOpReply::Listing(objects)) => Ok(objects),
            Ok(_) => Err(misanswered()),
            Err(error) => Err(object_error(&error)),
        }
    }

    pub(super) async fn put_object(&self, key: String, data: Vec<u8>) -> Result<()> {
        self.objects(ObjectOp::Put { key, data }).await?.map(|_| ()).map_err(|e| object_error(&e))
    }

    /// Whether the object was put: there was none before.
    pub(super) async fn put_object_if_absent(&self, key: String, data: Vec<u8>) -> Result<bool> {
        match self.objects(ObjectOp::PutIfAbsent { key, data }).await? {
            Ok(_) => Ok(true),
            Err(ObjectError::AlreadyExists(_)) => Ok(false),
            Err(error) => Err(object_error(&error)),
        }
    }

    pub(super) async fn delete_object(&self, key: String) -> Result<()> {
        self.objects(ObjectOp::Delete { key }).await?.map(|_| ()).map_err(|e| object_error(&e))
    }

    pub(super) async fn objects(&self, op: ObjectOp) -> Result<std::result::Result<ObjectOpReply, ObjectError>> {
        let asked = self.ask(OBJECT_SHARD, |reply| Command::Objects { op, reply });
        within(OBJECT_TIMEOUT, "the object store", asked).await
    }

    /// Ends every shard; a shard that is gone already counts as stopped.
    pub(super) async fn stop(&self) {
        join_all((0..self.count()).map(|shard| self.ask(shard, |reply| Command::Stop { reply }))).await;
    }
}

async fn within<T>(limit: Duration, who: &str, answer: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::new(Status::Busy, format!("{who} did not answer within {limit:?}"))),
    }
}

/// What a read answered, `None` if there is no such object.
fn data_of(answer: std::result::Result<ObjectOpReply, ObjectError>) -> Result<Option<Vec<u8>>> {
    match answer {
        Ok(ObjectOpReply::Data(data)) => Ok(Some(data)),
        Ok(_) => Err(misanswered()),
        Err(ObjectError::NotFound(_)) => Ok(None),
        Err(error) => Err(object_error(&error)),
    }
}

pub(super) fn object_error(error: &ObjectError) -> Error {
    let status = match error {
        ObjectError::Corrupt(_) => Status::Corrupt,
        _ => Status::ObjectStore,
    };
    Error::new(status, format!("object store: {error}"))
}

fn misanswered() -> Error {
    Error::new(Status::Internal, "a shard answered another object operation than the one asked")
}
