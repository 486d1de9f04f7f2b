//! What the benchmarks share: inputs, figures, processes. The same seed gives the same bytes, so that runs can be compared.

pub mod cases;
pub mod figure;
pub mod fio;
pub mod instructions;
pub mod mix;
pub mod mount;
pub mod origin;
pub mod policies;
pub mod process;
pub mod profile;
pub mod site;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use volley_tools::load::trace::Event;

/// Writes an image of so many MiB that shrink to about a half, the same for the same seed.
///
/// # Errors
/// When it can't be written.
pub fn full_image(path: &Path, mib: u32, seed: u64) -> Result<(), String> {
    let say = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = std::fs::File::create(path).map_err(say)?;
    for mib in 0..u64::from(mib) {
        file.write_all(&compressible(seed + mib, 1 << 20)).map_err(say)?;
    }
    file.sync_all().map_err(say)
}

/// The words of `volley` that make many sparse volumes by one request.
#[must_use]
pub fn creation<'a>(snapshot: &'a str, prefix: &'a str, count: &'a str) -> Vec<&'a str> {
    let sparse = ["volume", "create", "--overcommit", "unlimited"];
    let named = ["--snapshot", snapshot, "--name-prefix", prefix, "--count", count];
    [&sparse[..], &named].concat()
}

/// A recorded boot of Debian 12: every read, write and flush of its disk.
pub const BOOT_TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/data/boot-trace-debian12.csv");
/// The device that the trace was recorded on.
pub const IMAGE_BYTES: u64 = 2 << 30;
/// Bytes of a chunk, as images are imported.
pub const CHUNK_BYTES: u64 = 512 << 10;
/// What is in the image beside the chunks that the boot reads, so that it is as full as the real one.
const OTHER_DATA_CHUNKS: u64 = 600;

/// Writes an image for a recorded boot: data where it reads and in some chunks more, holes elsewhere.
///
/// # Errors
/// When it can't be written.
pub fn boot_image(path: &Path, reads: &[Event]) -> Result<(), String> {
    let said = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = std::fs::File::create(path).map_err(said)?;
    file.set_len(IMAGE_BYTES).map_err(said)?;
    let mut chunks: BTreeSet<u64> = reads.iter().flat_map(|read| read.chunks(CHUNK_BYTES)).collect();
    chunks.extend((0..OTHER_DATA_CHUNKS).map(|n| n * (IMAGE_BYTES / CHUNK_BYTES) / OTHER_DATA_CHUNKS));
    for chunk in chunks {
        let data = compressible(chunk + 1, CHUNK_BYTES as usize);
        file.write_all_at(&data, chunk * CHUNK_BYTES).map_err(said)?;
    }
    file.sync_all().map_err(said)
}

/// Bytes that no compressor shrinks.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that shrink to about a half, as much of a file system with programs does.
#[must_use]
pub fn compressible(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(seed, len);
    for block in bytes.chunks_mut(64) {
        let half = block.len() / 2;
        block[half..].fill(0x20);
    }
    bytes
}
