//! What every sector of a volume may hold, for one writer: obviously right, so that it can judge the servers.
//!
//! A sector's log holds its values from the last durable one on. A read returns the last acknowledged value or a later one
//! whose request has failed; after a crash that took the agent too, any value of the log.

use std::sync::Arc;

pub(crate) const SECTOR: u64 = 512;

/// Names a value: 0 is the image's, 1 is zeroes, all others are writes.
type Version = u32;
const IMAGE: Version = 0;
const ZEROES: Version = 1;

#[derive(Clone, Copy, Debug)]
struct Value {
    version: Version,
    acknowledged: bool,
}

/// What a request puts into its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    version: Version,
    first: usize,
    count: usize,
}

pub(crate) struct Model {
    image: Arc<Vec<u8>>,
    sectors: Vec<Vec<Value>>,
    next_version: Version,
    /// Acknowledged values may be gone: neither the server nor the agent that had them in memory lived on.
    pub(crate) may_have_lost: bool,
    /// Every write and flush, for the story of a wrong sector.
    diary: Vec<Entry>,
}

#[derive(Debug)]
enum Entry {
    Wrote(Write, Result<(), String>),
    Flushed(Result<(), String>),
    Note(&'static str),
}

impl Model {
    pub(crate) fn new(image: Arc<Vec<u8>>) -> Model {
        let unwritten = vec![Value { version: IMAGE, acknowledged: true }];
        let sectors = vec![unwritten; image.len() / SECTOR as usize];
        Model { image, sectors, next_version: ZEROES + 1, may_have_lost: false, diary: Vec::new() }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// A write of new data, or of zeroes; its bytes are [`Model::bytes`].
    pub(crate) fn begin(&mut self, first: u64, count: u64, zeroes: bool) -> Write {
        let version = if zeroes { ZEROES } else { self.next_version };
        self.next_version += u32::from(!zeroes);
        let write = Write { version, first: first as usize, count: count as usize };
        for log in &mut self.sectors[write.first..write.first + write.count] {
            log.push(Value { version, acknowledged: false });
        }
        write
    }

    /// Its answer; one that failed may have happened in any part, and still happens until the next answer.
    pub(crate) fn end(&mut self, write: Write, durable: bool, result: Result<(), String>) {
        if result.is_ok() {
            for log in &mut self.sectors[write.first..write.first + write.count] {
                log.last_mut().expect("begun").acknowledged = true;
                if durable {
                    log.drain(..log.len() - 1);
                }
            }
        }
        self.diary.push(Entry::Wrote(write, result));
    }

    /// A flush was answered: everything acknowledged before is durable.
    pub(crate) fn flushed(&mut self, result: Result<(), String>) {
        if result.is_ok() {
            for log in &mut self.sectors {
                let durable = log.iter().rposition(|value| value.acknowledged).expect("the first one is");
                log.drain(..durable);
            }
            self.may_have_lost = false;
        }
        self.diary.push(Entry::Flushed(result));
    }

    pub(crate) fn note(&mut self, what: &'static str) {
        self.diary.push(Entry::Note(what));
    }

    /// Bytes of a write.
    pub(crate) fn bytes(&self, write: Write) -> Vec<u8> {
        (write.first..write.first + write.count).flat_map(|sector| self.value(sector, write.version)).collect()
    }

    /// Judges what a read returned.
    pub(crate) fn check(&self, first: u64, found: &[u8]) -> Result<(), String> {
        for (at, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = first as usize + at;
            if !self.allowed(sector).iter().any(|value| self.value(sector, value.version) == bytes) {
                return Err(self.story(sector, bytes));
            }
        }
        Ok(())
    }

    /// Judges what was read after a flush that followed a crash, and takes it for the only truth from now on.
    pub(crate) fn settle(&mut self, first: u64, found: &[u8]) -> Result<(), String> {
        for (at, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = first as usize + at;
            let log = &self.sectors[sector];
            let Some(version) = log.iter().map(|v| v.version).find(|v| self.value(sector, *v) == bytes) else {
                return Err(self.story(sector, bytes));
            };
            self.sectors[sector] = vec![Value { version, acknowledged: true }];
        }
        Ok(())
    }

    /// Sectors with more than one possible value, as ranges.
    pub(crate) fn undecided(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for sector in (0..self.sectors.len()).filter(|s| self.sectors[*s].len() > 1).map(|s| s as u64) {
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == sector => *count += 1,
                _ => ranges.push((sector, 1)),
            }
        }
        ranges
    }

    fn allowed(&self, sector: usize) -> &[Value] {
        let log = &self.sectors[sector];
        match self.may_have_lost {
            true => log,
            false => &log[log.iter().rposition(|value| value.acknowledged).expect("the first one is")..],
        }
    }

    fn value(&self, sector: usize, version: Version) -> Vec<u8> {
        match version {
            IMAGE => self.image[sector * SECTOR as usize..][..SECTOR as usize].to_vec(),
            ZEROES => vec![0; SECTOR as usize],
            _ => {
                let word = (u64::from(version) << 32 | sector as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                word.to_le_bytes().repeat(SECTOR as usize / 8)
            }
        }
    }

    /// All that happened to a sector which is wrong, and what it holds.
    fn story(&self, sector: usize, found: &[u8]) -> String {
        let known = (0..self.next_version).find(|version| self.value(sector, *version) == found);
        let found = known.map_or_else(|| format!("no value it ever had: {:02x?}…", &found[..16]), |v| format!("v{v}"));
        let mut text = format!("sector {sector} holds {found}; allowed {:?}\n", self.allowed(sector));
        let touches = |write: &Write| (write.first..write.first + write.count).contains(&sector);
        let last = self.diary.len().saturating_sub(300);
        for (at, entry) in self.diary.iter().enumerate() {
            match entry {
                Entry::Wrote(write, result) if touches(write) => text += &format!("  {at}: {write:?} {result:?}\n"),
                Entry::Flushed(result) if at >= last => text += &format!("  {at}: flush {result:?}\n"),
                Entry::Note(what) => text += &format!("  {at}: {what}\n"),
                _ => {}
            }
        }
        text
    }
}
