//! Which chunks of a volume guests changed since its last snapshot, and what a snapshot being taken still needs of it. Plain
//! synchronous core, no I/O.
//!
//! A snapshot begins with a *cut*: from then on what was changed before belongs to it, and what is changed later does not. Chunks of the
//! cut are *pending* until they were captured; a guest that writes to a pending chunk first has its old content *staged*. The cut
//! ends with the commit of the snapshot, and only then is forgotten what was changed before it: so a snapshot that fails, at
//! whatever moment, costs the next one nothing but reading.

use std::collections::BTreeMap;

use crate::mutation::{self, Mutation};
use crate::types::{Changed, Lineage, SnapshotRef};

/// A set of chunks.
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

/// The old content of a chunk that a guest wrote to before it was captured: it is in the staging file at the chunk's own place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// Runs of sectors that were the volume's own, and are in the staging file; the others are the source's.
    pub own: Vec<(u64, u64)>,
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

/// Where the content of a chunk at the moment of the cut is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// In the volume: whoever reads it holds the chunk's lock, and says so afterwards.
    Volume,
    Staging(Staged),
}

#[derive(Debug)]
pub struct Changes {
    base: Option<SnapshotRef>,
    /// Changed since the base; `None`: unknown.
    since_base: Option<ChunkSet>,
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
        Changes { base: lineage.base, since_base, cut: None }
    }

    /// As a restart is to know it.
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

    /// A guest is about to change a chunk, which it must not do while the chunk is pending.
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

    /// Whether the chunk's content is still needed where it is.
    #[must_use]
    pub fn is_pending(&self, chunk: u32) -> bool {
        self.cut.as_ref().is_some_and(|cut| cut.failed.is_none() && cut.pending.contains(chunk))
    }

    /// The old content of a pending chunk is staged: it may be written to.
    pub fn staged(&mut self, chunk: u32, staged: Staged, bytes: u64) {
        if let Some(cut) = &mut self.cut {
            cut.pending.remove(chunk);
            cut.staged.insert(chunk, staged);
            cut.staged_bytes += bytes;
        }
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

    /// Where a chunk of the cut is.
    ///
    /// # Errors
    /// Why the snapshot can't be taken any more.
    pub fn find(&self, id: u64, chunk: u32) -> Result<Where, String> {
        let Some(cut) = self.cut.as_ref().filter(|cut| cut.id == id) else {
            return Err("it was given up".to_owned());
        };
        match (&cut.failed, cut.staged.get(&chunk)) {
            (Some(why), _) => Err(why.clone()),
            (None, Some(staged)) => Ok(Where::Staging(staged.clone())),
            (None, None) if cut.pending.contains(chunk) => Ok(Where::Volume),
            // It may have been written to since it was captured.
            (None, None) => Err(format!("chunk {chunk} is no part of it, or was captured before")),
        }
    }

    /// A chunk was read from the volume, while nobody could write to it.
    pub fn captured(&mut self, id: u64, chunk: u32) {
        if let Some(cut) = self.cut.as_mut().filter(|cut| cut.id == id) {
            cut.pending.remove(chunk);
        }
    }

    /// Ends the cut. With the snapshot it became, only what was changed since then differs from it; without, all is as if it had never been
    /// begun. `false`: there was no such cut.
    pub fn end(&mut self, id: u64, snapshot: Option<SnapshotRef>) -> bool {
        if self.cut() != Some(id) {
            return false;
        }
        let cut = self.cut.take();
        let snapshot = snapshot.or_else(|| self.base.clone().filter(|_| mutation::on(Mutation::GivenUpForgetsChanges)));
        if let (Some(cut), Some(snapshot)) = (cut, snapshot) {
            self.base = Some(snapshot);
            self.since_base =
                Some(if mutation::on(Mutation::ChangesSinceCutForgotten) { ChunkSet::default() } else { cut.since });
        }
        true
    }
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
