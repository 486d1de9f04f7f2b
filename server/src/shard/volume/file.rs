//! The file of a volume from its creation to its removal.

use std::io;

use super::{SET_ASIDE, Volume, has_no_data};
use crate::error::Result;
use crate::platform::{File, OpenMode, Platform};

impl<P: Platform> Volume<P> {
    /// Creates the file of a new volume: sparse, a whole number of sectors long. The directory is synced by the caller,
    /// once for all. The length of a blank volume is made durable here: no later sync of a fill will do it.
    /// A creation that a crash cut short left a file without data, which is taken over.
    pub async fn create_file(&self) -> Result<()> {
        let file = match self.platform.open(&self.path, OpenMode::CreateNew).await {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.take_over(error).await,
            opened => opened,
        };
        let file = file.map_err(|e| self.io_error("create", &e))?;
        let sized = file.set_len(self.file_len()).await;
        let made = if sized.is_ok() && self.hydrated.get() { file.datasync().await } else { sized };
        let made = file.close().await.and(made);
        if made.is_err() {
            drop(self.remove_file().await);
        }
        made.map_err(|e| self.io_error("create", &e))
    }

    /// The file that is there in place of a new one, if nothing was ever written to it.
    async fn take_over(&self, exists: io::Error) -> io::Result<P::File> {
        let file = self.platform.open(&self.path, OpenMode::ReadWrite).await?;
        if has_no_data(&file).await? {
            return Ok(file);
        }
        file.close().await?;
        Err(exists)
    }

    pub async fn remove_file(&self) -> Result<()> {
        self.close_file().await;
        match self.platform.remove_file(&self.path).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.io_error("remove", &e)),
            _ => Ok(()),
        }
    }

    /// Renames the file of a volume that is being deleted to `<id>.deleted`.
    pub async fn set_aside(&self) -> Result<()> {
        self.close_file().await;
        let renamed = self.platform.rename(&self.path, &self.path.with_extension(SET_ASIDE)).await;
        match renamed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.io_error("rename", &e)),
            _ => Ok(()),
        }
    }

    pub async fn remove_set_aside(&self) -> Result<()> {
        match self.platform.remove_file(&self.path.with_extension(SET_ASIDE)).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.io_error("remove", &e)),
            _ => Ok(()),
        }
    }
}
