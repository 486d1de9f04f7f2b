//! What a volume may answer: for every 512-byte sector the values it may hold, and nothing else.
//!
//! The guests never write one sector from two places at once, so its values form a line: the log. A read may return
//! the last acknowledged value at its start or any later one. After a power cut a sector holds the last value that a
//! FLUSH or FUA covered, or any later one, and from then on it keeps what it was found with.
//!
//! A rollback is one more value of every sector, of all of them or of none. What a snapshot may hold is what a read may
//! have returned at its moment.

use std::rc::Rc;
use std::sync::Arc;

use volley_server::shard::api::ConnectionId;
use volley_server::types::VolumeSpec;

pub use crate::values::{BLOCK, Image, Moment, SNAPSHOT, Tag, Values, ZEROES};

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
    /// As it was found after a restart.
    fn settled(&self, allowed: &[Entry], tag: Tag, after: After) -> Sector {
        let mut log = if after == After::PowerCut { Vec::new() } else { allowed.to_vec() };
        log.push(Entry { tag, op: 0, acked: true });
        let in_doubt = match after {
            After::PowerCut => false,
            After::Kill => self.doubtful.is_some_and(|at| self.log[at].tag == tag),
            After::KillOnBadDisk => log.len() > 2,
        };
        let doubtful = in_doubt.then(|| log.len() - 1);
        Sector { log, durable: 0, busy: None, doubtful }
    }

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
    /// Begins and ends of rollbacks: what was said of residency in their time may be of the volume before.
    pub rolls: u64,
    /// A rollback failed in such a way that only a restart tells what became of it.
    pub stuck: bool,
    values: Values,
    /// The snapshots that absent sectors may come from, by name: more than one only after a kill.
    sources: Vec<(Option<Arc<str>>, Tag)>,
    /// The rollback that may have happened: to this snapshot.
    rolling: Option<(Arc<str>, Tag)>,
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
            sources: vec![(spec.snapshot.as_ref().map(|snapshot| snapshot.name.clone()), SNAPSHOT)],
            values: Values::new(image),
            rolling: None,
            rolls: 0,
            stuck: false,
            spec,
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
        let op = write.op;
        for sector in self.end_write(write) {
            let at = sector.log.iter().rposition(|entry| entry.op == op).expect("begun");
            sector.log[at].acked = true;
            if durable {
                sector.durable = at;
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
            if !allowed.iter().any(|entry| self.values.is(index, entry.tag, found)) {
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
        if resident {
            return match allowed.iter().any(|entry| self.values.is(index, entry.tag, in_file)) {
                true => Ok(()),
                false => Err(self.complaint("in its file", index, in_file, allowed)),
            };
        }
        let mut seen = [0; BLOCK as usize];
        let sources = self.sources.iter().map(|(_, tag)| *tag).chain(self.rolling.iter().map(|(_, tag)| *tag));
        for source in sources {
            self.values.write(index as u64, source, &mut seen);
            if allowed.iter().any(|entry| self.values.is(index, entry.tag, &seen)) {
                return Ok(());
            }
        }
        Err(self.complaint("as not resident", index, &seen, allowed))
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

    /// The server is gone and back, and says that absent sectors come from `source`: every sector must hold what it may
    /// hold after that, and stays as it was found. After a mere kill the disk may still lose what was never synced, so
    /// older values stay possible for later.
    ///
    /// # Errors
    /// The first sector that holds what it never may.
    pub fn settle(&mut self, found: &[u8], after: After, source: Option<&str>) -> Result<(), String> {
        let rolled = self.rolling.take();
        let as_before = self.sources.iter().any(|(name, _)| name.as_deref() == source);
        let mut result = Err(format!("volume {:?} is made of {source:?}", &*self.spec.name));
        if as_before {
            result = self.settle_as_before(found, after, rolled.as_ref().map(|(_, tag)| *tag));
        }
        if let Some((name, tag)) = rolled.filter(|(name, _)| result.is_err() && Some(&**name) == source) {
            result = self.settle_rolled_back(found, after, tag);
            self.sources = match after {
                After::PowerCut => vec![(Some(name), tag)],
                _ => self.sources.drain(..).chain([(Some(name), tag)]).collect(),
            };
        } else if after == After::PowerCut {
            self.sources.retain(|(name, _)| name.as_deref() == source);
        }
        self.stuck = false;
        result
    }

    /// If a rollback was begun, it did not happen.
    fn settle_as_before(&mut self, found: &[u8], after: After, rolled: Option<Tag>) -> Result<(), String> {
        let mut settled = Vec::with_capacity(self.sectors.len());
        for (index, bytes) in found.chunks(BLOCK as usize).enumerate() {
            let sector = &self.sectors[index];
            let allowed = sector.log[sector.durable..].iter().filter(|entry| Some(entry.tag) != rolled);
            let allowed: Vec<Entry> = allowed.cloned().collect();
            let Some(entry) = allowed.iter().rev().find(|entry| self.values.is(index, entry.tag, bytes)) else {
                return Err(self.complaint("after restart", index, bytes, &allowed));
            };
            settled.push(sector.settled(&allowed, entry.tag, after));
        }
        self.sectors = settled;
        Ok(())
    }

    /// The rollback that was begun did happen, to all of the volume, and nobody wrote since.
    fn settle_rolled_back(&mut self, found: &[u8], after: After, tag: Tag) -> Result<(), String> {
        for (index, bytes) in found.chunks(BLOCK as usize).enumerate() {
            let sector = &self.sectors[index];
            if !self.values.is(index, tag, bytes) {
                let allowed = Entry { tag, op: 0, acked: true };
                return Err(self.complaint("after a rollback and a restart", index, bytes, &[allowed]));
            }
            self.sectors[index] = sector.settled(&sector.log[sector.durable..], tag, after);
        }
        Ok(())
    }

    /// A rollback to a snapshot begins: nobody may attach until it has ended.
    pub fn begin_rollback(&mut self, name: Arc<str>, image: Rc<Image>) {
        assert!(self.rolling.is_none() && self.attaching == 0, "one at a time");
        let tag = self.values.add(image);
        self.next_op += 1;
        let op = self.next_op;
        self.sectors.iter_mut().for_each(|sector| sector.log.push(Entry { tag, op, acked: false }));
        self.rolling = Some((name, tag));
        (self.hydrated, self.attached) = (false, false);
        self.fetched_durably.clear();
        self.attaching += 1;
        self.roll();
    }

    fn roll(&mut self) {
        self.rolls += 1;
        self.attach_changes += 1;
    }

    /// Nobody may use it, or trust what it says of itself.
    pub fn is_rolling(&self) -> bool {
        self.rolling.is_some()
    }

    /// It is the snapshot, for good: whatever others had under way has happened before or never will.
    pub fn rolled_back(&mut self) {
        let Some((name, tag)) = self.rolling.take() else { return };
        for sector in &mut self.sectors {
            sector.log.push(Entry { tag, op: 0, acked: true });
            sector.durable = sector.log.len() - 1;
            sector.doubtful = None;
        }
        self.sources = vec![(Some(name), tag)];
        self.fence_writes();
        self.attaching -= 1;
        self.roll();
    }

    /// The rollback was refused: it must not have happened.
    pub fn rollback_refused(&mut self) {
        let Some((_, tag)) = self.rolling.take() else { return };
        for sector in &mut self.sectors {
            while let Some(at) = sector.log.iter().position(|entry| entry.tag == tag) {
                sector.log[at] = Entry { op: 0, ..sector.log[at - 1].clone() };
            }
        }
        self.attaching -= 1;
        self.roll();
    }

    /// The rollback failed, and only a restart tells how far it came.
    pub fn rollback_in_doubt(&mut self) {
        self.stuck = true;
        self.roll();
    }

    /// Names of the snapshots that it may need.
    pub fn may_need(&self) -> impl Iterator<Item = &Arc<str>> {
        let sources = self.sources.iter().filter_map(|(name, _)| name.as_ref());
        sources.chain(self.rolling.iter().map(|(name, _)| name))
    }

    /// It never had a snapshot to come from.
    pub fn is_blank(&self) -> bool {
        !self.values.has_image()
    }

    /// What it is at this moment: what was acknowledged, or anything begun since.
    pub fn moment(&self) -> Moment {
        let tags = |sector: &Sector| {
            let mut tags: Vec<Tag> = sector.log[sector.current()..].iter().map(|entry| entry.tag).collect();
            tags.dedup();
            tags
        };
        let allowed = self.sectors.iter().map(tags).collect();
        Moment { volume: self.spec.name.to_string(), values: self.values.clone(), allowed }
    }

    /// The bytes of a write.
    pub fn content(&self, offset: u64, len: u64, tag: Tag) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        for (i, block) in bytes.chunks_mut(BLOCK as usize).enumerate() {
            self.values.write(offset / BLOCK + i as u64, tag, block);
        }
        bytes
    }

    fn complaint(&self, when: &str, index: usize, found: &[u8], allowed: &[Entry]) -> String {
        let sector = &self.sectors[index];
        let known: Vec<Tag> = sector.log.iter().map(|entry| entry.tag).collect();
        let what = self.values.name(index, &known, found);
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
