//! Which slot of the disk tier holds what: places of chunks, free slots, eviction. Plain synchronous core, no I/O.
//!
//! Slots are numbered through all slot files that the shard writes; every file has the same number, padded to whole
//! index pages (padding is never free). A slot belongs to at most one chunk, or is being written, or is free. The
//! table of encoded records is what the index files are made of; pages that differ from the disk are *dirty*.

use std::collections::{BTreeMap, BTreeSet};

use super::record::{PAGE_BYTES, RECORD_BYTES, RECORDS_PER_PAGE, Record, RecordRead};
use super::s3fifo::{Rank, S3Fifo};
use crate::transfer::Digest;

/// Where a chunk lies: its slots in the order of its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of part 0.
    pub record: Record,
    pub slots: Box<[u32]>,
}

/// Puts parts together: the places of all chunks that are complete, oldest first; of several copies the youngest.
pub fn places(records: impl IntoIterator<Item = (u32, Record)>) -> Vec<Place> {
    let mut parts: BTreeMap<(u64, Digest), Vec<(u32, Record)>> = BTreeMap::new();
    for (slot, record) in records {
        parts.entry((record.sequence, record.digest)).or_default().push((slot, record));
    }
    let mut youngest: hashbrown::HashMap<Digest, u64, ahash::RandomState> =
        hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(37, 38, 39, 40));
    let complete: Vec<Place> = parts.into_values().filter_map(complete).collect();
    for place in &complete {
        youngest.insert(place.record.digest, place.record.sequence);
    }
    complete.into_iter().filter(|place| youngest[&place.record.digest] == place.record.sequence).collect()
}

fn complete(mut parts: Vec<(u32, Record)>) -> Option<Place> {
    parts.sort_unstable_by_key(|(slot, record)| (record.part, *slot));
    let record = parts[0].1;
    let whole = parts.len() == record.parts();
    let agree = parts.iter().enumerate().all(|(part, (_, found))| *found == record.with_part(part));
    (whole && record.part == 0 && agree).then(|| Place { record, slots: parts.iter().map(|(slot, _)| *slot).collect() })
}

/// The slots of one shard.
pub struct Slots {
    order: S3Fifo<Place>,
    free: BTreeSet<u32>,
    table: Vec<[u8; RECORD_BYTES]>,
    dirty: BTreeSet<u32>,
    sequence: u64,
    evicted: u64,
}

impl Slots {
    /// `files` files of `per_file` slots each, all free.
    #[must_use]
    pub fn new(files: u32, per_file: u32) -> Slots {
        let stride = stride(per_file);
        Slots {
            order: S3Fifo::new((files * per_file) as usize),
            free: (0..files).flat_map(|file| file * stride..file * stride + per_file).collect(),
            table: vec![[0; RECORD_BYTES]; (files * stride) as usize],
            dirty: BTreeSet::new(),
            sequence: 0,
            evicted: 0,
        }
    }

    /// Takes over what earlier lives left. Records that make no whole chunk leave their slots free.
    pub fn adopt(&mut self, records: impl IntoIterator<Item = (u32, Record)>) {
        let mut found = Vec::new();
        for (slot, record) in records {
            self.sequence = self.sequence.max(record.sequence);
            if self.free.contains(&slot) {
                found.push((slot, record));
            }
        }
        for place in places(found) {
            for (part, slot) in place.slots.iter().enumerate() {
                self.free.remove(slot);
                self.table[*slot as usize] = place.record.with_part(part).encode();
            }
            let (digest, cost) = (place.record.digest, place.slots.len());
            self.order.restore(digest, place, cost);
        }
    }

    #[must_use]
    pub fn place(&self, digest: &Digest) -> Option<&Place> {
        self.order.peek(digest)
    }

    /// Of `count` slots from `from` on the first one where a chunk begins; and the slot to go on from, if there are more.
    #[must_use]
    pub fn next_chunk(&self, from: u32, count: u32) -> (Option<&Place>, Option<u32>) {
        let all = self.table.len() as u32;
        let end = from.saturating_add(count).min(all);
        let begins = |slot: u32| match Record::decode(&self.table[slot as usize]) {
            RecordRead::Valid(record) => self.place(&record.digest).filter(|place| place.slots[0] == slot),
            RecordRead::Free | RecordRead::Unreadable => None,
        };
        let found = (from..end).find_map(|slot| begins(slot).map(|place| (slot, place)));
        let next = found.map_or(end, |(slot, _)| slot + 1);
        (found.map(|(_, place)| place), (next < all).then_some(next))
    }

    /// Notes a request for the chunk.
    pub fn touch(&mut self, digest: &Digest, rank: Rank) {
        self.order.get(digest, rank);
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    #[must_use]
    pub fn used(&self) -> usize {
        self.order.used()
    }

    #[must_use]
    pub fn budget(&self) -> usize {
        self.order.budget()
    }

    /// Chunks evicted so far.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Takes slots to write a chunk into, evicting others; low numbers first, so that they are often neighbours. `None`:
    /// there are not so many.
    pub fn begin(&mut self, parts: usize) -> Option<(u64, Box<[u32]>)> {
        while self.free.len() < parts {
            let (_, place) = self.order.evict()?;
            self.evicted += 1;
            self.release(&place);
        }
        let slots: Box<[u32]> = self.free.iter().copied().take(parts).collect();
        for slot in &slots {
            self.free.remove(slot);
        }
        self.sequence += 1;
        Some((self.sequence, slots))
    }

    /// The chunk is in its slots. A copy that came by another way meanwhile gives its slots back.
    pub fn complete(&mut self, place: Place, rank: Rank) {
        let digest = place.record.digest;
        self.remove(&digest);
        for (part, slot) in place.slots.iter().enumerate() {
            self.set(*slot, place.record.with_part(part).encode());
        }
        let cost = place.slots.len();
        self.order.insert(digest, place, cost, rank);
    }

    /// The slots were not written, or not wholly.
    pub fn abort(&mut self, slots: &[u32]) {
        self.free.extend(slots);
    }

    /// Forgets a chunk; whether it was there.
    pub fn remove(&mut self, digest: &Digest) -> bool {
        let removed = self.order.remove(digest);
        removed.map(|place| self.release(&place)).is_some()
    }

    fn release(&mut self, place: &Place) {
        for slot in &place.slots {
            self.set(*slot, [0; RECORD_BYTES]);
            self.free.insert(*slot);
        }
    }

    fn set(&mut self, slot: u32, bytes: [u8; RECORD_BYTES]) {
        self.table[slot as usize] = bytes;
        self.dirty.insert(slot / RECORDS_PER_PAGE);
    }

    /// A page of the index that differs from the disk, and its content. It counts as written from here on.
    pub fn take_dirty(&mut self) -> Option<(u32, [u8; PAGE_BYTES])> {
        let page = self.dirty.pop_first()?;
        let first = (page * RECORDS_PER_PAGE) as usize;
        let mut bytes = [0; PAGE_BYTES];
        for (target, record) in bytes.chunks_mut(RECORD_BYTES).zip(&self.table[first..]) {
            target.copy_from_slice(record);
        }
        Some((page, bytes))
    }

    /// Writing the page failed.
    pub fn mark_dirty(&mut self, page: u32) {
        self.dirty.insert(page);
    }

    /// Checks places, free slots and table against each other.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.order.check()?;
        let (free, used, all) = (self.free.len(), self.order.used(), self.order.budget());
        if free + used > all {
            return Err(format!("{free} slots are free and {used} are used, of {all}"));
        }
        match self.free.iter().find(|slot| self.table[**slot as usize] != [0; RECORD_BYTES]) {
            Some(slot) => Err(format!("slot {slot} is free and has a record")),
            None => Ok(()),
        }
    }
}

/// Slots of one file with padding.
#[must_use]
pub fn stride(per_file: u32) -> u32 {
    per_file.next_multiple_of(RECORDS_PER_PAGE)
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
