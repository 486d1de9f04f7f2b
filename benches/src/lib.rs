//! What the benchmarks share: inputs, figures, processes. The same seed gives the same bytes, so that runs can be compared.

pub mod figure;
pub mod fio;
pub mod mix;
pub mod origin;
pub mod policies;
pub mod process;

use std::io::Write;
use std::path::Path;

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
