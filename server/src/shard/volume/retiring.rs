//! A volume whose content is copied out for a snapshot, or that another one replaces under its name.

use super::{SECTOR, Volume};
use crate::error::{Error, Result, Status};
use crate::platform::{File, Platform};
use crate::shard::residency::SectorRange;

impl<P: Platform> Volume<P> {
    /// Shares the extents of whole sectors with another file, at the same place. `false`: the filesystem can't.
    pub async fn share_out(&self, range: SectorRange, to: &P::File) -> Result<bool> {
        let (offset, len) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
        Ok(to.clone_range(offset, &self.file().await?, offset, len).await.is_ok())
    }

    /// Whole sectors, to be written elsewhere.
    pub async fn copy_out(&self, range: SectorRange) -> Result<P::WriteBuf> {
        let read = self.read_sectors(range).await?;
        let mut buf = self.platform.alloc(read.len());
        buf.copy_from_slice(&read);
        Ok(buf)
    }

    /// Nobody knows whether a restart will find this volume or the one that was to replace it.
    pub fn refuse_writes(&self, error: &Error) {
        let message = format!("{}; the volume takes no writes until volleyd is restarted", error.message);
        *self.poisoned.borrow_mut() = Some(Error::new(error.status, message));
    }

    /// What the journal is told of the volume from now on would be taken for the one that replaced it.
    ///
    /// # Errors
    /// `Busy` once there is such a one.
    pub fn check_not_replaced(&self) -> Result<()> {
        if self.replacement.borrow().is_none() {
            return Ok(());
        }
        let message = format!("volume {:?} was rolled back or resized: try again", &*self.spec.name);
        Err(Error::new(Status::Busy, message))
    }

    /// Ends a replacement. One that failed before the journal could know of it changed nothing.
    pub fn end_retirement(&self, replaced: bool) {
        if !replaced && self.replacement.borrow().is_none() {
            self.retired.set(false);
            self.thawed.wake_all();
        }
    }

    /// Makes the file longer, durably: the new part is a hole.
    pub async fn grow_file(&self, size_bytes: u64) -> Result<()> {
        let file = self.file().await?;
        let grown = file.set_len(size_bytes.next_multiple_of(SECTOR)).await;
        let grown = if grown.is_ok() { file.datasync().await } else { grown };
        grown.map_err(|e| self.io_error("grow", &e))
    }
}
