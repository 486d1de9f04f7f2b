//! The deterministic platform: one seed decides the schedule, the times, the faults and what a crash leaves behind.
//!
//! A [`SimWorld`] is one machine with a disk that forgets, in virtual time. [`SimWorld::platform`] gives the
//! [`Platform`] of its current life; [`SimWorld::crash`] cuts the power: every task and open file is gone, of the
//! unsynced changes any part survives, and the next life begins. Object stores ([`SimObjects`]) and connections
//! ([`SimConnection`]) of the same world share its time and its trace. Same seed, same program: same
//! [`SimWorld::trace_hash`], to the last event.

mod connection;
mod content;
mod disk;
mod executor;
mod faults;
mod file;
mod objects;
mod random;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

pub use connection::{SimConnection, SimKill, SimReader, SimWriter};
pub use disk::CrashPoint;
use disk::Disk;
use executor::Executor;
pub use executor::{RunLimits, SimStop};
pub use faults::DiskOp;
pub use file::SimFile;
pub use objects::{ObjectFaults, ObjectStats, SimObjects};
pub use random::SimRng;

use crate::platform::{DirEntry, OpenMode, Platform, Queue, SpaceInfo, Time};

/// 2026-01-01 00:00 UTC: the wall clock of every simulation starts here.
const WALL_CLOCK_START_MS: u64 = 1_767_225_600_000;
/// What a fresh buffer holds: never zeroes, so that code that relies on zeroes is caught.
const POISON: u8 = 0xa5;

/// Executor, disk and randomness: everything the parts of one world share.
struct Core {
    executor: Rc<Executor>,
    disk: RefCell<Disk>,
    /// Randomness handed to the program.
    program_rng: RefCell<SimRng>,
    /// Tasks given to the queue for what is urgent.
    served: Cell<u64>,
}

/// One simulated machine. Dropping it ends its tasks.
pub struct SimWorld {
    seed: u64,
    core: Rc<Core>,
}

impl SimWorld {
    #[must_use]
    pub fn new(seed: u64) -> SimWorld {
        let core = Core {
            executor: Executor::new(seed),
            disk: RefCell::new(Disk::new(seed)),
            program_rng: RefCell::new(SimRng::stream(seed, "program")),
            served: Cell::new(0),
        };
        SimWorld { seed, core: Rc::new(core) }
    }

    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The platform of the current life.
    #[must_use]
    pub fn platform(&self) -> Sim {
        Sim { core: self.core.clone(), life: self.core.executor.life() }
    }

    /// Another machine with a copy of this disk as it is now, without faults: whatever it does leaves this one alone.
    #[must_use]
    pub fn fork(&self, seed: u64) -> SimWorld {
        let fork = SimWorld::new(seed);
        *fork.core.disk.borrow_mut() = self.core.disk.borrow().fork(seed);
        fork
    }

    /// Runs the world until `main` is done, within the default limits.
    ///
    /// # Errors
    /// Deadlock, an exceeded limit, or a planned crash (which has happened: the next life has begun).
    pub fn run<T>(&self, main: impl Future<Output = T>) -> Result<T, SimStop> {
        self.run_within(RunLimits::default(), main)
    }

    /// Like [`SimWorld::run`] within given limits.
    ///
    /// # Errors
    /// As [`SimWorld::run`].
    pub fn run_within<T>(&self, limits: RunLimits, main: impl Future<Output = T>) -> Result<T, SimStop> {
        let result = self.core.executor.run(main, limits);
        if matches!(result, Err(SimStop::Crashed)) {
            self.crash();
        }
        result
    }

    /// Runs `main` to its end in a world where nothing may stop it.
    ///
    /// # Panics
    /// If the run stops early.
    pub fn block_on<T>(&self, main: impl Future<Output = T>) -> T {
        self.run(main).unwrap_or_else(|stop| panic!("seed {}: {stop}", self.seed))
    }

    /// Cuts the power now. Unsynced changes survive in parts; the next life begins.
    pub fn crash(&self) {
        self.core.executor.note("crash", &[]);
        self.core.executor.kill_all();
        self.core.disk.borrow_mut().crash();
    }

    /// Ends the process but not the machine: tasks are gone, the disk has everything that was issued to it.
    pub fn kill(&self) {
        self.core.executor.note("kill", &[]);
        self.core.executor.drain_devices();
        self.core.executor.kill_all();
    }

    /// Cuts the power when this many more steps have run (`None`: not at all).
    pub fn crash_after_steps(&self, steps: Option<u64>) {
        self.end_after_steps(steps, SimStop::Crashed);
    }

    /// Ends the run when this many more steps have run (`None`: does not); the tasks stay as they are, so that the
    /// caller decides what becomes of them.
    pub fn stop_after_steps(&self, steps: Option<u64>) {
        self.end_after_steps(steps, SimStop::Stopped);
    }

    fn end_after_steps(&self, steps: Option<u64>, stop: SimStop) {
        let at = steps.map(|steps| (self.core.executor.steps() + steps, stop));
        self.core.executor.stop_at_step(at);
    }

    /// Cuts the power at the `nth` durable point since the world began, counting from 1 (`None`: not at all).
    pub fn crash_at_sync(&self, point: Option<(u64, CrashPoint)>) {
        self.core.disk.borrow_mut().crash_at_sync(point);
    }

    /// Durable points (datasyncs and directory syncs) begun since the world began.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.core.disk.borrow().syncs()
    }

    #[must_use]
    pub fn steps(&self) -> u64 {
        self.core.executor.steps()
    }

    /// Tasks that were given to [`Queue::Serve`] so far.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.core.served.get()
    }

    #[must_use]
    pub fn now(&self) -> Time {
        self.core.executor.now()
    }

    /// A fold over every event so far.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.core.executor.trace_hash()
    }

    /// Calls `hook` after every step from now on (`None`: no longer). It may look at everything and must change nothing.
    pub fn on_step(&self, hook: Option<Box<dyn FnMut()>>) {
        self.core.executor.on_step(hook);
    }

    /// Keeps the last events as text from now on; they cost time and memory.
    pub fn keep_trace(&self) {
        self.core.executor.keep_trace();
    }

    /// The last events, oldest first: virtual nanoseconds, event, values.
    #[must_use]
    pub fn trace_lines(&self) -> Vec<String> {
        self.core.executor.trace_lines()
    }

    /// Adds an event of the test to the trace.
    pub fn note(&self, event: &str, values: &[u64]) {
        self.core.executor.note(event, values);
    }

    /// From now on operations on paths that start with `prefix` fail with this probability in a million.
    pub fn fail_disk(&self, prefix: &str, op: DiskOp, ppm: u32) {
        self.core.disk.borrow_mut().faults.fail(prefix, op, ppm);
    }

    /// The `nth` such operation from now fails, once.
    pub fn fail_disk_nth(&self, prefix: &str, op: DiskOp, nth: u64) {
        self.core.disk.borrow_mut().faults.fail_nth(prefix, op, nth);
    }

    /// From now on such operations take this long.
    pub fn slow_disk(&self, prefix: &str, op: DiskOp, latency: std::ops::Range<Duration>) {
        self.core.disk.borrow_mut().faults.slow(prefix, op, latency);
    }

    /// Ends all failures and slowness of the disk.
    pub fn heal_disk(&self) {
        self.core.disk.borrow_mut().faults.clear();
    }

    /// Size of the disk in bytes; `None`: as good as endless.
    pub fn set_disk_capacity(&self, bytes: Option<u64>) {
        self.core.disk.borrow_mut().set_capacity(bytes);
    }

    /// Whether files may share blocks from now on; at first they may not.
    pub fn share_extents(&self, can: bool) {
        self.core.disk.borrow_mut().shares_extents = can;
    }

    #[must_use]
    pub fn disk_free_bytes(&self) -> u64 {
        self.core.disk.borrow().space().free_bytes
    }

    /// The bytes a reader of the file would see now.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn file_bytes(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.platform().peek(path, 0, usize::MAX)
    }

    /// Damages one byte of a file on the medium, behind the program's back.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn flip_file_byte(&self, path: &Path, offset: u64) -> io::Result<()> {
        let inode = self.core.disk.borrow().file(path)?;
        inode.borrow_mut().flip(offset);
        Ok(())
    }

    /// The device wrote to the wrong place: `len` bytes from `from` lie at `to` too. All are multiples of 4096, inside of the
    /// file.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn misdirect_file(&self, path: &Path, from: u64, to: u64, len: u64) -> io::Result<()> {
        let inode = self.core.disk.borrow().file(path)?;
        inode.borrow_mut().misdirect(from, to, len);
        Ok(())
    }
}

impl Drop for SimWorld {
    fn drop(&mut self) {
        // Tasks hold the world and the world holds its tasks: end the circle.
        self.core.executor.kill_all();
    }
}

/// The platform of one life of a world. Clones are the same machine.
#[derive(Clone)]
pub struct Sim {
    core: Rc<Core>,
    life: u64,
}

impl Sim {
    /// What a reader of the file would see now, in no time: at most `len` bytes from `offset`.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn peek(&self, path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let inode = self.core.disk.borrow().file(path)?;
        let inode = inode.borrow();
        let rest = usize::try_from(inode.live.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        Ok(inode.live.read(offset, len.min(rest)))
    }

    /// Waits as long as `op` on `path` takes; fails where a fault is due or the life is over.
    async fn device(&self, path: &Path, op: DiskOp) -> io::Result<()> {
        self.check_life()?;
        let (latency, struck) = self.draw(path, op);
        self.sleep(latency).await;
        self.core.executor.note("disk", &[op as u64, path_hash(path), u64::from(struck)]);
        if struck { Err(device_error(path, op)) } else { Ok(()) }
    }

    fn draw(&self, path: &Path, op: DiskOp) -> (Duration, bool) {
        let disk = &mut *self.core.disk.borrow_mut();
        (disk.faults.latency(path, op, &mut disk.rng), disk.faults.strikes(path, op, &mut disk.rng))
    }

    fn check_life(&self) -> io::Result<()> {
        if self.life == self.core.executor.life() {
            return Ok(());
        }
        Err(io::Error::other("this life of the machine is over"))
    }

    fn names<T>(&self, f: impl FnOnce(&mut Disk) -> T) -> T {
        f(&mut self.core.disk.borrow_mut())
    }

    /// Counts a durable point; never returns if the power fails here.
    async fn begin_sync(&self) -> bool {
        let crash = self.names(Disk::begin_sync);
        if crash == Some(CrashPoint::Before) {
            self.core.executor.request_crash();
            std::future::pending::<()>().await;
        }
        crash == Some(CrashPoint::After)
    }
}

impl Platform for Sim {
    type File = SimFile;
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    fn now(&self) -> Time {
        self.core.executor.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        WALL_CLOCK_START_MS + self.now().0 / 1_000_000
    }

    fn random_u64(&self) -> u64 {
        self.core.program_rng.borrow_mut().next_u64()
    }

    async fn sleep(&self, duration: Duration) {
        self.core.executor.sleep_until(self.now().after(duration)).await;
    }

    async fn yield_now(&self) {
        executor::Yield::default().await;
    }

    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.core.served.update(|served| served + u64::from(queue == Queue::Serve));
        // The schedule is random: it contains every order that priorities between queues could give.
        self.core.executor.spawn(self.life, task_name(&task), Box::pin(task));
    }

    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![POISON; len]
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimFile> {
        self.device(path, DiskOp::Directory).await?;
        let inode = self.names(|disk| disk.open(path, mode))?;
        Ok(SimFile::new(self.clone(), path, inode, mode))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.device(to, DiskOp::Directory).await?;
        self.names(|disk| disk.rename(from, to))
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.device(to, DiskOp::Directory).await?;
        self.names(|disk| disk.hard_link(from, to))
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.device(path, DiskOp::Directory).await?;
        self.names(|disk| disk.remove_file(path))
    }

    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.device(path, DiskOp::Directory).await?;
        self.names(|disk| disk.create_dir_all(path))
    }

    async fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.device(path, DiskOp::Directory).await?;
        self.names(|disk| disk.list_dir(path))
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.check_life()?;
        let crash_after = self.begin_sync().await;
        let point = self.names(|disk| disk.dir_sync_point(path))?;
        self.device(path, DiskOp::Sync).await?;
        self.names(|disk| disk.sync_dir(path, point));
        if crash_after {
            self.core.executor.request_crash();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn space(&self, path: &Path) -> io::Result<SpaceInfo> {
        self.device(path, DiskOp::Directory).await?;
        Ok(self.names(|disk| disk.space()))
    }
}

fn task_name<F>(_task: &F) -> &'static str {
    std::any::type_name::<F>()
}

fn path_hash(path: &Path) -> u64 {
    u64::from(crc32fast::hash(path.as_os_str().as_encoded_bytes()))
}

fn device_error(path: &Path, op: DiskOp) -> io::Error {
    io::Error::other(format!("{}: simulated {op:?} failure", path.display()))
}
