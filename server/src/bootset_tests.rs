//! What boots teach a set, its bounds, and its bytes.

use proptest::prelude::*;

use super::{BadBootSet, BootSet, CHUNKS_MAX, Learned};
use crate::snapshot::{ChunkEntry, Encoding, Manifest, SnapshotInfo};
use crate::transfer::Digest;

fn digest(number: u32) -> Digest {
    let mut digest = [0; 32];
    digest[..4].copy_from_slice(&number.to_be_bytes());
    digest
}

fn digests(numbers: impl IntoIterator<Item = u32>) -> Vec<Digest> {
    numbers.into_iter().map(digest).collect()
}

/// An image whose chunks have these digests; `None` is a zero chunk.
fn image(chunks: &[Option<u32>]) -> Manifest {
    let entry = |(index, number): (usize, &Option<u32>)| match number {
        Some(number) => {
            let offset = 32 + index as u64 * 1000;
            ChunkEntry::Stored { pack: 0, offset, stored_len: 1000, encoding: Encoding::Zstd, digest: digest(*number) }
        }
        None => ChunkEntry::Zero,
    };
    let entries: Vec<ChunkEntry> = chunks.iter().enumerate().map(entry).collect();
    let info = SnapshotInfo {
        id: 7,
        name: "image".to_owned(),
        size_bytes: chunks.len() as u64 * 65536,
        chunk_bytes: 65536,
        parent: None,
        created_unix_ms: 1,
    };
    Manifest::new(info, vec![crate::snapshot::pack_key(1, 0)], &entries).expect("a manifest")
}

#[test]
fn the_first_boot_makes_the_set_in_its_order_and_places_are_found_in_the_image() {
    let mut set = BootSet::default();
    let learned = set.learn(&digests([5, 1, 9, 1, 3]));
    assert_eq!((learned, set.len(), set.boots()), (Learned { hits: 0, wasted: 0, new: 4 }, 4, 1));
    let image = image(&[Some(1), None, Some(3), Some(5), Some(5), Some(77), Some(9)]);
    assert_eq!(set.chunks_of(&image), [3, 0, 6, 2], "5, 1, 9, 3; of the two chunks 5 the first");
}

#[test]
fn what_boots_stop_touching_leaves_and_what_they_begin_to_touch_comes() {
    let mut set = BootSet::default();
    set.learn(&digests(0..10));
    let learned = set.learn(&digests([0, 1, 2, 20]));
    assert_eq!(learned, Learned { hits: 3, wasted: 7, new: 1 });
    assert_eq!(set.len(), 11, "one boot without a touch forgets nothing, one with a touch is enough to begin with");
    for _ in 0..4 {
        set.learn(&digests([0, 1, 2]));
    }
    assert_eq!(set.len(), 3, "the seven that five boots left out are gone, and so is what only one touched");
}

#[test]
fn an_image_without_a_set_inherits_the_chunks_it_shares() {
    let (mut one, mut other) = (BootSet::default(), BootSet::default());
    one.learn(&digests([1, 2, 3]));
    other.learn(&digests([9, 2]));
    other.learn(&digests([9]));
    let set = BootSet::inherit([&one, &other]);
    assert_eq!((set.len(), set.boots()), (4, 0));
    let new_version = image(&[Some(3), Some(50), Some(2), Some(9)]);
    let mut chunks = set.chunks_of(&new_version);
    chunks.sort_unstable();
    assert_eq!(chunks, [0, 2, 3], "all but the changed one");
    assert!(BootSet::inherit([]).is_empty());
}

#[test]
fn a_set_is_capped_and_keeps_what_most_boots_touch() {
    let mut set = BootSet::default();
    set.learn(&digests(0..CHUNKS_MAX as u32));
    set.learn(&digests((0..10).chain(100_000..100_100)));
    assert_eq!(set.len(), CHUNKS_MAX);
    let kept = set.chunks_of(&image(&(0..10).map(Some).collect::<Vec<_>>()));
    assert_eq!(kept.len(), 10, "what every boot touches stays");
    assert!(set.chunks_of(&image(&[Some(100_000)])).is_empty(), "what is new and rare goes first");
}

#[test]
fn the_bytes_are_those_of_the_document() {
    let mut set = BootSet::default();
    set.learn(&digests([3]));
    let bytes = set.encode();
    assert_eq!(bytes.len(), 24 + 40);
    assert_eq!(&bytes[..8], b"VLYBOOT1");
    assert_eq!((&bytes[8..12], &bytes[12..16], &bytes[20..24]), (&[1, 0, 0, 0][..], &[1, 0, 0, 0][..], &[0; 4][..]));
    assert_eq!(bytes[24..56], digest(3));
    assert_eq!((&bytes[56..60], &bytes[60..64]), (&1.0_f32.to_le_bytes()[..], &0.0_f32.to_le_bytes()[..]));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(BootSet::decode(&bad).is_err(), "byte {at}");
        assert!(BootSet::decode(&bytes[..at]).is_err(), "{at} bytes");
    }
    assert_eq!(BootSet::decode(b"<html>not found, sorry</html>"), Err(BadBootSet::Magic));
}

proptest! {
    #[test]
    fn any_history_stays_in_bounds_and_survives_its_bytes(
        boots in prop::collection::vec(prop::collection::vec(0_u32..60, 1..40), 1..12)
    ) {
        let mut set = BootSet::default();
        for boot in &boots {
            let before = set.len() as u64;
            let learned = set.learn(&digests(boot.iter().copied()));
            prop_assert_eq!(learned.hits + learned.wasted, before);
            let last: std::collections::HashSet<u32> = boot.iter().copied().collect();
            prop_assert_eq!(learned.hits + learned.new, last.len() as u64);
            let touched = image(&last.iter().copied().map(Some).collect::<Vec<_>>());
            prop_assert_eq!(set.chunks_of(&touched).len(), last.len(), "what the last boot touched is there");
        }
        prop_assert_eq!(set.boots() as usize, boots.len());
        prop_assert_eq!(BootSet::decode(&set.encode()), Ok(set));
    }
}
