//! Which volume of a store has its turn to hydrate. Plain synchronous core: no I/O, no clock.
//!
//! Volumes that are ready stand in the order of their rank: class, then deadline, and equal ones by turns, so that a
//! wave of one image goes through the chunk cache together. Volumes that must wait for a time sleep in the order of
//! these times. Whoever has nothing to do before something changes is not here at all. Every step is O(log n).

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;

use crate::mutation::{self, Mutation};
use crate::platform::Time;
use crate::transfer::FetchClass;

/// Why chunks are hydrated, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A guest missed them, or is about to.
    Priority,
    /// Guests of the image touch them when they boot.
    BootSet,
    Background,
}

impl Class {
    pub const ALL: [Class; 3] = [Class::Priority, Class::BootSet, Class::Background];

    /// How urgently hydration fetches it. Nobody waits for what is owed: a guest that wants it again fetches it itself.
    #[must_use]
    pub fn fetch_class(self) -> FetchClass {
        match self {
            Class::Priority | Class::BootSet => FetchClass::BootSet,
            Class::Background => FetchClass::Background,
        }
    }

    /// On whose account goes what was fetched so urgently.
    #[must_use]
    pub fn of(fetch: FetchClass) -> Class {
        match fetch {
            FetchClass::Priority | FetchClass::ReadAhead => Class::Priority,
            FetchClass::BootSet => Class::BootSet,
            FetchClass::Background => Class::Background,
        }
    }
}

/// Where a volume stands; less is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    class: Class,
    /// No deadline is the latest of all.
    deadline_unix_ms: u64,
}

impl Rank {
    #[must_use]
    pub fn new(class: Class, deadline_unix_ms: Option<u64>) -> Rank {
        Rank { class, deadline_unix_ms: deadline_unix_ms.unwrap_or(u64::MAX) }
    }

    #[must_use]
    pub fn class(self) -> Class {
        self.class
    }
}

#[derive(Clone, Copy)]
enum Place {
    Ready(Rank, u64),
    Asleep(Time, Rank),
}

/// The volumes of one store and shard that want to hydrate.
pub struct HydrationQueue<K> {
    /// By rank, and among equals by the turn they were given.
    ready: BTreeMap<(Rank, u64), K>,
    asleep: BTreeSet<(Time, K)>,
    places: hashbrown::HashMap<K, Place, ahash::RandomState>,
    ready_by_class: [usize; Class::ALL.len()],
    turns: u64,
}

impl<K> Default for HydrationQueue<K> {
    fn default() -> Self {
        let seeded = ahash::RandomState::with_seeds(25, 26, 27, 28);
        HydrationQueue {
            ready: BTreeMap::new(),
            asleep: BTreeSet::new(),
            places: hashbrown::HashMap::with_hasher(seeded),
            ready_by_class: [0; Class::ALL.len()],
            turns: 0,
        }
    }
}

impl<K: Copy + Ord + Hash> HydrationQueue<K> {
    /// Ready from now on. Behind all others of its rank, unless it stands among them already.
    pub fn put(&mut self, key: K, rank: Rank) {
        if matches!(self.places.get(&key), Some(Place::Ready(now, _)) if *now == rank) {
            return;
        }
        self.remove(key);
        self.turns += 1;
        self.ready.insert((rank, self.turns), key);
        self.ready_by_class[rank.class as usize] += 1;
        self.places.insert(key, Place::Ready(rank, self.turns));
    }

    /// Out of the way until a time; ready then.
    pub fn sleep(&mut self, key: K, rank: Rank, until: Time) {
        self.remove(key);
        self.asleep.insert((until, key));
        self.places.insert(key, Place::Asleep(until, rank));
    }

    /// Another rank for a volume that is here. One that sleeps goes on sleeping.
    pub fn change_rank(&mut self, key: K, rank: Rank) {
        match self.places.get_mut(&key) {
            Some(Place::Ready(..)) => self.put(key, rank),
            Some(Place::Asleep(_, asleep)) => *asleep = rank,
            None => {}
        }
    }

    /// Takes it out, ready or asleep.
    pub fn remove(&mut self, key: K) {
        match self.places.remove(&key) {
            Some(Place::Ready(rank, turn)) => {
                self.ready.remove(&(rank, turn));
                self.ready_by_class[rank.class as usize] -= 1;
            }
            Some(Place::Asleep(until, _)) => drop(self.asleep.remove(&(until, key))),
            None => {}
        }
    }

    #[must_use]
    pub fn contains(&self, key: K) -> bool {
        self.places.contains_key(&key)
    }

    /// Whose turn it is. Those whose time has come stand among the others from now on.
    pub fn first(&mut self, now: Time) -> Option<(K, Rank)> {
        while let Some((_, key)) = self.asleep.first().copied().filter(|(until, _)| *until <= now) {
            if let Some(Place::Asleep(_, rank)) = self.places.get(&key).copied() {
                self.put(key, rank);
            }
        }
        let first = match mutation::on(Mutation::LatestDeadlineFirst) {
            true => self.ready.last_key_value(),
            false => self.ready.first_key_value(),
        };
        first.map(|((rank, _), key)| (*key, *rank))
    }

    /// When the next sleeper becomes ready.
    #[must_use]
    pub fn wakes_at(&self) -> Option<Time> {
        self.asleep.first().map(|(until, _)| *until)
    }

    /// Volumes of a class that wait for their turn only.
    #[must_use]
    pub fn ready(&self, class: Class) -> usize {
        self.ready_by_class[class as usize]
    }

    #[must_use]
    pub fn asleep(&self) -> usize {
        self.asleep.len()
    }

    /// Checks the structure against itself.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<(), String> {
        let (ready, asleep, places) = (self.ready.len(), self.asleep.len(), self.places.len());
        if ready + asleep != places || self.ready_by_class.iter().sum::<usize>() != ready {
            return Err(format!("hydration queue: {ready} ready and {asleep} asleep of {places}"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "hydration_queue_tests.rs"]
mod tests;
