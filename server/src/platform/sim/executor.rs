//! The simulator's executor: one thread, virtual time, a seeded choice among ready tasks.
//!
//! Nothing outside decides anything: the same seed and the same program give the same steps, the same times and the
//! same trace hash. Wakers are `Send` because flume and futures demand it, but only this thread ever wakes.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::random::SimRng;
use crate::platform::Time;

/// A step takes up to this long, so that a task that spins on `yield_now` still sees time pass.
const STEP_NANOS_MAX: u64 = 400;
/// Events kept as text for the report of a failed run.
const TRACE_LINES_MAX: usize = 4000;

/// Why a run ended before its future did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimStop {
    /// Nothing can ever run again. `parked` names the waiting tasks.
    #[error("deadlock: no task is ready and no timer is set; waiting: {parked:?}")]
    Deadlock { parked: Vec<String> },
    #[error("step limit of {0} reached")]
    StepLimit(u64),
    /// The virtual time given to this run has passed. `parked` names the waiting tasks.
    #[error("virtual time limit of {limit:?} reached; waiting: {parked:?}")]
    TimeLimit { limit: Duration, parked: Vec<String> },
    /// The planned number of steps has run. The tasks are where they were.
    #[error("stopped as planned")]
    Stopped,
    /// The machine lost power; every task is gone.
    #[error("crashed as planned")]
    Crashed,
}

/// Limits of one run.
#[derive(Clone, Copy, Debug)]
pub struct RunLimits {
    pub steps: u64,
    pub virtual_time: Duration,
}

impl Default for RunLimits {
    fn default() -> RunLimits {
        RunLimits { steps: 20_000_000, virtual_time: Duration::from_secs(24 * 3600) }
    }
}

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    name: &'static str,
    /// `None` while it is being polled.
    future: Option<LocalFuture>,
    waker: Arc<TaskWaker>,
}

enum TimerAction {
    Wake(Waker),
    /// A device finishes a request, whatever became of the one who asked.
    Device(Box<dyn FnOnce()>),
}

struct State {
    tasks: BTreeMap<u64, Task>,
    next_task: u64,
    now: Time,
    timers: BTreeMap<(Time, u64), TimerAction>,
    next_timer: u64,
    rng: SimRng,
    steps: u64,
    life: u64,
    crash_requested: bool,
    /// Ends the run at this step, in this way.
    stop_at_step: Option<(u64, SimStop)>,
    trace: Trace,
}

/// A fold over every event of a run, and its last events in words.
#[derive(Default)]
struct Trace {
    hash: u64,
    lines: Option<VecDeque<String>>,
}

type StepHook = Box<dyn FnMut()>;

pub(super) struct Executor {
    state: RefCell<State>,
    on_step: RefCell<Option<StepHook>>,
    ready: Arc<ReadyList>,
}

#[derive(Default)]
struct ReadyList(Mutex<Vec<u64>>);

impl ReadyList {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<u64>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct TaskWaker {
    task: u64,
    queued: AtomicBool,
    ready: Arc<ReadyList>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.with(|list| list.push(self.task));
        }
    }
}

impl Executor {
    pub(super) fn new(seed: u64) -> Rc<Executor> {
        let state = State {
            tasks: BTreeMap::new(),
            next_task: 1,
            // Not zero: code that subtracts from the clock must not rely on it.
            now: Time(1_000_000_000),
            timers: BTreeMap::new(),
            next_timer: 0,
            rng: SimRng::stream(seed, "schedule"),
            steps: 0,
            life: 1,
            crash_requested: false,
            stop_at_step: None,
            trace: Trace::default(),
        };
        Rc::new(Executor { state: RefCell::new(state), on_step: RefCell::default(), ready: Arc::default() })
    }

    pub(super) fn now(&self) -> Time {
        self.state.borrow().now
    }

    pub(super) fn steps(&self) -> u64 {
        self.state.borrow().steps
    }

    pub(super) fn life(&self) -> u64 {
        self.state.borrow().life
    }

    pub(super) fn trace_hash(&self) -> u64 {
        self.state.borrow().trace.hash
    }

    pub(super) fn keep_trace(&self) {
        self.state.borrow_mut().trace.lines = Some(VecDeque::new());
    }

    pub(super) fn trace_lines(&self) -> Vec<String> {
        self.state.borrow().trace.lines.iter().flatten().cloned().collect()
    }

    /// Ends the current life at the next step boundary.
    pub(super) fn request_crash(&self) {
        self.state.borrow_mut().crash_requested = true;
    }

    pub(super) fn stop_at_step(&self, step: Option<(u64, SimStop)>) {
        self.state.borrow_mut().stop_at_step = step;
    }

    pub(super) fn on_step(&self, hook: Option<StepHook>) {
        *self.on_step.borrow_mut() = hook;
    }

    /// Folds an event into the trace.
    pub(super) fn note(&self, event: &str, values: &[u64]) {
        let mut state = self.state.borrow_mut();
        let now = state.now;
        state.trace.note(now, event, values);
    }

    pub(super) fn spawn(&self, life: u64, name: &'static str, future: LocalFuture) {
        let mut state = self.state.borrow_mut();
        if life != state.life {
            // A destructor of a life that has ended: the machine it ran on is off.
            drop(state);
            drop(future);
            return;
        }
        let id = state.next_task;
        state.next_task += 1;
        let waker = self.waker(id);
        state.tasks.insert(id, Task { name, future: Some(future), waker: waker.clone() });
        drop(state);
        waker.wake();
    }

    /// A device does `action` at `at`, unless the power fails first.
    pub(super) fn at_device(&self, at: Time, action: impl FnOnce() + 'static) {
        self.add_timer(at, TimerAction::Device(Box::new(action)));
    }

    /// Lets every device finish what it was given.
    pub(super) fn drain_devices(&self) {
        let timers = std::mem::take(&mut self.state.borrow_mut().timers);
        for action in timers.into_values() {
            if let TimerAction::Device(run) = action {
                run();
            }
        }
    }

    pub(super) fn sleep_until(self: &Rc<Self>, at: Time) -> Sleep {
        Sleep { executor: self.clone(), at, timer: None }
    }

    /// Runs everything until `main` is done. Other tasks stay where they are and go on in the next run.
    pub(super) fn run<T>(&self, main: impl Future<Output = T>, limits: RunLimits) -> Result<T, SimStop> {
        let mut main = pin!(main);
        let main_id = {
            let mut state = self.state.borrow_mut();
            state.next_task += 1;
            state.next_task - 1
        };
        let main_waker = self.waker(main_id);
        main_waker.clone().wake();
        let step_limit = self.steps().saturating_add(limits.steps);
        let deadline = self.now().after(limits.virtual_time);
        loop {
            self.fire_due_timers();
            if self.state.borrow().crash_requested {
                return Err(SimStop::Crashed);
            }
            if let Some((step, stop)) = &self.state.borrow().stop_at_step
                && self.steps() >= *step
            {
                return Err(stop.clone());
            }
            if self.steps() >= step_limit {
                return Err(SimStop::StepLimit(limits.steps));
            }
            if self.now() > deadline {
                return Err(SimStop::TimeLimit { limit: limits.virtual_time, parked: self.parked() });
            }
            let Some(id) = self.pick() else {
                if self.advance() {
                    continue;
                }
                return Err(SimStop::Deadlock { parked: self.parked() });
            };
            if id == main_id {
                self.begin_step(id);
                main_waker.queued.store(false, Ordering::Relaxed);
                let waker = Waker::from(main_waker.clone());
                if let Poll::Ready(value) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return Ok(value);
                }
            } else {
                self.step_task(id);
            }
            if let Some(hook) = &mut *self.on_step.borrow_mut() {
                hook();
            }
        }
    }

    /// Ends the life: no task, timer or wake-up of it survives.
    pub(super) fn kill_all(&self) {
        {
            let mut state = self.state.borrow_mut();
            state.life += 1;
            state.crash_requested = false;
            state.stop_at_step = None;
        }
        loop {
            // Destructors may wake or drop others: take everything out before dropping it.
            let (tasks, timers) = {
                let mut state = self.state.borrow_mut();
                (std::mem::take(&mut state.tasks), std::mem::take(&mut state.timers))
            };
            if tasks.is_empty() && timers.is_empty() {
                break;
            }
            drop(tasks);
            drop(timers);
        }
        self.ready.with(Vec::clear);
    }

    fn waker(&self, task: u64) -> Arc<TaskWaker> {
        Arc::new(TaskWaker { task, queued: AtomicBool::new(false), ready: self.ready.clone() })
    }

    fn add_timer(&self, at: Time, action: TimerAction) -> (Time, u64) {
        let mut state = self.state.borrow_mut();
        let key = (at, state.next_timer);
        state.next_timer += 1;
        state.timers.insert(key, action);
        key
    }

    fn fire_due_timers(&self) {
        loop {
            let action = {
                let mut state = self.state.borrow_mut();
                let now = state.now;
                match state.timers.first_entry() {
                    Some(entry) if entry.key().0 <= now => entry.remove(),
                    _ => return,
                }
            };
            match action {
                TimerAction::Wake(waker) => waker.wake(),
                TimerAction::Device(run) => run(),
            }
        }
    }

    fn pick(&self) -> Option<u64> {
        let mut state = self.state.borrow_mut();
        self.ready.with(|list| {
            if list.is_empty() {
                return None;
            }
            let index = state.rng.index(list.len());
            Some(list.swap_remove(index))
        })
    }

    /// Moves time to the next timer; false if there is none.
    fn advance(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let Some(&(at, _)) = state.timers.keys().next() else { return false };
        state.now = state.now.max(at);
        true
    }

    fn begin_step(&self, id: u64) {
        let mut state = self.state.borrow_mut();
        state.steps += 1;
        state.now.0 += state.rng.below(STEP_NANOS_MAX);
        let now = state.now;
        state.trace.fold(&[now.0, id]);
    }

    fn step_task(&self, id: u64) {
        let Some((mut future, waker)) = self.take_task(id) else { return };
        self.begin_step(id);
        let waker = Waker::from(waker);
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            if let Some(task) = self.state.borrow_mut().tasks.get_mut(&id) {
                task.future = Some(future);
            }
            return;
        }
        let finished = self.state.borrow_mut().tasks.remove(&id);
        drop(finished);
    }

    fn take_task(&self, id: u64) -> Option<(LocalFuture, Arc<TaskWaker>)> {
        let mut state = self.state.borrow_mut();
        let task = state.tasks.get_mut(&id)?;
        task.waker.queued.store(false, Ordering::Relaxed);
        Some((task.future.take()?, task.waker.clone()))
    }

    /// Waiting tasks by type, with their number.
    fn parked(&self) -> Vec<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for task in self.state.borrow().tasks.values() {
            *counts.entry(task.name).or_default() += 1;
        }
        counts.into_iter().map(|(name, count)| format!("{count} x {name}")).collect()
    }
}

impl Trace {
    fn note(&mut self, now: Time, event: &str, values: &[u64]) {
        self.fold(&[now.0, u64::from(crc32fast::hash(event.as_bytes()))]);
        self.fold(values);
        let Some(lines) = &mut self.lines else { return };
        if lines.len() == TRACE_LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(format!("{:>14} {event} {values:?}", now.0));
    }

    fn fold(&mut self, values: &[u64]) {
        for value in values {
            self.hash = (self.hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.borrow();
        f.debug_struct("Executor").field("now", &state.now).field("steps", &state.steps).finish_non_exhaustive()
    }
}

/// Resolves at its time; forgets its timer when dropped early.
pub(super) struct Sleep {
    executor: Rc<Executor>,
    at: Time,
    timer: Option<(Time, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.forget_timer();
        if self.executor.now() >= self.at {
            return Poll::Ready(());
        }
        let key = self.executor.add_timer(self.at, TimerAction::Wake(cx.waker().clone()));
        self.timer = Some(key);
        Poll::Pending
    }
}

impl Sleep {
    fn forget_timer(&mut self) {
        if let Some(key) = self.timer.take() {
            let action = self.executor.state.borrow_mut().timers.remove(&key);
            drop(action);
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget_timer();
    }
}

/// Lets every other ready task go first, or not: the scheduler decides.
#[derive(Default)]
pub(super) struct Yield {
    yielded: bool,
}

impl Future for Yield {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
