//! Work spread over threads, results taken in order, memory bounded: how image tools use all cores.
//!
//! Only command-line work runs here; shards never block and never start threads.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How much runs at once.
#[derive(Clone, Copy, Debug)]
pub struct Parallel {
    /// Threads that work; at least one.
    pub threads: usize,
    /// Items started but not yet consumed, at most; bounds memory. At least one.
    pub window: u32,
}

impl Parallel {
    /// Bytes of chunks in flight: enough to ride out one slow chunk or the sync of a pack on every core.
    const WINDOW_BYTES: u32 = 64 << 20;

    /// `threads` threads (none given: one per core) over chunks of `chunk_bytes`.
    #[must_use]
    pub fn for_chunks(threads: Option<usize>, chunk_bytes: u32) -> Parallel {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.unwrap_or_else(cores).max(1);
        let window = (Parallel::WINDOW_BYTES / chunk_bytes.max(1)).max(u32::try_from(threads).unwrap_or(u32::MAX));
        Parallel { threads, window }
    }
}

/// Calls `work` for every index below `count` on several threads, and `consume` on the calling thread with every
/// result in the order of the indexes. The first error of `consume` ends the work and is returned.
///
/// # Errors
/// What `consume` returned.
pub fn in_order<T: Send, E>(
    count: u32,
    parallel: Parallel,
    work: impl Fn(u32) -> T + Sync,
    mut consume: impl FnMut(u32, T) -> Result<(), E>,
) -> Result<(), E> {
    let window = Window { state: Mutex::default(), moved: Condvar::new(), count, size: parallel.window.max(1) };
    let (sender, receiver) = flume::unbounded();
    std::thread::scope(|scope| {
        for _ in 0..parallel.threads.max(1) {
            let (sender, window, work) = (sender.clone(), &window, &work);
            scope.spawn(move || {
                while let Some(index) = window.claim() {
                    if sender.send((index, work(index))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let result = drain(&receiver, &window, &mut consume);
        window.close();
        result
    })
}

fn drain<T, E>(
    receiver: &flume::Receiver<(u32, T)>,
    window: &Window,
    consume: &mut impl FnMut(u32, T) -> Result<(), E>,
) -> Result<(), E> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    while let Ok((index, item)) = receiver.recv() {
        early.insert(index, item);
        while let Some(item) = early.remove(&next) {
            consume(next, item)?;
            next += 1;
            window.consumed(next);
        }
    }
    Ok(())
}

/// Hands out indexes, never further than `size` ahead of what was consumed.
struct Window {
    state: Mutex<WindowState>,
    moved: Condvar,
    count: u32,
    size: u32,
}

#[derive(Default)]
struct WindowState {
    next: u32,
    consumed: u32,
    closed: bool,
}

impl Window {
    fn claim(&self) -> Option<u32> {
        let mut state = self.lock();
        loop {
            if state.closed || state.next == self.count {
                return None;
            }
            if state.next - state.consumed < self.size {
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn consumed(&self, consumed: u32) {
        self.lock().consumed = consumed;
        self.moved.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, WindowState> {
        // The state is three plain fields: no panic can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::{Parallel, in_order};

    #[test]
    fn results_come_in_order_and_never_run_far_ahead() {
        for (threads, window) in [(1, 1), (4, 1), (4, 7), (2, 1000)] {
            let consumed = AtomicU32::new(0);
            let mut seen = Vec::new();
            let work = |index| {
                assert!(index < consumed.load(Ordering::SeqCst) + window + 1, "{index} is too early");
                index * 2
            };
            let result: Result<(), ()> = in_order(500, Parallel { threads, window }, work, |index, item| {
                assert_eq!(item, index * 2);
                seen.push(index);
                consumed.store(index + 1, Ordering::SeqCst);
                Ok(())
            });
            assert_eq!(result, Ok(()));
            assert_eq!(seen, (0..500).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        let result = in_order(
            u32::MAX,
            Parallel { threads: 3, window: 8 },
            |i| i,
            |i, _| if i == 100 { Err(i) } else { Ok(()) },
        );
        assert_eq!(result, Err(100));
    }
}
