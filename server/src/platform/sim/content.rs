//! A simulated file's bytes and the changes that are not yet durable, with what a crash makes of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::random::SimRng;

/// What a disk writes whole or not at all.
pub(super) const DISK_SECTOR: u64 = 512;
/// Direct I/O and allocation unit.
pub(super) const BLOCK: u64 = 4096;

type Block = [u8; BLOCK as usize];

/// Sparse bytes: absent blocks read as zeroes and take no space.
#[derive(Clone, Default)]
pub(super) struct Content {
    pub(super) len: u64,
    blocks: BTreeMap<u64, Box<Block>>,
}

/// A change to a file, durable or not.
#[derive(Clone)]
pub(super) enum Change {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// Shares another file's blocks, which hold these bytes.
    Clone {
        offset: u64,
        data: Vec<u8>,
    },
    Deallocate {
        offset: u64,
        len: u64,
    },
    SetLen(u64),
}

impl Content {
    /// Bytes of `offset..offset + len` that lie inside the file.
    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = self.len.min(offset.saturating_add(len as u64));
        let mut out = Vec::with_capacity(len);
        let mut at = offset;
        while at < end {
            let within = (at % BLOCK) as usize;
            let part = (BLOCK as usize - within).min((end - at) as usize);
            match self.blocks.get(&(at / BLOCK)) {
                Some(block) => out.extend_from_slice(&block[within..within + part]),
                None => out.resize(out.len() + part, 0),
            }
            at += part as u64;
        }
        out
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// The parts of a byte range that are allocated, at most `max` of them.
    pub(super) fn stored(&self, range: Range<u64>, max: usize) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        for (block, _) in self.blocks.range(range.start / BLOCK..range.end.div_ceil(BLOCK)) {
            let (start, end) = ((block * BLOCK).max(range.start), ((block + 1) * BLOCK).min(range.end));
            let full = parts.len() == max;
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ if full => break,
                _ => parts.push(start..end),
            }
        }
        parts
    }

    /// Bytes a write to this range would newly allocate.
    pub(super) fn growth(&self, offset: u64, len: u64) -> u64 {
        let touched = offset / BLOCK..(offset + len).div_ceil(BLOCK);
        let present = self.blocks.range(touched.clone()).count() as u64;
        (touched.end - touched.start - present) * BLOCK
    }

    /// Takes space for a write without changing a byte.
    pub(super) fn allocate(&mut self, offset: u64, len: u64) {
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            self.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK as usize]));
        }
    }

    pub(super) fn apply(&mut self, change: &Change) {
        self.apply_some(change, |_| true);
    }

    /// Whether readers see what a write wrote or a clone shares.
    fn shows(&self, change: &Change) -> bool {
        let (Change::Write { offset, data } | Change::Clone { offset, data }) = change else { return false };
        self.read(*offset, data.len()) == *data
    }

    /// Applies the parts of `change` that `keep` lets through; it is asked once per unit that can't be torn.
    pub(super) fn apply_some(&mut self, change: &Change, mut keep: impl FnMut(u64) -> bool) {
        match change {
            Change::Write { offset, data } => {
                for (index, sector) in data.chunks(DISK_SECTOR as usize).enumerate() {
                    let at = offset + index as u64 * DISK_SECTOR;
                    if keep(at) {
                        self.put(at, sector);
                    }
                }
            }
            Change::Clone { offset, data } => {
                for (index, block) in data.chunks(BLOCK as usize).enumerate() {
                    let at = offset + index as u64 * BLOCK;
                    if keep(at) {
                        block.chunks(DISK_SECTOR as usize).zip(0..).for_each(|(sector, i)| {
                            self.put(at + i * DISK_SECTOR, sector);
                        });
                    }
                }
            }
            Change::Deallocate { offset, len } => {
                for block in offset / BLOCK..(offset + len) / BLOCK {
                    if keep(block * BLOCK) {
                        self.blocks.remove(&block);
                    }
                }
            }
            Change::SetLen(len) => {
                if keep(*len) {
                    self.set_len(*len);
                }
            }
        }
    }

    /// Applies a change as an interrupted disk would: all, nothing, or a random part of it.
    /// The length of the file is metadata with a fate of its own: it may be there without the bytes.
    pub(super) fn apply_torn(&mut self, change: &Change, rng: &mut SimRng) {
        let keep_ppm = [0, 1_000_000, 500_000, 900_000][rng.index(4)];
        self.apply_some(change, |_| rng.chance(keep_ppm));
        if let Change::Write { offset, data } = change
            && rng.coin()
        {
            self.len = self.len.max(offset + data.len() as u64);
        }
    }

    /// Damages one byte in place, as a failing medium does.
    pub(super) fn flip(&mut self, offset: u64) {
        if let Some(block) = self.blocks.get_mut(&(offset / BLOCK)) {
            block[(offset % BLOCK) as usize] ^= 0x40;
        }
    }

    /// Copies whole blocks over others in place, as a device does that writes to the wrong address.
    pub(super) fn misdirect(&mut self, from: u64, to: u64, len: u64) {
        for at in (0..len).step_by(BLOCK as usize) {
            match self.blocks.get(&((from + at) / BLOCK)).cloned() {
                Some(block) => drop(self.blocks.insert((to + at) / BLOCK, block)),
                None => drop(self.blocks.remove(&((to + at) / BLOCK))),
            }
        }
    }

    fn put(&mut self, at: u64, sector: &[u8]) {
        let block = self.blocks.entry(at / BLOCK).or_insert_with(|| Box::new([0; BLOCK as usize]));
        let within = (at % BLOCK) as usize;
        block[within..within + sector.len()].copy_from_slice(sector);
        self.len = self.len.max(at + sector.len() as u64);
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.blocks.split_off(&len.div_ceil(BLOCK));
            if let Some(block) = self.blocks.get_mut(&(len / BLOCK)) {
                block[(len % BLOCK) as usize..].fill(0);
            }
        }
        self.len = len;
    }
}

/// A file: what a reader sees now, what survives a power cut for certain, and the changes between the two.
#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) live: Content,
    durable: Content,
    pending: Vec<Pending>,
    next_id: u64,
    completions: u64,
}

#[derive(Clone)]
struct Pending {
    id: u64,
    /// Order of completion; `None` while the device works on it.
    completed: Option<u64>,
    change: Change,
}

impl Inode {
    /// Starts a change. Some of its sectors may be visible to readers from now on.
    pub(super) fn issue(&mut self, change: Change, rng: &mut SimRng) -> u64 {
        if let Change::Write { offset, data } = &change {
            self.live.allocate(*offset, data.len() as u64);
            if rng.coin() {
                let len = self.live.len;
                self.live.apply_some(&change, |at| at + DISK_SECTOR <= len && rng.coin());
            }
        }
        if let Change::Clone { .. } = &change
            && rng.coin()
        {
            self.live.apply_some(&change, |_| rng.coin());
        }
        self.next_id += 1;
        self.pending.push(Pending { id: self.next_id, completed: None, change });
        self.next_id
    }

    /// The device has done it: readers see it; a later sync makes it durable.
    pub(super) fn complete(&mut self, id: u64) {
        let Some(pending) = self.pending.iter_mut().find(|p| p.id == id) else { return };
        self.completions += 1;
        pending.completed = Some(self.completions);
        self.live.apply(&pending.change);
    }

    /// The device failed: any part of the change may have happened, and what readers have seen of it has.
    pub(super) fn complete_torn(&mut self, id: u64, rng: &mut SimRng) {
        let Some(index) = self.pending.iter().position(|p| p.id == id) else { return };
        let change = self.pending.remove(index).change;
        for part in torn_parts(change) {
            if !(rng.coin() | self.live.shows(&part)) {
                continue;
            }
            self.next_id += 1;
            self.completions += 1;
            self.live.apply(&part);
            self.pending.push(Pending { id: self.next_id, completed: Some(self.completions), change: part });
        }
    }

    /// What a sync that starts now covers.
    pub(super) fn sync_point(&self) -> u64 {
        self.completions
    }

    /// Makes all changes completed up to `point` durable.
    pub(super) fn sync(&mut self, point: u64) {
        for pending in self.take_covered(point) {
            self.durable.apply(&pending.change);
        }
    }

    /// A failed sync: parts of what it covered are durable, and no later sync will try the rest again.
    pub(super) fn sync_torn(&mut self, point: u64, rng: &mut SimRng) {
        for pending in self.take_covered(point) {
            self.durable.apply_torn(&pending.change, rng);
        }
    }

    /// Power cut: any part of what was not synced may have reached the disk.
    pub(super) fn crash(&mut self, rng: &mut SimRng) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.sort_by_key(|p| p.completed.unwrap_or(u64::MAX));
        for pending in pending {
            self.durable.apply_torn(&pending.change, rng);
        }
        self.live = self.durable.clone();
    }

    pub(super) fn flip(&mut self, offset: u64) {
        self.live.flip(offset);
        self.durable.flip(offset);
    }

    pub(super) fn misdirect(&mut self, from: u64, to: u64, len: u64) {
        self.live.misdirect(from, to, len);
        self.durable.misdirect(from, to, len);
    }

    fn take_covered(&mut self, point: u64) -> Vec<Pending> {
        let (mut covered, rest) =
            std::mem::take(&mut self.pending).into_iter().partition::<Vec<_>, _>(|p| is_covered(p, point));
        self.pending = rest;
        covered.sort_by_key(|p| p.completed);
        covered
    }
}

fn is_covered(pending: &Pending, point: u64) -> bool {
    pending.completed.is_some_and(|completed| completed <= point)
}

/// The parts of a change that happen or do not, each for itself.
fn torn_parts(change: Change) -> Vec<Change> {
    match change {
        Change::Write { offset, data } => {
            let sectors = data.chunks(DISK_SECTOR as usize).map(<[u8]>::to_vec).zip(0..);
            sectors.map(|(data, i)| Change::Write { offset: offset + i * DISK_SECTOR, data }).collect()
        }
        Change::Clone { offset, data } => {
            let blocks = data.chunks(BLOCK as usize).map(<[u8]>::to_vec).zip(0..);
            blocks.map(|(data, i)| Change::Clone { offset: offset + i * BLOCK, data }).collect()
        }
        whole => vec![whole],
    }
}
