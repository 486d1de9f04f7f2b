//! Which chunk lies where in a shard's part of a base, and which leaves first. Pure.
//!
//! The first time a chunk comes it has its image's order (its *seat*), so that neighbours of an image lie together and are
//! cloned together; afterwards, and where no image is, chunks are appended. No place is ever used again: an offset means one
//! chunk or nothing, for as long as the file lives. What is evicted is punched out of the file.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::mutation::{self, Mutation};
use crate::transfer::Digest;

/// Held by whoever clones from a slot: it stays what it is until then.
pub type Lease = Arc<()>;

/// Images that have seats; those that come later are appended.
const IMAGES_MAX: usize = 4096;
/// Seats take no space until they are used, but offsets of files end at 2^63.
const SEATS_END_MAX: u64 = 1 << 60;

/// Where a chunk is in its image.
#[derive(Clone, Debug)]
pub struct Seat {
    pub image: Arc<str>,
    pub chunk: u32,
    /// Of the whole image.
    pub chunks: u32,
    pub chunk_bytes: u32,
}

/// The part of the file that an image's chunks have, in their order.
struct Seats {
    start: u64,
    chunks: u32,
    chunk_bytes: u32,
    used: BTreeSet<u32>,
}

struct Slot {
    place: Range<u64>,
    last_use: u64,
    /// Its bytes are in the file.
    ready: bool,
    lease: Lease,
}

impl Slot {
    fn is_idle(&self) -> bool {
        let lent = Arc::strong_count(&self.lease) > 1 && !mutation::on(Mutation::LentPlacePunched);
        self.ready && !lent
    }
}

pub struct Slots {
    budget: u64,
    used: u64,
    end: u64,
    uses: u64,
    slots: hashbrown::HashMap<Digest, Slot, ahash::RandomState>,
    by_use: BTreeMap<u64, Digest>,
    seats: BTreeMap<Arc<str>, Seats>,
}

/// What a chunk that is wanted in the base finds.
pub enum Claim {
    /// It is there.
    Ready(Range<u64>, Lease),
    /// Somebody is writing it.
    Coming,
    /// The caller writes it here, after what was evicted for it is punched or while it is.
    Write { place: Range<u64>, evicted: Vec<Range<u64>> },
    /// There is no room.
    Full,
}

impl Slots {
    pub fn new(budget: u64) -> Slots {
        Slots {
            budget,
            used: 0,
            end: 0,
            uses: 0,
            slots: hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(53, 54, 55, 56)),
            by_use: BTreeMap::new(),
            seats: BTreeMap::new(),
        }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// A chunk that is ready, used now.
    pub fn find(&mut self, digest: &Digest) -> Option<(Range<u64>, Lease)> {
        let slot = self.slots.get_mut(digest).filter(|slot| slot.ready)?;
        self.uses += 1;
        self.by_use.remove(&slot.last_use);
        self.by_use.insert(self.uses, *digest);
        slot.last_use = self.uses;
        Some((slot.place.clone(), slot.lease.clone()))
    }

    /// A place for a chunk of `len` bytes. Whoever is told to write says how that ended.
    pub fn claim(&mut self, digest: &Digest, len: u64, seat: Option<&Seat>) -> Claim {
        if let Some((place, lease)) = self.find(digest) {
            return Claim::Ready(place, lease);
        }
        if self.slots.contains_key(digest) {
            return Claim::Coming;
        }
        let Some(evicted) = self.make_room(len) else { return Claim::Full };
        let start = seat.and_then(|seat| self.seat(seat, len)).unwrap_or_else(|| self.append(len));
        let place = start..start + len;
        self.used += len;
        self.uses += 1;
        self.by_use.insert(self.uses, *digest);
        let slot = Slot { place: place.clone(), last_use: self.uses, ready: false, lease: Lease::default() };
        self.slots.insert(*digest, slot);
        Claim::Write { place, evicted }
    }

    fn append(&mut self, len: u64) -> u64 {
        let start = self.end;
        self.end += len;
        start
    }

    /// Where a chunk sits in its image, if nobody has been there.
    fn seat(&mut self, seat: &Seat, len: u64) -> Option<u64> {
        if !self.seats.contains_key(&seat.image) {
            let bytes = u64::from(seat.chunks) * u64::from(seat.chunk_bytes);
            if self.seats.len() >= IMAGES_MAX || self.end.saturating_add(bytes) > SEATS_END_MAX {
                return None;
            }
            let start = self.append(bytes);
            let seats = Seats { start, chunks: seat.chunks, chunk_bytes: seat.chunk_bytes, used: BTreeSet::new() };
            self.seats.insert(seat.image.clone(), seats);
        }
        let seats = self.seats.get_mut(&seat.image)?;
        // Another image may have had the name.
        let fits = seat.chunk_bytes == seats.chunk_bytes && seat.chunk < seats.chunks && len <= seat.chunk_bytes.into();
        let free = fits && seats.used.insert(seat.chunk);
        free.then(|| seats.start + u64::from(seat.chunk) * u64::from(seats.chunk_bytes))
    }

    /// The chunk's bytes are in the file.
    pub fn written(&mut self, digest: &Digest) -> (Range<u64>, Lease) {
        let slot = self.slots.get_mut(digest).expect("only its writer ends a claim");
        slot.ready = true;
        (slot.place.clone(), slot.lease.clone())
    }

    /// The chunk could not be written: its place is to be punched.
    pub fn failed(&mut self, digest: &Digest) -> Range<u64> {
        self.remove(digest)
    }

    /// Forgets everything that nobody uses: its places are to be punched.
    pub fn drop_idle(&mut self) -> Vec<Range<u64>> {
        let idle: Vec<Digest> = self.idle().map(|(digest, _)| digest).collect();
        idle.iter().map(|digest| self.remove(digest)).collect()
    }

    /// Those that nobody uses, the one unused for longest first.
    fn idle(&self) -> impl Iterator<Item = (Digest, &Slot)> {
        let slots = self.by_use.values().map(|digest| (*digest, &self.slots[digest]));
        slots.filter(|(_, slot)| slot.is_idle())
    }

    /// Evicts until `len` bytes fit; nothing if they can't.
    fn make_room(&mut self, len: u64) -> Option<Vec<Range<u64>>> {
        let wanted = (self.used + len).saturating_sub(self.budget);
        let mut freed = 0;
        let mut leaving = Vec::new();
        for (digest, slot) in self.idle() {
            if freed >= wanted {
                break;
            }
            freed += slot.place.end - slot.place.start;
            leaving.push(digest);
        }
        (freed >= wanted).then(|| leaving.iter().map(|digest| self.remove(digest)).collect())
    }

    fn remove(&mut self, digest: &Digest) -> Range<u64> {
        let slot = self.slots.remove(digest).expect("a slot that is there");
        self.by_use.remove(&slot.last_use);
        self.used -= slot.place.end - slot.place.start;
        slot.place
    }

    /// Checks the slots against themselves and their budget.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let mut places: Vec<&Range<u64>> = self.slots.values().map(|slot| &slot.place).collect();
        places.sort_by_key(|place| place.start);
        let used: u64 = places.iter().map(|place| place.end - place.start).sum();
        if used != self.used || used > self.budget {
            return Err(format!("base: {used} bytes in slots, {} counted, {} allowed", self.used, self.budget));
        }
        if places.windows(2).any(|two| two[0].end > two[1].start) || places.last().is_some_and(|l| l.end > self.end) {
            return Err("base: slots overlap".to_owned());
        }
        let in_order = self.by_use.len() == self.slots.len()
            && self.by_use.iter().all(|(last_use, d)| self.slots.get(d).is_some_and(|s| s.last_use == *last_use));
        if in_order { Ok(()) } else { Err("base: the order of use does not list every slot once".to_owned()) }
    }
}
