//! The disk cache, in the data directory or elsewhere. Nothing in it is needed, so nothing about it is worse than a note.
#![allow(clippy::disallowed_methods)] // Runs in a tool, on no shard's thread.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{CheckError, Checker, Kind, files};
use crate::cache::disk::files::{index_name, number_of, slots_name};
use crate::cache::record::{HeadRead, PAGE_BYTES, RECORD_BYTES, Record, RecordRead, SLOT_BYTES, decode_head};
use crate::cache::slots::{Place, places};
use crate::datadir::CACHE_DIR;
use crate::snapshot::{ChunkEntry, decode_chunk};

/// Chunks of one slot file, by what came of reading them.
#[derive(Default)]
struct Found {
    sound: u64,
    corrupt: u64,
    /// The slots hold other chunks than the index says: its last pages were not written.
    stale: u64,
}

impl Checker<'_> {
    /// Every chunk that the indexes name is read and verified, unless `quick`.
    pub(super) fn cache(&mut self) -> Result<(), CheckError> {
        let elsewhere = self.options.cache_dir.clone();
        let named = elsewhere.is_some();
        let dir = &elsewhere.unwrap_or_else(|| self.data.join(CACHE_DIR));
        let names = match files::names(dir) {
            Err(CheckError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                if named {
                    self.find(Kind::CacheUnusable, dir, "there is no such directory".into());
                }
                return Ok(());
            }
            names => names?,
        };
        let mut numbers = BTreeSet::new();
        for name in names {
            match number_of(&name) {
                Some(number) => drop(numbers.insert(number)),
                None => self.find(Kind::Foreign, &dir.join(name), "not a file of Volley".into()),
            }
        }
        for number in numbers {
            let path = dir.join(slots_name(number));
            match self.slot_file(&path, &dir.join(index_name(number))) {
                Ok(found) => self.slots_found(&path, &found),
                Err(why) => self.find(Kind::CacheUnusable, &path, format!("the cache file can't be read: {why}")),
            }
        }
        Ok(())
    }

    fn slot_file(&self, slots: &Path, index: &Path) -> Result<Found, String> {
        let index = fs::read(index).map_err(|e| format!("its index: {e}"))?;
        if decode_head(&index, None) != HeadRead::Own {
            return Err("its index has no valid head of this version".into());
        }
        let file = File::open(slots).map_err(|e| e.to_string())?;
        let records = index[PAGE_BYTES.min(index.len())..].chunks_exact(RECORD_BYTES).map(Record::decode);
        let valid = (0..).zip(records).filter_map(|(slot, read)| match read {
            RecordRead::Valid(record) => Some((slot, record)),
            RecordRead::Free | RecordRead::Unreadable => None,
        });
        let mut found = Found::default();
        for place in places(valid) {
            match self.options.quick || read_place(&file, &place).map_err(|e| e.to_string())? {
                true => found.sound += 1,
                false if names_itself(&file, &place) => found.corrupt += 1,
                false => found.stale += 1,
            }
        }
        Ok(found)
    }

    fn slots_found(&mut self, path: &Path, found: &Found) {
        let Found { sound, corrupt, stale } = found;
        self.report.cache_chunks += sound + corrupt + stale;
        self.report.cache_chunks_corrupt += corrupt;
        if *corrupt > 0 {
            let message = format!("{corrupt} of {} cached chunks fail their checks", sound + corrupt + stale);
            self.find(Kind::CacheCorrupt, path, message);
        }
        if *stale > 0 {
            let message = format!("the slots of {stale} cached chunks hold others by now: the index is older");
            self.find(Kind::CacheStale, path, message);
        }
    }
}

/// Whether the chunk is there and is the one that its digest says.
fn read_place(file: &File, place: &Place) -> io::Result<bool> {
    let mut stored = Vec::with_capacity(place.record.stored_len as usize);
    let mut slot = vec![0; SLOT_BYTES];
    for (part, number) in place.slots.iter().enumerate() {
        match file.read_exact_at(&mut slot, u64::from(*number) * SLOT_BYTES as u64) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read?,
        }
        if Record::decode(&slot) != RecordRead::Valid(place.record.with_part(part)) {
            return Ok(false);
        }
        stored.extend_from_slice(&slot[RECORD_BYTES..RECORD_BYTES + place.record.part_range(part).len()]);
    }
    let Record { digest, encoding, stored_len, chunk_len, .. } = place.record;
    let entry = ChunkEntry::Stored { pack: 0, offset: 0, stored_len, encoding, digest };
    Ok(decode_chunk(&entry, &stored, chunk_len).is_ok())
}

/// Whether no slot of the place says that it holds something else: then what is wrong is damage.
fn names_itself(file: &File, place: &Place) -> bool {
    place.slots.iter().enumerate().all(|(part, number)| {
        let mut record = [0; RECORD_BYTES];
        let read = file.read_exact_at(&mut record, u64::from(*number) * SLOT_BYTES as u64);
        let decoded = Record::decode(&record);
        read.is_ok()
            && (decoded == RecordRead::Valid(place.record.with_part(part)) || decoded == RecordRead::Unreadable)
    })
}
