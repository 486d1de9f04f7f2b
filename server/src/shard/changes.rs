//! Which chunks of a volume guests changed since its last snapshot, and what a snapshot being taken still needs of it. Plain
//! synchronous core, no I/O.
//!
//! A snapshot begins with a *cut*: from then on what was changed before belongs to it, and what is changed later does not. Chunks of the
//! cut are *pending* until they were captured; a guest that writes to a pending chunk first has its old content *staged*. The cut
//! ends with the commit of the snapshot, and only then is forgotten what was changed before it: so a snapshot that fails, at
//! whatever moment, costs the next one nothing but reading.
//!
//! What a restart knows of it is what the journal has: the set as of the last checkpoint, and the *regions* of chunks that were announced since.
//! A region is announced before the first write to it, so after a crash too many chunks may count as changed, and never too few.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use crate::mutation::{self, Mutation};
use crate::types::{Changed, Lineage, SnapshotRef};

/// Chunks that are announced together: with chunks of 512 KiB one record of the journal for 64 MiB of a volume.
const REGION_CHUNKS: u32 = 128;

/// A set of chunks, or of sectors of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet(Vec<u64>);

impl ChunkSet {
    #[must_use]
    pub fn contains(&self, chunk: u32) -> bool {
        self.0.get(chunk as usize / 64).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    pub fn insert(&mut self, chunk: u32) {
        let word = chunk as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (chunk % 64);
    }

    pub fn remove(&mut self, chunk: u32) {
        if let Some(word) = self.0.get_mut(chunk as usize / 64) {
            *word &= !(1 << (chunk % 64));
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let words = self.0.iter().enumerate();
        words
            .flat_map(|(at, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at as u32 * 64 + bit))
    }

    fn add(&mut self, other: &ChunkSet) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(word, more)| *word |= more);
    }

    /// As runs, first chunk and count.
    #[must_use]
    pub fn runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for chunk in self.iter() {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == chunk => *len += 1,
                _ => runs.push((chunk, 1)),
            }
        }
        runs
    }
}

impl FromIterator<u32> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = u32>>(chunks: I) -> ChunkSet {
        let mut set = ChunkSet::default();
        chunks.into_iter().for_each(|chunk| set.insert(chunk));
        set
    }
}

/// Sectors of a chunk, counted from its first, that guests wrote to before it was captured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Staged {
    /// They were the volume's own: their old content is in the staging file, at its own place.
    pub own: ChunkSet,
    /// They were not in the volume: their old content is the source's.
    pub source: ChunkSet,
}

impl Staged {
    #[must_use]
    pub fn contains(&self, sector: u32) -> bool {
        self.own.contains(sector) || self.source.contains(sector)
    }
}

/// A snapshot being taken.
#[derive(Debug)]
struct Cut {
    id: u64,
    pending: ChunkSet,
    /// Changed after the cut.
    since: ChunkSet,
    staged: BTreeMap<u32, Staged>,
    staged_bytes: u64,
    failed: Option<String>,
}

/// What the journal has of the changes since the base.
#[derive(Debug, Default)]
struct Announced {
    /// A restart takes these for changed: guests may write to them.
    durable: ChunkSet,
    /// Grows whenever what was announced before does not count any more.
    epoch: u64,
}

/// An announcement that is not durable yet.
#[derive(Debug)]
#[must_use]
pub struct Announcement {
    run: Range<u32>,
    epoch: u64,
}

#[derive(Debug)]
pub struct Changes {
    base: Option<SnapshotRef>,
    /// Changed since the base; `None`: unknown.
    since_base: Option<ChunkSet>,
    announced: Announced,
    cut: Option<Cut>,
}

impl Changes {
    #[must_use]
    pub fn new(lineage: Lineage) -> Changes {
        let set = |runs: Vec<(u32, u32)>| runs.into_iter().flat_map(|(start, len)| start..start + len).collect();
        let since_base = match lineage.changed {
            Changed::Unknown => None,
            Changed::Runs(runs) => Some(set(runs)),
        };
        let announced = Announced { durable: since_base.clone().unwrap_or_default(), epoch: 0 };
        Changes { base: lineage.base, since_base, announced, cut: None }
    }

    /// For a record that replaces what the journal has of it: what guests may be writing to is in it, all else has to be announced again.
    pub fn recorded(&mut self) -> Lineage {
        let durable = self.since_base.clone().unwrap_or_default();
        self.announced = Announced { durable, epoch: self.announced.epoch + 1 };
        match mutation::on(Mutation::CheckpointForgetsChanges) {
            true => Lineage { changed: Changed::Runs(Vec::new()), ..self.lineage() },
            false => self.lineage(),
        }
    }

    /// As far as is known now.
    #[must_use]
    pub fn lineage(&self) -> Lineage {
        let runs = self.since_base.as_ref().map(ChunkSet::runs);
        Lineage { base: self.base.clone(), changed: runs.map_or(Changed::Unknown, Changed::Runs) }
    }

    #[must_use]
    pub fn base(&self) -> Option<&SnapshotRef> {
        self.base.as_ref()
    }

    /// Whether the chunk may differ from the base; `None`: unknown.
    #[must_use]
    pub fn is_changed(&self, chunk: u32) -> Option<bool> {
        self.since_base.as_ref().map(|set| set.contains(chunk))
    }

    /// The chunks, of `all` that there are, to announce before a guest may write to these.
    #[must_use]
    pub fn unannounced(&self, chunks: &RangeInclusive<u32>, all: u32) -> Option<Range<u32>> {
        self.since_base.as_ref()?;
        let missing = |chunk: &u32| !self.announced.durable.contains(*chunk);
        let first = chunks.clone().find(missing)?;
        let last = chunks.clone().rev().find(missing)?;
        let region = |chunk: u32| chunk / REGION_CHUNKS * REGION_CHUNKS;
        Some(region(first)..(region(last) + REGION_CHUNKS).min(all))
            .filter(|_| !mutation::on(Mutation::ChangeNotAnnounced))
    }

    /// The announcement is appended to the journal now.
    pub fn announce(&self, run: Range<u32>) -> Announcement {
        Announcement { run, epoch: self.announced.epoch }
    }

    /// It is durable. Without effect where a later record replaced it.
    pub fn announced(&mut self, announcement: Announcement) {
        if announcement.epoch == self.announced.epoch {
            announcement.run.for_each(|chunk| self.announced.durable.insert(chunk));
        }
    }

    /// A guest is about to change a chunk: it is announced, and not pending.
    pub fn write(&mut self, chunk: u32) {
        if let Some(set) = &mut self.since_base
            && !mutation::on(Mutation::ChangeNotNoted)
        {
            set.insert(chunk);
        }
        if let Some(cut) = &mut self.cut {
            cut.since.insert(chunk);
        }
    }

    /// Begins a snapshot of `changed` chunks: those since the base, unless all of `all` have to be looked at, and `also`. `None`: one is being
    /// taken already.
    pub fn begin(&mut self, id: u64, all: Option<impl Iterator<Item = u32>>, also: Option<u32>) -> Option<Vec<u32>> {
        if self.cut.is_some() {
            return None;
        }
        let mut pending: ChunkSet = match (all, &self.since_base) {
            (Some(all), _) => all.collect(),
            (None, Some(set)) => set.clone(),
            (None, None) => return None,
        };
        also.into_iter().for_each(|chunk| pending.insert(chunk));
        let chunks = pending.iter().collect();
        let (since, staged) = (ChunkSet::default(), BTreeMap::new());
        self.cut = Some(Cut { id, pending, since, staged, staged_bytes: 0, failed: None });
        Some(chunks)
    }

    /// The snapshot that is being taken.
    #[must_use]
    pub fn cut(&self) -> Option<u64> {
        self.cut.as_ref().map(|cut| cut.id)
    }

    /// Those of the chunk's sectors whose content is still needed where it is.
    #[must_use]
    pub fn needed(&self, chunk: u32, sectors: Range<u32>) -> Vec<u32> {
        let Some(cut) = self.cut.as_ref().filter(|cut| cut.failed.is_none() && cut.pending.contains(chunk)) else {
            return Vec::new();
        };
        let staged = cut.staged.get(&chunk);
        sectors.filter(|sector| staged.is_none_or(|staged| !staged.contains(*sector))).collect()
    }

    /// The old content of sectors of a pending chunk is safe: they may be written to. `false`: the cut has failed or ended meanwhile.
    pub fn staged(&mut self, id: u64, chunk: u32, more: &Staged, bytes: u64) -> bool {
        let Some(cut) = self.cut.as_mut().filter(|cut| cut.id == id && cut.failed.is_none()) else { return false };
        let staged = cut.staged.entry(chunk).or_default();
        staged.own.add(&more.own);
        staged.source.add(&more.source);
        cut.staged_bytes += bytes;
        true
    }

    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.cut.as_ref().map_or(0, |cut| cut.staged_bytes)
    }

    /// The snapshot can't be taken any more: guests no longer take it into account.
    pub fn fail(&mut self, why: String) {
        if let Some(cut) = &mut self.cut {
            cut.failed.get_or_insert(why);
        }
    }

    /// Which sectors of a chunk of the cut are not as they were in the volume. Whoever reads the chunk holds its lock until it says that
    /// it is captured.
    ///
    /// # Errors
    /// Why the snapshot can't be taken any more.
    pub fn find(&self, id: u64, chunk: u32) -> Result<Staged, String> {
        let Some(cut) = self.cut.as_ref().filter(|cut| cut.id == id) else {
            return Err("it was given up".to_owned());
        };
        match &cut.failed {
            Some(why) => Err(why.clone()),
            None if cut.pending.contains(chunk) => Ok(cut.staged.get(&chunk).cloned().unwrap_or_default()),
            // It may have been written to since it was captured.
            None => Err(format!("chunk {chunk} is no part of it, or was captured before")),
        }
    }

    /// A chunk was read, while nobody could write to it.
    pub fn captured(&mut self, id: u64, chunk: u32) {
        if let Some(cut) = self.cut.as_mut().filter(|cut| cut.id == id) {
            cut.pending.remove(chunk);
            cut.staged.remove(&chunk);
        }
    }

    /// Ends the cut. With the snapshot it became, only what was changed since then differs from it, which the caller records at once;
    /// without, all is as if it had never been begun. `false`: there was no such cut.
    pub fn end(&mut self, id: u64, snapshot: Option<SnapshotRef>) -> bool {
        if self.cut() != Some(id) {
            return false;
        }
        let cut = self.cut.take();
        let snapshot = snapshot.or_else(|| self.base.clone().filter(|_| mutation::on(Mutation::GivenUpForgetsChanges)));
        if let (Some(cut), Some(snapshot)) = (cut, snapshot) {
            self.base = Some(snapshot);
            let since = if mutation::on(Mutation::ChangesSinceCutForgotten) { ChunkSet::default() } else { cut.since };
            self.since_base = Some(since);
        }
        true
    }
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
