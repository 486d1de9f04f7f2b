//! What a crash leaves in a volume store, looked through at start.

use std::io;
use std::path::Path;

use crate::error::{Error, Result};
use crate::object_store::ObjectStore;
use crate::platform::{File as _, OpenMode, Platform};
use crate::shard::hydrate::Store;
use crate::shard::volume::{SET_ASIDE, has_no_data};
use crate::shard::{ORPHANS_NAMED_MAX, Shard};
use crate::types::VolumeId;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Ends deletions and creations that a crash cut short. Files with data that belong to no volume are named and never
    /// removed.
    pub(super) async fn tidy_store(&self, store: &Store) -> Result<()> {
        let dir = &store.volumes_dir;
        let failed = |e: io::Error| Error::from_io(&format!("volume store {}", dir.display()), &e);
        self.0.platform.create_dir_all(dir).await.map_err(failed)?;
        let mut orphans = 0;
        for entry in self.0.platform.list_dir(dir).await.map_err(failed)? {
            let Some((stem, extension)) = entry.name.split_once('.') else { continue };
            let Ok(id) = u64::from_str_radix(stem, 16).map(VolumeId) else { continue };
            if id.owner(self.0.config.shards) != self.0.config.shard {
                continue;
            }
            let known = self.0.volumes.borrow().contains_key(&id);
            let path = dir.join(&entry.name);
            match (extension, known) {
                (SET_ASIDE, true) => {
                    self.0.platform.rename(&path, &path.with_extension("raw")).await.map_err(failed)?;
                    self.0.platform.sync_dir(dir).await.map_err(failed)?;
                }
                (SET_ASIDE, false) => self.0.platform.remove_file(&path).await.map_err(failed)?,
                ("raw", false) if self.is_hole(&path).await.unwrap_or(false) => {
                    self.0.platform.remove_file(&path).await.map_err(failed)?;
                }
                ("raw", false) => {
                    orphans += 1;
                    if orphans <= ORPHANS_NAMED_MAX {
                        tracing::warn!(file = %path.display(), "volume file belongs to no volume; left alone");
                    }
                }
                _ => {}
            }
        }
        self.drop_stale_staging(store).await;
        Ok(())
    }

    /// Snapshots that a stop or a crash cut short are not gone on with.
    async fn drop_stale_staging(&self, store: &Store) {
        for entry in self.0.platform.list_dir(&store.staging_dir).await.unwrap_or_default() {
            let id = entry.name.strip_suffix(".raw").and_then(|stem| u64::from_str_radix(stem, 16).ok()).map(VolumeId);
            if id.is_some_and(|id| id.owner(self.0.config.shards) == self.0.config.shard) {
                drop(self.0.platform.remove_file(&store.staging_dir.join(&entry.name)).await);
            }
        }
    }

    /// Nothing was ever written to it: the journal does not know it because its creation was not finished.
    async fn is_hole(&self, path: &Path) -> io::Result<bool> {
        let file = self.0.platform.open(path, OpenMode::Read).await?;
        let is_hole = has_no_data(&file).await;
        file.close().await?;
        is_hole
    }
}
