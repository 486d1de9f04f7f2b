//! Replies that wait to be sent: frames one after the other, and large payloads where they are.

use volley_protocol::encode;

use crate::limits::{OUTPUT_BUFFER_KEPT_BYTES, WRITE_PIECE_BYTES};
use crate::shard::api::ReadData;

/// A payload of so many bytes stays where it is and is sent from there. Below, a copy costs less than a write of its own.
const APART_BYTES_MIN: usize = 32 << 10;

/// What a connection owes its peer, in order.
#[derive(Default)]
pub(super) struct Output {
    /// Frames, without the payloads that lie apart.
    frames: Vec<u8>,
    /// Payloads, and how many bytes of `frames` come before each.
    apart: Vec<(usize, ReadData)>,
    apart_bytes: usize,
}

impl Output {
    /// Where encoders append whole frames.
    pub(super) fn frames(&mut self) -> &mut Vec<u8> {
        &mut self.frames
    }

    /// Appends the reply to a READ.
    pub(super) fn data(&mut self, request_id: u64, data: ReadData) {
        if data.len() < APART_BYTES_MIN {
            return encode::reply_data(&mut self.frames, request_id, &data);
        }
        encode::reply_data_head(&mut self.frames, request_id, &data);
        self.apart_bytes += data.len();
        self.apart.push((self.frames.len(), data));
    }

    /// Bytes to send.
    pub(super) fn len(&self) -> usize {
        self.frames.len() + self.apart_bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// All bytes in order, none of the pieces longer than [`WRITE_PIECE_BYTES`].
    pub(super) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.apart.iter().map(|(at, _)| *at));
        let ends = self.apart.iter().map(|(at, data)| (*at, &data[..]));
        let ends = ends.chain(std::iter::once((self.frames.len(), &[][..])));
        let parts = begins.zip(ends).flat_map(|(begin, (end, payload))| [&self.frames[begin..end], payload]);
        parts.flat_map(|part| part.chunks(WRITE_PIECE_BYTES))
    }

    /// Forgets what was sent, and keeps no large buffer.
    pub(super) fn clear(&mut self) {
        if self.frames.capacity() > OUTPUT_BUFFER_KEPT_BYTES {
            self.frames = Vec::new();
        }
        self.frames.clear();
        self.apart.clear();
        self.apart_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use volley_protocol::Op;

    use super::*;
    use crate::platform::AlignedBytes;

    proptest! {
        /// Where a payload lies does not show in the bytes that are sent.
        #[test]
        fn pieces_are_the_frames_in_order(
            replies in prop::collection::vec(prop::option::of((0..3 * WRITE_PIECE_BYTES, any::<bool>())), 0..12)
        ) {
            let (mut output, mut plain) = (Output::default(), Vec::new());
            for (id, reply) in (0..).zip(replies) {
                let Some((len, is_chunk)) = reply else {
                    encode::reply_done(output.frames(), Op::Flush, id);
                    encode::reply_done(&mut plain, Op::Flush, id);
                    continue;
                };
                let bytes: Vec<u8> = (0..len).map(|at| (at as u64 * 31 + id) as u8).collect();
                encode::reply_data(&mut plain, id, &bytes);
                let data = Arc::new(AlignedBytes::from(&bytes[..]));
                let part = 0..len;
                output.data(id, if is_chunk { ReadData::Chunk { data, part } } else { ReadData::Own(bytes) });
            }
            prop_assert_eq!(output.len(), plain.len());
            prop_assert!(output.pieces().all(|piece| !piece.is_empty() && piece.len() <= WRITE_PIECE_BYTES));
            prop_assert!(output.pieces().flatten().eq(&plain));
            output.clear();
            prop_assert!(output.is_empty() && output.pieces().next().is_none());
            prop_assert_eq!(output.len(), 0);
        }
    }
}
