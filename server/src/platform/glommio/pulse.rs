//! A thread that wakes an executor now and then, so that it never sleeps for long while it has work.
//!
//! glommio arms a timer that preempts its queues, and then runs them. A thread that the kernel takes off its core between
//! the two, for longer than the timer, finds itself preempted before it ran anything; glommio takes that for "nothing to
//! do" and sleeps, with tasks ready to run that no event will ever wake (mended upstream after the release we use, in
//! glommio/glommio#53). A shard that had just started stood still for ever like this, a busy one until its next request.
//! A timer of the executor does not help: its task is lost in the same way as the others. What comes from another thread
//! is never lost, and when the executor is awake everything that is ready runs.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};
use std::time::Duration;

use glommio::TaskQueueHandle;

/// The longest sleep over work of an executor that ran something since the last beat.
const BUSY: Duration = Duration::from_millis(2);
/// That of one that did nothing: 20 wake-ups a second are what an idle shard costs.
const IDLE: Duration = Duration::from_millis(50);

/// The thread ends when this is dropped.
pub struct Pulse(#[expect(dead_code, reason = "it lives, and that is all")] Arc<()>);

#[derive(Default)]
struct Shared {
    /// The task of the executor; none before its first run.
    task: OnceLock<Waker>,
    /// The executor ran more than that task since the last beat.
    busy: AtomicBool,
}

impl Pulse {
    /// Starts the pulse of the executor that runs the caller. The thread stays on the executor's core: there its beats delay nobody else.
    ///
    /// # Errors
    /// As `pthread_create(3)`.
    pub fn start(queue: TaskQueueHandle) -> std::io::Result<Pulse> {
        let (alive, shared) = (Arc::new(()), Arc::new(Shared::default()));
        let felt = shared.clone();
        let feel = poll_fn(move |context| {
            felt.task.get_or_init(|| context.waker().clone());
            // Counted since the last call; one task is this one.
            felt.busy.store(glommio::executor().executor_stats().tasks_executed() > 1, Ordering::Relaxed);
            Poll::<()>::Pending
        });
        glommio::spawn_local_into(feel, queue).expect("the queue was made just now").detach();
        let executor = Arc::downgrade(&alive);
        std::thread::Builder::new().name("pulse".to_owned()).spawn(move || {
            while executor.strong_count() > 0 {
                if let Some(task) = shared.task.get() {
                    task.wake_by_ref();
                }
                std::thread::sleep(if shared.busy.load(Ordering::Relaxed) { BUSY } else { IDLE });
            }
        })?;
        Ok(Pulse(alive))
    }
}
