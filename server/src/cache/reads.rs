//! The order of reads from the disk tier. Plain synchronous core: no I/O, no clock.
//!
//! One read per chunk: who asks later joins it and lends it a higher class. Most urgent first, first come first served
//! within a class; background reads leave room that only more urgent ones may use.

use std::collections::BTreeMap;

use crate::transfer::{ChunkSource, Digest, FetchClass};

/// Reads in flight per shard: what a disk needs to be busy.
pub const READS_MAX: usize = 32;
/// Of those, how many may be background or boot-set.
pub const READS_BACKGROUND_MAX: usize = 16;

const _: () = assert!(READS_BACKGROUND_MAX < READS_MAX);

struct Entry<W> {
    source: ChunkSource,
    waiters: Vec<(FetchClass, W)>,
    class: FetchClass,
    /// `None`: in flight, in the class it was started with.
    queued: Option<u64>,
}

/// `W` is whatever the shell uses to answer a waiter.
pub struct ReadQueue<W> {
    entries: hashbrown::HashMap<Digest, Entry<W>, ahash::RandomState>,
    order: BTreeMap<(FetchClass, u64), Digest>,
    sequence: u64,
    in_flight: usize,
    in_flight_background: usize,
}

impl<W> Default for ReadQueue<W> {
    fn default() -> ReadQueue<W> {
        ReadQueue {
            entries: hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(41, 42, 43, 44)),
            order: BTreeMap::new(),
            sequence: 0,
            in_flight: 0,
            in_flight_background: 0,
        }
    }
}

impl<W> ReadQueue<W> {
    /// Whether a read of the chunk is queued or in flight.
    #[must_use]
    pub fn contains(&self, digest: &Digest) -> bool {
        self.entries.contains_key(digest)
    }

    /// Adds a waiter.
    pub fn push(&mut self, source: ChunkSource, class: FetchClass, waiter: W) {
        let digest = source.digest;
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(&digest) else {
            self.order.insert((class, self.sequence), digest);
            let queued = Some(self.sequence);
            self.entries.insert(digest, Entry { source, waiters: vec![(class, waiter)], class, queued });
            return;
        };
        entry.waiters.push((class, waiter));
        if class < entry.class {
            if let Some(turn) = entry.queued {
                self.order.remove(&(entry.class, turn));
                self.order.insert((class, turn), digest);
            }
            entry.class = class;
        }
    }

    /// The next read to start, or `None` when none may start now.
    pub fn start(&mut self) -> Option<(FetchClass, ChunkSource)> {
        let (&(class, turn), &digest) = self.order.iter().next()?;
        let background = class != FetchClass::Priority;
        if self.in_flight >= READS_MAX || (background && self.in_flight_background >= READS_BACKGROUND_MAX) {
            return None;
        }
        self.order.remove(&(class, turn));
        self.in_flight += 1;
        self.in_flight_background += usize::from(background);
        let entry = self.entries.get_mut(&digest).expect("what has a turn is there");
        entry.queued = None;
        Some((class, entry.source.clone()))
    }

    /// A read that was started in `class` ended: its waiters with their classes, also those that joined meanwhile.
    pub fn end(&mut self, class: FetchClass, digest: &Digest) -> Vec<(FetchClass, W)> {
        self.in_flight -= 1;
        self.in_flight_background -= usize::from(class != FetchClass::Priority);
        self.entries.remove(digest).map(|entry| entry.waiters).unwrap_or_default()
    }

    /// The most urgent class of those who wait for a chunk.
    #[must_use]
    pub fn class_of(&self, digest: &Digest) -> Option<FetchClass> {
        self.entries.get(digest).map(|entry| entry.class)
    }

    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let queued = self.entries.values().filter(|entry| entry.queued.is_some()).count();
        let (all, background) = (self.in_flight, self.in_flight_background);
        if queued != self.order.len() || queued + all != self.entries.len() {
            let known = self.entries.len();
            return Err(format!("{queued} disk reads are queued and {all} in flight, of {known}"));
        }
        if all > READS_MAX || background > READS_BACKGROUND_MAX {
            return Err(format!("{all} disk reads in flight, {background} of them background"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::{ChunkEntry, Encoding};
    use crate::transfer::ledger::Origin;

    fn source(key: u8) -> ChunkSource {
        let entry =
            ChunkEntry::Stored { pack: 0, offset: 0, stored_len: 10, encoding: Encoding::Raw, digest: [key; 32] };
        ChunkSource {
            pack_key: "p".into(),
            entry,
            digest: [key; 32],
            offset: 0,
            stored_len: 10,
            chunk_len: 10,
            origin: Arc::new(Origin::image("s")),
        }
    }

    #[test]
    fn urgent_reads_come_first_and_lend_their_class() {
        let mut reads = ReadQueue::default();
        for (key, class) in [(1, FetchClass::Background), (2, FetchClass::BootSet), (3, FetchClass::Background)] {
            reads.push(source(key), class, key);
        }
        reads.push(source(3), FetchClass::Priority, 30);
        let mut started = Vec::new();
        while let Some((class, source)) = reads.start() {
            started.push((source.digest[0], class));
            assert_eq!(reads.check(), Ok(()));
        }
        assert_eq!(started, [(3, FetchClass::Priority), (2, FetchClass::BootSet), (1, FetchClass::Background)]);
        reads.push(source(1), FetchClass::Priority, 10);
        assert_eq!(reads.class_of(&[1; 32]), Some(FetchClass::Priority), "in flight, and wanted urgently by now");
        let waiters = reads.end(FetchClass::Background, &[1; 32]);
        assert_eq!(waiters, [(FetchClass::Background, 1), (FetchClass::Priority, 10)]);
        assert!(!reads.contains(&[1; 32]) && reads.contains(&[2; 32]));
        assert_eq!(reads.check(), Ok(()));
    }

    #[test]
    fn background_leaves_room_for_priority() {
        let mut reads = ReadQueue::default();
        (0..100).for_each(|key| reads.push(source(key), FetchClass::Background, ()));
        assert_eq!(std::iter::from_fn(|| reads.start()).count(), READS_BACKGROUND_MAX);
        (100..200).for_each(|key| reads.push(source(key), FetchClass::Priority, ()));
        assert_eq!(std::iter::from_fn(|| reads.start()).count(), READS_MAX - READS_BACKGROUND_MAX);
        assert_eq!(reads.check(), Ok(()));
    }
}
