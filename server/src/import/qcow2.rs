//! What is checked of a qcow2 file before `imago` reads it: encryption, features it can't honour, and truncation.
//!
//! imago reads past the end of a file as zeroes and ignores the encryption method, so that a truncated or an
//! encrypted image would be imported without a word.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION_AT: usize = 4;
const CLUSTER_BITS_AT: usize = 20;
const SIZE_AT: usize = 24;
const CRYPT_METHOD_AT: usize = 32;
const L1_ENTRIES_AT: usize = 36;
const L1_OFFSET_AT: usize = 40;
const SNAPSHOTS_AT: usize = 60;
const INCOMPATIBLE_AT: usize = 72;
const V2_HEADER_BYTES: usize = 72;
const V3_HEADER_BYTES: usize = 104;
/// Bits 9 to 55 of an L1 entry.
const L2_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// qemu's own limit: an L1 table of 32 MiB.
const L1_ENTRIES_MAX: u32 = (32 << 20) / 8;
/// Clusters have 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Incompatible features and what to do about each. All others are unknown.
const INCOMPATIBLE: [&str; 5] = [
    "it was not closed cleanly: repair it with 'qemu-img check -r all'",
    "it is marked corrupt: repair it with 'qemu-img check -r all'",
    "its data is in an external file: convert it with 'qemu-img convert -O qcow2'",
    "its clusters are compressed with zstd: convert it with 'qemu-img convert -O qcow2'",
    "it has extended L2 entries: convert it with 'qemu-img convert -O qcow2'",
];

/// What the header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Qcow2Facts {
    pub cluster_bytes: u64,
    pub internal_snapshots: u32,
}

/// Checks header and tables of a qcow2 file of `file_bytes` bytes.
pub(super) fn check(file: &File, file_bytes: u64) -> Result<Qcow2Facts, String> {
    let mut header = [0; V3_HEADER_BYTES];
    let got = read_up_to(file, &mut header).map_err(|e| e.to_string())?;
    if got < V2_HEADER_BYTES {
        return Err("it is truncated: the header is not whole".to_owned());
    }
    if header[..4] != MAGIC {
        return Err("it is not qcow2 (wrong magic)".to_owned());
    }
    let version = be32(&header, VERSION_AT);
    if !(2..=3).contains(&version) {
        return Err(format!("qcow2 version {version} is not supported: convert it with 'qemu-img convert -O qcow2'"));
    }
    match be32(&header, CRYPT_METHOD_AT) {
        0 => {}
        _ => return Err("it is encrypted: decrypt it with 'qemu-img convert' first".to_owned()),
    }
    if version == 3 {
        if got < V3_HEADER_BYTES {
            return Err("it is truncated: the header is not whole".to_owned());
        }
        check_features(be64(&header, INCOMPATIBLE_AT))?;
    }
    let cluster_bits = be32(&header, CLUSTER_BITS_AT);
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(format!("its header is corrupt: clusters of 2^{cluster_bits} bytes"));
    }
    let cluster_bytes = 1u64 << cluster_bits;
    let l1 = L1 { offset: be64(&header, L1_OFFSET_AT), entries: be32(&header, L1_ENTRIES_AT) };
    check_tables(file, file_bytes, cluster_bytes, be64(&header, SIZE_AT), l1)?;
    Ok(Qcow2Facts { cluster_bytes, internal_snapshots: be32(&header, SNAPSHOTS_AT) })
}

struct L1 {
    offset: u64,
    entries: u32,
}

fn check_features(bits: u64) -> Result<(), String> {
    match bits.trailing_zeros() {
        64 => Ok(()),
        bit => match INCOMPATIBLE.get(bit as usize) {
            Some(advice) => Err((*advice).to_owned()),
            None => Err(format!("it needs the unknown qcow2 feature {bit}")),
        },
    }
}

/// The L1 table, and every L2 table it points to, must lie in the file: what lies past its end reads as "unallocated".
fn check_tables(file: &File, file_bytes: u64, cluster_bytes: u64, size: u64, l1: L1) -> Result<(), String> {
    let truncated = |what: &str| format!("it is truncated: {what} lies past its end at {file_bytes} bytes");
    let l2_covers = u128::from(cluster_bytes) * u128::from(cluster_bytes / 8);
    if l1.entries > L1_ENTRIES_MAX || u128::from(l1.entries) * l2_covers < u128::from(size) {
        return Err(format!("its header is corrupt: {} L1 entries for {size} bytes", l1.entries));
    }
    let mut table = vec![0; l1.entries as usize * 8];
    if l1.offset.checked_add(table.len() as u64).is_none_or(|end| end > file_bytes) {
        return Err(truncated("its L1 table"));
    }
    file.read_exact_at(&mut table, l1.offset).map_err(|e| e.to_string())?;
    for (number, entry) in table.chunks_exact(8).enumerate() {
        let l2 = be64(entry, 0) & L2_OFFSET_MASK;
        if l2 != 0 && l2 + cluster_bytes > file_bytes {
            return Err(truncated(&format!("L2 table {number}")));
        }
    }
    Ok(())
}

fn read_up_to(file: &File, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match file.read_at(&mut buf[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
