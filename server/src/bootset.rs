//! Boot sets: the chunks that a machine reads when it boots from an image, learned from machines that did. Plain
//! synchronous core: no I/O, no clock.
//!
//! A set holds digests, not places: another image that has the same chunk inherits it. What boots stop touching ages out.
//! `docs/bootset.md` has the bytes.

use std::collections::HashMap;

use thiserror::Error;

use crate::snapshot::Manifest;
use crate::transfer::Digest;

/// Key prefix of boot sets in the object store; the rest of the key is the image's name.
pub const BOOT_SET_PREFIX: &str = "bootsets/";

/// Chunks of a set; with the default chunk 2 GiB, more than a boot reads.
pub const CHUNKS_MAX: usize = 4096;
/// Weight of one more boot in a chunk's rate of being touched.
const LEARN: f32 = 0.25;
/// Chunks touched by fewer boots than this leave the set: it takes five boots without a touch to forget one that all touched.
const RATE_MIN: f32 = 0.25;

const MAGIC: [u8; 8] = *b"VLYBOOT1";
const HEAD_BYTES: usize = 24;
const ENTRY_BYTES: usize = 40;

/// The object key of an image's set.
#[must_use]
pub fn boot_set_key(image: &str) -> String {
    format!("{BOOT_SET_PREFIX}{image}")
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    digest: Digest,
    /// Share of the boots that touch the chunk, later ones counting more; 0 to 1.
    rate: f32,
    /// When it is touched: mean place in the order of first touches.
    place: f32,
}

/// What one boot says about the set that was there before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// Chunks of the set that the boot touched.
    pub hits: u64,
    /// Chunks of the set that it did not.
    pub wasted: u64,
    /// Chunks that it touched and the set did not have.
    pub new: u64,
}

/// A boot set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BootSet {
    /// In the order of their places.
    entries: Vec<Entry>,
    boots: u32,
}

/// Bytes that are not a boot set.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadBootSet {
    #[error("a boot set of {0} bytes is cut off or too long")]
    Length(usize),
    #[error("no boot set, or one of another version")]
    Magic,
    #[error("a boot set that fails its checksum")]
    Checksum,
    #[error("a boot set with a rate or place that is none")]
    Number,
}

impl BootSet {
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Boots it was learned from.
    #[must_use]
    pub fn boots(&self) -> u32 {
        self.boots
    }

    /// Adds a boot: the chunks it touched, in the order of their first touch. The first boot makes the set.
    pub fn learn(&mut self, touched: &[Digest]) -> Learned {
        let mut places: HashMap<Digest, usize> = HashMap::with_capacity(touched.len());
        for digest in touched {
            let next = places.len();
            places.entry(*digest).or_insert(next);
        }
        let (first, mut learned) = (self.boots == 0, Learned::default());
        for entry in &mut self.entries {
            match places.remove(&entry.digest) {
                Some(place) => {
                    learned.hits += 1;
                    entry.rate += (1.0 - entry.rate) * LEARN;
                    entry.place += (place as f32 - entry.place) * LEARN;
                }
                None => {
                    learned.wasted += 1;
                    entry.rate -= entry.rate * LEARN;
                }
            }
        }
        learned.new = places.len() as u64;
        let rate = if first { 1.0 } else { LEARN };
        self.entries.extend(places.into_iter().map(|(digest, place)| Entry { digest, rate, place: place as f32 }));
        self.entries.retain(|entry| entry.rate >= RATE_MIN);
        if self.entries.len() > CHUNKS_MAX {
            self.entries.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(a.digest.cmp(&b.digest)));
            self.entries.truncate(CHUNKS_MAX);
        }
        self.sort();
        self.boots = self.boots.saturating_add(1);
        learned
    }

    fn sort(&mut self) {
        self.entries.sort_by(|a, b| a.place.total_cmp(&b.place).then(a.digest.cmp(&b.digest)));
    }

    /// The image's chunks that are in the set, in its order; of equal chunks only the first.
    #[must_use]
    pub fn chunks_of(&self, manifest: &Manifest) -> Vec<u32> {
        let places: HashMap<Digest, usize> = self.entries.iter().enumerate().map(|(i, e)| (e.digest, i)).collect();
        let mut found: Vec<Option<u32>> = vec![None; self.entries.len()];
        for chunk in 0..manifest.chunk_count() {
            if let Some(place) = manifest.digest(chunk).and_then(|digest| places.get(&digest)) {
                found[*place].get_or_insert(chunk);
            }
        }
        found.into_iter().flatten().collect()
    }

    /// A set for an image without its own: what others have learned about the chunks it shares with theirs. Its boots
    /// count as none, so that the first own one counts fully.
    #[must_use]
    pub fn inherit<'a>(others: impl IntoIterator<Item = &'a BootSet>) -> BootSet {
        let mut entries: HashMap<Digest, Entry> = HashMap::new();
        for entry in others.into_iter().flat_map(|other| &other.entries) {
            let kept = entries.entry(entry.digest).or_insert(*entry);
            if entry.rate > kept.rate {
                *kept = *entry;
            }
        }
        let mut set = BootSet { entries: entries.into_values().collect(), boots: 0 };
        set.sort();
        set
    }

    /// The bytes of `docs/bootset.md`.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_BYTES + self.entries.len() * ENTRY_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.boots.to_le_bytes());
        out.extend_from_slice(&u32::try_from(self.entries.len()).expect("a set is small").to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        for entry in &self.entries {
            out.extend_from_slice(&entry.digest);
            out.extend_from_slice(&entry.rate.to_le_bytes());
            out.extend_from_slice(&entry.place.to_le_bytes());
        }
        let checksum = crc32fast::hash(&out);
        out[16..20].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<BootSet, BadBootSet> {
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES).ok_or(BadBootSet::Length(bytes.len()))?;
        if head[..8] != MAGIC {
            return Err(BadBootSet::Magic);
        }
        let (entries, cut) = rest.as_chunks::<ENTRY_BYTES>();
        if !cut.is_empty() || entries.len() > CHUNKS_MAX || entries.len() as u32 != word(&head[12..]) {
            return Err(BadBootSet::Length(bytes.len()));
        }
        let mut sealed = bytes.to_vec();
        sealed[16..20].fill(0);
        if crc32fast::hash(&sealed) != word(&head[16..]) {
            return Err(BadBootSet::Checksum);
        }
        let entry = |bytes: &[u8; ENTRY_BYTES]| {
            let digest = *bytes.first_chunk::<32>().expect("40 bytes");
            let (rate, place) = (f32::from_bits(word(&bytes[32..])), f32::from_bits(word(&bytes[36..])));
            let good = (0.0..=1.0).contains(&rate) && place.is_finite() && place >= 0.0;
            good.then_some(Entry { digest, rate, place }).ok_or(BadBootSet::Number)
        };
        let mut set =
            BootSet { entries: entries.iter().map(entry).collect::<Result<_, _>>()?, boots: word(&head[8..]) };
        set.sort();
        Ok(set)
    }
}

/// The little-endian number that the bytes begin with.
fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(*bytes.first_chunk::<4>().expect("inside the length checked"))
}

#[cfg(test)]
#[path = "bootset_tests.rs"]
mod tests;
