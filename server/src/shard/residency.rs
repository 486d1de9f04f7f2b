//! Residency map: which 4 KiB sectors of a volume are in the volume itself. Plain synchronous core, no I/O.
//!
//! Residency only grows. Beside what is true now the map remembers, for every chunk changed since the last journal
//! commit, what is *durable*: a record may only speak of data that was synced before it (P1), and a checkpoint may
//! only dump durable facts.

use crate::mutation::{self, Mutation};
use crate::types::{ChunkResidency, SECTOR_BYTES};

type Map<V> = hashbrown::HashMap<u32, V, ahash::RandomState>;

fn map<V>() -> Map<V> {
    Map::with_hasher(ahash::RandomState::with_seeds(1, 2, 3, 4))
}

/// A half-open range of sectors of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    pub start: u64,
    pub end: u64,
}

impl SectorRange {
    /// The sectors touched by a byte range.
    #[must_use]
    pub fn covering(offset: u64, len: u64) -> SectorRange {
        let sector = u64::from(SECTOR_BYTES);
        SectorRange { start: offset / sector, end: (offset + len).div_ceil(sector) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRun {
    pub start: u64,
    pub end: u64,
    pub resident: bool,
}

pub struct ResidencyMap {
    sectors: u64,
    sectors_per_chunk: u32,
    chunks: u32,
    /// One bit per chunk: every sector of it is resident.
    resident: Box<[u64]>,
    /// One bit per chunk: resident without ever having been given data.
    holes: Box<[u64]>,
    /// One bit per chunk: zero by nature, and no record says so yet.
    unrecorded: Box<[u64]>,
    partial: Map<Box<[u64]>>,
    /// Durable state of chunks changed since their last capture.
    dirty: Map<ChunkResidency>,
    /// Durable state of chunks whose captured change is being synced now.
    syncing: Map<ChunkResidency>,
    /// The record of the captured change is in the journal's buffer: its data is synced, its commit is not.
    appended: bool,
    resident_sectors: u64,
    version: u64,
}

fn bit(words: &[u64], index: u64) -> bool {
    words[(index / 64) as usize] >> (index % 64) & 1 == 1
}

fn set(words: &mut [u64], index: u64) {
    words[(index / 64) as usize] |= 1 << (index % 64);
}

fn clear(words: &mut [u64], index: u64) {
    words[(index / 64) as usize] &= !(1 << (index % 64));
}

impl ResidencyMap {
    /// An empty map of a device of `size_bytes`. `version` should differ from that of earlier lives.
    #[must_use]
    pub fn new(size_bytes: u64, chunk_bytes: u32, version: u64) -> ResidencyMap {
        let sectors = size_bytes.div_ceil(u64::from(SECTOR_BYTES));
        let sectors_per_chunk = chunk_bytes / SECTOR_BYTES;
        let chunks = u32::try_from(sectors.div_ceil(u64::from(sectors_per_chunk))).expect("checked at creation");
        let words = (chunks as usize).div_ceil(64);
        ResidencyMap {
            sectors,
            sectors_per_chunk,
            chunks,
            resident: vec![0; words].into(),
            holes: vec![0; words].into(),
            unrecorded: vec![0; words].into(),
            partial: map(),
            dirty: map(),
            syncing: map(),
            appended: false,
            resident_sectors: 0,
            version,
        }
    }

    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Changes whenever residency does.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    #[must_use]
    pub fn resident_sectors(&self) -> u64 {
        self.resident_sectors
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.resident_sectors == self.sectors
    }

    /// Full, and nothing of it waits for the journal.
    #[must_use]
    pub fn is_full_and_durable(&self) -> bool {
        self.is_full() && self.dirty.is_empty() && self.syncing.is_empty()
    }

    /// The sectors of a chunk; the last chunk may be short.
    #[must_use]
    pub fn chunk_sectors(&self, chunk: u32) -> SectorRange {
        let start = u64::from(chunk) * u64::from(self.sectors_per_chunk);
        SectorRange { start, end: (start + u64::from(self.sectors_per_chunk)).min(self.sectors) }
    }

    #[must_use]
    pub fn chunk_of(&self, sector: u64) -> u32 {
        u32::try_from(sector / u64::from(self.sectors_per_chunk)).expect("sector inside the device")
    }

    #[must_use]
    pub fn is_chunk_resident(&self, chunk: u32) -> bool {
        bit(&self.resident, u64::from(chunk))
    }

    #[must_use]
    pub fn is_sector_resident(&self, sector: u64) -> bool {
        let chunk = self.chunk_of(sector);
        self.is_chunk_resident(chunk)
            || self.partial.get(&chunk).is_some_and(|p| bit(p, sector - self.chunk_sectors(chunk).start))
    }

    #[must_use]
    pub fn is_resident(&self, range: SectorRange) -> bool {
        let (first, last) = (self.chunk_of(range.start), self.chunk_of(range.end - 1));
        (first..=last).all(|chunk| {
            self.is_chunk_resident(chunk) || {
                let whole = self.chunk_sectors(chunk);
                self.partial.get(&chunk).is_some_and(|p| {
                    (range.start.max(whole.start)..range.end.min(whole.end)).all(|s| bit(p, s - whole.start))
                })
            }
        })
    }

    /// Nothing of the range is resident.
    #[must_use]
    pub fn is_absent(&self, range: SectorRange) -> bool {
        let (first, last) = (self.chunk_of(range.start), self.chunk_of(range.end - 1));
        (first..=last).all(|chunk| {
            let whole = self.chunk_sectors(chunk);
            let mut wanted = range.start.max(whole.start)..range.end.min(whole.end);
            !self.is_chunk_resident(chunk)
                && self.partial.get(&chunk).is_none_or(|p| !wanted.any(|s| bit(p, s - whole.start)))
        })
    }

    /// Resident, and the journal knows.
    #[must_use]
    pub fn is_durable(&self, range: SectorRange) -> bool {
        let chunks = self.chunk_of(range.start)..=self.chunk_of(range.end - 1);
        self.is_resident(range)
            && chunks.clone().all(|chunk| !bit(&self.unrecorded, u64::from(chunk)))
            && ((self.dirty.is_empty() && self.syncing.is_empty())
                || chunks.into_iter().all(|c| !self.dirty.contains_key(&c) && !self.syncing.contains_key(&c)))
    }

    /// First chunk at or after `from` that is not resident.
    #[must_use]
    pub fn next_absent_chunk(&self, from: u32) -> Option<u32> {
        let mut chunk = u64::from(from);
        while chunk < u64::from(self.chunks) {
            let absent = !self.resident[(chunk / 64) as usize] >> (chunk % 64);
            if absent == 0 {
                chunk = (chunk / 64 + 1) * 64;
                continue;
            }
            chunk += u64::from(absent.trailing_zeros());
            return (chunk < u64::from(self.chunks)).then(|| u32::try_from(chunk).expect("below chunks"));
        }
        None
    }

    /// Runs of equal residency that cover the range, in order.
    #[must_use]
    pub fn runs(&self, range: SectorRange) -> Vec<SectorRun> {
        self.runs_at_most(range, usize::MAX)
    }

    /// The first runs of the range: about `max` of them, complete ones, if there are more.
    #[must_use]
    pub fn runs_at_most(&self, range: SectorRange, max: usize) -> Vec<SectorRun> {
        let mut runs: Vec<SectorRun> = Vec::new();
        let mut push = |start: u64, end: u64, resident: bool| {
            match runs.last_mut() {
                Some(last) if last.resident == resident => last.end = end,
                _ => runs.push(SectorRun { start, end, resident }),
            }
            runs.len()
        };
        let mut sector = range.start;
        while sector < range.end {
            let chunk = self.chunk_of(sector);
            let whole = self.chunk_sectors(chunk);
            let end = whole.end.min(range.end);
            let found = match self.partial.get(&chunk) {
                Some(bits) => {
                    (sector..end).map(|s| push(s, s + 1, bit(bits, s - whole.start))).last().expect("not empty")
                }
                None => push(sector, end, self.is_chunk_resident(chunk)),
            };
            if found >= max {
                break;
            }
            sector = end;
        }
        runs
    }

    /// Runs of sectors of a chunk that are not resident: what hydration may write.
    #[must_use]
    pub fn absent_runs(&self, chunk: u32) -> Vec<SectorRange> {
        let runs = self.runs(self.chunk_sectors(chunk));
        runs.iter().filter(|r| !r.resident).map(|r| SectorRange { start: r.start, end: r.end }).collect()
    }

    /// Marks sectors resident whose data has been written to the volume file.
    pub fn mark_written(&mut self, range: SectorRange) {
        self.mark(range, false);
    }

    /// Marks sectors resident that the volume file reads as zeroes (punched); whole chunks become holes.
    pub fn mark_zeroed(&mut self, range: SectorRange) {
        self.mark(range, true);
    }

    /// Marks a chunk of a fresh volume resident that has no data by nature. Nothing is journaled unless somebody asks
    /// for it by [`ResidencyMap::record_zeroes`] or another change is made durable: the manifest says it again.
    pub fn mark_zero_by_nature(&mut self, chunk: u32) {
        let sectors = self.chunk_sectors(chunk);
        if !self.is_chunk_resident(chunk) {
            set(&mut self.resident, u64::from(chunk));
            set(&mut self.holes, u64::from(chunk));
            set(&mut self.unrecorded, u64::from(chunk));
            self.resident_sectors += sectors.end - sectors.start;
        }
    }

    /// Lets the next capture speak of the chunks of `range` that are zero by nature: then even a restart without the
    /// object store knows them.
    pub fn record_zeroes(&mut self, range: SectorRange) {
        for chunk in self.chunk_of(range.start)..=self.chunk_of(range.end - 1) {
            if bit(&self.unrecorded, u64::from(chunk)) {
                clear(&mut self.unrecorded, u64::from(chunk));
                self.dirty.insert(chunk, ChunkResidency::Absent);
            }
        }
    }

    /// [`ResidencyMap::record_zeroes`] for at most `max` chunks of the whole device, wherever they are.
    pub fn record_some_zeroes(&mut self, max: usize) {
        for _ in 0..max {
            let Some(word) = self.unrecorded.iter().position(|word| *word != 0) else { return };
            let chunk = word as u32 * 64 + self.unrecorded[word].trailing_zeros();
            clear(&mut self.unrecorded, u64::from(chunk));
            self.dirty.insert(chunk, ChunkResidency::Absent);
        }
    }

    fn mark(&mut self, range: SectorRange, zeroed: bool) {
        let mut sector = range.start;
        while sector < range.end {
            let chunk = self.chunk_of(sector);
            let whole = self.chunk_sectors(chunk);
            let end = whole.end.min(range.end);
            self.mark_in_chunk(chunk, whole, SectorRange { start: sector, end }, zeroed);
            sector = end;
        }
    }

    fn mark_in_chunk(&mut self, chunk: u32, whole: SectorRange, range: SectorRange, zeroed: bool) {
        let index = u64::from(chunk);
        let was_hole = bit(&self.holes, index);
        if self.is_chunk_resident(chunk) && (zeroed || !was_hole) {
            if zeroed && range == whole && !was_hole {
                set(&mut self.holes, index);
                self.version += 1;
            }
            return;
        }
        let before = if bit(&self.unrecorded, index) { ChunkResidency::Absent } else { self.current(chunk) };
        if was_hole {
            // Data arrives in a chunk that had none by nature: from now on the journal must know it.
            clear(&mut self.holes, index);
            clear(&mut self.unrecorded, index);
        } else if range == whole {
            self.resident_sectors += (whole.end - whole.start) - self.count(chunk);
            self.become_resident(chunk);
            if zeroed {
                set(&mut self.holes, index);
            }
        } else {
            self.mark_partial(chunk, whole, range);
        }
        self.dirty.entry(chunk).or_insert(before);
        self.version += 1;
    }

    fn mark_partial(&mut self, chunk: u32, whole: SectorRange, range: SectorRange) {
        let words = (self.sectors_per_chunk as usize).div_ceil(64);
        let bits = self.partial.entry(chunk).or_insert_with(|| vec![0; words].into());
        for sector in range.start - whole.start..range.end - whole.start {
            if !bit(bits, sector) {
                set(bits, sector);
                self.resident_sectors += 1;
            }
        }
        if self.count(chunk) == whole.end - whole.start {
            self.become_resident(chunk);
        }
    }

    fn become_resident(&mut self, chunk: u32) {
        self.partial.remove(&chunk);
        set(&mut self.resident, u64::from(chunk));
    }

    fn count(&self, chunk: u32) -> u64 {
        self.partial.get(&chunk).map_or(0, |bits| bits.iter().map(|w| u64::from(w.count_ones())).sum())
    }

    fn current(&self, chunk: u32) -> ChunkResidency {
        if self.is_chunk_resident(chunk) {
            return ChunkResidency::Resident;
        }
        self.partial.get(&chunk).map_or(ChunkResidency::Absent, |bits| ChunkResidency::Partial(bits.clone()))
    }

    #[must_use]
    pub fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Captures the changes that a sync started now will make durable. One capture at a time: the caller answers it
    /// with [`ResidencyMap::sync_done`] or [`ResidencyMap::sync_failed`].
    pub fn capture_dirty(&mut self) -> Vec<(u32, ChunkResidency)> {
        assert!(self.syncing.is_empty(), "one capture at a time");
        self.syncing = std::mem::replace(&mut self.dirty, map());
        let mut changes: Vec<_> = self.syncing.keys().map(|chunk| (*chunk, self.current(*chunk))).collect();
        changes.sort_unstable_by_key(|(chunk, _)| *chunk);
        changes
    }

    /// The captured change was appended to the journal: a checkpoint that starts from now on must contain it, for its
    /// segment gets only records appended later.
    pub fn sync_appended(&mut self) {
        self.appended = true;
    }

    pub fn sync_done(&mut self) {
        self.appended = false;
        self.syncing.clear();
    }

    pub fn sync_failed(&mut self) {
        self.appended = false;
        // The older durable state wins over one captured meanwhile.
        for (chunk, durable) in self.syncing.drain() {
            self.dirty.insert(chunk, durable);
        }
    }

    /// Every chunk that is at least partly resident with synced data and an appended record, for a checkpoint. Those that are zero by nature are so
    /// durably only once the file has been synced (`zeroes`): until then not even its length is.
    #[must_use]
    pub fn durable(&self, zeroes: bool) -> Vec<(u32, ChunkResidency)> {
        (0..self.chunks)
            .filter(|chunk| zeroes || !bit(&self.unrecorded, u64::from(*chunk)))
            .filter_map(|chunk| {
                if mutation::on(Mutation::CheckpointDumpsUnsynced) {
                    return Some((chunk, self.current(chunk)));
                }
                let syncing = self.syncing.get(&chunk).filter(|_| !self.appended);
                let state = syncing.or_else(|| self.dirty.get(&chunk)).cloned();
                match state.unwrap_or_else(|| self.current(chunk)) {
                    ChunkResidency::Absent => None,
                    state => Some((chunk, state)),
                }
            })
            .collect()
    }

    /// Applies what the journal knew, at start.
    ///
    /// # Errors
    /// A sentence when the record does not fit the volume.
    pub fn restore(&mut self, states: &[(u32, ChunkResidency)]) -> Result<(), String> {
        let words = (self.sectors_per_chunk as usize).div_ceil(64);
        for (chunk, state) in states {
            if *chunk >= self.chunks {
                return Err(format!("residency of chunk {chunk} of a volume with {} chunks", self.chunks));
            }
            let whole = self.chunk_sectors(*chunk);
            match state {
                ChunkResidency::Absent => {}
                ChunkResidency::Resident => self.mark_in_chunk(*chunk, whole, whole, false),
                ChunkResidency::Partial(bits) if bits.len() == words => {
                    for sector in whole.start..whole.end {
                        if bit(bits, sector - whole.start) {
                            self.mark_in_chunk(*chunk, whole, SectorRange { start: sector, end: sector + 1 }, false);
                        }
                    }
                }
                ChunkResidency::Partial(bits) => {
                    return Err(format!("residency bitmap of chunk {chunk} has {} words, not {words}", bits.len()));
                }
            }
        }
        self.dirty.clear();
        Ok(())
    }

    /// Checks the map against itself.
    ///
    /// # Errors
    /// A sentence that names what does not hold.
    pub fn check(&self) -> Result<(), String> {
        let mut sectors = 0;
        for chunk in 0..self.chunks {
            let (index, whole) = (u64::from(chunk), self.chunk_sectors(chunk));
            let (resident, partial) = (self.is_chunk_resident(chunk), self.partial.contains_key(&chunk));
            let (hole, unrecorded) = (bit(&self.holes, index), bit(&self.unrecorded, index));
            if (resident && partial) || (hole && !resident) || (unrecorded && !hole) {
                return Err(format!(
                    "chunk {chunk}: resident {resident}, partial {partial}, hole {hole}, unrecorded {unrecorded}"
                ));
            }
            let count = if resident { whole.end - whole.start } else { self.count(chunk) };
            if partial && (count == 0 || count >= whole.end - whole.start) {
                return Err(format!("chunk {chunk}: {count} sectors make it partial"));
            }
            sectors += count;
        }
        if sectors != self.resident_sectors {
            return Err(format!("{sectors} sectors are resident, the count says {}", self.resident_sectors));
        }
        let durable = self.dirty.iter().chain(&self.syncing);
        match durable.into_iter().find(|(chunk, durable)| !self.includes(**chunk, durable)) {
            Some((chunk, durable)) => Err(format!("chunk {chunk}: durable as {durable:?}, but not resident")),
            None => Ok(()),
        }
    }

    /// Whether everything of `durable` is resident now.
    fn includes(&self, chunk: u32, durable: &ChunkResidency) -> bool {
        match (durable, self.current(chunk)) {
            (ChunkResidency::Absent, _) | (_, ChunkResidency::Resident) => true,
            (ChunkResidency::Partial(old), ChunkResidency::Partial(now)) => {
                old.iter().zip(&now).all(|(old, now)| old & !now == 0)
            }
            _ => false,
        }
    }

    /// Marks everything resident at start: the journal knew the volume as hydrated.
    pub fn restore_hydrated(&mut self) {
        (0..self.chunks).for_each(|chunk| set(&mut self.resident, u64::from(chunk)));
        self.resident_sectors = self.sectors;
    }
}

#[cfg(test)]
#[path = "residency_tests.rs"]
mod tests;
