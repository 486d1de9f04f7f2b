//! What the benchmarks share: inputs, figures, processes. The same seed gives the same bytes, so that runs can be compared.

pub mod figure;
pub mod mix;
pub mod origin;
pub mod policies;
pub mod process;

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
