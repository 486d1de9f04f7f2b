//! The manifest of a snapshot (docs/snapshot.md), as an object store may hand it out.

use volley_server::snapshot::manifest::{HEADER_BYTES, Manifest, ManifestError};
use volley_server::snapshot::{ChunkEntry, Encoding, PACK_BYTES_MAX, SnapshotInfo, pack_key, parse_pack_key};

use super::assert_one_line;
use super::measure::within;

/// The manifest itself, its encoding twice, and room for vectors to grow.
const MEMORY_PER_BYTE: usize = 16;

/// Any bytes, as they are and with their length and checksum repaired.
pub fn run(input: &[u8]) {
    within((64 << 10) + MEMORY_PER_BYTE * input.len(), || {
        check(input);
        check(&sealed(input));
    });
}

fn sealed(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    if let Some((head, body)) = bytes.split_first_chunk_mut::<HEADER_BYTES>() {
        head[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
        head[32..].copy_from_slice(blake3::hash(body).as_bytes());
    }
    bytes
}

fn check(bytes: &[u8]) {
    let manifest = match Manifest::decode(bytes) {
        Ok(manifest) => manifest,
        Err(error) => return check_error(bytes, &error),
    };
    assert_eq!(&bytes[32..HEADER_BYTES], blake3::hash(&bytes[HEADER_BYTES..]).as_bytes(), "a bad checksum is accepted");
    // rkyv lets one value be laid out in several ways: what we write is the shortest, and stays as it is.
    let encoded = manifest.encode();
    assert!(encoded.len() <= bytes.len(), "{} bytes became {}", bytes.len(), encoded.len());
    let again = Manifest::decode(&encoded).expect("what was encoded is decoded");
    assert_eq!(again, manifest);
    assert_eq!(again.encode(), encoded);
    let mut device_bytes = 0;
    for index in 0..manifest.chunk_count() {
        let len = manifest.chunk_len(index);
        assert!(len > 0 && len <= manifest.chunk_bytes);
        device_bytes += u64::from(len);
        let ChunkEntry::Stored { pack, offset, stored_len, encoding, .. } = manifest.chunk(index) else { continue };
        assert!(parse_pack_key(manifest.pack_key(pack)).is_some());
        assert!(offset >= 32 && offset + u64::from(stored_len) <= PACK_BYTES_MAX);
        match encoding {
            Encoding::Raw => assert_eq!(stored_len, len),
            Encoding::Zstd => assert!(stored_len > 0 && stored_len < len),
        }
    }
    assert_eq!(device_bytes, manifest.size_bytes, "the chunks are the device");
}

fn check_error(bytes: &[u8], error: &ManifestError) {
    assert_one_line(&error.to_string(), 1024 + 8 * bytes.len());
    match error {
        ManifestError::Magic => assert!(!bytes.starts_with(b"VLYMANIF")),
        ManifestError::FutureVersion(version) => assert_ne!(*version, 1),
        ManifestError::Length { expected, found } => {
            assert!(*found == bytes.len() as u64 && expected != found);
        }
        ManifestError::Checksum | ManifestError::Malformed(_) | ManifestError::Invalid(_) => {}
    }
}

/// Manifests with every kind of entry, and of every kind of device.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let zstd =
        |pack, offset| ChunkEntry::Stored { pack, offset, stored_len: 1000, encoding: Encoding::Zstd, digest: [3; 32] };
    let raw =
        |len| ChunkEntry::Stored { pack: 0, offset: 32, stored_len: len, encoding: Encoding::Raw, digest: [4; 32] };
    let chunk = 64 << 10;
    let manifest = |name: &str, size_bytes, parent: Option<&str>, packs: u32, chunks: &[ChunkEntry]| {
        let info = SnapshotInfo {
            id: 0xabcd << 80 | 1,
            name: name.to_owned(),
            size_bytes,
            chunk_bytes: chunk,
            parent: parent.map(str::to_owned),
            created_unix_ms: 1_700_000_000_000,
        };
        let packs = (0..packs).map(|number| pack_key(7, number)).collect();
        Manifest::new(info, packs, chunks).expect("a sound manifest").encode()
    };
    let size = u64::from(chunk);
    vec![
        ("zero".into(), manifest("z", 512, None, 0, &[ChunkEntry::Zero])),
        ("raw".into(), manifest("debian-12", size, None, 1, &[raw(chunk)])),
        ("raw-short".into(), manifest("debian-12", size + 512, None, 1, &[raw(chunk), raw(512)])),
        ("zstd".into(), manifest("debian-12", size, None, 1, &[zstd(0, 32)])),
        (
            "mixed".into(),
            manifest(
                "a-name-of-many-bytes",
                4 * size,
                Some("debian-12-base"),
                3,
                &[ChunkEntry::Zero, zstd(2, 40), raw(chunk), zstd(1, PACK_BYTES_MAX - 1000)],
            ),
        ),
        ("shared".into(), manifest("twice", 2 * size, Some("p"), 1, &[zstd(0, 32), zstd(0, 32)])),
    ]
}
