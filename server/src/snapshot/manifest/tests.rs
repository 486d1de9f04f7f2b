//! Tests of the manifest: round trips, every kind of damage, every contradiction.

use proptest::prelude::*;

use super::*;
use crate::snapshot::pack_key;

const CHUNK: u32 = 64 << 10;

fn info(size_bytes: u64) -> SnapshotInfo {
    SnapshotInfo {
        id: 0x1234,
        name: "debian-12".to_owned(),
        size_bytes,
        chunk_bytes: CHUNK,
        parent: None,
        created_unix_ms: 1_700_000_000_000,
    }
}

fn stored(pack: u32, offset: u64, stored_len: u32, encoding: Encoding) -> ChunkEntry {
    ChunkEntry::Stored { pack, offset, stored_len, encoding, digest: [0xd1; 32] }
}

fn small() -> Manifest {
    let chunks = [stored(0, 32, 100, Encoding::Zstd), ChunkEntry::Zero, stored(1, 4096, 512, Encoding::Raw)];
    Manifest::new(info(2 * u64::from(CHUNK) + 512), vec![pack_key(1, 0), pack_key(0x1234, 7)], &chunks).unwrap()
}

prop_compose! {
    fn any_manifest()(
        id in any::<u128>(),
        name in "[a-z][a-z0-9._-]{0,20}",
        parent in prop::option::of("[a-z][a-z0-9]{0,9}"),
        shift in 16u32..=22,
        last_blocks in 1u64..=128,
        packs in prop::collection::vec((any::<u128>(), any::<u32>()), 1..5),
        seeds in prop::collection::vec((any::<u32>(), any::<u32>(), any::<[u8; 32]>(), 0u8..3), 1..40),
        created_unix_ms in any::<u64>(),
    ) -> Manifest {
        let chunk_bytes = 1u32 << shift;
        let size_bytes = (seeds.len() as u64 - 1) * u64::from(chunk_bytes) + last_blocks * 512;
        let chunks: Vec<_> = seeds.iter().enumerate().map(|(i, (a, b, digest, kind))| {
            let len = chunk_len(size_bytes, chunk_bytes, i as u32);
            let (stored_len, encoding) = match kind {
                0 => return ChunkEntry::Zero,
                1 => (len, Encoding::Raw),
                _ => (1 + b % (len - 1), Encoding::Zstd),
            };
            let offset = 32 + u64::from(*b) % (PACK_BYTES_MAX - 32 - u64::from(stored_len));
            ChunkEntry::Stored { pack: a % packs.len() as u32, offset, stored_len, encoding, digest: *digest }
        }).collect();
        let packs = packs.into_iter().map(|(id, n)| pack_key(id, n)).collect();
        let info = SnapshotInfo { id, name, size_bytes, chunk_bytes, parent, created_unix_ms };
        Manifest::new(info, packs, &chunks).unwrap()
    }
}

proptest! {
    #[test]
    fn round_trips(manifest in any_manifest()) {
        let decoded = Manifest::decode(&manifest.encode()).unwrap();
        let total: u64 = (0..decoded.chunk_count()).map(|i| u64::from(decoded.chunk_len(i))).sum();
        prop_assert_eq!(total, manifest.size_bytes);
        prop_assert_eq!(decoded, manifest);
    }

    /// With a right checksum around it, arbitrary damage of the body must still end in an error or a valid manifest.
    #[test]
    fn damaged_bodies_with_a_right_checksum_never_panic(
        manifest in any_manifest(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = manifest.encode();
        for (at, value) in flips {
            let at = HEADER_BYTES + at.index(bytes.len() - HEADER_BYTES);
            bytes[at] = value;
        }
        reseal(&mut bytes);
        if let Ok(decoded) = Manifest::decode(&bytes) {
            decoded.check().unwrap();
        }
    }
}

fn reseal(bytes: &mut [u8]) {
    let digest = blake3::hash(&bytes[HEADER_BYTES..]);
    bytes[BODY_DIGEST_AT..HEADER_BYTES].copy_from_slice(digest.as_bytes());
}

#[test]
fn every_damaged_byte_and_every_truncation_is_refused() {
    let bytes = small().encode();
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            assert!(Manifest::decode(&bad).is_err(), "byte {at}");
        }
        assert!(Manifest::decode(&bytes[..at]).is_err(), "length {at}");
        let mut resealed = bytes.clone();
        resealed[at] ^= 0x21;
        reseal(&mut resealed);
        let _ = Manifest::decode(&resealed);
    }
    let trailing = [bytes, vec![0]].concat();
    assert!(matches!(Manifest::decode(&trailing), Err(ManifestError::Length { .. })));
    assert_eq!(Manifest::decode(b"QFI\xfb"), Err(ManifestError::Magic));
    assert_eq!(Manifest::decode(&[0; 200]), Err(ManifestError::Magic));
}

#[test]
fn a_future_version_is_named() {
    let mut bytes = small().encode();
    bytes[VERSION_AT] = 9;
    let error = Manifest::decode(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "manifest has format version 9; this program reads version 1: upgrade it");
}

#[test]
fn accessors_give_back_what_was_put_in() {
    let manifest = Manifest::decode(&small().encode()).unwrap();
    assert_eq!(manifest.chunk_count(), 3);
    assert_eq!((manifest.chunk_len(0), manifest.chunk_len(2)), (CHUNK, 512));
    assert_eq!(manifest.chunk(0), stored(0, 32, 100, Encoding::Zstd));
    assert_eq!(manifest.chunk(1), ChunkEntry::Zero);
    assert_eq!(manifest.pack_key(1), pack_key(0x1234, 7));
}

#[test]
fn contradictions_are_refused() {
    let size = u64::from(CHUNK);
    let packs = || vec![pack_key(1, 0)];
    let refused = |info: SnapshotInfo, packs: Vec<String>, chunks: &[ChunkEntry], why: &str| {
        let error = Manifest::new(info, packs, chunks).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let zero = [ChunkEntry::Zero];
    refused(SnapshotInfo { name: "a/b".to_owned(), ..info(size) }, packs(), &zero, "name");
    refused(SnapshotInfo { parent: Some(String::new()), ..info(size) }, packs(), &zero, "parent");
    refused(SnapshotInfo { chunk_bytes: 65537, ..info(size) }, packs(), &zero, "chunk size");
    refused(SnapshotInfo { chunk_bytes: 8 << 20, ..info(size) }, packs(), &zero, "chunk size");
    refused(info(0), packs(), &[], "device size");
    refused(info(513), packs(), &zero, "device size");
    refused(info(u64::MAX - 511), packs(), &zero, "larger chunk size");
    refused(info(2 * size), packs(), &zero, "it lists 1 chunks, a device of this size has 2");
    refused(info(size), vec!["snapshots/x".to_owned()], &zero, "not the key of a pack");
    refused(info(size), packs(), &[stored(1, 32, CHUNK, Encoding::Raw)], "pack number 1 of 1");
    refused(info(size), packs(), &[stored(0, 31, CHUNK, Encoding::Raw)], "outside any pack");
    refused(info(size), packs(), &[stored(0, PACK_BYTES_MAX - 9, 10, Encoding::Zstd)], "outside any pack");
    refused(info(size), packs(), &[stored(0, u64::MAX, 10, Encoding::Zstd)], "outside any pack");
    refused(info(size), packs(), &[stored(0, 32, CHUNK - 1, Encoding::Raw)], "cannot be");
    refused(info(size), packs(), &[stored(0, 32, CHUNK, Encoding::Zstd)], "cannot be");
    refused(info(size), packs(), &[stored(0, 32, 0, Encoding::Zstd)], "impossible");
}
