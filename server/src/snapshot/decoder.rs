//! Verifying a large chunk in slices, so that whoever does it can let others in between.
//!
//! A chunk of up to [`WHOLE_BYTES_MAX`] is one step: that is below a millisecond, and decompressing at once is faster.

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::ChunkEntry;
use super::chunk::{CorruptChunk, Encoding, decode_chunk};
use crate::mutation::{self, Mutation};
use crate::platform::{AlignedBytes, Platform};

/// Larger chunks are decoded in slices.
const WHOLE_BYTES_MAX: u32 = 1 << 20;
/// Bytes of the chunk that one step makes: some 200 µs of decompression and digest.
const SLICE_BYTES: usize = 256 << 10;

/// What one step brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    More,
    /// The verified chunk.
    Done(AlignedBytes),
}

/// Turns stored bytes into a verified chunk as [`decode_chunk`] does, step by step.
pub struct ChunkDecoder<'a> {
    entry: &'a ChunkEntry,
    stored: &'a [u8],
    chunk_len: u32,
    slices: Option<Slices<'a>>,
}

struct Slices<'a> {
    /// Stored bytes not taken yet.
    rest: &'a [u8],
    /// `None`: stored raw.
    zstd: Option<Decoder<'static>>,
    raw: AlignedBytes,
    hasher: blake3::Hasher,
}

impl<'a> ChunkDecoder<'a> {
    #[must_use]
    pub fn new(entry: &'a ChunkEntry, stored: &'a [u8], chunk_len: u32) -> ChunkDecoder<'a> {
        ChunkDecoder { entry, stored, chunk_len, slices: None }
    }

    /// The verified chunk; others run between its slices.
    ///
    /// # Errors
    /// As [`decode_chunk`].
    pub async fn run(mut self, platform: &impl Platform) -> Result<AlignedBytes, CorruptChunk> {
        loop {
            if let Step::Done(data) = self.step()? {
                return Ok(data);
            }
            platform.yield_now().await;
        }
    }

    /// The next slice.
    ///
    /// # Errors
    /// As [`decode_chunk`].
    pub fn step(&mut self) -> Result<Step, CorruptChunk> {
        let ChunkEntry::Stored { stored_len, encoding, digest, .. } = self.entry else {
            return Err(CorruptChunk::Zero);
        };
        if self.chunk_len <= WHOLE_BYTES_MAX || self.stored.len() != *stored_len as usize {
            return decode_chunk(self.entry, self.stored, self.chunk_len).map(Step::Done);
        }
        let len = self.chunk_len as usize;
        let slices = match &mut self.slices {
            Some(slices) => slices,
            none => none.insert(Slices::new(self.stored, *encoding, len)?),
        };
        let from = slices.raw.len();
        slices.extend((from + SLICE_BYTES).min(len))?;
        let Slices { raw, hasher, rest, .. } = slices;
        hasher.update(&raw[from..]);
        if raw.len() < len {
            return Ok(Step::More);
        }
        if !rest.is_empty() {
            return Err(CorruptChunk::Decompress("bytes behind the end of the chunk".to_owned()));
        }
        if hasher.finalize().as_bytes() != digest && !mutation::on(Mutation::DigestNotChecked) {
            return Err(CorruptChunk::Digest);
        }
        Ok(Step::Done(std::mem::take(raw)))
    }
}

impl<'a> Slices<'a> {
    fn new(stored: &'a [u8], encoding: Encoding, len: usize) -> Result<Slices<'a>, CorruptChunk> {
        let zstd = match encoding {
            Encoding::Raw => None,
            Encoding::Zstd => Some(Decoder::new().map_err(|e| CorruptChunk::Decompress(e.to_string()))?),
        };
        Ok(Slices { rest: stored, zstd, raw: AlignedBytes::with_capacity(len), hasher: blake3::Hasher::new() })
    }

    /// Decodes until the chunk has `end` bytes.
    fn extend(&mut self, end: usize) -> Result<(), CorruptChunk> {
        let Some(zstd) = &mut self.zstd else {
            let take = end - self.raw.len();
            let short = CorruptChunk::RawLength {
                expected: u32::try_from(end).unwrap_or(u32::MAX),
                found: self.raw.len() + self.rest.len(),
            };
            let (slice, rest) = self.rest.split_at_checked(take).ok_or(short)?;
            self.raw.extend_from_slice(slice);
            self.rest = rest;
            return Ok(());
        };
        let start = self.raw.len();
        self.raw.resize(end);
        let mut output = OutBuffer::around(&mut self.raw[start..]);
        let mut ended = false;
        while output.pos() < output.capacity() {
            let mut input = InBuffer::around(self.rest);
            let before = output.pos();
            let hint = zstd.run(&mut input, &mut output).map_err(|e| CorruptChunk::Decompress(e.to_string()))?;
            let taken = input.pos();
            self.rest = &self.rest[taken..];
            if ended || (taken == 0 && output.pos() == before) {
                return Err(CorruptChunk::Decompress("the stored bytes end before the chunk".to_owned()));
            }
            ended = hint == 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{ChunkDecoder, Step, WHOLE_BYTES_MAX};
    use crate::snapshot::chunk::{CorruptChunk, Encoding, encode_chunk};
    use crate::snapshot::{ChunkEntry, EncodedChunk};

    fn entry(encoded: &EncodedChunk) -> ChunkEntry {
        let stored_len = u32::try_from(encoded.stored.len()).unwrap();
        ChunkEntry::Stored { pack: 0, offset: 32, stored_len, encoding: encoded.encoding, digest: encoded.digest }
    }

    fn contents(len: usize) -> [(Vec<u8>, Encoding); 2] {
        let mut noise = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut noise);
        let text: Vec<u8> = (0..len).map(|i| if i % 64 < 32 { noise[i] } else { b' ' }).collect();
        [(noise, Encoding::Raw), (text, Encoding::Zstd)]
    }

    fn decode(entry: &ChunkEntry, stored: &[u8], len: usize) -> Result<(Vec<u8>, usize), CorruptChunk> {
        let mut decoder = ChunkDecoder::new(entry, stored, u32::try_from(len).unwrap());
        for steps in 1.. {
            assert!(steps <= 64, "it ends");
            if let Step::Done(raw) = decoder.step()? {
                return Ok((raw.to_vec(), steps));
            }
        }
        unreachable!("the loop ends by returning")
    }

    #[test]
    fn a_large_chunk_is_the_same_in_slices() {
        for (len, steps) in [(WHOLE_BYTES_MAX as usize, 1), (4 << 20, 16), ((1 << 20) + 512, 5)] {
            for (raw, encoding) in contents(len) {
                let encoded = encode_chunk(&raw, 3);
                assert_eq!(encoded.encoding, encoding);
                assert_eq!(decode(&entry(&encoded), &encoded.stored, len), Ok((raw, steps)));
            }
        }
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let len = 2 << 20;
        for (raw, _) in contents(len) {
            let encoded = encode_chunk(&raw, 3);
            let entry = entry(&encoded);
            for at in (0..encoded.stored.len()).step_by(encoded.stored.len() / 50) {
                let mut bad = encoded.stored.clone();
                bad[at] ^= 0x10;
                assert_ne!(decode(&entry, &bad, len).map(|(raw, _)| raw), Ok(vec![]), "never empty");
                if let Ok((content, _)) = decode(&entry, &bad, len) {
                    assert_eq!(content, raw);
                }
                assert!(decode(&entry, &encoded.stored[..at], len).is_err());
            }
            assert!(decode(&entry, &encoded.stored, len + 512).is_err(), "shorter than it must be");
            assert!(decode(&entry, &encoded.stored, len - 512).is_err(), "longer than it may be");
        }
    }

    #[test]
    fn stored_bytes_that_lie_about_their_end_are_refused() {
        let len = 2 << 20;
        let [_, (raw, _)] = contents(len);
        // A shorter chunk and one with more behind it, both sealed by a manifest that says so.
        for stored in [encode_chunk(&raw[..len - 4096], 3).stored, [encode_chunk(&raw, 3).stored, vec![0; 9]].concat()]
        {
            let digest = *blake3::hash(&raw).as_bytes();
            let lie = EncodedChunk { digest, encoding: Encoding::Zstd, stored, raw_len: 0 };
            assert!(matches!(decode(&entry(&lie), &lie.stored, len), Err(CorruptChunk::Decompress(_))));
        }
    }
}
