//! What a volume's changes count from, and which chunks have changed.

use super::{Entry, HEAD_BYTES, RECORD_BYTES_MAX, RUN_BYTES, Reader, STRING_BYTES_MAX, emit, kind, put_u32, put_u64};
use crate::types::{Changed, Lineage, SnapshotRef, VolumeId};

/// Volume id, flags, length of the name, number of runs, snapshot id.
const FIXED_BYTES: usize = 32;
const RUNS_MAX: usize = 4096;
const HAS_BASE: u16 = 1;
const UNKNOWN: u16 = 2;
const CONTINUED: u16 = 4;

const _: () = assert!(HEAD_BYTES + FIXED_BYTES + STRING_BYTES_MAX + RUNS_MAX * RUN_BYTES <= RECORD_BYTES_MAX);

pub(super) fn encode(volume: VolumeId, lineage: &Lineage, sink: &mut impl FnMut(&[u8])) {
    let (runs, unknown): (&[_], _) = match &lineage.changed {
        Changed::Unknown => (&[], UNKNOWN),
        Changed::Runs(runs) => (runs, 0),
    };
    let (name, id) = lineage.base.as_ref().map_or(("", 0), |base| (&*base.name, base.id));
    let has_base = if lineage.base.is_some() { HAS_BASE } else { 0 };
    let mut put = |runs: &[(u32, u32)], continued: u16| {
        emit(kind::LINEAGE, sink, |body| {
            put_u64(body, volume.0);
            body.extend_from_slice(&(has_base | unknown | continued).to_le_bytes());
            body.extend_from_slice(&(name.len() as u16).to_le_bytes());
            put_u32(body, runs.len() as u32);
            body.extend_from_slice(&id.to_le_bytes());
            body.extend_from_slice(name.as_bytes());
            for (start, len) in runs {
                put_u32(body, *start);
                put_u32(body, *len);
            }
        });
    };
    let (first, rest) = runs.split_at(runs.len().min(RUNS_MAX));
    put(first, 0);
    rest.chunks(RUNS_MAX).for_each(|runs| put(runs, CONTINUED));
}

pub(super) fn take(reader: &mut Reader<'_>) -> Result<Entry, &'static str> {
    let volume = VolumeId(reader.u64()?);
    let (flags, name_len, run_count) = (reader.u16()?, reader.u16()?, reader.u32()?);
    let id = u128::from_le_bytes(reader.array()?);
    let name = reader.text(name_len)?;
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for _ in 0..run_count {
        let (start, len) = (reader.u32()?, reader.u32()?);
        let apart = runs.last().is_none_or(|(first, count)| start > first + count);
        if len == 0 || !apart || start.checked_add(len).is_none() {
            return Err("runs of changed chunks are empty or out of order");
        }
        runs.push((start, len));
    }
    let unknown = flags & UNKNOWN != 0;
    if flags & !(HAS_BASE | UNKNOWN | CONTINUED) != 0 || (unknown && !runs.is_empty()) {
        return Err("unknown or contradictory flags of a lineage");
    }
    let base = (flags & HAS_BASE != 0).then_some(SnapshotRef { name, id });
    let changed = if unknown { Changed::Unknown } else { Changed::Runs(runs) };
    Ok(Entry::Lineage { volume, lineage: Lineage { base, changed }, continued: flags & CONTINUED != 0 })
}
