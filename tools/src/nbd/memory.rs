//! Exports in memory, for tests: a backend that counts what is asked of it and fails on request.
//!
//! Part of the library, not of a test module, because the component tests drive it from outside the crate.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::backend::{Backend, Description, ErrorKind, Export, ExportError, Extent, Result};

const BLOCK: usize = 512;

/// A set of disks in memory. Clones are the same set.
#[derive(Clone, Debug)]
pub struct MemoryBackend {
    disks: Arc<BTreeMap<String, Arc<Mutex<Disk>>>>,
}

/// One disk and what happened to it.
#[derive(Debug, Default)]
pub struct Disk {
    /// Its bytes.
    pub data: Vec<u8>,
    /// For each 512-byte block: in the volume itself.
    pub resident: Vec<bool>,
    /// For each 512-byte block: reads as zeroes without storage.
    pub hole: Vec<bool>,
    /// If set, every request fails with this.
    pub failure: Option<ExportError>,
    /// Attachments so far.
    pub attached_total: u64,
    /// Attachments given up so far.
    pub detached_total: u64,
    /// Flushes so far.
    pub flushes_total: u64,
    /// Writes answered since the last flush.
    pub writes_unflushed: u64,
    /// Ranges fetched with priority.
    pub prefetched: Vec<(u64, u64)>,
}

/// An attached disk.
#[derive(Clone, Debug)]
pub struct MemoryExport {
    disk: Arc<Mutex<Disk>>,
    size_bytes: u64,
}

impl MemoryBackend {
    /// Disks by name with their content, which is a multiple of 512 bytes. All of it is resident.
    pub fn new<'a>(disks: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> MemoryBackend {
        let disks = disks.into_iter().map(|(name, data)| {
            let blocks = data.len() / BLOCK;
            let disk = Disk { data, resident: vec![true; blocks], hole: vec![false; blocks], ..Disk::default() };
            (name.to_owned(), Arc::new(Mutex::new(disk)))
        });
        MemoryBackend { disks: Arc::new(disks.collect()) }
    }

    /// The disk `name`, to look at or to prepare.
    ///
    /// # Panics
    /// If there is none.
    pub fn disk(&self, name: &str) -> MutexGuard<'_, Disk> {
        lock(&self.disks[name])
    }

    /// The disk `name` without counting an attachment.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn export(&self, name: &str) -> MemoryExport {
        let disk = Arc::clone(&self.disks[name]);
        let size_bytes = lock(&disk).data.len() as u64;
        MemoryExport { disk, size_bytes }
    }

    fn find(&self, name: &str) -> Result<MemoryExport> {
        if self.disks.contains_key(name) {
            return Ok(self.export(name));
        }
        Err(ExportError::new(ErrorKind::UnknownExport, format!("no volume {name:?}")))
    }
}

impl Backend for MemoryBackend {
    type Export = MemoryExport;

    async fn names(&self) -> Result<Vec<String>> {
        Ok(self.disks.keys().cloned().collect())
    }

    async fn describe(&self, name: &str) -> Result<Description> {
        let size_bytes = self.find(name)?.size_bytes;
        Ok(Description { size_bytes, text: format!("memory disk {name}") })
    }

    async fn attach(&self, name: &str) -> Result<MemoryExport> {
        let export = self.find(name)?;
        lock(&export.disk).attached_total += 1;
        Ok(export)
    }
}

impl MemoryExport {
    /// One step on the disk, after a turn of the scheduler so that requests interleave as they do on a real backend.
    async fn step<T>(&self, f: impl FnOnce(&mut Disk) -> T) -> Result<T> {
        tokio::task::yield_now().await;
        let mut disk = lock(&self.disk);
        match &disk.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(f(&mut disk)),
        }
    }
}

impl Export for MemoryExport {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes> {
        let range = offset as usize..offset as usize + len as usize;
        assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK), "unaligned read {range:?}");
        self.step(|disk| Bytes::copy_from_slice(&disk.data[range])).await
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        self.step(|disk| disk.overwrite(offset as usize, &data, false, fua)).await
    }

    async fn flush(&self) -> Result<()> {
        self.step(|disk| {
            disk.flushes_total += 1;
            disk.writes_unflushed = 0;
        })
        .await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, false).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.step(|disk| disk.overwrite(offset as usize, &vec![0; len as usize], true, fua)).await
    }

    async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.step(|disk| {
            disk.prefetched.push((offset, len));
            disk.resident[blocks(offset, len)].fill(true);
        })
        .await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let state = |disk: &Disk, block: usize| (disk.resident[block], disk.hole[block]);
        self.step(|disk| {
            let range = blocks(offset, len);
            let all: Vec<_> = range.map(|block| state(disk, block)).collect();
            let run = |run: &[(bool, bool)]| Extent {
                len_bytes: (run.len() * BLOCK) as u64,
                resident: run[0].0,
                hole: run[0].1,
            };
            all.chunk_by(|a, b| a == b).map(run).collect()
        })
        .await
    }

    async fn detach(&self) -> Result<()> {
        lock(&self.disk).detached_total += 1;
        Ok(())
    }
}

impl Disk {
    fn overwrite(&mut self, offset: usize, data: &[u8], hole: bool, fua: bool) {
        assert!(offset.is_multiple_of(BLOCK) && data.len().is_multiple_of(BLOCK), "unaligned write at {offset}");
        self.data[offset..offset + data.len()].copy_from_slice(data);
        let blocks = blocks(offset as u64, data.len() as u64);
        self.resident[blocks.clone()].fill(true);
        self.hole[blocks].fill(hole);
        self.writes_unflushed += u64::from(!fua);
    }
}

fn blocks(offset: u64, len: u64) -> std::ops::Range<usize> {
    offset as usize / BLOCK..(offset + len) as usize / BLOCK
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
