//! One connection of the generator: requests go out, answers come in, each finds its request.

use std::collections::VecDeque;
use std::time::Instant;

use volley_protocol::messages::{PriorityFetch, Read, Write};
use volley_protocol::{Decoded, FLAG_FUA, FetchUntil, decode, encode};

use super::socket::Socket;
use crate::load::addresses::Blocks;
use crate::load::report::Series;
use crate::load::workload::{Kind, Plan};
use crate::load::{Random, pattern};

/// Room for answers, beside that for a whole block.
const RECEIVE_BYTES: usize = 64 << 10;

/// A volume as a connection uses it.
pub struct Lane {
    pub volume: u64,
    /// Of the attachment; none is needed to fetch.
    pub generation: u64,
    pub blocks: Blocks,
}

/// What a request is.
#[derive(Clone, Copy)]
enum Make {
    Fetch(FetchUntil),
    Read,
    /// With these flags.
    Write(u8),
}

/// A request without an answer.
#[derive(Clone, Copy)]
pub struct Asked {
    /// From here its latency counts.
    pub since: Instant,
    /// Index in [`Kind::requests`].
    pub kind: usize,
}

pub struct Connection {
    socket: Socket,
    lanes: Vec<Lane>,
    next_lane: usize,
    /// By index in [`Kind::requests`].
    makes: Vec<Make>,
    /// Of a hundred requests so many are of the first kind.
    first_percent: u64,
    block_bytes: u32,
    /// What is written, the same everywhere: making it anew would cost more than sending it.
    data: Vec<u8>,
    random: Random,
    /// By request id.
    slots: Vec<Option<Asked>>,
    free: Vec<u32>,
    /// Times of requests that are due and wait for one in flight to end.
    waiting: VecDeque<Instant>,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    received: usize,
}

impl Connection {
    pub fn new(socket: Socket, lanes: Vec<Lane>, plan: &Plan, random: Random) -> Connection {
        let (first_percent, makes) = match plan.kind {
            Kind::PriorityFetch(until) => (100, vec![Make::Fetch(until)]),
            Kind::Write { fua } => (100, vec![Make::Write(if fua { FLAG_FUA } else { 0 })]),
            Kind::Mixed { read_percent } => (u64::from(read_percent), vec![Make::Read, Make::Write(0)]),
            Kind::Read | Kind::Churn | Kind::Connect => (100, vec![Make::Read]),
        };
        let writes = makes.iter().any(|make| matches!(make, Make::Write(_)));
        Connection {
            socket,
            lanes,
            next_lane: 0,
            makes,
            first_percent,
            block_bytes: plan.block_bytes,
            data: if writes { pattern(0, plan.block_bytes as usize, plan.seed) } else { Vec::new() },
            random,
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            output: Vec::new(),
            sent: 0,
            input: vec![0; RECEIVE_BYTES + plan.block_bytes as usize],
            received: 0,
        }
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.waiting.len()
    }

    pub fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    pub fn unanswered(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.slots).into_iter().flatten().collect()
    }

    /// A request that is due at a time: now, or as soon as fewer than `depth` are in flight.
    pub fn ask_at(&mut self, due: Instant, depth: usize) {
        if self.slots.len() - self.free.len() < depth { self.ask(due) } else { self.waiting.push_back(due) }
    }

    /// What has waited and may go now.
    pub fn ask_waiting(&mut self, depth: usize) -> Result<(), String> {
        while self.slots.len() - self.free.len() < depth {
            let Some(due) = self.waiting.pop_front() else { break };
            self.ask(due);
        }
        self.flush()
    }

    /// Appends a request to the output.
    pub fn ask(&mut self, since: Instant) {
        let first = self.first_percent == 100 || self.random.below(100) < self.first_percent;
        let kind = usize::from(!first);
        let asked = Some(Asked { since, kind });
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = asked;
                u64::from(id)
            }
            None => {
                self.slots.push(asked);
                self.slots.len() as u64 - 1
            }
        };
        let lanes = self.lanes.len();
        let lane = &mut self.lanes[self.next_lane];
        self.next_lane = (self.next_lane + 1) % lanes;
        let offset = lane.blocks.next_block() * u64::from(self.block_bytes);
        let (volume, generation, out) = (lane.volume, lane.generation, &mut self.output);
        match self.makes[kind] {
            Make::Fetch(until) => {
                let body = PriorityFetch { volume, offset, len: u64::from(self.block_bytes), until };
                encode::request(out, id, 0, &body, &[]);
            }
            Make::Read => {
                encode::request(out, id, 0, &Read { volume, generation, offset, len: self.block_bytes }, &[]);
            }
            Make::Write(flags) => {
                encode::request(out, id, flags, &Write { volume, generation, offset }, &self.data);
            }
        }
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<(), String> {
        while self.has_output() {
            match self.socket.write(&self.output[self.sent..]).map_err(|error| format!("connection lost: {error}"))? {
                Some(len) => self.sent += len,
                None => return Ok(()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// Takes all answers that have come.
    pub fn receive(&mut self, now: Instant, series: &mut [Series]) -> Result<(), String> {
        loop {
            let room = self.input.len() - self.received;
            let read = self.socket.read(&mut self.input[self.received..]);
            let Some(len) = read.map_err(|error| format!("connection lost: {error}"))? else { return Ok(()) };
            if len == 0 {
                return Err("the server closed a connection".to_owned());
            }
            self.received += len;
            self.take_answers(now, series)?;
            // Less than asked for: there is no more.
            if len < room {
                return Ok(());
            }
        }
    }

    fn take_answers(&mut self, now: Instant, series: &mut [Series]) -> Result<(), String> {
        let mut at = 0;
        loop {
            let decoded = decode(&self.input[at..self.received]).map_err(|error| error.to_string())?;
            let Decoded::Frame(frame) = decoded else { break };
            let id = frame.header.request_id;
            let slot = self.slots.get_mut(id as usize).and_then(Option::take);
            let asked = slot.ok_or_else(|| format!("an answer to request {id}, which was not made"))?;
            let outcome = frame.outcome().map_err(|error| error.message);
            series[asked.kind].record(now.saturating_duration_since(asked.since), u64::from(self.block_bytes), outcome);
            self.free.push(id as u32);
            at += frame.len();
        }
        self.input.copy_within(at..self.received, 0);
        self.received -= at;
        Ok(())
    }
}
