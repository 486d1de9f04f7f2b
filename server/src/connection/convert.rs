//! Between wire messages and the shard's requests and replies. The wire crate has validated every field by now.

use volley_protocol as wire;
use volley_protocol::limits::{ERROR_BYTES_MAX, EXTENTS_MAX, LIST_NAMES_MAX, PAYLOAD_BYTES_MAX};
use volley_protocol::messages as m;
use volley_protocol::{Op, encode};

use super::output::Output;
use crate::error::{Result, Status};
use crate::shard::api::{Extent, FetchUntil, Reply, Request, VolumeStatus};
use crate::types::VolumeId;

/// The shard's form of a wire request, with its operation; `None` for HELLO, which never reaches a shard.
pub(super) fn request(wire: wire::Request<'_>) -> Option<(Op, Request)> {
    use wire::Request as W;
    let id = |number: u64| VolumeId(number);
    Some(match wire {
        W::Hello(_) => return None,
        W::Attach(b) => {
            let resume_generation = b.resume_generation.as_ref().map(|generation| generation.to_native());
            (Op::Attach, Request::Attach { name: b.name.as_str().to_owned(), resume_generation })
        }
        W::Lookup(b) => (Op::Lookup, Request::Lookup { name: b.name.as_str().to_owned() }),
        W::Detach(b) => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            (Op::Detach, Request::Detach { volume, generation })
        }
        W::Read(b) => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            (Op::Read, Request::Read { volume, generation, offset: b.offset.to_native(), len: b.len.to_native() })
        }
        W::Write { body: b, data, fua } => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            let (offset, data) = (b.offset.to_native(), data.to_vec());
            (Op::Write, Request::Write { volume, generation, offset, data, fua })
        }
        W::Flush(b) => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            (Op::Flush, Request::Flush { volume, generation })
        }
        W::Discard(b) => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            let (offset, len) = (b.offset.to_native(), b.len.to_native());
            (Op::Discard, Request::Discard { volume, generation, offset, len })
        }
        W::WriteZeroes { body: b, fua } => {
            let (volume, generation) = (id(b.volume.to_native()), b.generation.to_native());
            let (offset, len) = (b.offset.to_native(), b.len.to_native());
            (Op::WriteZeroes, Request::WriteZeroes { volume, generation, offset, len, fua })
        }
        W::PriorityFetch(b) => {
            let (volume, offset, len) = (id(b.volume.to_native()), b.offset.to_native(), b.len.to_native());
            let until = match wire::FetchUntil::from(b.until) {
                wire::FetchUntil::Readable => FetchUntil::Readable,
                wire::FetchUntil::Resident => FetchUntil::Resident,
                wire::FetchUntil::Durable => FetchUntil::Durable,
            };
            (Op::PriorityFetch, Request::PriorityFetch { volume, offset, len, until })
        }
        W::Residency(b) => {
            let (volume, offset, len) = (id(b.volume.to_native()), b.offset.to_native(), b.len.to_native());
            (Op::Residency, Request::Residency { volume, offset, len })
        }
        W::ResidencyWait(b) => {
            let (volume, seen_version) = (id(b.volume.to_native()), b.seen_version.to_native());
            (Op::ResidencyWait, Request::ResidencyWait { volume, seen_version })
        }
        W::Stat(b) => (Op::Stat, Request::Stat { volume: id(b.volume.to_native()) }),
        W::List(b) => (Op::List, Request::ListVolumes { after: b.after.as_str().to_owned() }),
    })
}

/// Bytes that a request pins until it is answered: its payload, or the payload of its reply.
pub(super) fn pinned_bytes(request: &Request) -> usize {
    match request {
        Request::Write { data, .. } => data.len(),
        Request::Read { len, .. } => *len as usize,
        _ => 0,
    }
}

/// Appends the reply frame of a request.
pub(super) fn reply(out: &mut Output, op: Op, request_id: u64, outcome: Result<Reply>) {
    match outcome {
        Ok(Reply::Done) => encode::reply_done(out.frames(), op, request_id),
        Ok(Reply::Attached(info)) => {
            let (volume, generation) = (info.volume.0, info.generation);
            let body =
                m::AttachReply { volume, generation, size_bytes: info.size_bytes, chunk_bytes: info.chunk_bytes };
            encode::reply(out.frames(), op, request_id, &body);
        }
        Ok(Reply::Data(data)) if data.len() <= PAYLOAD_BYTES_MAX as usize => {
            out.data(request_id, data);
        }
        Ok(Reply::Data(data)) => {
            let message = format!("the answer of {} bytes exceeds the limit", data.len());
            encode::reply_error(out.frames(), op as u8, request_id, Status::Internal, &message);
        }
        Ok(Reply::Residency { version, extents }) => {
            // The client asks again from where a cut list ends.
            let extents = extents.into_iter().take(EXTENTS_MAX).map(extent).collect();
            encode::reply(out.frames(), op, request_id, &m::ResidencyReply { version, extents });
        }
        Ok(Reply::Stat(status)) => encode::reply(out.frames(), op, request_id, &stat(*status)),
        Ok(Reply::Names(mut names)) => {
            names.truncate(LIST_NAMES_MAX);
            encode::reply(out.frames(), op, request_id, &m::ListReply { names });
        }
        Err(error) => encode::reply_error(out.frames(), op as u8, request_id, error.status, &error.message),
    }
}

fn extent(extent: Extent) -> m::Extent {
    m::Extent { len_bytes: extent.len_bytes, resident: extent.resident, hole: extent.hole }
}

fn stat(status: VolumeStatus) -> m::StatReply {
    let cut = |mut text: String| {
        text.truncate(text.floor_char_boundary(ERROR_BYTES_MAX));
        text
    };
    m::StatReply {
        id: status.id,
        name: status.name,
        size_bytes: status.size_bytes,
        chunk_bytes: status.chunk_bytes,
        snapshot: status.snapshot,
        store: status.store,
        rate: status.rate,
        batch: status.batch,
        created_unix_ms: status.created_unix_ms,
        shard: u32::try_from(status.shard).unwrap_or(u32::MAX),
        generation: status.generation,
        attached: status.attached,
        hydrated: status.hydrated,
        resident_bytes: status.resident_bytes,
        remaining_bytes: status.remaining_bytes,
        eta_seconds: status.eta_seconds,
        hydration_bytes_per_second: status.hydration_bytes_per_second,
        hydration_state: status.hydration_state,
        last_error: status.last_error.map(cut),
        reads: status.reads,
        read_bytes: status.read_bytes,
        writes: status.writes,
        written_bytes: status.written_bytes,
        flushes: status.flushes,
        read_misses: status.read_misses,
        priority_fetches: status.priority_fetches,
    }
}
