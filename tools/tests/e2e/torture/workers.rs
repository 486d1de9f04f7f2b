//! Workers: each owns stripes of a volume, writes, flushes and reads them at random, and knows what it must find.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use volley_tools::nbd::wire::errno;

use super::guest::{Failure, NbdGuest};
use super::model::{Model, SECTOR};
use crate::harness::Random;

/// Stripes of 1 MiB, dealt to the workers in turn: most requests lie in one or two chunks.
const STRIPE_SECTORS: u64 = 2048;
/// Residency is kept by 4 KiB: a trim that is cut otherwise leaves its edges alone.
const BLOCK_SECTORS: u64 = 8;
/// After a connection ended, a new one works within this.
const RECONNECT_MAX: Duration = Duration::from_secs(60);

/// Errors that guests may see just now.
#[derive(Default)]
pub(crate) struct Tolerance {
    /// The store is full.
    pub(crate) no_space: AtomicBool,
    /// The disk fails.
    pub(crate) io_errors: AtomicBool,
    /// The server is away for longer than the agent's deadline, in ms; 0: it is not.
    pub(crate) deadline_ms: AtomicU64,
    /// Errors that were seen and tolerated.
    pub(crate) seen: AtomicU64,
}

impl Tolerance {
    /// Panics unless a request that took `took` may fail so.
    fn check(&self, what: &str, errno: u32, took: Duration) {
        let deadline = Duration::from_millis(self.deadline_ms.load(Ordering::SeqCst));
        let tolerated = match errno {
            errno::ENOSPC => self.no_space.load(Ordering::SeqCst),
            _ if self.io_errors.load(Ordering::SeqCst) => true,
            _ => !deadline.is_zero() && took >= deadline,
        };
        assert!(tolerated, "{what} failed with errno {errno} after {took:?}, deadline {deadline:?}");
        assert!(deadline.is_zero() || took < deadline * 6, "{what} was answered only after {took:?}");
        self.seen.fetch_add(1, Ordering::SeqCst);
    }
}

/// Where a worker works.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) socket: PathBuf,
    pub(crate) export: String,
    pub(crate) image: Arc<Vec<u8>>,
    pub(crate) tolerance: Arc<Tolerance>,
    /// Counts deaths of agents: a connection of an older one has lost what it had not flushed.
    pub(crate) agents_killed: Arc<AtomicU64>,
    /// Requests answered, of all volumes' workers.
    pub(crate) answered: Arc<AtomicU64>,
    /// How long each took, of all volumes' workers.
    pub(crate) latencies: Arc<Mutex<Vec<Duration>>>,
}

/// Workers of one volume.
pub(crate) struct Workers {
    place: Place,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Worker>>,
}

struct Worker {
    place: Place,
    model: Model,
    rng: Random,
    number: u64,
    of: u64,
    guest: Option<NbdGuest>,
    /// Agents that had been killed when the guest connected: one more explains the end of its connection, also if that is
    /// noticed only by the next request.
    agents_killed: u64,
}

impl Workers {
    /// Starts them; returns when each has its connection.
    pub(crate) fn start(place: &Place, of: u64, seed: u64) -> Workers {
        let stop = Arc::new(AtomicBool::new(false));
        let (connected, all_connected) = std::sync::mpsc::channel();
        let start = |number| {
            let (place, stop, connected) = (place.clone(), stop.clone(), connected.clone());
            let rng = Random::new(seed ^ (number + 1) << 32);
            std::thread::spawn(move || {
                let model = Model::new(place.image.clone());
                let mut worker = Worker { place, model, rng, number, of, guest: None, agents_killed: 0 };
                worker.connect();
                connected.send(()).expect("the test waits");
                while !stop.load(Ordering::SeqCst) {
                    worker.step();
                }
                worker
            })
        };
        let threads = (0..of).map(start).collect();
        (0..of).for_each(|_| all_connected.recv().expect("a worker connects"));
        Workers { place: place.clone(), threads, stop }
    }

    /// Whether a worker has found something wrong.
    pub(crate) fn any_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Stops the load, reads every sector through the agent, flushes, and returns what the volume's file must hold once
    /// it is hydrated.
    pub(crate) fn finish(self) -> Expected {
        self.stop.store(true, Ordering::SeqCst);
        let expected = Mutex::new(Vec::new());
        for thread in self.threads {
            let mut worker = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            worker.flush();
            worker.read_back();
            expected.lock().expect("one thread").push((worker.number, worker.of, worker.model));
        }
        Expected { export: self.place.export, models: expected.into_inner().expect("one thread") }
    }
}

/// What a volume must hold after its workers ended.
pub(crate) struct Expected {
    pub(crate) export: String,
    models: Vec<(u64, u64, Model)>,
}

impl Expected {
    /// Compares a raw file with it.
    pub(crate) fn check_file(&self, path: &std::path::Path) {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for (number, of, model) in &self.models {
            for stripe in own_stripes(*number, *of, model.sectors()) {
                let range = byte_range(stripe, model.sectors());
                let start = stripe * STRIPE_SECTORS;
                model.check(start, &bytes[range]).unwrap_or_else(|story| panic!("{}: raw file: {story}", self.export));
            }
        }
    }
}

fn own_stripes(number: u64, of: u64, sectors: u64) -> impl Iterator<Item = u64> {
    (0..sectors.div_ceil(STRIPE_SECTORS)).filter(move |stripe| stripe % of == number)
}

fn byte_range(stripe: u64, sectors: u64) -> std::ops::Range<usize> {
    let end = ((stripe + 1) * STRIPE_SECTORS).min(sectors);
    (stripe * STRIPE_SECTORS * SECTOR) as usize..(end * SECTOR) as usize
}

impl Worker {
    /// One request of any kind.
    fn step(&mut self) {
        match self.rng.below(100) {
            0..45 => self.write(),
            45..80 => self.read(),
            80..88 => self.flush(),
            88..94 => self.zero(),
            _ => self.trim(),
        }
    }

    /// Runs a request on the connection and reconnects if that ended. `Err`: not done, or perhaps done.
    fn ask<T>(
        &mut self,
        what: &str,
        request: impl FnOnce(&mut NbdGuest) -> Result<T, Failure>,
    ) -> (Result<T, String>, bool) {
        let begun = Instant::now();
        let agents_killed = self.agents_killed;
        match request(self.guest.as_mut().expect("connected")) {
            Ok(answer) => {
                self.place.answered.fetch_add(1, Ordering::SeqCst);
                self.place.latencies.lock().expect("nobody panics with it").push(begun.elapsed());
                (Ok(answer), false)
            }
            Err(Failure::Errno(errno)) => {
                self.place.tolerance.check(&format!("{}: {what}", self.place.export), errno, begun.elapsed());
                (Err(format!("errno {errno}")), false)
            }
            Err(Failure::Gone) => {
                self.guest = None;
                let end = Instant::now() + RECONNECT_MAX;
                // The agent counts as killed a moment after it is.
                while self.place.agents_killed.load(Ordering::SeqCst) == agents_killed && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let killed = self.place.agents_killed.load(Ordering::SeqCst) != agents_killed;
                assert!(killed, "{}: the agent ended the connection in {what}", self.place.export);
                (Err("the agent was killed".to_owned()), true)
            }
        }
    }

    fn write(&mut self) {
        let (first, count) = self.range();
        let write = self.model.begin(first, count, false);
        let data = self.model.bytes(write);
        let fua = self.rng.below(6) == 0;
        let (result, gone) = self.ask("write", |guest| guest.write(first * SECTOR, &data, fua));
        self.model.end(write, fua, result);
        self.after(gone);
    }

    fn zero(&mut self) {
        let (first, count) = self.range();
        let write = self.model.begin(first, count, true);
        let (result, gone) = self.ask("write-zeroes", |guest| guest.zero(first * SECTOR, (count * SECTOR) as usize));
        self.model.end(write, false, result);
        self.after(gone);
    }

    fn trim(&mut self) {
        let (first, count) = self.range();
        let end = (first + count) / BLOCK_SECTORS * BLOCK_SECTORS;
        let first = first.next_multiple_of(BLOCK_SECTORS);
        if first >= end {
            return;
        }
        let write = self.model.begin(first, end - first, true);
        let len = ((end - first) * SECTOR) as usize;
        let (result, gone) = self.ask("trim", |guest| guest.trim(first * SECTOR, len));
        self.model.end(write, false, result);
        self.after(gone);
    }

    fn read(&mut self) {
        let (first, count) = self.range();
        let (result, gone) = self.ask("read", |guest| guest.read(first * SECTOR, (count * SECTOR) as usize));
        if let Ok(found) = result {
            self.judge(|model| model.check(first, &found));
        }
        self.after(gone);
    }

    fn flush(&mut self) {
        let (result, gone) = self.ask("flush", NbdGuest::flush);
        self.model.flushed(result);
        self.after(gone);
    }

    /// After an agent died: whatever is there after a flush is there for good, and must be one of the possible values.
    fn after(&mut self, gone: bool) {
        if !gone {
            return;
        }
        loop {
            self.model.note("the agent died");
            self.model.may_have_lost = true;
            self.connect();
            let guest = self.guest.as_mut().expect("connected");
            // Whatever is read after a flush can't go away again.
            if guest.flush().is_ok() && self.settle().is_ok() {
                self.model.may_have_lost = false;
                return;
            }
            self.guest = None;
        }
    }

    fn settle(&mut self) -> Result<(), Failure> {
        for (first, count) in self.model.undecided() {
            for start in (first..first + count).step_by(STRIPE_SECTORS as usize) {
                let count = STRIPE_SECTORS.min(first + count - start);
                let guest = self.guest.as_mut().expect("connected");
                let found = guest.read(start * SECTOR, (count * SECTOR) as usize)?;
                self.judge(|model| model.settle(start, &found));
            }
        }
        Ok(())
    }

    /// Reads every own sector.
    fn read_back(&mut self) {
        for stripe in own_stripes(self.number, self.of, self.model.sectors()) {
            let range = byte_range(stripe, self.model.sectors());
            let guest = self.guest.as_mut().expect("connected");
            let found = guest.read(range.start as u64, range.len()).expect("the servers are up");
            self.judge(|model| model.settle(stripe * STRIPE_SECTORS, &found));
        }
    }

    fn judge(&mut self, judge: impl FnOnce(&mut Model) -> Result<(), String>) {
        if let Err(story) = judge(&mut self.model) {
            panic!("{}, worker {}: {story}", self.place.export, self.number);
        }
    }

    fn connect(&mut self) {
        let end = Instant::now() + RECONNECT_MAX;
        while self.guest.is_none() {
            self.agents_killed = self.place.agents_killed.load(Ordering::SeqCst);
            match NbdGuest::connect(&self.place.socket, &self.place.export) {
                Ok(guest) => self.guest = Some(guest),
                Err(error) => {
                    assert!(Instant::now() < end, "{}: no connection: {error}", self.place.export);
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// A range inside one of the worker's stripes: any sectors, often whole blocks, mostly small.
    fn range(&mut self) -> (u64, u64) {
        let sectors = self.model.sectors();
        let own: Vec<u64> = own_stripes(self.number, self.of, sectors).collect();
        let stripe = own[self.rng.below(own.len() as u64) as usize] * STRIPE_SECTORS;
        let end = (stripe + STRIPE_SECTORS).min(sectors);
        let mut first = stripe + self.rng.below(end - stripe);
        let most = [BLOCK_SECTORS, 128, STRIPE_SECTORS][[0, 0, 1, 1, 1, 2][self.rng.below(6) as usize]];
        let mut count = 1 + self.rng.below(most);
        if self.rng.below(2) == 0 {
            first -= first % BLOCK_SECTORS;
            count = count.next_multiple_of(BLOCK_SECTORS);
        }
        (first, count.min(end - first))
    }
}
