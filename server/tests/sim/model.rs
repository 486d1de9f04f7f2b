//! What a volume may answer: for every 512-byte sector the values it may hold, and nothing else.
//!
//! The guests never write one sector from two places at once, so its values form a line: the log. A read may return
//! the last acknowledged value at its start or any later one. After a power cut a sector holds the last value that a
//! FLUSH or FUA covered, or any later one, and from then on it keeps what it was found with.

use std::rc::Rc;

use volley_server::platform::sim::SimRng;
use volley_server::shard::api::ConnectionId;
use volley_server::types::VolumeSpec;

pub const BLOCK: u64 = 512;

/// Names a value of a sector: 0 is the snapshot's, 1 is zeroes, all others are writes.
pub type Tag = u32;
pub const SNAPSHOT: Tag = 0;
pub const ZEROES: Tag = 1;

/// Content of a snapshot.
pub struct Image {
    pub bytes: Vec<u8>,
}

#[derive(Clone)]
struct Entry {
    tag: Tag,
    /// Which write this is: several may write zeroes.
    op: u64,
    /// The write was answered with success: older values are gone for readers.
    acked: bool,
}

#[derive(Clone)]
struct Sector {
    log: Vec<Entry>,
    /// Nothing before this entry can come back.
    durable: usize,
    /// The write under way.
    busy: Option<u64>,
    /// A flush does not cover this value: it was written before a kill, unflushed, by a disk that failed a sync. Such a
    /// disk may have dropped it and still show it, and no later sync of its brings it back. (Hosts that live on send what
    /// they had not flushed again; the guests of this test do not.)
    doubtful: Option<usize>,
}

impl Sector {
    fn current(&self) -> usize {
        self.log.iter().rposition(|entry| entry.acked).unwrap_or(0)
    }
}

/// What ended a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    PowerCut,
    Kill,
    /// Some syncs may have failed before.
    KillOnBadDisk,
}

/// Whether the server is known to have the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// Its creation was asked for and not answered.
    Maybe,
    Sure,
    /// Its deletion was asked for and not answered.
    Leaving,
}

pub struct VolumeModel {
    pub spec: VolumeSpec,
    pub image: Option<Rc<Image>>,
    pub existence: Existence,
    /// The highest generation handed out.
    pub generation: u64,
    pub attached: bool,
    /// The connection that attached last.
    pub connection: ConnectionId,
    /// Attaches and detaches begun: a request in whose time it changed may be refused.
    pub attach_changes: u64,
    /// Attaches and detaches under way.
    pub attaching: u32,
    /// Ranges reported as durably fetched, in bytes.
    pub fetched_durably: Vec<(u64, u64)>,
    /// Reported as hydrated.
    pub hydrated: bool,
    sectors: Vec<Sector>,
    next_op: u64,
}

/// A write under way.
pub struct WriteStart {
    op: u64,
    range: std::ops::Range<usize>,
}

/// What a read that begins now may return.
pub struct ReadStart {
    offset: u64,
    from: Vec<usize>,
}

/// What a flush that begins now covers.
pub struct FlushStart(Vec<usize>);

impl VolumeModel {
    pub fn new(spec: VolumeSpec, image: Option<Rc<Image>>) -> VolumeModel {
        let first =
            Sector { log: vec![Entry { tag: SNAPSHOT, op: 0, acked: true }], durable: 0, busy: None, doubtful: None };
        VolumeModel {
            sectors: vec![first; (spec.size_bytes / BLOCK) as usize],
            spec,
            image,
            existence: Existence::Maybe,
            generation: 0,
            attached: false,
            connection: ConnectionId(0),
            attach_changes: 0,
            attaching: 0,
            fetched_durably: Vec::new(),
            hydrated: false,
            next_op: 0,
        }
    }

    /// Takes a range for writing; `None` if another write has part of it.
    pub fn begin_write(&mut self, offset: u64, len: u64, tag: Tag) -> Option<WriteStart> {
        let range = sectors(offset, len);
        if self.sectors[range.clone()].iter().any(|sector| sector.busy.is_some()) {
            return None;
        }
        self.next_op += 1;
        let op = self.next_op;
        for sector in &mut self.sectors[range.clone()] {
            sector.log.push(Entry { tag, op, acked: false });
            sector.busy = Some(op);
        }
        Some(WriteStart { op, range })
    }

    pub fn write_done(&mut self, write: &WriteStart, durable: bool) {
        for sector in self.end_write(write) {
            sector.log.last_mut().expect("begun").acked = true;
            if durable {
                sector.durable = sector.log.len() - 1;
            }
        }
    }

    /// The write failed: it may have happened in part.
    pub fn write_failed(&mut self, write: &WriteStart) {
        self.end_write(write).for_each(drop);
    }

    /// The write was refused: it must not have happened.
    pub fn write_refused(&mut self, write: &WriteStart) {
        self.end_write(write).for_each(drop);
        for sector in &mut self.sectors[write.range.clone()] {
            // The value stays in the log while a read may be comparing positions, but as one that was always there.
            if let Some(at) = sector.log.iter().position(|entry| entry.op == write.op && entry.op > 0) {
                sector.log[at] = Entry { op: 0, ..sector.log[at - 1].clone() };
            }
        }
    }

    /// The sectors that were still this write's.
    fn end_write(&mut self, write: &WriteStart) -> impl Iterator<Item = &mut Sector> {
        let op = write.op;
        let owned = self.sectors[write.range.clone()].iter_mut();
        owned.filter_map(move |sector| sector.busy.take_if(|busy| *busy == op).map(|_| sector))
    }

    /// A host attached and was told so: whatever others had under way has happened or never will (P7). Its sectors are
    /// free; if it were written after all, a later value would be overwritten.
    pub fn fence_writes(&mut self) {
        self.sectors.iter_mut().for_each(|sector| sector.busy = None);
    }

    pub fn begin_read(&self, offset: u64, len: u64) -> ReadStart {
        ReadStart { offset, from: self.sectors[sectors(offset, len)].iter().map(Sector::current).collect() }
    }

    /// # Errors
    /// The first sector that holds what it never may.
    pub fn check_read(&self, start: &ReadStart, data: &[u8]) -> Result<(), String> {
        for (i, (found, from)) in data.chunks(BLOCK as usize).zip(&start.from).enumerate() {
            let index = (start.offset / BLOCK) as usize + i;
            let allowed = &self.sectors[index].log[*from..];
            if !allowed.iter().any(|entry| self.value_is(index, entry.tag, found)) {
                return Err(self.complaint("read", index, found, allowed));
            }
        }
        Ok(())
    }

    /// What the file may hold in a sector at any moment: if the sector is resident, its value or one that is being
    /// written; if not, guests see the snapshot, so that must be its value.
    ///
    /// # Errors
    /// What it holds instead.
    pub fn check_block(&self, index: usize, resident: bool, in_file: &[u8]) -> Result<(), String> {
        let sector = &self.sectors[index];
        let allowed = &sector.log[sector.current()..];
        let mut snapshot = [0; BLOCK as usize];
        self.value(index as u64, SNAPSHOT, &mut snapshot);
        let seen = if resident { in_file } else { &snapshot };
        match allowed.iter().any(|entry| self.value_is(index, entry.tag, seen)) {
            true => Ok(()),
            false => {
                Err(self.complaint(if resident { "in its file" } else { "as not resident" }, index, seen, allowed))
            }
        }
    }

    pub fn begin_flush(&self) -> FlushStart {
        FlushStart(self.sectors.iter().map(Sector::current).collect())
    }

    pub fn flush_done(&mut self, start: &FlushStart) {
        for (sector, covered) in self.sectors.iter_mut().zip(&start.0) {
            if sector.doubtful != Some(*covered) {
                sector.durable = sector.durable.max(*covered);
            }
        }
    }

    /// The server is gone and back: every sector must hold what it may hold after that, and stays as it was found.
    /// After a mere kill the disk may still lose what was never synced, so older values stay possible for later.
    ///
    /// # Errors
    /// The first sector that holds what it never may.
    pub fn settle(&mut self, found: &[u8], after: After) -> Result<(), String> {
        for (index, bytes) in found.chunks(BLOCK as usize).enumerate() {
            let sector = &self.sectors[index];
            let allowed = &sector.log[sector.durable..];
            let Some(entry) = allowed.iter().rev().find(|entry| self.value_is(index, entry.tag, bytes)) else {
                return Err(self.complaint("after restart", index, bytes, allowed));
            };
            let now = Entry { tag: entry.tag, op: 0, acked: true };
            let mut log = if after == After::PowerCut { Vec::new() } else { allowed.to_vec() };
            log.push(now);
            let doubtful = (after == After::KillOnBadDisk && log.len() > 2).then(|| log.len() - 1);
            self.sectors[index] = Sector { log, durable: 0, busy: None, doubtful };
        }
        Ok(())
    }

    /// The bytes of a write.
    pub fn content(&self, offset: u64, len: u64, tag: Tag) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        for (i, block) in bytes.chunks_mut(BLOCK as usize).enumerate() {
            self.value(offset / BLOCK + i as u64, tag, block);
        }
        bytes
    }

    fn value_is(&self, index: usize, tag: Tag, found: &[u8]) -> bool {
        let mut block = [0; BLOCK as usize];
        self.value(index as u64, tag, &mut block);
        block == found
    }

    fn value(&self, index: u64, tag: Tag, block: &mut [u8]) {
        block.fill(0);
        match tag {
            SNAPSHOT => {
                let Some(image) = &self.image else { return };
                let at = (index * BLOCK) as usize;
                if let Some(bytes) = image.bytes.get(at..at + BLOCK as usize) {
                    block.copy_from_slice(bytes);
                }
            }
            ZEROES => {}
            write => SimRng::new(u64::from(write) << 32 | index).fill(block),
        }
    }

    fn complaint(&self, when: &str, index: usize, found: &[u8], allowed: &[Entry]) -> String {
        let sector = &self.sectors[index];
        let known: Vec<Tag> = sector.log.iter().map(|entry| entry.tag).collect();
        let is = [SNAPSHOT, ZEROES].into_iter().chain(known.clone()).find(|tag| self.value_is(index, *tag, found));
        let what = match is {
            Some(SNAPSHOT) => "the snapshot's content".to_owned(),
            Some(ZEROES) => "zeroes".to_owned(),
            Some(write) => format!("write {write}"),
            None => format!("no value it ever had ({:02x?}...)", &found[..16]),
        };
        let allowed: Vec<Tag> = allowed.iter().map(|entry| entry.tag).collect();
        format!(
            "volume {:?} {when}: byte {} (chunk {}) holds {what}; allowed writes {allowed:?} (0 snapshot, 1 zeroes), \
             log {known:?}, durable from {}",
            &*self.spec.name,
            index as u64 * BLOCK,
            index as u64 * BLOCK / u64::from(self.spec.chunk_bytes),
            sector.durable
        )
    }
}

fn sectors(offset: u64, len: u64) -> std::ops::Range<usize> {
    (offset / BLOCK) as usize..((offset + len) / BLOCK) as usize
}
