//! The order of fetches on one shard. Plain synchronous core: no I/O, no clock.
//!
//! Priority before read-ahead before boot-set before background, first come first served within a class. At most one entry per chunk;
//! a second request joins it and lends it its class (priority inheritance). Neighbours in a pack that wait in the
//! queue are merged into one ranged GET. When the next may start is the gate's to say.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::gate::{Admission, Gate, GateLimits};
use super::{ChunkSource, Digest};
use crate::mutation::{self, Mutation};
use crate::platform::Time;

/// Order of urgency, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FetchClass {
    Priority,
    /// What a guest that reads in order is expected to want next.
    ReadAhead,
    BootSet,
    Background,
}

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    pub gate: GateLimits,
    /// Largest merged GET.
    pub get_bytes_max: u64,
    /// `false`: every request is a fetch of its own, and nothing is cached. Only to measure what sharing saves.
    pub share: bool,
}

impl QueueLimits {
    /// One shard's part of the node's rates. Slots are each shard's own.
    #[must_use]
    pub fn share(self, shards: usize) -> QueueLimits {
        let part = |rate: Option<u64>| rate.map(|rate| (rate / shards as u64).max(1));
        let (bytes_per_second, gets_per_second) = (part(self.gate.bytes_per_second), part(self.gate.gets_per_second));
        QueueLimits { gate: GateLimits { bytes_per_second, gets_per_second, ..self.gate }, ..self }
    }
}

impl Default for QueueLimits {
    fn default() -> QueueLimits {
        // A stretch and the chunk across its end are one GET.
        QueueLimits { gate: GateLimits::default(), get_bytes_max: 8 << 20, share: true }
    }
}

/// What may be done next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Start(GetPlan),
    /// Nothing before this time has passed: a budget is spent.
    After(Duration),
    /// Nothing before a chunk is wanted or a GET ends.
    Idle,
}

/// One ranged GET and the chunks in it, in the order of their offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetPlan {
    pub class: FetchClass,
    /// When its first chunk was asked for.
    pub queued_at: Time,
    pub pack_key: Arc<str>,
    pub range: Range<u64>,
    pub sources: Vec<ChunkSource>,
}

impl GetPlan {
    #[must_use]
    pub fn single(source: ChunkSource) -> GetPlan {
        let range = source.offset..source.offset + u64::from(source.stored_len);
        let (class, queued_at) = (FetchClass::Priority, Time::default());
        GetPlan { class, queued_at, pack_key: source.pack_key.clone(), range, sources: vec![source] }
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Where chunk `i` lies in the answer.
    #[must_use]
    pub fn slice(&self, i: usize) -> Range<usize> {
        let source = &self.sources[i];
        let start = (source.offset - self.range.start) as usize;
        start..start + source.stored_len as usize
    }
}

struct Entry<W> {
    source: ChunkSource,
    waiters: Vec<W>,
    /// `None`: in flight.
    queued: Option<(FetchClass, u64)>,
    queued_at: Time,
    /// The most urgent class of its waiters.
    class: FetchClass,
    /// A more urgent waiter joined while it was in flight.
    promoted: bool,
}

/// `W` is whatever the shell uses to answer a waiter.
pub struct FetchQueue<W> {
    get_bytes_max: u64,
    share: bool,
    pub gate: Gate,
    entries: hashbrown::HashMap<Digest, Entry<W>, ahash::RandomState>,
    order: BTreeMap<(FetchClass, u64), Digest>,
    /// Queued chunks by place, to find neighbours.
    places: BTreeMap<(Arc<str>, u64), Digest>,
    sequence: u64,
}

impl<W> FetchQueue<W> {
    #[must_use]
    pub fn new(limits: QueueLimits, now: Time) -> FetchQueue<W> {
        FetchQueue {
            get_bytes_max: limits.get_bytes_max,
            share: limits.share,
            gate: Gate::new(limits.gate, now),
            entries: hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(9, 10, 11, 12)),
            order: BTreeMap::new(),
            places: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// Whether requests for one chunk share a fetch and what the cache holds.
    #[must_use]
    pub fn shares(&self) -> bool {
        self.share
    }

    #[must_use]
    pub fn queued(&self) -> usize {
        self.order.len()
    }

    /// Adds a waiter; `true` if the chunk was queued or in flight already. A more urgent class promotes it.
    pub fn push(&mut self, source: ChunkSource, class: FetchClass, waiter: W, now: Time) -> bool {
        self.sequence += 1;
        let mut source = source;
        if !self.share || mutation::on(Mutation::SingleFlightBroken) {
            // Another name for the same bytes.
            source.digest[..8].copy_from_slice(&self.sequence.to_le_bytes());
        }
        if let Some(entry) = self.entries.get_mut(&source.digest) {
            entry.waiters.push(waiter);
            entry.promoted |= entry.queued.is_none() && class < entry.class;
            entry.class = entry.class.min(class);
            if let Some(old) = entry.queued.filter(|(queued, _)| class < *queued) {
                self.order.remove(&old);
                entry.queued = Some((class, self.sequence));
                self.order.insert((class, self.sequence), source.digest);
            }
            return true;
        }
        let digest = source.digest;
        self.order.insert((class, self.sequence), digest);
        self.places.insert((source.pack_key.clone(), source.offset), digest);
        let queued = Some((class, self.sequence));
        self.entries
            .insert(digest, Entry { source, waiters: vec![waiter], queued, queued_at: now, class, promoted: false });
        false
    }

    /// The next GET to start, which is then in flight.
    pub fn next_get(&mut self, now: Time) -> Next {
        let Some((&(class, _), &digest)) = self.order.iter().next() else { return Next::Idle };
        match self.gate.admits(class, now) {
            Admission::Now => {}
            Admission::After(wait) => return Next::After(wait),
            Admission::WhenOneEnds => return Next::Idle,
        }
        let mut plan =
            GetPlan { class, queued_at: self.entries[&digest].queued_at, ..GetPlan::single(self.start(&digest)) };
        while self.extend(&mut plan) {}
        self.gate.start(class, plan.bytes(), now);
        Next::Start(plan)
    }

    /// Takes the queued chunk right behind the plan's range into it, if it is at most as urgent and fits. Urgent work
    /// takes only its own kind along: it must not wait for bytes nobody waits for.
    fn extend(&mut self, plan: &mut GetPlan) -> bool {
        let Some(digest) = self.places.get(&(plan.pack_key.clone(), plan.range.end)) else { return false };
        let digest = *digest;
        let entry = &self.entries[&digest];
        let same_class = entry.queued.is_some_and(|(class, _)| class == plan.class);
        let end = plan.range.end + u64::from(entry.source.stored_len);
        if !same_class || end - plan.range.start > self.get_bytes_max {
            return false;
        }
        plan.range.end = end;
        let source = self.start(&digest);
        plan.sources.push(source);
        true
    }

    fn start(&mut self, digest: &Digest) -> ChunkSource {
        let entry = self.entries.get_mut(digest).expect("queued chunks have an entry");
        let at = entry.queued.take().expect("started once");
        self.order.remove(&at);
        self.places.remove(&(entry.source.pack_key.clone(), entry.source.offset));
        entry.source.clone()
    }

    /// Whether a more urgent waiter joined the chunk's fetch while it was in flight.
    #[must_use]
    pub fn is_promoted(&self, digest: &Digest) -> bool {
        self.entries.get(digest).is_some_and(|entry| entry.promoted)
    }

    /// Ends the fetch of a chunk: the waiters to answer, also those that joined in flight.
    pub fn take_waiters(&mut self, digest: &Digest) -> Vec<W> {
        self.entries.remove(digest).map(|entry| entry.waiters).unwrap_or_default()
    }

    /// Checks the queue against itself and its limits.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let queued = self.entries.values().filter(|entry| entry.queued.is_some()).count();
        if queued != self.order.len() {
            return Err(format!("{queued} chunks are queued, {} have a turn", self.order.len()));
        }
        self.gate.check()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
