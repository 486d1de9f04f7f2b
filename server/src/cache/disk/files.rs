//! The files of the disk tier: which shard writes which, where a slot lies, and what their indexes say at the start.
//!
//! `shard-<n>.slots` and `shard-<n>.index`. Shard `s` of `k` writes file `s`, and files `s + k`, `s + 2k` … if an earlier
//! life had more shards; all files share the budget evenly. A shard without a file makes one.

use std::io;
use std::path::{Path, PathBuf};

use crate::cache::disk::{DiskCacheConfig, Owner};
use crate::cache::record::{
    HeadRead, PAGE_BYTES, RECORD_BYTES, RECORDS_PER_PAGE, Record, RecordRead, SLOT_BYTES, decode_head, encode_head,
};
use crate::cache::slots::{Place, Slots, places, stride};
use crate::platform::{File, OpenMode, Platform};
use crate::transfer::Digest;

/// An index is read in pieces of this size.
const INDEX_READ_BYTES: usize = 1 << 20;

/// The open files of a shard.
pub struct Files<P: Platform> {
    own: Vec<OwnFile<P>>,
    others: Vec<OtherFile<P>>,
    stride: u32,
}

struct OwnFile<P: Platform> {
    number: usize,
    slots: P::File,
    index: P::File,
}

struct OtherFile<P: Platform> {
    number: usize,
    slots: P::File,
}

/// Files and what is in them.
pub struct Opened<P: Platform> {
    pub files: Files<P>,
    pub slots: Slots,
    pub elsewhere: hashbrown::HashMap<Digest, (usize, Place), ahash::RandomState>,
}

impl<P: Platform> Files<P> {
    /// Handle and byte offset of a slot: of another shard's file, or of the shard's own numbering.
    pub fn locate(&self, file: Option<usize>, slot: u32) -> (&P::File, u64) {
        let file = match file {
            Some(other) => &self.others[other].slots,
            None => &self.own[(slot / self.stride) as usize].slots,
        };
        (file, u64::from(slot % self.stride) * SLOT_BYTES as u64)
    }

    /// Handle and byte offset of a page of the own index.
    pub fn locate_page(&self, page: u32) -> (&P::File, u64) {
        let pages = self.stride / RECORDS_PER_PAGE;
        (&self.own[(page / pages) as usize].index, (1 + u64::from(page % pages)) * PAGE_BYTES as u64)
    }

    pub fn name(&self, file: Option<usize>, slot: u32) -> String {
        slots_name(match file {
            Some(other) => self.others[other].number,
            None => self.own[(slot / self.stride) as usize].number,
        })
    }

    /// Number of a slot in its file.
    pub fn slot(&self, slot: u32) -> u32 {
        slot % self.stride
    }
}

pub fn slots_name(number: usize) -> String {
    format!("shard-{number}.slots")
}

pub fn index_name(number: usize) -> String {
    format!("shard-{number}.index")
}

/// Opens everything. Whatever an index says beyond the present size of its file is left out.
pub async fn open<P: Platform>(platform: &P, config: &DiskCacheConfig, owner: Owner) -> Result<Opened<P>, String> {
    let dir = &config.dir;
    let failed = |e: io::Error| format!("disk cache {}: {e}", dir.display());
    platform.create_dir_all(dir).await.map_err(failed)?;
    let names = platform.list_dir(dir).await.map_err(failed)?;
    let highest = names.iter().filter_map(|entry| number_of(&entry.name)).max();
    let count = owner.shards.max(highest.map_or(0, |number| number + 1));
    let per_file = slots_per_file(config.bytes, count);
    let stride = stride(per_file);
    let (mut own, mut others, mut records, mut elsewhere) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        if number % owner.shards == owner.shard {
            let (file, found) = open_own(platform, dir, number, per_file, owner).await?;
            let base = own.len() as u32 * stride;
            own.push(file);
            records.extend(found.into_iter().map(|(slot, record)| (base + slot, record)));
        } else if let Some((file, found)) = open_other(platform, dir, number, per_file, owner).await {
            let mine = found.into_iter().filter(|(_, record)| owner.owns(record));
            elsewhere.extend(places(mine).into_iter().map(|place| (others.len(), place)));
            others.push(file);
        }
    }
    let mut slots = Slots::new(own.len() as u32, per_file);
    slots.adopt(records);
    let mut map = hashbrown::HashMap::with_hasher(ahash::RandomState::with_seeds(45, 46, 47, 48));
    map.extend(elsewhere.into_iter().map(|(file, place)| (place.record.digest, (file, place))));
    map.retain(|digest, _| slots.place(digest).is_none());
    Ok(Opened { files: Files { own, others, stride }, slots, elsewhere: map })
}

impl Owner {
    fn owns(&self, record: &Record) -> bool {
        record.placement % self.shards as u64 == self.shard as u64
    }
}

/// Of `shard-<n>.slots` and `shard-<n>.index`, as they are spelled here.
pub fn number_of(name: &str) -> Option<usize> {
    let (stem, extension) = name.split_once('.')?;
    let number = stem.strip_prefix("shard-")?.parse().ok()?;
    let known = matches!(extension, "slots" | "index");
    (known && (name == slots_name(number) || name == index_name(number))).then_some(number)
}

fn slots_per_file(bytes: u64, files: usize) -> u32 {
    u32::try_from(bytes / SLOT_BYTES as u64 / files as u64).unwrap_or(u32::MAX / 2).min(u32::MAX / 2 / files as u32)
}

/// Opens or makes a file of this shard; its index is made anew where it can't be read.
async fn open_own<P: Platform>(
    platform: &P,
    dir: &Path,
    number: usize,
    per_file: u32,
    owner: Owner,
) -> Result<(OwnFile<P>, Vec<(u32, Record)>), String> {
    let (slots_path, index_path) = (dir.join(slots_name(number)), dir.join(index_name(number)));
    let failed = |path: &Path, e: io::Error| format!("disk cache {}: {e}", path.display());
    let slots = open_or_create(platform, &slots_path).await.map_err(|e| failed(&slots_path, e))?;
    let index = open_or_create(platform, &index_path).await.map_err(|e| failed(&index_path, e))?;
    let (head, records) = read_index::<P>(&index, per_file, owner.node_id).await.map_err(|e| failed(&index_path, e))?;
    if head == HeadRead::Foreign {
        let path = index_path.display();
        return Err(format!("disk cache {path}: of another node or version: remove it or choose another cache.dir"));
    }
    let index_bytes = PAGE_BYTES as u64 + u64::from(stride(per_file)) * RECORD_BYTES as u64;
    let sized = async {
        resize::<P>(&slots, u64::from(per_file) * SLOT_BYTES as u64).await?;
        if head == HeadRead::Unreadable {
            // Nothing of the old index may come to light again under a good head.
            index.set_len(0).await?;
            index.set_len(index_bytes).await?;
            let mut page = platform.alloc(PAGE_BYTES);
            page.copy_from_slice(&encode_head(owner.node_id));
            return index.write_at(0, page).await;
        }
        resize::<P>(&index, index_bytes).await
    };
    sized.await.map_err(|e| failed(&index_path, e))?;
    Ok((OwnFile { number, slots, index }, records))
}

/// Mostly there is nothing to do, and a length change may wait for the file system's journal.
async fn resize<P: Platform>(file: &P::File, len: u64) -> io::Result<()> {
    if file.len().await? == len {
        return Ok(());
    }
    file.set_len(len).await
}

async fn open_or_create<P: Platform>(platform: &P, path: &Path) -> io::Result<P::File> {
    match platform.open(path, OpenMode::ReadWrite).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => platform.open(path, OpenMode::CreateNew).await,
        opened => opened,
    }
}

/// A file of another shard, as far as it can be read: a loss here is a miss later.
async fn open_other<P: Platform>(
    platform: &P,
    dir: &Path,
    number: usize,
    per_file: u32,
    owner: Owner,
) -> Option<(OtherFile<P>, Vec<(u32, Record)>)> {
    let path = |name: String| -> PathBuf { dir.join(name) };
    let slots = platform.open(&path(slots_name(number)), OpenMode::Read).await.ok()?;
    let index = platform.open(&path(index_name(number)), OpenMode::Read).await.ok()?;
    let (head, records) = read_index::<P>(&index, per_file, owner.node_id).await.ok()?;
    let _ = index.close().await;
    (head == HeadRead::Own).then_some((OtherFile { number, slots }, records))
}

/// The head of an index and its valid records.
async fn read_index<P: Platform>(
    index: &P::File,
    per_file: u32,
    node_id: u128,
) -> io::Result<(HeadRead, Vec<(u32, Record)>)> {
    let head = decode_head(&index.read_at(0, PAGE_BYTES).await?, Some(node_id));
    let mut records = Vec::new();
    if head != HeadRead::Own {
        return Ok((head, records));
    }
    let pages = (per_file.div_ceil(RECORDS_PER_PAGE)) as usize;
    let mut at = 0;
    while at < pages * PAGE_BYTES {
        let len = INDEX_READ_BYTES.min(pages * PAGE_BYTES - at);
        let bytes = index.read_at((PAGE_BYTES + at) as u64, len).await?;
        let first = (at / RECORD_BYTES) as u32;
        for (slot, bytes) in (first..per_file).zip(bytes.chunks(RECORD_BYTES)) {
            if let RecordRead::Valid(record) = Record::decode(bytes) {
                records.push((slot, record));
            }
        }
        if bytes.len() < len {
            break;
        }
        at += len;
    }
    Ok((head, records))
}
