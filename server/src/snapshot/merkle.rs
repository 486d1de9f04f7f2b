//! The Merkle root of a snapshot: 32 bytes that stand for its whole content, wherever its chunks are stored.
//!
//! Two snapshots have the same root exactly if devices and chunks have the same sizes and the same bytes (`docs/snapshot.md`,
//! "Merkle root"). Names, packs, compression and time do not count, so an import of the same image anywhere has the same
//! root, and a rewrite of packs keeps it.

use super::Manifest;

const LEAF_DATA: u8 = 0;
const LEAF_ZERO: u8 = 1;
const INNER: u8 = 2;
const ROOT: u8 = 3;
const DOMAIN: &[u8; 24] = b"volley snapshot merkle 1";

/// The Merkle root of the snapshot.
#[must_use]
pub fn root(manifest: &Manifest) -> [u8; 32] {
    let leaves = (0..manifest.chunk_count()).map(|index| manifest.digest(index));
    root_of(manifest.size_bytes, manifest.chunk_bytes, leaves)
}

/// The root over one digest for each chunk, `None` for a chunk of zeroes. There is at least one chunk.
fn root_of(size_bytes: u64, chunk_bytes: u32, leaves: impl Iterator<Item = Option<[u8; 32]>>) -> [u8; 32] {
    // Perfect subtrees from left to right, each smaller than the one before, with the number of their leaves.
    let mut subtrees: Vec<(u64, [u8; 32])> = Vec::new();
    for digest in leaves {
        let mut whole = (1, leaf(digest));
        while let Some((leaves, left)) = subtrees.pop_if(|(leaves, _)| *leaves == whole.0) {
            whole = (leaves * 2, inner(&left, &whole.1));
        }
        subtrees.push(whole);
    }
    let top = subtrees.into_iter().rev().map(|(_, hash)| hash).reduce(|right, left| inner(&left, &right));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[ROOT]).update(DOMAIN);
    hasher.update(&size_bytes.to_le_bytes()).update(&chunk_bytes.to_le_bytes());
    hasher.update(&top.expect("a device has at least one chunk"));
    *hasher.finalize().as_bytes()
}

fn leaf(digest: Option<[u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    match digest {
        Some(digest) => hasher.update(&[LEAF_DATA]).update(&digest),
        None => hasher.update(&[LEAF_ZERO]),
    };
    *hasher.finalize().as_bytes()
}

fn inner(left: &[u8; 32], right: &[u8; 32]) -> [u8; 32] {
    *blake3::Hasher::new().update(&[INNER]).update(left).update(right).finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Leaf = Option<[u8; 32]>;

    /// The definition of the document, word by word: the left subtree has the largest power of two of leaves below all.
    fn top(leaves: &[Leaf]) -> [u8; 32] {
        match leaves {
            [only] => leaf(*only),
            _ => {
                let left = leaves.len().next_power_of_two() / 2;
                inner(&top(&leaves[..left]), &top(&leaves[left..]))
            }
        }
    }

    fn by_definition(size: u64, chunk: u32, leaves: &[Leaf]) -> [u8; 32] {
        let mut bytes = vec![ROOT];
        bytes.extend_from_slice(b"volley snapshot merkle 1");
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&chunk.to_le_bytes());
        bytes.extend_from_slice(&top(leaves));
        *blake3::hash(&bytes).as_bytes()
    }

    fn leaves() -> impl Strategy<Value = Vec<Leaf>> {
        prop::collection::vec(prop::option::of(any::<[u8; 32]>()), 1..70)
    }

    proptest! {
        #[test]
        fn the_root_is_the_defined_one(leaves in leaves(), size: u64, chunk: u32) {
            prop_assert_eq!(root_of(size, chunk, leaves.iter().copied()), by_definition(size, chunk, &leaves));
        }

        #[test]
        fn any_change_changes_the_root(leaves in leaves(), at: prop::sample::Index, bit in 0usize..256, size: u64) {
            let root = root_of(size, 65536, leaves.iter().copied());
            let (at, mut other) = (at.index(leaves.len()), leaves.clone());
            other[at] = match leaves[at] {
                Some(mut digest) => { digest[bit / 8] ^= 1 << (bit % 8); Some(digest) }
                None => Some([0; 32]),
            };
            prop_assert_ne!(root, root_of(size, 65536, other.iter().copied()));
            other[at] = if leaves[at].is_some() { None } else { Some([1; 32]) };
            prop_assert_ne!(root, root_of(size, 65536, other.iter().copied()));
            let longer = leaves.iter().copied().chain([None]);
            prop_assert_ne!(root, root_of(size, 65536, longer));
            prop_assert_ne!(root, root_of(size ^ 1 << (bit % 64), 65536, leaves.iter().copied()));
            prop_assert_ne!(root, root_of(size, 1 << (17 + bit % 6), leaves.iter().copied()));
        }

        #[test]
        fn two_unequal_chunks_cannot_change_places(leaves in leaves(), a: prop::sample::Index, b: prop::sample::Index) {
            let (a, b) = (a.index(leaves.len()), b.index(leaves.len()));
            let mut other = leaves.clone();
            other.swap(a, b);
            let same = leaves[a] == leaves[b];
            prop_assert_eq!(same, root_of(1, 1, leaves.into_iter()) == root_of(1, 1, other.into_iter()));
        }
    }

    /// Frozen: what was printed once must be computed for ever. The value is of another implementation.
    #[test]
    fn the_root_of_known_leaves_is_known() {
        let root = root_of(3 << 19, 1 << 19, [Some(*blake3::hash(b"a").as_bytes()), None, Some([7; 32])].into_iter());
        let known = "3bd92ca2a8a43094b564b447434ea0f58cf683036171ec0eaad29d170682a9ed";
        assert_eq!(blake3::Hash::from_bytes(root).to_hex().as_str(), known);
    }
}
