//! Writes qcow2 files (version 3): whole images, and overlays that hold only what differs from a backing file.
//!
//! `docs/qcow2.md` has the layout byte by byte. A file is written from front to back: data clusters and their L2 tables as
//! they come, then the L1 table and the reference counts, and at last the header, which makes it a qcow2 file. Every cluster
//! is used once, so all reference counts are one, and memory holds one L2 table and the L1 table.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::import::ImageFormat;
use crate::snapshot::is_zero;

/// qemu's default, and the smallest chunk of a snapshot.
pub const CLUSTER_BYTES: u64 = 64 << 10;
const CLUSTER_BITS: u32 = 16;
/// Longer names are not read by qemu.
pub const BACKING_NAME_BYTES_MAX: usize = 1023;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const HEADER_BYTES: u32 = 104;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// 16 bits each.
const REFCOUNT_ORDER: u32 = 4;
/// In an L1 or L2 entry: the cluster it points to is used once.
const COPIED: u64 = 1 << 63;
/// An L2 entry: the cluster reads as zeroes, whatever the backing file has.
const ZERO: u64 = 1;

const L2_ENTRIES: u64 = CLUSTER_BYTES / 8;
const REFCOUNTS: u64 = CLUSTER_BYTES / 2;
const _: () = assert!(1 << CLUSTER_BITS == CLUSTER_BYTES);
// The header with its extension and the longest name stay in the first cluster.
const _: () = assert!(HEADER_BYTES as usize + 32 + BACKING_NAME_BYTES_MAX < CLUSTER_BYTES as usize);

/// The file beneath an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As the overlay is to name it; relative to the overlay's directory.
    pub name: String,
    pub format: ImageFormat,
}

/// A qcow2 file being written.
pub struct Writer<'a> {
    file: &'a File,
    size_bytes: u64,
    backing: Option<Backing>,
    /// The first cluster of the file that is not used.
    next: u64,
    l1: Vec<u64>,
    /// Number and entries of the L2 table being filled.
    l2: Option<(usize, Vec<u64>)>,
}

impl<'a> Writer<'a> {
    /// An image of `size_bytes` in an empty file. What is not written reads as the backing file, or as zeroes.
    ///
    /// # Errors
    /// The name of the backing file can't be written down.
    pub fn new(file: &'a File, size_bytes: u64, backing: Option<Backing>) -> Result<Writer<'a>, String> {
        if let Some(Backing { name, .. }) = &backing
            && (name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX)
        {
            return Err(format!(
                "the name of a backing file has 1 to {BACKING_NAME_BYTES_MAX} bytes, not {}",
                name.len()
            ));
        }
        let tables = size_bytes.div_ceil(CLUSTER_BYTES * L2_ENTRIES);
        let l1 = vec![0; usize::try_from(tables).map_err(|_| "the image is too large".to_owned())?];
        Ok(Writer { file, size_bytes, backing, next: 1, l1, l2: None })
    }

    /// Writes `data` at `offset`, a multiple of the cluster size past all that was written before. Only the end of the image may
    /// cut a cluster. Clusters of zeroes are flagged and not stored.
    ///
    /// # Errors
    /// Those of the file.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(CLUSTER_BYTES) && offset + data.len() as u64 <= self.size_bytes);
        let mut run = 0..0;
        for (cluster, part) in (offset / CLUSTER_BYTES..).zip(data.chunks(CLUSTER_BYTES as usize)) {
            if is_zero(part) {
                self.write_run(&data[run.clone()])?;
                run = run.end + part.len()..run.end + part.len();
                self.zero_cluster(cluster)?;
            } else {
                // A table that is full goes behind the data it points to.
                if self.begins_table(cluster) {
                    self.write_run(&data[run.clone()])?;
                    run.start = run.end;
                    self.write_l2()?;
                }
                let at = self.next + (run.len() as u64).div_ceil(CLUSTER_BYTES);
                self.set(cluster, (at * CLUSTER_BYTES) | COPIED)?;
                run.end += part.len();
            }
        }
        self.write_run(&data[run])
    }

    /// Zeroes `len` bytes at `offset`, under the rules of [`Writer::data`].
    ///
    /// # Errors
    /// Those of the file.
    pub fn zeroes(&mut self, offset: u64, len: u32) -> io::Result<()> {
        assert!(offset.is_multiple_of(CLUSTER_BYTES) && offset + u64::from(len) <= self.size_bytes);
        let first = offset / CLUSTER_BYTES;
        (first..(offset + u64::from(len)).div_ceil(CLUSTER_BYTES)).try_for_each(|cluster| self.zero_cluster(cluster))
    }

    /// Writes tables and header. Returns the length of the file, which the caller makes durable.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(mut self) -> io::Result<u64> {
        self.write_l2()?;
        let l1_at = self.next * CLUSTER_BYTES;
        let table = be_bytes(&self.l1);
        self.file.write_all_at(&table, l1_at)?;
        let used = self.next + (table.len() as u64).div_ceil(CLUSTER_BYTES);
        let counts = Counts::of(used);
        counts.write(self.file)?;
        self.file.set_len(counts.clusters * CLUSTER_BYTES)?;
        let header = self.header(l1_at, &counts);
        self.file.write_all_at(&header, 0)?;
        Ok(counts.clusters * CLUSTER_BYTES)
    }

    fn zero_cluster(&mut self, cluster: u64) -> io::Result<()> {
        // Without a backing file, what is not there is zero already.
        if self.backing.is_some() { self.set(cluster, ZERO) } else { Ok(()) }
    }

    /// Whether the L2 entry of the cluster is in another table than the one being filled.
    fn begins_table(&self, cluster: u64) -> bool {
        self.l2.as_ref().is_some_and(|(number, _)| *number as u64 != cluster / L2_ENTRIES)
    }

    fn set(&mut self, cluster: u64, entry: u64) -> io::Result<()> {
        if self.begins_table(cluster) {
            self.write_l2()?;
        }
        let number = (cluster / L2_ENTRIES) as usize;
        let (_, table) = self.l2.get_or_insert_with(|| (number, vec![0; L2_ENTRIES as usize]));
        table[(cluster % L2_ENTRIES) as usize] = entry;
        Ok(())
    }

    /// Writes data clusters that lie one after the other.
    fn write_run(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.next * CLUSTER_BYTES)?;
        self.next += (data.len() as u64).div_ceil(CLUSTER_BYTES);
        Ok(())
    }

    fn write_l2(&mut self) -> io::Result<()> {
        let Some((number, table)) = self.l2.take() else { return Ok(()) };
        let at = self.next * CLUSTER_BYTES;
        self.file.write_all_at(&be_bytes(&table), at)?;
        self.l1[number] = at | COPIED;
        self.next += 1;
        Ok(())
    }

    fn header(&self, l1_at: u64, counts: &Counts) -> Vec<u8> {
        let name = self.backing.as_ref().map_or("", |backing| &backing.name);
        let mut extensions = Vec::new();
        if let Some(backing) = &self.backing {
            let format = backing.format.to_string();
            extensions.extend_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
            extensions.extend_from_slice(&(format.len() as u32).to_be_bytes());
            extensions.extend_from_slice(format.as_bytes());
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend_from_slice(&[0; 8]);
        let name_at = if name.is_empty() { 0 } else { u64::from(HEADER_BYTES) + extensions.len() as u64 };
        let mut header = MAGIC.to_vec();
        let put32 = |value: u32| value.to_be_bytes();
        header.extend(put32(VERSION));
        header.extend(name_at.to_be_bytes());
        header.extend(put32(name.len() as u32));
        header.extend(put32(CLUSTER_BITS));
        header.extend(self.size_bytes.to_be_bytes());
        header.extend(put32(0)); // no encryption
        header.extend(put32(self.l1.len() as u32));
        header.extend(l1_at.to_be_bytes());
        header.extend((counts.table_at()).to_be_bytes());
        header.extend(put32(counts.table_clusters as u32));
        header.extend([0; 4 + 8]); // no internal snapshots
        header.extend([0; 8 + 8 + 8]); // no features
        header.extend(put32(REFCOUNT_ORDER));
        header.extend(put32(HEADER_BYTES));
        debug_assert_eq!(header.len(), HEADER_BYTES as usize);
        header.extend(extensions);
        header.extend(name.as_bytes());
        header
    }
}

/// The reference counts of a file in which every cluster is used once: the blocks, then the table that points to them.
struct Counts {
    /// Where the blocks begin.
    blocks_at: u64,
    blocks: u64,
    table_clusters: u64,
    /// Of the whole file.
    clusters: u64,
}

impl Counts {
    /// Behind `used` clusters. The counts count themselves.
    fn of(used: u64) -> Counts {
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let clusters = used + blocks + table_clusters;
            let needed = (clusters.div_ceil(REFCOUNTS), blocks.div_ceil(L2_ENTRIES));
            if needed == (blocks, table_clusters) {
                return Counts { blocks_at: used, blocks, table_clusters, clusters };
            }
            (blocks, table_clusters) = (needed.0.max(blocks), needed.1.max(table_clusters));
        }
    }

    fn table_at(&self) -> u64 {
        (self.blocks_at + self.blocks) * CLUSTER_BYTES
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let mut table = Vec::new();
        for block in 0..self.blocks {
            let at = (self.blocks_at + block) * CLUSTER_BYTES;
            let counted = (self.clusters - block * REFCOUNTS).min(REFCOUNTS) as usize;
            file.write_all_at(&[0, 1].repeat(counted), at)?;
            table.push(at);
        }
        file.write_all_at(&be_bytes(&table), self.table_at())
    }
}

fn be_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests;
