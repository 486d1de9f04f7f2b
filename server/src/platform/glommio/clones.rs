//! Clones on their way to the filesystem: those of one source go to a helper thread together.
//!
//! A filesystem clones from one file one by one anyway, and for small ranges waking a helper costs as much as a clone. So
//! per source one helper at a time has whatever came while the one before was away.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use futures::channel::oneshot;
use glommio::TaskQueueHandle;

use super::GlommioFile;
use crate::platform::blocking::clone_range;

/// Clones that a helper makes before it comes back: about a millisecond's worth, which the first of them waits for.
const TOGETHER_MAX: usize = 32;

/// A part of one file that is to share a part of another.
pub(super) struct Clone {
    pub(super) file: GlommioFile,
    pub(super) offset: u64,
    pub(super) source: GlommioFile,
    pub(super) source_offset: u64,
    pub(super) len: u64,
}

impl Clone {
    /// The call of the filesystem, with descriptors of its own: it outlives whoever asked for it. Only those that go have
    /// some: thousands may wait.
    fn call(&self) -> io::Result<impl FnOnce() -> io::Result<()> + Send + 'static> {
        let (file, source): (OwnedFd, OwnedFd) = (self.file.own_descriptor()?, self.source.own_descriptor()?);
        let (offset, source_offset, len) = (self.offset, self.source_offset, self.len);
        Ok(move || clone_range(&file, offset, &source, source_offset, len))
    }
}

type Waiting = Vec<(Clone, oneshot::Sender<io::Result<()>>)>;

thread_local! {
    /// Clones that wait, by the descriptor of their source. An entry is there as long as somebody sends them off.
    static WAITING: RefCell<HashMap<RawFd, Waiting>> = RefCell::default();
    /// Where they are sent off: whoever came first may be in no hurry, who joins may be.
    static QUEUE: Cell<Option<TaskQueueHandle>> = const { Cell::new(None) };
}

/// Sends clones off by tasks of this queue from now on.
pub(super) fn send_by(queue: TaskQueueHandle) {
    QUEUE.set(Some(queue));
}

/// Makes a clone from the file that has the descriptor `source`.
pub(super) async fn join(source: RawFd, clone: Clone) -> io::Result<()> {
    let (sender, answer) = oneshot::channel();
    let is_first = WAITING.with_borrow_mut(|waiting| {
        let is_first = !waiting.contains_key(&source);
        waiting.entry(source).or_default().push((clone, sender));
        is_first
    });
    if is_first {
        let queue = QUEUE.get().expect("there is no file without a platform");
        glommio::spawn_local_into(send_off(source), queue).expect("the queues live as long as the executor").detach();
    }
    answer.await.unwrap_or_else(|_| Err(io::Error::other("the executor is stopping")))
}

async fn send_off(source: RawFd) {
    while let Some(together) = take(source) {
        let (clones, senders): (Vec<Clone>, Vec<_>) = together.into_iter().unzip();
        let calls: Vec<_> = clones.iter().map(Clone::call).collect();
        let make = move || Ok(calls.into_iter().map(|call| call?()).collect::<Vec<_>>());
        let made = super::off_reactor(make).await.unwrap_or_default();
        for (sender, made) in senders.into_iter().zip(made) {
            // Who has gone away needs no answer.
            let _ = sender.send(made);
        }
    }
}

/// The next to go; `None`, and the entry is gone, when there are none.
fn take(source: RawFd) -> Option<Waiting> {
    WAITING.with_borrow_mut(|waiting| {
        let all = waiting.get_mut(&source)?;
        if all.is_empty() {
            waiting.remove(&source);
            return None;
        }
        let count = all.len().min(TOGETHER_MAX);
        Some(all.drain(..count).collect())
    })
}
