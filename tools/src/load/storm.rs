//! A boot storm: many volumes, each asked for what a recorded boot reads, as hypervisors do when a batch of machines starts.
//!
//! Each volume replays the reads of a trace one after the other (or `depth` at a time), as guest reads with data or as
//! priority fetches without. Latencies are counted twice: from when a request was sent, as the guest that waits for its own reads
//! meets them, and (where the replay is paced) from when it was due, so that a node that falls behind is not spared the requests
//! it delayed.

mod disk;

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};
use tokio::time::{Instant, sleep_until};
use volley_client::FetchUntil;

use super::nbd::Servers;
use super::replay::{Speed, compare, due, read_image};
use super::report::{Report, Series};
use super::trace::{Event, Op};
use super::{Random, Target, check_threads, on_threads};
use crate::units::parse_duration;
use disk::{Disk, Host};

/// What the reads of a trace have to give is kept in memory if it is no more than this: looking it up for each machine would take as
/// long as reading it.
const WANTED_BYTES_MAX: u64 = 512 << 20;

/// When the volumes of a storm start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    AtOnce,
    /// Evenly, the last one after this.
    Ramp(Duration),
    /// At random, so many per second on average.
    Poisson(f64),
}

impl std::str::FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Arrivals, String> {
        let wrong =
            || format!("{text:?} is not an arrival pattern: write at-once, ramp:DURATION or poisson:PER_SECOND");
        match text.split_once(':') {
            None if text == "at-once" => Ok(Arrivals::AtOnce),
            Some(("ramp", over)) => Ok(Arrivals::Ramp(parse_duration(over).map_err(|_| wrong())?)),
            Some(("poisson", rate)) => match rate.parse::<f64>() {
                Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Arrivals::Poisson(rate)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

impl Arrivals {
    /// When each of `count` volumes starts, after the storm does.
    fn starts(self, count: usize, seed: u64) -> Vec<Duration> {
        match self {
            Arrivals::AtOnce => vec![Duration::ZERO; count],
            Arrivals::Ramp(over) => (0..count).map(|i| over.mul_f64(i as f64 / (count.max(2) - 1) as f64)).collect(),
            Arrivals::Poisson(rate) => {
                let mut random = Random::new(seed);
                let mut at = 0.0;
                let mut next = || {
                    at += -(1.0 - random.fraction()).ln() / rate;
                    Duration::try_from_secs_f64(at).unwrap_or(Duration::MAX)
                };
                (0..count).map(|_| next()).collect()
            }
        }
    }
}

/// What a volume is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ask {
    /// The bytes.
    Read,
    /// That they come; answered when they are so far.
    Fetch(FetchUntil),
}

/// A storm to run.
#[derive(Debug)]
pub struct Plan {
    pub target: Target,
    /// Reads come from these NBD servers instead of the target.
    pub nbd: Option<Servers>,
    pub volumes: Vec<String>,
    /// Clients with connections of their own, over which the volumes are dealt.
    pub connections: u32,
    pub threads: u32,
    /// The trace; only its reads are asked for.
    pub events: Vec<Event>,
    pub ask: Ask,
    /// Leave out what touches only chunks that were asked for before, as a host does that remembers what was answered.
    pub first_touches_only: bool,
    pub arrivals: Arrivals,
    pub speed: Speed,
    /// Requests in flight of one volume.
    pub depth: usize,
    /// No request starts later than this after the storm began.
    pub duration: Duration,
    /// The raw image that every byte read must equal.
    pub verify: Option<File>,
    /// Chooses random arrivals.
    pub seed: u64,
}

/// How far a storm is; shared by its threads.
#[derive(Debug, Default)]
pub struct Progress {
    pub attached: AtomicU64,
    pub finished: AtomicU64,
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
    pub errors: AtomicU64,
    /// Set by whoever watches: no request starts any more.
    pub stop: AtomicBool,
}

/// Runs a storm to its end.
///
/// # Errors
/// A sentence when it can't start: node away, nothing to read.
pub fn run(plan: &Plan, progress: &Progress) -> Result<Report, String> {
    let storm = Storm::new(plan, progress)?;
    let tallies = on_threads(
        plan.threads,
        async |thread| storm.connect(thread).await,
        async |clients| storm.boot_all(clients).await,
    )?;
    let mut whole = Tally::default();
    tallies.into_iter().for_each(|tally| whole.merge(tally));
    Ok(whole.report(plan, progress))
}

/// What was measured.
#[derive(Default)]
struct Tally {
    attach: Series,
    first_touch: Series,
    later: Series,
    /// Every request, from when it was due.
    since_due: Series,
    /// From a volume's arrival to its last answer.
    boots: Series,
    mismatches: u64,
    skipped: u64,
    elapsed: Duration,
}

impl Tally {
    fn merge(&mut self, other: Tally) {
        self.attach.merge(other.attach);
        self.first_touch.merge(other.first_touch);
        self.later.merge(other.later);
        self.since_due.merge(other.since_due);
        self.boots.merge(other.boots);
        self.mismatches += other.mismatches;
        self.skipped += other.skipped;
        self.elapsed = self.elapsed.max(other.elapsed);
    }

    fn report(self, plan: &Plan, progress: &Progress) -> Report {
        let series = vec![
            ("attach", self.attach),
            ("first-touch", self.first_touch),
            ("later", self.later),
            ("since-due", self.since_due),
            ("boots", self.boots),
        ];
        let mut facts = vec![
            ("volumes", plan.volumes.len() as u64),
            ("volumes_finished", progress.finished.load(Ordering::Relaxed)),
            ("requests_skipped", self.skipped),
        ];
        if plan.verify.is_some() {
            facts.push(("mismatches", self.mismatches));
        }
        Report { workload: "storm", elapsed: self.elapsed, series, facts }
    }
}

struct Storm<'a> {
    plan: &'a Plan,
    progress: &'a Progress,
    reads: Arc<[Event]>,
    starts: Vec<Duration>,
    touches: OnceLock<(u32, Arc<[bool]>)>,
    /// What each read has to give, once it was looked up in the image.
    wanted: Vec<OnceLock<Vec<u8>>>,
}

/// One answered request.
struct Done {
    index: usize,
    latency: Duration,
    since_due: Option<Duration>,
    outcome: Result<(), String>,
    wrong: bool,
}

impl<'a> Storm<'a> {
    fn new(plan: &'a Plan, progress: &'a Progress) -> Result<Storm<'a>, String> {
        let reads: Arc<[Event]> = plan.events.iter().filter(|event| event.op == Op::Read).copied().collect();
        if reads.is_empty() {
            return Err("the trace reads nothing".to_owned());
        }
        check_threads(plan.threads, plan.connections)?;
        let starts = plan.arrivals.starts(plan.volumes.len(), plan.seed);
        let bytes: u64 = reads.iter().map(|read| read.len).sum();
        let kept = if plan.verify.is_some() && bytes <= WANTED_BYTES_MAX { reads.len() } else { 0 };
        let wanted = (0..kept).map(|_| OnceLock::new()).collect();
        Ok(Storm { plan, progress, reads, starts, touches: OnceLock::new(), wanted })
    }

    /// The hosts of a thread, by number.
    async fn connect(&self, thread: u32) -> Result<Vec<(u32, Host)>, String> {
        let mut hosts = Vec::new();
        for connection in (thread..self.plan.connections).step_by(self.plan.threads as usize) {
            hosts.push((connection, Host::new(self.plan).await?));
        }
        Ok(hosts)
    }

    async fn boot_all(&self, hosts: Vec<(u32, Host)>) -> Tally {
        let (begun, tally) = (Instant::now(), RefCell::default());
        let boots = hosts.iter().flat_map(|(connection, host)| {
            let mine = (*connection as usize..self.plan.volumes.len()).step_by(self.plan.connections as usize);
            mine.map(|number| self.boot(host, number, begun, &tally)).collect::<Vec<_>>()
        });
        let boots: FuturesUnordered<_> = boots.collect();
        let attached: Vec<Option<Disk>> = boots.collect().await;
        let mut whole = tally.take();
        whole.elapsed = begun.elapsed();
        for disk in attached.into_iter().flatten() {
            disk.detach().await;
        }
        whole
    }

    /// One machine: attaches its volume and replays the trace. The volume stays attached, as a running machine's.
    async fn boot(&self, host: &Host, number: usize, begun: Instant, tally: &RefCell<Tally>) -> Option<Disk> {
        let (start, end) = (begun + self.starts[number], begun + self.plan.duration);
        sleep_until(start.min(end)).await;
        if start > end {
            tally.borrow_mut().skipped += self.reads.len() as u64;
            return None;
        }
        let name = &self.plan.volumes[number];
        let attached = host.attach(self.plan, name).await;
        let outcome = attached.as_ref().map(|_| ()).map_err(|error| format!("volume {name}: {error}"));
        self.count(0, outcome.is_ok());
        tally.borrow_mut().attach.record(start.elapsed(), 0, outcome);
        let disk = attached.ok()?;
        self.progress.attached.fetch_add(1, Ordering::Relaxed);
        if self.replay(name, &disk, start, end, tally).await {
            tally.borrow_mut().boots.record(start.elapsed(), 0, Ok(()));
            self.progress.finished.fetch_add(1, Ordering::Relaxed);
        }
        Some(disk)
    }

    /// Whether every request was made and answered.
    async fn replay(&self, name: &str, disk: &Disk, start: Instant, end: Instant, tally: &RefCell<Tally>) -> bool {
        let touches = self.touches(disk.chunk_bytes());
        let asked = (0..self.reads.len()).filter(|index| touches[*index] || !self.plan.first_touches_only);
        let requests = asked.map(|index| async move {
            let event = &self.reads[index];
            let due = match self.plan.speed {
                Speed::Times(times) => Some(start + due(event, times).min(self.plan.duration)),
                Speed::Max => None,
            };
            if let Some(due) = due {
                sleep_until(due.min(end)).await;
            }
            let sent = Instant::now();
            if sent >= end || self.progress.stop.load(Ordering::Relaxed) {
                return None;
            }
            let (outcome, wrong) = self.ask(name, disk, index).await;
            let (latency, since_due) = (sent.elapsed(), due.map(|due| due.elapsed()));
            Some(Done { index, latency, since_due, outcome, wrong })
        });
        let mut answers = stream::iter(requests).buffer_unordered(self.plan.depth.max(1));
        let mut whole = true;
        while let Some(answer) = answers.next().await {
            let tally = &mut *tally.borrow_mut();
            let Some(done) = answer else {
                (tally.skipped, whole) = (tally.skipped + 1, false);
                continue;
            };
            whole &= done.outcome.is_ok();
            let len = self.reads[done.index].len;
            let series = if touches[done.index] { &mut tally.first_touch } else { &mut tally.later };
            self.count(len, done.outcome.is_ok());
            tally.mismatches += u64::from(done.wrong);
            if let Some(since_due) = done.since_due.filter(|_| done.outcome.is_ok()) {
                tally.since_due.record(since_due, len, Ok(()));
            }
            series.record(done.latency, len, done.outcome);
        }
        whole
    }

    /// For each read, whether it touches a chunk that none before it touched.
    fn touches(&self, chunk_bytes: u32) -> Arc<[bool]> {
        let (of, touches) = self.touches.get_or_init(|| (chunk_bytes, first_touches(&self.reads, chunk_bytes)));
        if *of == chunk_bytes { touches.clone() } else { first_touches(&self.reads, chunk_bytes) }
    }

    fn count(&self, bytes: u64, good: bool) {
        self.progress.requests.fetch_add(1, Ordering::Relaxed);
        match good {
            true => self.progress.bytes.fetch_add(bytes, Ordering::Relaxed),
            false => self.progress.errors.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// One request; whether its answer was wrong data.
    async fn ask(&self, name: &str, disk: &Disk, index: usize) -> (Result<(), String>, bool) {
        let event = &self.reads[index];
        let named = |error: String| format!("volume {name}: {error}");
        match (self.plan.ask, &self.plan.verify) {
            (Ask::Fetch(until), _) => (disk.fetch(event, until).await.map_err(named), false),
            (Ask::Read, None) => (disk.read(event, |_| ()).await.map_err(named), false),
            (Ask::Read, Some(image)) => {
                let check = |data: &[u8]| self.check(index, image, data);
                match disk.read(event, check).await {
                    Err(error) => (Err(named(error)), false),
                    Ok(checked) => (checked.clone().map_err(named), checked.is_err()),
                }
            }
        }
    }

    /// Compares what was read with the image.
    fn check(&self, index: usize, image: &File, data: &[u8]) -> Result<(), String> {
        let event = &self.reads[index];
        let Some(wanted) = self.wanted.get(index) else { return compare(event, data, &read_image(image, event)?) };
        let wanted = match wanted.get() {
            Some(wanted) => wanted,
            None => {
                let read = read_image(image, event)?;
                wanted.get_or_init(|| read)
            }
        };
        compare(event, data, wanted)
    }
}

/// Which requests of a replay touch a chunk that none before them touched.
fn first_touches(reads: &[Event], chunk_bytes: u32) -> Arc<[bool]> {
    let mut touched = HashSet::new();
    let mut is_new =
        |event: &Event| event.chunks(chunk_bytes.into()).fold(false, |new, chunk| touched.insert(chunk) | new);
    reads.iter().map(&mut is_new).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Arrivals, first_touches};
    use crate::load::trace::{Event, Op};

    #[test]
    fn arrival_patterns_are_understood_and_start_as_they_say() {
        assert_eq!("at-once".parse(), Ok(Arrivals::AtOnce));
        assert_eq!("ramp:60s".parse(), Ok(Arrivals::Ramp(Duration::from_secs(60))));
        assert_eq!("poisson:100".parse(), Ok(Arrivals::Poisson(100.0)));
        for bad in ["", "ramp", "ramp:x", "poisson:0", "poisson:-1", "poisson:inf", "later:3s"] {
            assert!(bad.parse::<Arrivals>().unwrap_err().contains("arrival pattern"), "{bad}");
        }
        assert_eq!(Arrivals::AtOnce.starts(3, 1), [Duration::ZERO; 3]);
        let ramp = Arrivals::Ramp(Duration::from_secs(10));
        assert_eq!(ramp.starts(3, 1), [0, 5, 10].map(Duration::from_secs));
        assert_eq!(ramp.starts(1, 1), [Duration::ZERO]);
        let poisson = Arrivals::Poisson(100.0).starts(10_000, 7);
        assert!(poisson.is_sorted());
        let last = poisson[9_999].as_secs_f64();
        assert!((90.0..110.0).contains(&last), "10,000 at 100 per second take about 100 s, not {last}");
        assert_ne!(poisson, Arrivals::Poisson(100.0).starts(10_000, 8));
    }

    #[test]
    fn a_first_touch_is_of_any_new_chunk() {
        let read = |offset, len| Event { at_us: 0, op: Op::Read, offset, len };
        let reads = [read(0, 4096), read(4096, 4096), read(61440, 8192), read(65536, 512), read(1 << 20, 512)];
        assert_eq!(first_touches(&reads, 65536)[..], [true, false, true, false, true]);
    }
}
