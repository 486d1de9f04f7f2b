//! Snapshots: the immutable content of a block device in the object store, as one manifest and packs of chunks.
//!
//! This module owns the two object formats (`docs/snapshot.md` is their other half), the object keys, and the coding
//! of a single chunk: plain synchronous code without I/O. Objects come and go, through the seam, by [`catalog`] (find, load),
//! [`claim`] (make), [`deletion`] and [`gc`].

pub mod catalog;
pub mod chunk;
pub mod claim;
mod decoder;
pub mod deletion;
pub mod diff;
pub mod draft;
pub mod gc;
pub mod manifest;
pub mod marker;
pub mod merkle;
pub mod pack;
pub mod read;
pub mod sectors;

pub use catalog::CatalogError;
pub use chunk::{CorruptChunk, EncodedChunk, Encoding, decode_chunk, encode_chunk, is_zero};
pub use decoder::{ChunkDecoder, Step};
pub use manifest::{ChunkEntry, Manifest, ManifestError, SnapshotInfo};
pub use pack::{PACK_BYTES_MAX, PackBuilder, PackError, PackIndex, PackedChunk};

pub const MANIFEST_PREFIX: &str = "snapshots/";
pub const PACK_PREFIX: &str = "packs/";
pub const IMPORT_PREFIX: &str = "imports/";
pub const REFERENCE_PREFIX: &str = "refs/";

/// Key of the manifest whose existence makes the snapshot exist.
#[must_use]
pub fn manifest_key(name: &str) -> String {
    format!("{MANIFEST_PREFIX}{name}")
}

/// Key of the `number`th pack of the import (or snapshot) `id`.
#[must_use]
pub fn pack_key(id: u128, number: u32) -> String {
    format!("{}{number:06}", pack_prefix(id))
}

/// Prefix of all packs written by the import `id`.
#[must_use]
pub fn pack_prefix(id: u128) -> String {
    format!("{PACK_PREFIX}{id:032x}/")
}

/// Import id and number of a pack key, or `None` if it isn't one.
#[must_use]
pub fn parse_pack_key(key: &str) -> Option<(u128, u32)> {
    let (id, number) = key.strip_prefix(PACK_PREFIX)?.split_once('/')?;
    let parsed = (u128::from_str_radix(id, 16).ok()?, number.parse().ok()?);
    // Only the canonical spelling: `+1`, upper case or a missing zero would make two keys of one pack.
    (pack_key(parsed.0, parsed.1) == key).then_some(parsed)
}

/// Key of the marker of an import in progress.
#[must_use]
pub fn import_key(name: &str) -> String {
    format!("{IMPORT_PREFIX}{name}")
}

/// Prefix of the references that nodes hold on a snapshot while a volume of theirs still needs it.
#[must_use]
pub fn reference_prefix(name: &str) -> String {
    format!("{REFERENCE_PREFIX}{name}/")
}

/// Key of the reference of the node `node_id` on the snapshot `name`.
#[must_use]
pub fn reference_key(name: &str, node_id: &str) -> String {
    format!("{}{node_id}", reference_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::{pack_key, parse_pack_key};

    #[test]
    fn pack_keys_have_one_spelling() {
        let key = pack_key(0xabc, 7);
        assert_eq!(key, "packs/00000000000000000000000000000abc/000007");
        assert_eq!(parse_pack_key(&key), Some((0xabc, 7)));
        assert_eq!(parse_pack_key(&pack_key(u128::MAX, u32::MAX)), Some((u128::MAX, u32::MAX)));
        for bad in ["packs/abc/000007", "packs/00000000000000000000000000000ABC/000007", "packs/1", "snapshots/a/1", ""]
        {
            assert_eq!(parse_pack_key(bad), None, "{bad}");
        }
        assert_eq!(parse_pack_key("packs/00000000000000000000000000000abc/+00007"), None);
    }
}
