//! Disk images for tests: made of what importers treat differently, and different in every sector.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// The default chunk of a snapshot.
pub(crate) const CHUNK: u64 = 512 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// Writes an image of `size` bytes, whose chunks in turn are noise, text, zeroes, and a repetition of the first chunk.
/// The same `seed` gives the same bytes.
pub(crate) fn write_image(path: &Path, size: u64, seed: u64) {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).expect("create the image"));
    let mut left = size;
    for chunk in 0.. {
        let len = left.min(CHUNK);
        if len == 0 {
            break;
        }
        match chunk % 5 {
            2 => {
                file.seek_relative(i64::try_from(len).expect("chunk")).expect("seek");
            }
            4 => file.write_all(&noise(seed, len)).expect("write"),
            1 => file.write_all(&text(seed ^ chunk, len)).expect("write"),
            _ => file.write_all(&noise(seed ^ (chunk << 8), len)).expect("write"),
        }
        left -= len;
    }
    let file = file.into_inner().expect("flush the image");
    file.set_len(size).expect("set the length");
}

/// Bytes that no compressor shrinks.
pub(crate) fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(usize::try_from(len).expect("length") + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(len).expect("length"));
    bytes
}

/// Bytes that every compressor shrinks, different in every sector.
fn text(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in 0.. {
        if bytes.len() as u64 >= len {
            break;
        }
        writeln!(bytes, "line {line} of the text with seed {seed:016x}").expect("write to memory");
    }
    bytes.truncate(usize::try_from(len).expect("length"));
    bytes
}

/// Asserts that two files hold the same bytes, and says where they first differ.
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let (mut left, mut right) = (File::open(a).expect("open"), File::open(b).expect("open"));
    let (left_len, right_len) = (left.metadata().expect("size").len(), right.metadata().expect("size").len());
    assert_eq!(left_len, right_len, "sizes of {} and {}", a.display(), b.display());
    assert_same_range(&mut left, &mut right, left_len);
}

/// Asserts that `b` holds the bytes of `a`, then only zeroes.
pub(crate) fn assert_same_padded(a: &Path, b: &Path) {
    let (mut left, mut right) = (File::open(a).expect("open"), File::open(b).expect("open"));
    let len = left.metadata().expect("size").len();
    assert_same_range(&mut left, &mut right, len);
    let mut rest = Vec::new();
    right.seek(SeekFrom::Start(len)).expect("seek");
    right.read_to_end(&mut rest).expect("read");
    assert!(rest.iter().all(|&b| b == 0), "padding of {} is not zero", b.display());
}

fn assert_same_range(left: &mut File, right: &mut File, len: u64) {
    let mut at = 0;
    while at < len {
        let n = usize::try_from((len - at).min(MIB)).expect("length");
        let (mut a, mut b) = (vec![0; n], vec![0; n]);
        left.read_exact(&mut a).expect("read");
        right.read_exact(&mut b).expect("read");
        if a != b {
            let first = a.iter().zip(&b).position(|(x, y)| x != y).expect("differs");
            panic!("files differ at byte {}", at + first as u64);
        }
        at += n as u64;
    }
}
