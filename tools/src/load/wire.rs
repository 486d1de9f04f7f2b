//! A generator that speaks the wire protocol itself: one thread drives all its connections, and a request costs it little,
//! so that what is measured is the server.
//!
//! Closed loop: on each connection a fixed number of requests is always in flight. Open loop (a rate): requests have their
//! times, whatever the server does, and latencies count from those times, so that a server that stands still is charged for
//! everything that should have been asked meanwhile (no coordinated omission).

mod connection;
mod socket;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use volley_protocol::messages::{Attach, Lookup};
use volley_protocol::name_tag;
use volley_server::bootstrap::raise_open_files;

use self::connection::{Asked, Connection, Lane};
use self::socket::Greeted;
use super::addresses::Blocks;
use super::cpu;
use super::report::{Measured, Report, Series};
use super::workload::{Kind, Plan};
use super::{Random, check_threads};

/// An open loop looks at its clock instead of sleeping when less than this is left.
const SPIN: Duration = Duration::from_micros(200);
/// Sockets looked at in one go.
const EVENTS_MAX: usize = 1024;

/// A volume, and where it is.
struct Found {
    name: String,
    shard: usize,
    volume: u64,
    size_bytes: u64,
}

/// Runs a plan to its end.
///
/// # Errors
/// A sentence when the load can't start, or a connection is lost.
pub fn run(plan: &Plan) -> Result<Report, String> {
    check_threads(plan.threads, plan.connections)?;
    // Each connection is one; what can't be raised shows when they run out.
    raise_open_files();
    let mut first = Greeted::connect(&plan.target.server, plan.target.deadline)?;
    let shards = first.shards.clone();
    let mut found = Vec::new();
    for name in &plan.volumes {
        let volume = first.volume(&Lookup { name: name.clone() }).map_err(|error| format!("volume {name}: {error}"))?;
        if volume.size_bytes < u64::from(plan.block_bytes) {
            return Err(format!("volume {name} of {} bytes is smaller than a block", volume.size_bytes));
        }
        let shard = usize::from(name_tag(name)) % shards.len();
        found.push(Found { name: name.clone(), shard, volume: volume.volume, size_bytes: volume.size_bytes });
    }
    drop(first);
    let budget = Arc::new(AtomicU64::new(plan.count));
    plan.measure(
        async |thread| Driver::prepare(plan, &found, &shards, thread, Arc::clone(&budget)),
        async |mut driver| driver.run(),
    )
}

/// The connections of one thread.
struct Driver {
    poll: mio::Poll,
    connections: Vec<Connection>,
    /// By kind of request.
    series: Vec<Series>,
    budget: Arc<AtomicU64>,
    duration: Duration,
    deadline: Duration,
    depth: usize,
    /// Between two requests of an open loop.
    spacing: Option<Duration>,
}

impl Driver {
    fn prepare(
        plan: &Plan,
        found: &[Found],
        shards: &[String],
        thread: u32,
        budget: Arc<AtomicU64>,
    ) -> Result<Driver, String> {
        let failed = |error: io::Error| format!("can't watch the connections: {error}");
        let poll = mio::Poll::new().map_err(failed)?;
        let mut connections = Vec::new();
        for number in (thread..plan.connections).step_by(plan.threads as usize) {
            let shard = number as usize % shards.len();
            let mut greeted = Greeted::connect(&shards[shard], plan.target.deadline)?;
            let lanes = lanes(plan, found, shards.len(), number as usize, &mut greeted)?;
            let mut socket = greeted.unblocked()?;
            socket.register(&poll, mio::Token(connections.len())).map_err(failed)?;
            let random = Random::new(plan.seed.wrapping_mul(31).wrapping_add(u64::from(number)));
            connections.push(Connection::new(socket, lanes, plan, random));
        }
        let share = f64::from(plan.threads);
        Ok(Driver {
            poll,
            connections,
            series: vec![Series::default(); plan.kind.requests().len()],
            budget,
            duration: plan.duration,
            deadline: plan.target.deadline,
            depth: plan.target.depth as usize,
            spacing: plan.rate.map(|rate| Duration::from_secs_f64(share / rate)),
        })
    }

    fn run(&mut self) -> Result<Measured, String> {
        let mut events = mio::Events::with_capacity(EVENTS_MAX);
        let (begun, cpu) = (Instant::now(), cpu::thread_ns());
        let end = begun + self.duration;
        let (mut due, mut next) = (begun, 0);
        if self.spacing.is_none() {
            for index in 0..self.connections.len() {
                self.refill(index, begun, end)?;
            }
        }
        loop {
            let mut now = Instant::now();
            if let Some(spacing) = self.spacing {
                while due <= now && due < end && self.take(1) == 1 {
                    self.connections[next].ask_at(due, self.depth);
                    next = (next + 1) % self.connections.len();
                    due += spacing;
                }
                for connection in self.connections.iter_mut().filter(|connection| connection.has_output()) {
                    connection.flush()?;
                }
            }
            let idle = self.connections.iter().all(|connection| connection.in_flight() == 0);
            let spent = now >= end || self.budget.load(Ordering::Relaxed) == 0;
            if idle && spent {
                break;
            }
            if now >= end + self.deadline {
                self.give_up();
                break;
            }
            let wait = match self.spacing {
                Some(_) if !spent => due.saturating_duration_since(now).saturating_sub(SPIN),
                _ => Duration::from_millis(100),
            };
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error.to_string()),
                _ => now = Instant::now(),
            }
            for event in &events {
                let mio::Token(index) = event.token();
                if event.is_readable() {
                    self.connections[index].receive(now, &mut self.series)?;
                }
                match self.spacing {
                    None => self.refill(index, now, end)?,
                    Some(_) => self.connections[index].ask_waiting(self.depth)?,
                }
            }
        }
        Ok(Measured {
            series: std::mem::take(&mut self.series),
            elapsed: begun.elapsed(),
            cpu_ns: cpu::thread_ns().saturating_sub(cpu),
        })
    }

    /// As many requests as the closed loop wants in flight.
    fn refill(&mut self, index: usize, now: Instant, end: Instant) -> Result<(), String> {
        let missing = self.depth - self.connections[index].in_flight();
        let allowed = if now < end { self.take(missing as u64) } else { 0 };
        let connection = &mut self.connections[index];
        (0..allowed).for_each(|_| connection.ask(now));
        connection.flush()
    }

    /// So many requests may be made, or fewer.
    fn take(&self, wanted: u64) -> u64 {
        let take = |left: u64| (wanted > 0 && left > 0).then(|| left.saturating_sub(wanted));
        let before = self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        before.map_or(0, |left| left.min(wanted))
    }

    /// What has no answer by now has failed.
    fn give_up(&mut self) {
        for connection in &mut self.connections {
            for Asked { kind, .. } in connection.unanswered() {
                self.series[kind].record(Duration::ZERO, 0, Err("no answer within the deadline".to_owned()));
            }
        }
    }
}

/// The volumes of a connection: those of its shard, shared out where each may be attached once only.
fn lanes(
    plan: &Plan,
    found: &[Found],
    shards: usize,
    number: usize,
    greeted: &mut Greeted,
) -> Result<Vec<Lane>, String> {
    let mine: Vec<&Found> = if plan.any_shard {
        found.iter().collect()
    } else {
        found.iter().filter(|volume| volume.shard == number % shards).collect()
    };
    let attaches = !matches!(plan.kind, Kind::PriorityFetch(_));
    // Of the connections of this shard.
    let (index, sharing) = match plan.any_shard {
        true => (number, plan.connections as usize),
        false => (number / shards, (plan.connections as usize - number % shards).div_ceil(shards)),
    };
    let mut lanes = Vec::new();
    for (at, volume) in mine.into_iter().enumerate() {
        if attaches && at % sharing != index {
            continue;
        }
        let mut generation = 0;
        if attaches {
            let attach = Attach { name: volume.name.clone(), resume_generation: None };
            let attached = greeted.volume(&attach).map_err(|error| format!("volume {}: {error}", volume.name))?;
            generation = attached.generation;
        }
        let random = Random::new(plan.seed.wrapping_add((number * found.len() + at) as u64));
        let count = volume.size_bytes / u64::from(plan.block_bytes);
        let blocks = Blocks::new(0, 1, count, plan.order, random);
        lanes.push(Lane { volume: volume.volume, generation, blocks });
    }
    if lanes.is_empty() {
        let shard = number % shards;
        let what = if attaches { "of its own (a volume is attached by one connection)" } else { "to ask for" };
        return Err(format!("connection {number}, to shard {shard}, has no volume {what}: name more volumes"));
    }
    Ok(lanes)
}
