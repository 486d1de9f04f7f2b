//! Memory that direct I/O can take as it is, from whatever thread it comes.

use std::fmt;
use std::ops::{Deref, DerefMut};

use rkyv::util::AlignedVec;
use zstd::zstd_safe::WriteBuf;

/// Bytes aligned to 4096, made once and then shared: a chunk in the cache is written into volumes from where it is.
#[derive(Default)]
pub struct AlignedBytes(AlignedVec<4096>);

impl AlignedBytes {
    #[must_use]
    pub fn with_capacity(bytes: usize) -> AlignedBytes {
        AlignedBytes(AlignedVec::with_capacity(bytes))
    }

    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Cuts the end off, or appends zeroes.
    pub fn resize(&mut self, len: usize) {
        self.0.resize(len, 0);
    }
}

// SAFETY: as for `Vec<u8>`: the bytes up to the length are initialized, the memory up to the capacity is ours.
unsafe impl WriteBuf for AlignedBytes {
    fn as_slice(&self) -> &[u8] {
        &self.0
    }

    fn capacity(&self) -> usize {
        self.0.capacity()
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    unsafe fn filled_until(&mut self, n: usize) {
        // SAFETY: the caller has written the first `n` bytes, which are within the capacity.
        unsafe { self.0.set_len(n) };
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl From<&[u8]> for AlignedBytes {
    fn from(bytes: &[u8]) -> AlignedBytes {
        let mut aligned = AlignedBytes::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        aligned
    }
}

impl PartialEq for AlignedBytes {
    fn eq(&self, other: &AlignedBytes) -> bool {
        **self == **other
    }
}

impl Eq for AlignedBytes {}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::AlignedBytes;

    #[test]
    fn bytes_are_aligned_however_they_come_in() {
        let packed = zstd::bulk::compress(&[7; 5000], 3).unwrap();
        let mut decompressor = zstd::bulk::Decompressor::new().unwrap();
        let mut bytes = AlignedBytes::with_capacity(5000);
        assert_eq!(decompressor.decompress_to_buffer(&packed, &mut bytes).unwrap(), 5000);
        assert_eq!(*bytes, [7; 5000]);
        bytes.extend_from_slice(&[8; 5000]);
        bytes.resize(11000);
        assert_eq!(*bytes, *[vec![7; 5000], vec![8; 5000], vec![0; 1000]].concat());
        assert!(bytes.as_ptr().addr().is_multiple_of(4096));
        let mut short = AlignedBytes::with_capacity(4999);
        assert!(decompressor.decompress_to_buffer(&packed, &mut short).is_err(), "it has no place for more");
        assert!(short.is_empty() && AlignedBytes::from(&bytes[..]) == bytes);
    }
}
