//! A shard's journal (docs/journal.md), as a disk may hand it out: recovery of any bytes against an independent reading
//! of the format, on the simulated disk. What was recovered is written again as the next epoch and recovered once more.
//!
//! An input that starts with a magic is a segment or the superblock, as it is and with its checksums repaired. Any other
//! is a short form of a sound segment and damage to it: a byte that counts the damages, the damages (place in 2 bytes, what to
//! flip there in 1), then batches (length in 2 bytes, records).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use volley_server::error::{Result, Status};
use volley_server::journal::{Journal, Record, Recovered, commit_epoch, recover};
use volley_server::platform::sim::{Sim, SimWorld};
use volley_server::platform::{File, OpenMode, Platform};
use volley_server::types::{ChunkResidency, HydrationRate, Lineage, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

use super::assert_one_line;
use super::measure::within;

const BLOCK: usize = 4096;
const SEGMENT_MAGIC: &[u8] = b"VOLLEYJ\n";
const CURRENT_MAGIC: &[u8] = b"VOLLEYC\n";
const SEGMENT_ID: u64 = 0x5eed;
const DAMAGES_MAX: usize = 4;

/// The simulated disk and a few windows of 1 MiB.
const MEMORY_BASE: usize = 24 << 20;
const MEMORY_PER_BYTE: usize = 64;
/// A recovered volume lists its resident chunks one by one, while a record names runs of them.
const MEMORY_PER_CHUNK: usize = 128;
/// Longer runs are refused or expanded as shorter ones are, only with more memory: not fuzzed.
const RUN_CHUNKS_MAX: u32 = 4096;

pub fn run(input: &[u8]) {
    if input.starts_with(CURRENT_MAGIC) {
        let segment = framed(&[&[8, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]);
        for current in [input.to_vec(), sealed_block(input)] {
            superblock(&current, &segment);
        }
    } else if input.starts_with(SEGMENT_MAGIC) {
        segment(input, false);
        segment(&sealed_segment(input), false);
    } else {
        let (damages, batches) = short_form(input);
        let mut bytes = framed(&batches);
        let sound = segment(&bytes, false);
        for [low, high, flip] in damages {
            let at = usize::from(u16::from_le_bytes([*low, *high])) % bytes.len();
            bytes[at] ^= flip;
        }
        if !damages.is_empty() {
            segment(&bytes, sound);
        }
    }
}

fn short_form(input: &[u8]) -> (&[[u8; 3]], Vec<&[u8]>) {
    let Some((count, rest)) = input.split_first() else { return (&[], Vec::new()) };
    let damages = rest.len().min(3 * (usize::from(*count) % (DAMAGES_MAX + 1))) / 3;
    let (damage, mut rest) = rest.split_at(3 * damages);
    let mut batches = Vec::new();
    while let Some((len, records)) = rest.split_first_chunk::<2>() {
        let (batch, tail) = records.split_at(records.len().min(u16::from_le_bytes(*len).into()));
        batches.push(batch);
        rest = tail;
    }
    (damage.as_chunks::<3>().0, batches)
}

/// Whatever `CURRENT` says, it is understood or refused.
fn superblock(current: &[u8], segment: &[u8]) {
    let sound = current.len() == BLOCK
        && u32_at(current, 8) == 1
        && crc_without(current, 12) == u32_at(current, 12)
        && current.starts_with(CURRENT_MAGIC);
    let recovered = on_disk(Some(current), segment, async |platform, dir| recover(&platform, &dir).await);
    match recovered {
        Ok(recovered) => {
            assert!(sound, "a damaged superblock is accepted");
            assert_eq!((recovered.epoch, recovered.shards as u32), (u64_at(current, 16), u32_at(current, 24)));
        }
        Err(error) => check_error(error.status, &error.message),
    }
}

/// Recovers a segment; returns whether it was accepted. `sound`: it was before its blocks were damaged, so a torn end must
/// be forgiven.
fn segment(bytes: &[u8], sound: bool) -> bool {
    let read = Reading::of(bytes);
    if read.longest_run > RUN_CHUNKS_MAX {
        return false;
    }
    let memory = MEMORY_BASE + MEMORY_PER_BYTE * bytes.len() + MEMORY_PER_CHUNK * read.run_chunks;
    within(memory, || {
        let outcome = on_disk(None, bytes, async |platform, dir| {
            let first = recover(&platform, &dir).await?;
            let again = rewrite(&platform, &dir, &first).await;
            Ok((first, again))
        });
        match outcome {
            Ok((first, again)) => {
                read.agrees(&first);
                first.volumes.iter().for_each(check_state);
                assert_eq!(again.expect("what was recovered can be written").volumes, first.volumes);
                true
            }
            Err(error) => {
                check_error(error.status, &error.message);
                let torn = read.header && read.complete && !read.doubtful && !read.later;
                assert!(!(sound && torn), "a torn end is refused: {}", error.message);
                false
            }
        }
    })
}

/// Starts the next epoch with what was recovered.
async fn rewrite(platform: &Sim, dir: &Path, recovered: &Recovered) -> Result<Recovered> {
    let epoch = recovered.epoch + 1;
    Journal::create(platform, dir, epoch, 0, recovered.volumes.iter().cloned()).await?;
    commit_epoch(platform, dir, epoch, 1).await?;
    recover(platform, dir).await
}

fn check_error(status: Status, message: &str) {
    assert!(matches!(status, Status::Corrupt | Status::Unsupported), "{status:?}: {message}");
    assert_one_line(message, 1024);
}

/// What a shard relies on.
fn check_state(state: &VolumeState) {
    let VolumeState { spec, residency, hydrated, .. } = state;
    assert!(spec.chunk_bytes.is_power_of_two() && spec.size_bytes > 0 && spec.size_bytes.is_multiple_of(512));
    assert!(residency.is_empty() || !hydrated);
    assert!(residency.is_sorted_by(|(a, _), (b, _)| a < b), "{residency:?}");
    for (chunk, residency) in residency {
        assert!(*chunk < spec.chunks());
        let start = u64::from(*chunk) * u64::from(spec.chunk_bytes);
        let sectors = (spec.size_bytes - start).min(spec.chunk_bytes.into()).div_ceil(4096);
        match residency {
            ChunkResidency::Absent => panic!("absence is listed"),
            ChunkResidency::Resident => {}
            ChunkResidency::Partial(words) => {
                assert_eq!(words.len() as u64, u64::from(spec.chunk_bytes).div_ceil(4096 * 64));
                let real = (0..sectors).filter(|at| words[(at / 64) as usize] >> (at % 64) & 1 == 1).count() as u64;
                assert!(real < sectors && words.iter().any(|word| *word != 0), "{real} of {sectors}: {words:x?}");
            }
        }
    }
}

/// Runs `work` on a disk that holds a superblock (by default a sound one of epoch 1) and one segment.
fn on_disk<T>(current: Option<&[u8]>, segment: &[u8], work: impl AsyncFnOnce(Sim, PathBuf) -> Result<T>) -> Result<T> {
    let world = SimWorld::new(1);
    let platform = world.platform();
    let dir = PathBuf::from("/journal");
    world.block_on(async {
        platform.create_dir_all(&dir).await.expect("a healthy disk");
        match current {
            Some(bytes) => write(&platform, &dir.join("CURRENT"), bytes).await,
            None => commit_epoch(&platform, &dir, 1, 1).await.expect("a healthy disk"),
        }
        write(&platform, &dir.join("0000000001-0000-0000000000.vj"), segment).await;
        work(platform.clone(), dir).await
    })
}

async fn write(platform: &Sim, path: &Path, bytes: &[u8]) {
    let file = platform.open(path, OpenMode::CreateNew).await.expect("a healthy disk");
    let mut whole = bytes.to_vec();
    whole.resize(bytes.len().next_multiple_of(BLOCK), 0);
    if !whole.is_empty() {
        file.write_at(0, whole).await.expect("a healthy disk");
    }
    file.set_len(bytes.len() as u64).await.expect("a healthy disk");
}

/// The format read a second time, without a line of the journal's code.
#[derive(Default)]
struct Reading {
    header: bool,
    /// Header block and batches that are good and in order.
    good_bytes: usize,
    /// Records in them, up to the first that says that the journal was closed.
    records: u64,
    closed: bool,
    /// The end of the checkpoint is in them.
    complete: bool,
    /// A record in them does not parse, or something is behind the end that proves damage.
    doubtful: bool,
    /// A batch header of this segment stands behind the end of the good batches.
    later: bool,
    longest_run: u32,
    run_chunks: usize,
}

impl Reading {
    fn of(bytes: &[u8]) -> Reading {
        let header = bytes.len() >= BLOCK
            && bytes.starts_with(SEGMENT_MAGIC)
            && u32_at(bytes, 8) == 1
            && crc_without(&bytes[..BLOCK], 12) == u32_at(bytes, 12)
            && (u64_at(bytes, 16), u64_at(bytes, 24), u32_at(bytes, 40)) == (1, 0, 0);
        let mut read = Reading { header, good_bytes: BLOCK, ..Reading::default() };
        if !header {
            return read;
        }
        let id = u64_at(bytes, 32);
        let mut number = 0;
        while let Some(payload) = batch_at(bytes, read.good_bytes, id).filter(|_| !read.closed) {
            if payload.0 != number {
                read.doubtful = true;
                return read;
            }
            let Some(records) = payload.1 else { break };
            read.read_records(records);
            read.good_bytes += (40 + records.len()).next_multiple_of(BLOCK);
            number += 1;
        }
        let behind = (read.good_bytes + BLOCK..bytes.len()).step_by(BLOCK);
        read.later = !read.closed && behind.into_iter().any(|at| batch_at(bytes, at, id).is_some());
        read
    }

    fn read_records(&mut self, mut rest: &[u8]) {
        while !rest.is_empty() && !self.doubtful {
            let Some(body) = rest.get(..8).and_then(|_| rest[8..].get(..u32_at(rest, 0) as usize)) else {
                self.doubtful = true;
                return;
            };
            match rest[4] {
                6 if body.len() >= 16 => {
                    for run in body[16..].chunks_exact(8).take(u32_at(body, 8) as usize) {
                        self.longest_run = self.longest_run.max(u32_at(run, 4));
                        self.run_chunks = self.run_chunks.saturating_add(u32_at(run, 4) as usize);
                    }
                }
                8 => self.complete = true,
                9 => self.closed = true,
                _ => {}
            }
            self.records += 1;
            rest = &rest[8 + body.len()..];
        }
    }

    /// Recovery took exactly the good batches, and missed no sign of damage.
    fn agrees(&self, recovered: &Recovered) {
        assert!(self.header, "a damaged header is accepted");
        assert!(!self.doubtful && !self.later, "damage in the middle is accepted");
        let [file] = &recovered.files[..] else { panic!("one segment, {} reports", recovered.files.len()) };
        assert_eq!((file.bytes, file.records, file.closed), (self.good_bytes as u64, self.records, self.closed));
    }
}

/// Number and, if they are whole and sound, records of a batch of the segment `id` at `at`.
fn batch_at(bytes: &[u8], at: usize, id: u64) -> Option<(u64, Option<&[u8]>)> {
    let rest = bytes.get(at..)?;
    let head = rest.get(..40)?;
    let len = u32_at(head, 24) as usize;
    if !head.starts_with(b"VJB1")
        || u32_at(head, 4) != crc32fast::hash(&head[8..])
        || u64_at(head, 8) != id
        || len > (1 << 20) - 40
    {
        return None;
    }
    let body = rest.get(40..(40 + len).next_multiple_of(BLOCK));
    let sound = body.filter(|body| crc32fast::hash(body) == u32_at(head, 28));
    Some((u64_at(head, 16), sound.map(|body| &body[..len])))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn crc_without(block: &[u8], at: usize) -> u32 {
    crc32fast::hash(&[&block[..at], &[0; 4], &block[at + 4..]].concat())
}

/// A block with the checksum it asks for, cut or filled to its length.
fn sealed_block(input: &[u8]) -> Vec<u8> {
    let mut block = input.to_vec();
    block.resize(BLOCK, 0);
    let crc = crc_without(&block, 12);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    block
}

fn sealed_segment(input: &[u8]) -> Vec<u8> {
    let mut bytes = sealed_block(&input[..input.len().min(BLOCK)]);
    bytes.extend_from_slice(input.get(BLOCK..).unwrap_or_default());
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    let mut at = BLOCK;
    while bytes.get(at..at + 4).is_some_and(|magic| magic == b"VJB1") {
        let len = u32_at(&bytes, at + 24) as usize;
        let end = at + len.saturating_add(40).next_multiple_of(BLOCK).min(bytes.len() - at);
        seal_batch(&mut bytes[at..end]);
        at = end;
    }
    bytes
}

fn seal_batch(batch: &mut [u8]) {
    let crc = crc32fast::hash(&batch[40..]);
    batch[28..32].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&batch[8..40]);
    batch[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// A sound segment of these batches.
fn framed(batches: &[&[u8]]) -> Vec<u8> {
    let mut head = SEGMENT_MAGIC.to_vec();
    head.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.extend_from_slice(&SEGMENT_ID.to_le_bytes());
    let mut bytes = sealed_block(&head);
    for (number, records) in batches.iter().enumerate() {
        let start = bytes.len();
        bytes.extend_from_slice(b"VJB1\0\0\0\0");
        bytes.extend_from_slice(&SEGMENT_ID.to_le_bytes());
        bytes.extend_from_slice(&(number as u64).to_le_bytes());
        bytes.extend_from_slice(&(records.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(records);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        seal_batch(&mut bytes[start..]);
    }
    bytes
}

/// Journals that hold every kind of record, written by the journal itself, in the short form and whole; a superblock.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let spec = |id: u64, snapshot: bool| VolumeSpec {
        id: VolumeId(id),
        name: Arc::from(format!("web-{id}")),
        size_bytes: 3 * (64 << 10) + 512,
        chunk_bytes: 64 << 10,
        snapshot: snapshot.then(|| SnapshotRef { name: Arc::from("debian-12"), id: 0xabcd << 80 }),
        store: Arc::from("main"),
        rate: HydrationRate::BytesPerSecond(1 << 20),
        batch: snapshot.then_some(9),
        created_unix_ms: 1_700_000_000_000,
    };
    let state = |id, hydrated, residency| VolumeState {
        spec: spec(id, true),
        generation: 2,
        residency,
        hydrated,
        lineage: Lineage::new(None),
    };
    let partial = |word: u64| ChunkResidency::Partial([word].into());
    let (volume, whole) = (VolumeId(1), ChunkResidency::Resident);
    let residency = |chunks| Record::Residency { volume, chunks };
    let facts = vec![
        ("created", vec![Record::Created(spec(1, true))]),
        ("blank", vec![Record::Created(spec(1, false)), Record::Hydrated { volume }]),
        ("deleted", vec![Record::Created(spec(1, true)), Record::Deleted(volume)]),
        ("generation", vec![Record::Created(spec(1, true)), Record::Generation { volume, generation: 7 }]),
        (
            "rates",
            [HydrationRate::Unlimited, HydrationRate::None, HydrationRate::BytesPerSecond(5)]
                .map(|rate| Record::Rate { volume, rate })
                .to_vec(),
        ),
        (
            "residency",
            vec![
                Record::Created(spec(1, true)),
                residency(vec![(0, whole.clone()), (1, whole.clone()), (2, partial(0xff00)), (3, partial(1))]),
                residency(vec![(2, partial(0x00ff))]),
            ],
        ),
        (
            "hydrated",
            vec![Record::Created(spec(1, true)), residency(vec![(0, whole.clone())]), Record::Hydrated { volume }],
        ),
    ];
    let mut seeds: Vec<(String, Vec<u8>)> = facts
        .iter()
        .map(|(name, records)| ((*name).to_owned(), shortened(&[], &written(&[], records, false))))
        .collect();
    let states = [state(1, false, vec![(0, whole), (2, partial(6))]), state(2, true, Vec::new())];
    let all: Vec<Record> = facts.into_iter().flat_map(|(_, records)| records).collect();
    let closed = written(&states, &all, true);
    seeds.push(("checkpoint".into(), shortened(&[], &written(&states, &[], false))));
    seeds.push(("closed".into(), shortened(&[], &closed)));
    seeds.push(("damaged-checkpoint".into(), shortened(&[[0x40, 0x10, 1]], &closed)));
    seeds.push(("torn".into(), shortened(&[[0x40, 0x30, 1], [0, 0x30, 0xff]], &written(&states, &all[..3], false))));
    let mut raw = written(&[], &[], false);
    raw.truncate(BLOCK + 64);
    seeds.push(("raw".into(), raw));
    let world = SimWorld::new(1);
    let path = Path::new("/journal");
    world.block_on(async {
        world.platform().create_dir_all(path).await.expect("a healthy disk");
        commit_epoch(&world.platform(), path, 1, 1).await.expect("a healthy disk");
    });
    let current = world.file_bytes(&path.join("CURRENT")).expect("it was made");
    seeds.push(("current".into(), current[..32].to_vec()));
    seeds
}

/// The segment that the journal writes: `states` as its checkpoint, each record in a batch of its own.
fn written(states: &[VolumeState], records: &[Record], close: bool) -> Vec<u8> {
    let world = SimWorld::new(1);
    let platform = world.platform();
    let dir = Path::new("/journal");
    world.block_on(async {
        platform.create_dir_all(dir).await.expect("a healthy disk");
        let journal = Journal::create(&platform, dir, 1, 0, states.iter().cloned()).await.expect("a healthy disk");
        for record in records {
            let position = journal.append(record);
            journal.commit(position).await.expect("a healthy disk");
        }
        if close {
            journal.close().await.expect("a healthy disk");
        }
    });
    world.file_bytes(&dir.join("0000000001-0000-0000000000.vj")).expect("it was made")
}

/// The short form of a segment and damages to it.
fn shortened(damages: &[[u8; 3]], segment: &[u8]) -> Vec<u8> {
    let mut short = vec![damages.len() as u8];
    short.extend_from_slice(damages.as_flattened());
    let mut at = BLOCK;
    while let Some((_, Some(records))) = batch_at(segment, at, u64_at(segment, 32)) {
        short.extend_from_slice(&(records.len() as u16).to_le_bytes());
        short.extend_from_slice(records);
        at += (40 + records.len()).next_multiple_of(BLOCK);
    }
    short
}
