//! Replies of the transmission phase to bytes: simple ones, and chunks of structured ones.

use bytes::Bytes;

use super::backend::{ErrorKind, ExportError, Extent};
use super::negotiation::Contexts;
use super::wire::{self, chunk, context, errno};

/// Most extents in one BLOCK_STATUS chunk: 32 KiB of reply. A client asks again for the rest, as the protocol says.
pub const EXTENTS_MAX: usize = 4096;
/// Longest extent in one descriptor: what fits in 32 bits and ends on a block.
const EXTENT_BYTES_MAX: u32 = u32::MAX - (wire::BLOCK_BYTES_PREFERRED - 1);
/// Longest error text sent; the protocol's limit of a string.
const ERROR_TEXT_BYTES_MAX: usize = wire::STRING_BYTES_MAX;

/// A reply ready for the socket: `head` and then `payload`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub head: Vec<u8>,
    pub payload: Bytes,
}

/// Encodes replies in the form agreed in the handshake.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// Structured replies were agreed.
    pub structured: bool,
    /// Contexts that BLOCK_STATUS answers.
    pub contexts: Contexts,
}

impl Encoder {
    /// Success without data.
    #[must_use]
    pub fn done(&self, cookie: u64) -> Encoded {
        let head = if self.structured {
            chunk_header(chunk::FLAG_DONE, chunk::NONE, cookie, 0)
        } else {
            simple_header(0, cookie)
        };
        Encoded { head, payload: Bytes::new() }
    }

    /// Data of a read at `offset`: one chunk, so DF holds for every read.
    #[must_use]
    pub fn data(&self, cookie: u64, offset: u64, payload: Bytes) -> Encoded {
        if !self.structured {
            return Encoded { head: simple_header(0, cookie), payload };
        }
        if payload.is_empty() {
            // A data chunk of no bytes is illegal.
            return self.done(cookie);
        }
        let mut head = chunk_header(chunk::FLAG_DONE, chunk::OFFSET_DATA, cookie, 8 + payload.len());
        head.extend_from_slice(&offset.to_be_bytes());
        Encoded { head, payload }
    }

    /// Failure; the text reaches clients with structured replies.
    #[must_use]
    pub fn error(&self, cookie: u64, number: u32, message: &str) -> Encoded {
        if !self.structured {
            return Encoded { head: simple_header(number, cookie), payload: Bytes::new() };
        }
        let text = truncate(message, ERROR_TEXT_BYTES_MAX);
        let mut head = chunk_header(chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + text.len());
        head.extend_from_slice(&number.to_be_bytes());
        head.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
        head.extend_from_slice(text.as_bytes());
        Encoded { head, payload: Bytes::new() }
    }

    /// Status of the extents that start at the request's offset: one chunk for each chosen context.
    #[must_use]
    pub fn block_status(&self, cookie: u64, extents: &[Extent], one: bool) -> Encoded {
        let mut head = Vec::new();
        let last = self.contexts.names().last().map(|(id, _)| id);
        for (id, _) in self.contexts.names() {
            let limit = if one { 1 } else { EXTENTS_MAX };
            let descriptors = descriptors(extents, limit, |extent| state_in(id, extent));
            let flags = if Some(id) == last { chunk::FLAG_DONE } else { 0 };
            head.extend(chunk_header(flags, chunk::BLOCK_STATUS, cookie, 4 + descriptors.len() * 8));
            head.extend_from_slice(&id.to_be_bytes());
            for (len, state) in descriptors {
                head.extend_from_slice(&len.to_be_bytes());
                head.extend_from_slice(&state.to_be_bytes());
            }
        }
        Encoded { head, payload: Bytes::new() }
    }
}

/// The error number that tells a client the truth about `error`.
#[must_use]
pub fn errno_of(error: &ExportError) -> u32 {
    match error.kind {
        ErrorKind::UnknownExport | ErrorKind::Gone => errno::ESHUTDOWN,
        ErrorKind::Invalid => errno::EINVAL,
        ErrorKind::NoSpace => errno::ENOSPC,
        ErrorKind::Io => errno::EIO,
    }
}

/// State of an extent in a context. A range that is not resident still reads as the snapshot's data, so in
/// `base:allocation` it is data: calling it a hole would make copying clients leave it out.
fn state_in(context_id: u32, extent: &Extent) -> u32 {
    match context_id {
        context::BASE_ALLOCATION_ID if extent.hole => context::STATE_HOLE | context::STATE_ZERO,
        context::VOLLEY_RESIDENT_ID if extent.resident => context::STATE_RESIDENT,
        _ => 0,
    }
}

/// Merges neighbours of equal state into at most `limit` pairs of length and state. Extents after the last are left
/// out, as are bytes that a 32-bit length can't hold: the client asks again from where we stopped.
fn descriptors(extents: &[Extent], limit: usize, state: impl Fn(&Extent) -> u32) -> Vec<(u32, u32)> {
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for extent in extents {
        let state = state(extent);
        if let Some((len, last)) = merged.last_mut()
            && *last == state
            && let Ok(sum) = u32::try_from(u64::from(*len) + extent.len_bytes)
        {
            *len = sum;
            continue;
        }
        if merged.len() == limit {
            break;
        }
        let Ok(len) = u32::try_from(extent.len_bytes) else {
            merged.push((EXTENT_BYTES_MAX, state));
            break;
        };
        merged.push((len, state));
    }
    merged
}

fn simple_header(number: u32, cookie: u64) -> Vec<u8> {
    let mut head = Vec::with_capacity(16);
    head.extend_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    head.extend_from_slice(&number.to_be_bytes());
    head.extend_from_slice(&cookie.to_be_bytes());
    head
}

fn chunk_header(flags: u16, kind: u16, cookie: u64, len: usize) -> Vec<u8> {
    let len = u32::try_from(len).expect("chunks are bounded by the payload limit");
    let mut head = Vec::with_capacity(28);
    head.extend_from_slice(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
    head.extend_from_slice(&flags.to_be_bytes());
    head.extend_from_slice(&kind.to_be_bytes());
    head.extend_from_slice(&cookie.to_be_bytes());
    head.extend_from_slice(&len.to_be_bytes());
    head
}

/// The longest start of `text` that is no longer than `bytes_max`.
pub(super) fn truncate(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Contexts = Contexts { allocation: true, resident: true };

    fn extent(len_bytes: u64, resident: bool, hole: bool) -> Extent {
        Extent { len_bytes, resident, hole }
    }

    #[test]
    fn what_is_not_resident_is_data_and_only_holes_are_holes() {
        let states = |e: Extent| [state_in(context::BASE_ALLOCATION_ID, &e), state_in(context::VOLLEY_RESIDENT_ID, &e)];
        assert_eq!(states(extent(1, false, false)), [0, 0]);
        assert_eq!(states(extent(1, true, false)), [0, 1]);
        assert_eq!(states(extent(1, true, true)), [3, 1]);
    }

    #[test]
    fn replies_have_the_bytes_of_the_protocol() {
        let simple = Encoder { structured: false, contexts: Contexts::default() };
        assert_eq!(simple.done(9).head, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(simple.error(9, errno::EIO, "x").head[4..8], [0, 0, 0, 5]);
        let structured = Encoder { structured: true, contexts: ALL };
        let data = structured.data(9, 512, Bytes::from_static(b"abc"));
        assert_eq!(data.head[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(data.head[16..], [0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 2, 0]);
        let error = structured.error(9, errno::ENOSPC, "full");
        assert_eq!(error.head[4..8], [0, 1, 0x80, 1]);
        assert_eq!(error.head[16..], [0, 0, 0, 10, 0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l']);
        let status = structured.block_status(9, &[extent(512, true, false), extent(512, false, false)], false);
        let second = status.head.len() - 20 - 4 - 16;
        assert_eq!(status.head[4..8], [0, 0, 0, 5], "the first of two contexts is not the end");
        assert_eq!(status.head[16..32], [0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(status.head[second + 4..second + 8], [0, 1, 0, 5]);
    }

    proptest! {
        #[test]
        fn descriptors_describe_a_prefix_truly(
            extents in prop::collection::vec(
                (prop_oneof![1u64..8, Just(1 << 31), Just(1 << 33)], any::<bool>()), 1..40),
            limit in 1usize..10,
        ) {
            let extents: Vec<Extent> = extents.iter().map(|(len, resident)| extent(len * 512, *resident, false)).collect();
            let merged = descriptors(&extents, limit, |e| u32::from(e.resident));
            prop_assert!(!merged.is_empty() && merged.len() <= limit);
            let mut at = 0u64;
            for (len, state) in merged {
                prop_assert!(len > 0 && len.is_multiple_of(512));
                let end = at + u64::from(len);
                let mut start = 0u64;
                for e in &extents {
                    if start < end && at < start + e.len_bytes {
                        prop_assert_eq!(u32::from(e.resident), state);
                    }
                    start += e.len_bytes;
                }
                prop_assert!(end <= start);
                at = end;
            }
        }
    }
}
