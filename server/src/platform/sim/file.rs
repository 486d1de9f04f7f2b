//! Files of the simulated disk: direct I/O that takes time, may fail, and is done by the device even if its caller
//! goes away.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use super::content::{BLOCK, Change, DISK_SECTOR, Inode};
use super::disk::InodeRc;
use super::faults::DiskOp;
use super::random::SimRng;
use super::{Core, Sim, device_error};
use crate::platform::{AlignedBytes, File, OpenMode, Platform};

/// An open file of one life.
#[derive(Clone)]
pub struct SimFile {
    sim: Sim,
    path: Rc<Path>,
    inode: InodeRc,
    mode: OpenMode,
    /// Shared by clones: closing one of them closes them all.
    closed: Rc<Cell<bool>>,
}

impl SimFile {
    pub(super) fn new(sim: Sim, path: &Path, inode: InodeRc, mode: OpenMode) -> SimFile {
        SimFile { sim, path: path.into(), inode, mode, closed: Rc::default() }
    }

    fn check_open(&self) -> io::Result<()> {
        assert!(!self.closed.get(), "{}: used after close", self.path.display());
        self.sim.check_life()
    }

    fn check_writable(&self) -> io::Result<()> {
        assert!(self.mode != OpenMode::Read, "{}: opened read-only", self.path.display());
        self.check_open()
    }

    /// Hands a change to the device and waits for it.
    async fn submit(&self, change: Change) -> io::Result<()> {
        self.check_writable()?;
        let (latency, struck) = self.sim.draw(&self.path, DiskOp::Write);
        let core = self.sim.core.clone();
        core.executor.note("write", &self.trace_values(&change, struck));
        let (change, full) = self.fit(change);
        let id = self.with_rng(|inode, rng| inode.issue(change, rng));
        let job = DeviceJob::default();
        let (inode, path, done) = (self.inode.clone(), self.path.clone(), job.clone());
        core.executor.clone().at_device(core.executor.now().after(latency), move || {
            if struck {
                with_rng(&core, &inode, |inode, rng| inode.complete_torn(id, rng));
                return done.finish(Err(device_error(&path, DiskOp::Write)));
            }
            inode.borrow_mut().complete(id);
            done.finish(if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) });
        });
        job.wait().await
    }

    /// Cuts a write to what still fits on the disk; says whether it was cut.
    fn fit(&self, change: Change) -> (Change, bool) {
        let Change::Write { offset, mut data } = change else { return (change, false) };
        let free = self.sim.core.disk.borrow().space().free_bytes;
        let inode = self.inode.borrow();
        let len = data.len();
        while !data.is_empty() && inode.live.growth(offset, data.len() as u64) > free {
            data.truncate(data.len() - BLOCK as usize);
        }
        let full = data.len() < len;
        (Change::Write { offset, data }, full)
    }

    fn with_rng<T>(&self, f: impl FnOnce(&mut Inode, &mut SimRng) -> T) -> T {
        with_rng(&self.sim.core, &self.inode, f)
    }

    fn trace_values(&self, change: &Change, struck: bool) -> [u64; 5] {
        let path = super::path_hash(&self.path);
        let struck = u64::from(struck);
        match change {
            Change::Write { offset, data } => {
                [path, *offset, data.len() as u64, u64::from(crc32fast::hash(data)), struck]
            }
            Change::Clone { offset, data } => {
                [path, *offset, data.len() as u64, u64::from(crc32fast::hash(data)), 4 | struck]
            }
            Change::Deallocate { offset, len } => [path, *offset, *len, 1, struck],
            Change::SetLen(len) => [path, 0, *len, 2, struck],
        }
    }
}

impl File for SimFile {
    type WriteBuf = Vec<u8>;
    type ReadBuf = Vec<u8>;

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.check_open()?;
        check_direct(&self.path, offset, len as u64);
        let early = self.inode.borrow().live.read(offset, len);
        self.sim.device(&self.path, DiskOp::Read).await?;
        let late = self.inode.borrow().live.read(offset, len);
        if early == late {
            return Ok(late);
        }
        // Something wrote meanwhile: each sector may have been read before or after it.
        let rng = &mut self.sim.core.disk.borrow_mut().rng;
        Ok(mix_sectors(&early, late, rng))
    }

    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> io::Result<()> {
        check_direct(&self.path, offset, buf.len() as u64);
        self.submit(Change::Write { offset, data: buf }).await
    }

    async fn write_shared_at(&self, offset: u64, data: Arc<AlignedBytes>, range: Range<usize>) -> io::Result<()> {
        self.write_at(offset, data[range].to_vec()).await
    }

    async fn clone_range(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> io::Result<()> {
        check_direct(&self.path, offset, len);
        check_direct(&source.path, source_offset, 0);
        source.check_open()?;
        if !self.sim.core.disk.borrow().shares_extents {
            self.sim.yield_now().await;
            return Err(io::ErrorKind::Unsupported.into());
        }
        let data = source.inode.borrow().live.read(source_offset, len as usize);
        if data.len() as u64 != len || self.inode.borrow().live.len < offset + len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.submit(Change::Clone { offset, data }).await
    }

    async fn datasync(&self) -> io::Result<()> {
        self.check_writable()?;
        let crash_after = self.sim.begin_sync().await;
        let point = self.inode.borrow().sync_point();
        let result = self.sim.device(&self.path, DiskOp::Sync).await;
        if result.is_err() {
            self.with_rng(|inode, rng| inode.sync_torn(point, rng));
            return result;
        }
        self.inode.borrow_mut().sync(point);
        if crash_after {
            self.sim.core.executor.request_crash();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        check_direct(&self.path, offset, len);
        self.submit(Change::Deallocate { offset, len }).await
    }

    async fn stored(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Range<u64>>> {
        self.check_open()?;
        self.sim.yield_now().await;
        Ok(self.inode.borrow().live.stored(range, max))
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.submit(Change::SetLen(len)).await
    }

    async fn len(&self) -> io::Result<u64> {
        self.check_open()?;
        self.sim.yield_now().await;
        Ok(self.inode.borrow().live.len)
    }

    async fn close(self) -> io::Result<()> {
        self.closed.set(true);
        Ok(())
    }
}

/// One request at the device. The device finishes it whether or not anyone still waits.
#[derive(Clone, Default)]
struct DeviceJob(Rc<RefCell<JobState>>);

#[derive(Default)]
struct JobState {
    result: Option<io::Result<()>>,
    waker: Option<Waker>,
}

impl DeviceJob {
    fn finish(&self, result: io::Result<()>) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.result = Some(result);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn wait(&self) -> io::Result<()> {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            match state.result.take() {
                Some(result) => Poll::Ready(result),
                None => {
                    state.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

fn with_rng<T>(core: &Core, inode: &InodeRc, f: impl FnOnce(&mut Inode, &mut SimRng) -> T) -> T {
    f(&mut inode.borrow_mut(), &mut core.disk.borrow_mut().rng)
}

/// The contract of direct I/O. A breach is a bug of the caller, which a real disk would refuse with EINVAL.
fn check_direct(path: &Path, offset: u64, len: u64) {
    assert!(
        offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK),
        "{}: direct I/O of {len} bytes at {offset} is not aligned to {BLOCK}",
        path.display()
    );
}

fn mix_sectors(early: &[u8], mut late: Vec<u8>, rng: &mut SimRng) -> Vec<u8> {
    for (old, new) in early.chunks(DISK_SECTOR as usize).zip(late.chunks_mut(DISK_SECTOR as usize)) {
        if old.len() == new.len() && rng.coin() {
            new.copy_from_slice(old);
        }
    }
    late
}
