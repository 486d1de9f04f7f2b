//! Codec of journal records: fixed little-endian layouts, byte by byte in docs/journal.md. Pure and synchronous.
//!
//! A record is an 8-byte head (body length, kind) and a body. Every record is at most [`RECORD_BYTES_MAX`] long:
//! residency of a large volume is cut into several records, which is safe because each of them only adds sectors.

mod lineage;

use std::sync::Arc;

use crate::types::{
    CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, ChunkResidency, HydrationRate, Lineage, SECTOR_BYTES, SnapshotRef, VolumeId,
    VolumeSpec, VolumeState,
};

/// One durable fact about a volume. Facts are idempotent: replaying one again changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The volume exists, with generation 0 and nothing resident (without a snapshot: everything). Changes nothing if the
    /// volume is known.
    Created(VolumeSpec),
    Deleted(VolumeId),
    /// An attach handed out this generation. Generations only grow.
    Generation {
        volume: VolumeId,
        generation: u64,
    },
    Rate {
        volume: VolumeId,
        rate: HydrationRate,
    },
    /// These sectors are in the volume file, and their data is durable. Residency only grows.
    Residency {
        volume: VolumeId,
        chunks: Vec<(u32, ChunkResidency)>,
    },
    /// Every chunk is resident.
    Hydrated {
        volume: VolumeId,
    },
    /// A snapshot of the volume was taken: what it holds is told by that one from now on.
    Lineage {
        volume: VolumeId,
        lineage: Lineage,
    },
    /// The volume was rolled back or resized: this replaces all that is known of it.
    Replaced(VolumeState),
    /// Guests may change these chunks from now on: first chunk and count.
    Changing {
        volume: VolumeId,
        run: (u32, u32),
    },
}

/// What a segment file holds: the facts of [`Record`] as they are stored, and what the journal itself writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// First record of a volume in a checkpoint; `Residency` entries follow.
    State {
        spec: VolumeSpec,
        generation: u64,
        hydrated: bool,
    },
    Created(VolumeSpec),
    Deleted(VolumeId),
    Generation {
        volume: VolumeId,
        generation: u64,
    },
    Rate {
        volume: VolumeId,
        rate: HydrationRate,
    },
    /// Runs of whole chunks (first chunk, count), not yet checked against the volume's size; bitmaps of partial ones.
    Residency {
        volume: VolumeId,
        runs: Vec<(u32, u32)>,
        partials: Vec<(u32, Box<[u64]>)>,
    },
    Hydrated(VolumeId),
    /// `continued`: more runs of the record before.
    Lineage {
        volume: VolumeId,
        lineage: Lineage,
        continued: bool,
    },
    /// As `State`, in the log.
    Replaced {
        spec: VolumeSpec,
        generation: u64,
        hydrated: bool,
    },
    Changing {
        volume: VolumeId,
        run: (u32, u32),
    },
    /// Everything before was synced before the file got its final name. Counts the `State` entries before it.
    CheckpointComplete {
        volumes: u64,
    },
    /// The journal was closed in good order: nothing follows.
    Closed,
}

/// Longest record with its head. Bounds what a decoder holds at once; a batch takes at least 15 of them.
pub(super) const RECORD_BYTES_MAX: usize = 64 << 10;
pub(super) const HEAD_BYTES: usize = 8;
/// 4 MiB chunks have 1,024 sectors: 16 words of 64.
const PARTIAL_WORDS_MAX: usize = (CHUNK_BYTES_MAX / SECTOR_BYTES / 64) as usize;
/// Volume id, number of runs, number of partial chunks.
const RESIDENCY_FIXED_BYTES: usize = 16;
const RUN_BYTES: usize = 8;
const PARTIAL_FIXED_BYTES: usize = 8;
const SPEC_FIXED_BYTES: usize = 68;
/// Names are at most 128 bytes, labels come from a config file: this leaves every spec far inside a record.
const STRING_BYTES_MAX: usize = 4096;

const _: () = assert!(HEAD_BYTES + 16 + SPEC_FIXED_BYTES + 3 * STRING_BYTES_MAX <= RECORD_BYTES_MAX);
const _: () = assert!(
    HEAD_BYTES + RESIDENCY_FIXED_BYTES + PARTIAL_FIXED_BYTES + 8 * PARTIAL_WORDS_MAX + RUN_BYTES <= RECORD_BYTES_MAX
);

mod kind {
    pub(super) const STATE: u8 = 1;
    pub(super) const CREATED: u8 = 2;
    pub(super) const DELETED: u8 = 3;
    pub(super) const GENERATION: u8 = 4;
    pub(super) const RATE: u8 = 5;
    pub(super) const RESIDENCY: u8 = 6;
    pub(super) const HYDRATED: u8 = 7;
    pub(super) const CHECKPOINT_COMPLETE: u8 = 8;
    pub(super) const CLOSED: u8 = 9;
    pub(super) const LINEAGE: u8 = 10;
    pub(super) const REPLACED: u8 = 11;
    pub(super) const CHANGING: u8 = 12;
}

const RATE_UNLIMITED: u8 = 0;
const RATE_NONE: u8 = 1;
const RATE_BYTES_PER_SECOND: u8 = 2;
const FLAG_SNAPSHOT: u8 = 1;
const FLAG_BATCH: u8 = 2;

/// Why bytes inside a batch with a good checksum are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    #[error("record kind {0} is unknown: the file was written by a newer volleyd; start that version")]
    UnknownKind(u8),
    #[error("record of kind {kind} is malformed: {what}")]
    Malformed { kind: u8, what: &'static str },
}

/// Encodes `record` as one or more whole records, each given to `sink`. Residency of nothing gives none.
pub(super) fn encode(record: &Record, sink: &mut impl FnMut(&[u8])) {
    match record {
        Record::Created(spec) => emit(kind::CREATED, sink, |body| put_spec(body, spec)),
        Record::Deleted(volume) => emit(kind::DELETED, sink, |body| put_u64(body, volume.0)),
        Record::Generation { volume, generation } => emit(kind::GENERATION, sink, |body| {
            put_u64(body, volume.0);
            put_u64(body, *generation);
        }),
        Record::Rate { volume, rate } => emit(kind::RATE, sink, |body| {
            let (kind, bytes) = rate_parts(*rate);
            put_u64(body, volume.0);
            put_u64(body, bytes);
            body.push(kind);
        }),
        Record::Residency { volume, chunks } => encode_residency(*volume, chunks, sink),
        Record::Hydrated { volume } => emit(kind::HYDRATED, sink, |body| put_u64(body, volume.0)),
        Record::Lineage { volume, lineage } => lineage::encode(*volume, lineage, sink),
        Record::Replaced(state) => encode_whole(kind::REPLACED, state, sink),
        Record::Changing { volume, run } => emit(kind::CHANGING, sink, |body| {
            put_u64(body, volume.0);
            put_u32(body, run.0);
            put_u32(body, run.1);
        }),
    }
}

/// Encodes the full state of a volume: one `State` record and its residency.
pub(super) fn encode_state(state: &VolumeState, sink: &mut impl FnMut(&[u8])) {
    encode_whole(kind::STATE, state, sink);
}

fn encode_whole(kind: u8, state: &VolumeState, sink: &mut impl FnMut(&[u8])) {
    emit(kind, sink, |body| {
        put_u64(body, state.generation);
        put_u64(body, u64::from(state.hydrated));
        put_spec(body, &state.spec);
    });
    lineage::encode(state.spec.id, &state.lineage, sink);
    if !state.hydrated {
        encode_residency(state.spec.id, &state.residency, sink);
    }
}

pub(super) fn encode_checkpoint_complete(volumes: u64, sink: &mut impl FnMut(&[u8])) {
    emit(kind::CHECKPOINT_COMPLETE, sink, |body| put_u64(body, volumes));
}

pub(super) fn encode_closed(sink: &mut impl FnMut(&[u8])) {
    emit(kind::CLOSED, sink, |_| ());
}

/// Decodes the record at the start of `bytes`; returns it and its length.
pub(super) fn decode(bytes: &[u8]) -> Result<(Entry, usize), RecordError> {
    let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else {
        return Err(RecordError::Malformed { kind: 0, what: "its head is cut short" });
    };
    let body_len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let kind = head[4];
    let malformed = |what| RecordError::Malformed { kind, what };
    // The kind first: a newer version may have kinds that are longer than our limit.
    if !(kind::STATE..=kind::CHANGING).contains(&kind) {
        return Err(RecordError::UnknownKind(kind));
    }
    if head[5..] != [0; 3] {
        return Err(malformed("reserved bytes of the head are not zero"));
    }
    if body_len > RECORD_BYTES_MAX - HEAD_BYTES {
        return Err(malformed("it is longer than the limit"));
    }
    let body = bytes.get(HEAD_BYTES..HEAD_BYTES + body_len).ok_or(malformed("it runs past the end of its batch"))?;
    let mut reader = Reader(body);
    let entry = decode_body(kind, &mut reader).map_err(malformed)?;
    if !reader.0.is_empty() {
        return Err(malformed("its body is longer than its fields"));
    }
    Ok((entry, HEAD_BYTES + body_len))
}

fn decode_body(kind: u8, reader: &mut Reader<'_>) -> Result<Entry, &'static str> {
    Ok(match kind {
        kind::STATE | kind::REPLACED => {
            let generation = reader.u64()?;
            let hydrated = match reader.u64()? {
                0 => false,
                1 => true,
                _ => return Err("the hydrated flag is neither 0 nor 1"),
            };
            let spec = take_spec(reader)?;
            match kind {
                kind::STATE => Entry::State { spec, generation, hydrated },
                _ => Entry::Replaced { spec, generation, hydrated },
            }
        }
        kind::CREATED => Entry::Created(take_spec(reader)?),
        kind::DELETED => Entry::Deleted(VolumeId(reader.u64()?)),
        kind::GENERATION => Entry::Generation { volume: VolumeId(reader.u64()?), generation: reader.u64()? },
        kind::RATE => {
            let (volume, bytes, kind) = (VolumeId(reader.u64()?), reader.u64()?, reader.u8()?);
            Entry::Rate { volume, rate: rate_from(kind, bytes)? }
        }
        kind::RESIDENCY => take_residency(reader)?,
        kind::HYDRATED => Entry::Hydrated(VolumeId(reader.u64()?)),
        kind::CHECKPOINT_COMPLETE => Entry::CheckpointComplete { volumes: reader.u64()? },
        kind::LINEAGE => lineage::take(reader)?,
        kind::CHANGING => {
            let (volume, run) = (VolumeId(reader.u64()?), (reader.u32()?, reader.u32()?));
            if run.1 == 0 || run.0.checked_add(run.1).is_none() {
                return Err("the run of chunks is empty or has no end");
            }
            Entry::Changing { volume, run }
        }
        _ => Entry::Closed,
    })
}

fn emit(kind: u8, sink: &mut impl FnMut(&[u8]), body: impl FnOnce(&mut Vec<u8>)) {
    let mut record = vec![0, 0, 0, 0, kind, 0, 0, 0];
    body(&mut record);
    let body_len = u32::try_from(record.len() - HEAD_BYTES).expect("bounded by RECORD_BYTES_MAX");
    assert!(record.len() <= RECORD_BYTES_MAX, "record of kind {kind} with {body_len} bytes");
    record[..4].copy_from_slice(&body_len.to_le_bytes());
    sink(&record);
}

/// Residency in the making: runs of whole chunks, then the bitmaps of partial ones.
#[derive(Default)]
struct ResidencyBody {
    runs: Vec<(u32, u32)>,
    partials: Vec<u8>,
    partial_count: u32,
}

impl ResidencyBody {
    fn bytes(&self) -> usize {
        HEAD_BYTES + RESIDENCY_FIXED_BYTES + RUN_BYTES * self.runs.len() + self.partials.len()
    }

    fn add(&mut self, chunk: u32, residency: &ChunkResidency) {
        match residency {
            ChunkResidency::Absent => {}
            ChunkResidency::Resident => match self.runs.last_mut() {
                Some((start, len)) if start.checked_add(*len) == Some(chunk) => *len += 1,
                _ => self.runs.push((chunk, 1)),
            },
            ChunkResidency::Partial(words) => {
                assert!(words.len() <= PARTIAL_WORDS_MAX, "bitmap of {} words", words.len());
                put_u32(&mut self.partials, chunk);
                put_u32(&mut self.partials, words.len() as u32);
                words.iter().for_each(|word| put_u64(&mut self.partials, *word));
                self.partial_count += 1;
            }
        }
    }

    fn emit(self, volume: VolumeId, sink: &mut impl FnMut(&[u8])) {
        if self.runs.is_empty() && self.partial_count == 0 {
            return;
        }
        emit(kind::RESIDENCY, sink, |body| {
            put_u64(body, volume.0);
            put_u32(body, self.runs.len() as u32);
            put_u32(body, self.partial_count);
            for (start, len) in self.runs {
                put_u32(body, start);
                put_u32(body, len);
            }
            body.extend_from_slice(&self.partials);
        });
    }
}

fn encode_residency(volume: VolumeId, chunks: &[(u32, ChunkResidency)], sink: &mut impl FnMut(&[u8])) {
    const GROWTH_MAX: usize = PARTIAL_FIXED_BYTES + 8 * PARTIAL_WORDS_MAX + RUN_BYTES;
    let mut body = ResidencyBody::default();
    for (chunk, residency) in chunks {
        if body.bytes() + GROWTH_MAX > RECORD_BYTES_MAX {
            std::mem::take(&mut body).emit(volume, sink);
        }
        body.add(*chunk, residency);
    }
    body.emit(volume, sink);
}

fn take_residency(reader: &mut Reader<'_>) -> Result<Entry, &'static str> {
    let volume = VolumeId(reader.u64()?);
    let (run_count, partial_count) = (reader.u32()?, reader.u32()?);
    let (mut runs, mut partials) = (Vec::new(), Vec::new());
    for _ in 0..run_count {
        runs.push((reader.u32()?, reader.u32()?));
    }
    for _ in 0..partial_count {
        let (chunk, words) = (reader.u32()?, reader.u32()? as usize);
        if words == 0 || words > PARTIAL_WORDS_MAX {
            return Err("a bitmap has no words or too many");
        }
        let words: Result<Box<[u64]>, _> = (0..words).map(|_| reader.u64()).collect();
        partials.push((chunk, words?));
    }
    Ok(Entry::Residency { volume, runs, partials })
}

fn put_spec(out: &mut Vec<u8>, spec: &VolumeSpec) {
    let (rate_kind, rate_bytes) = rate_parts(spec.rate);
    let mut flags = 0;
    flags |= if spec.snapshot.is_some() { FLAG_SNAPSHOT } else { 0 };
    flags |= if spec.batch.is_some() { FLAG_BATCH } else { 0 };
    let snapshot_name = spec.snapshot.as_ref().map_or("", |s| &s.name);
    put_u64(out, spec.id.0);
    put_u64(out, spec.size_bytes);
    put_u64(out, spec.created_unix_ms);
    put_u64(out, rate_bytes);
    put_u64(out, spec.batch.unwrap_or(0));
    out.extend_from_slice(&spec.snapshot.as_ref().map_or(0, |s| s.id).to_le_bytes());
    put_u32(out, spec.chunk_bytes);
    out.push(rate_kind);
    out.push(flags);
    for text in [&*spec.name, &*spec.store, snapshot_name] {
        assert!(text.len() <= STRING_BYTES_MAX, "name or label of {} bytes", text.len());
        out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    }
    for text in [&*spec.name, &*spec.store, snapshot_name] {
        out.extend_from_slice(text.as_bytes());
    }
}

fn take_spec(reader: &mut Reader<'_>) -> Result<VolumeSpec, &'static str> {
    let id = VolumeId(reader.u64()?);
    let (size_bytes, created_unix_ms, rate_bytes, batch) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
    let snapshot_id = u128::from_le_bytes(reader.array()?);
    let (chunk_bytes, rate_kind, flags) = (reader.u32()?, reader.u8()?, reader.u8()?);
    let (name_len, store_len, snapshot_len) = (reader.u16()?, reader.u16()?, reader.u16()?);
    let (name, store, snapshot_name) = (reader.text(name_len)?, reader.text(store_len)?, reader.text(snapshot_len)?);
    if flags & !(FLAG_SNAPSHOT | FLAG_BATCH) != 0 {
        return Err("unknown flags of a volume");
    }
    if !chunk_bytes.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
        return Err("the chunk size is not a power of two from 64 KiB to 4 MiB");
    }
    if size_bytes == 0
        || !size_bytes.is_multiple_of(512)
        || size_bytes.div_ceil(u64::from(chunk_bytes)) > u64::from(u32::MAX)
    {
        return Err("the device size is not a positive multiple of 512 within the limits");
    }
    let snapshot = (flags & FLAG_SNAPSHOT != 0).then_some(SnapshotRef { name: snapshot_name, id: snapshot_id });
    Ok(VolumeSpec {
        id,
        name,
        size_bytes,
        chunk_bytes,
        snapshot,
        store,
        rate: rate_from(rate_kind, rate_bytes)?,
        batch: (flags & FLAG_BATCH != 0).then_some(batch),
        created_unix_ms,
    })
}

fn rate_parts(rate: HydrationRate) -> (u8, u64) {
    match rate {
        HydrationRate::Unlimited => (RATE_UNLIMITED, 0),
        HydrationRate::None => (RATE_NONE, 0),
        HydrationRate::BytesPerSecond(bytes) => (RATE_BYTES_PER_SECOND, bytes),
    }
}

fn rate_from(kind: u8, bytes: u64) -> Result<HydrationRate, &'static str> {
    match kind {
        RATE_UNLIMITED => Ok(HydrationRate::Unlimited),
        RATE_NONE => Ok(HydrationRate::None),
        RATE_BYTES_PER_SECOND => Ok(HydrationRate::BytesPerSecond(bytes)),
        _ => Err("unknown kind of hydration rate"),
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Takes fields off the front of a body.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or("its body is cut short")?;
        self.0 = rest;
        Ok(*field)
    }

    fn u8(&mut self) -> Result<u8, &'static str> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, &'static str> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self, len: u16) -> Result<Arc<str>, &'static str> {
        let (text, rest) = self.0.split_at_checked(usize::from(len)).ok_or("its body is cut short")?;
        self.0 = rest;
        std::str::from_utf8(text).map(Arc::from).map_err(|_| "a name is not UTF-8")
    }
}
