//! Which blocks of a snapshot have data, and which differ between two snapshots: what an incremental backup asks for.
//!
//! A block is a chunk as backup tools see it: a number, a length and a digest. Manifests are flat and chunks are named by
//! their content, so both questions are answered from manifests alone. Pure.

use serde::{Serialize, Serializer};
use thiserror::Error;

use super::Manifest;

/// A block that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Block {
    pub index: u32,
    /// Bytes; only the last block of a device may be shorter than the others.
    #[serde(rename = "length")]
    pub len: u32,
    /// BLAKE3 of the bytes.
    #[serde(serialize_with = "hex")]
    pub digest: [u8; 32],
}

/// A block that is not the same in two snapshots. No digest: zeroes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub index: u32,
    #[serde(rename = "length")]
    pub len: u32,
    #[serde(serialize_with = "hex_or_null")]
    pub digest: Option<[u8; 32]>,
    /// In the snapshot it is compared with.
    #[serde(serialize_with = "hex_or_null")]
    pub since_digest: Option<[u8; 32]>,
}

/// Two snapshots whose blocks are not the same parts of the same device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{name:?} and {since:?} can't be compared block by block: {size_bytes} bytes in blocks of {chunk_bytes}, and \
     {since_size_bytes} bytes in blocks of {since_chunk_bytes}"
)]
pub struct OtherGeometry {
    pub name: String,
    pub since: String,
    pub size_bytes: u64,
    pub chunk_bytes: u32,
    pub since_size_bytes: u64,
    pub since_chunk_bytes: u32,
}

/// A part of a list, and the index of the block where the next part begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<u32>,
}

/// Anything listed by block.
pub trait Indexed {
    fn index(&self) -> u32;
}

impl Indexed for Block {
    fn index(&self) -> u32 {
        self.index
    }
}

impl Indexed for Change {
    fn index(&self) -> u32 {
        self.index
    }
}

/// The blocks with data, from block `starting` on.
pub fn blocks(manifest: &Manifest, starting: u32) -> impl Iterator<Item = Block> {
    let block = move |index| Some(Block { index, len: manifest.chunk_len(index), digest: manifest.digest(index)? });
    (starting..manifest.chunk_count()).filter_map(block)
}

/// The blocks of `manifest` that are not as in `since`, from block `starting` on.
///
/// # Errors
/// [`OtherGeometry`].
pub fn changes(
    manifest: &Manifest,
    since: &Manifest,
    starting: u32,
) -> Result<impl Iterator<Item = Change>, OtherGeometry> {
    check_geometry(manifest, since)?;
    let change = move |index| {
        let (digest, since_digest) = (manifest.digest(index), since.digest(index));
        (digest != since_digest).then(|| Change { index, len: manifest.chunk_len(index), digest, since_digest })
    };
    Ok((starting..manifest.chunk_count()).filter_map(change))
}

/// Which of the first chunks of a device two snapshots hold differently; `None` holds zeroes, and so does what is past the
/// end of one.
pub fn differing<'a>(a: Option<&'a Manifest>, b: &'a Manifest, chunks: u32) -> impl Iterator<Item = u32> + 'a {
    let held = |manifest: &Manifest, chunk| Some((manifest.digest(chunk)?, manifest.chunk_len(chunk)));
    (0..chunks).filter(move |chunk| a.and_then(|a| held(a, *chunk)) != held(b, *chunk))
}

/// The first `max` items.
pub fn page<T: Indexed>(mut items: impl Iterator<Item = T>, max: usize) -> Page<T> {
    let first = items.by_ref().take(max).collect();
    Page { items: first, next: items.next().map(|item| item.index()) }
}

/// A digest as it is written in answers and headers.
#[must_use]
pub fn digest_text(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

fn check_geometry(manifest: &Manifest, since: &Manifest) -> Result<(), OtherGeometry> {
    if (manifest.size_bytes, manifest.chunk_bytes) == (since.size_bytes, since.chunk_bytes) {
        return Ok(());
    }
    Err(OtherGeometry {
        name: manifest.name.clone(),
        since: since.name.clone(),
        size_bytes: manifest.size_bytes,
        chunk_bytes: manifest.chunk_bytes,
        since_size_bytes: since.size_bytes,
        since_chunk_bytes: since.chunk_bytes,
    })
}

fn hex<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&digest_text(digest))
}

fn hex_or_null<S: Serializer>(digest: &Option<[u8; 32]>, serializer: S) -> Result<S::Ok, S::Error> {
    match digest {
        Some(digest) => hex(digest, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::{ChunkEntry, Encoding, SnapshotInfo, pack_key};

    const CHUNK: u32 = 64 << 10;

    /// A snapshot whose block `i` is zero where `contents[i]` is 0, and else named by that number.
    fn snapshot(name: &str, contents: &[u8], size_bytes: u64) -> Manifest {
        let entry = |content: &u8| match content {
            0 => ChunkEntry::Zero,
            n => ChunkEntry::Stored { pack: 0, offset: 32, stored_len: 9, encoding: Encoding::Zstd, digest: [*n; 32] },
        };
        let info = SnapshotInfo {
            id: 5,
            name: name.to_owned(),
            size_bytes,
            chunk_bytes: CHUNK,
            parent: None,
            created_unix_ms: 0,
        };
        Manifest::new(info, vec![pack_key(5, 0)], &contents.iter().map(entry).collect::<Vec<_>>()).unwrap()
    }

    fn of(contents: &[u8]) -> Manifest {
        snapshot("a", contents, contents.len() as u64 * u64::from(CHUNK) - 512)
    }

    /// All pages of a list, joined.
    fn joined<T: Indexed>(mut page_from: impl FnMut(u32) -> Page<T>, max: usize) -> Vec<T> {
        let (mut all, mut starting) = (Vec::new(), Some(0));
        while let Some(from) = starting {
            let Page { items, next } = page_from(from);
            assert!(items.len() == max || next.is_none(), "only the last page is not full");
            all.extend(items);
            starting = next;
        }
        all
    }

    proptest! {
        #[test]
        fn pages_of_any_size_make_up_the_list(
            pair in prop::collection::vec((0u8..4, 0u8..4), 1..60),
            max in 1usize..70,
        ) {
            let (new, old): (Vec<u8>, Vec<u8>) = pair.into_iter().unzip();
            let (a, b) = (of(&new), of(&old));
            let whole: Vec<Block> = blocks(&a, 0).collect();
            prop_assert_eq!(joined(|from| page(blocks(&a, from), max), max), whole.clone());
            prop_assert_eq!(whole.len(), new.iter().filter(|content| **content != 0).count());

            let whole: Vec<Change> = changes(&a, &b, 0).unwrap().collect();
            prop_assert_eq!(joined(|from| page(changes(&a, &b, from).unwrap(), max), max), whole.clone());
            for index in 0..a.chunk_count() {
                let change = whole.iter().find(|change| change.index == index);
                let (now, then) = (new[index as usize], old[index as usize]);
                prop_assert_eq!(change.is_some(), now != then);
                if let Some(change) = change {
                    prop_assert_eq!(change.digest.is_some(), now != 0);
                    prop_assert_eq!(change.since_digest.is_some(), then != 0);
                    prop_assert_eq!(change.len, a.chunk_len(index));
                }
            }
        }
    }

    #[test]
    fn a_list_may_begin_past_the_end() {
        let a = of(&[1, 1]);
        assert_eq!(page(blocks(&a, 2), 10), Page { items: Vec::new(), next: None });
        assert_eq!(page(blocks(&a, u32::MAX), 10), Page { items: Vec::new(), next: None });
    }

    #[test]
    fn devices_of_other_sizes_are_not_compared() {
        let (a, b) = (of(&[1, 2]), of(&[1, 2, 3]));
        let text = changes(&a, &b, 0).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("130560 bytes in blocks of 65536, and 196096"), "{text}");
    }

    #[test]
    fn answers_say_which_side_has_data() {
        let change = changes(&of(&[0, 2]), &of(&[1, 2]), 0).unwrap().next().unwrap();
        let json = serde_json::to_value(change).unwrap();
        let digest = "01".repeat(32);
        assert_eq!(json, serde_json::json!({"index": 0, "length": 65536, "digest": null, "since_digest": digest}));
    }
}
