//! `journal/CURRENT`: which epoch is valid. One 4 KiB block, replaced whole by a rename: the commit point of a start.

use std::io;
use std::path::Path;

use super::frame::{BLOCK_BYTES, SegmentName, TMP_SUFFIX, block_is_sealed, get, put, seal_block};
use super::segment::remove_if_exists;
use crate::error::{Error, Result};
use crate::mutation::{self, Mutation};
use crate::platform::{File, OpenMode, Platform};

pub(super) const CURRENT: &str = "CURRENT";
const CURRENT_TMP: &str = "CURRENT.tmp";

const MAGIC: [u8; 8] = *b"VOLLEYC\n";
const VERSION: u32 = 1;
const VERSION_AT: usize = 8;
const CRC_AT: usize = VERSION_AT + 4;
const EPOCH_AT: usize = CRC_AT + 4;
const SHARDS_AT: usize = EPOCH_AT + 8;
const END: usize = SHARDS_AT + 4;

const _: () = assert!(END <= BLOCK_BYTES);

/// The valid epoch and how many journals it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Current {
    pub(super) epoch: u64,
    pub(super) shards: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CurrentError {
    #[error("it does not have one block of 4096 bytes")]
    Length,
    #[error("it is not a Volley superblock (no magic)")]
    Magic,
    #[error("it fails its checksum")]
    Checksum,
    #[error("it has format version {0}, this build reads {VERSION}: start the newer volleyd")]
    Version(u32),
}

impl Current {
    pub(super) fn encode(self, block: &mut [u8]) {
        assert_eq!(block.len(), BLOCK_BYTES);
        block.fill(0);
        put(block, 0, MAGIC);
        put(block, VERSION_AT, VERSION.to_le_bytes());
        put(block, EPOCH_AT, self.epoch.to_le_bytes());
        put(block, SHARDS_AT, self.shards.to_le_bytes());
        seal_block(block, CRC_AT);
    }

    pub(super) fn decode(block: &[u8]) -> std::result::Result<Current, CurrentError> {
        if block.len() != BLOCK_BYTES {
            return Err(CurrentError::Length);
        }
        if block[..8] != MAGIC {
            return Err(CurrentError::Magic);
        }
        if !block_is_sealed(block, CRC_AT) {
            return Err(CurrentError::Checksum);
        }
        match u32::from_le_bytes(get(block, VERSION_AT)) {
            VERSION => {}
            version => return Err(CurrentError::Version(version)),
        }
        let (epoch, shards) = (u64::from_le_bytes(get(block, EPOCH_AT)), u32::from_le_bytes(get(block, SHARDS_AT)));
        Ok(Current { epoch, shards })
    }
}

/// Makes `epoch` with its `shards` journals, all created, the valid one: they count from now on, and the files of
/// other epochs are removed.
///
/// # Errors
/// `NoSpace` or `Io`, naming the file. The old epoch is still valid unless the error says `removing`.
pub async fn commit_epoch<P: Platform>(platform: &P, dir: &Path, epoch: u64, shards: usize) -> Result<()> {
    let current = Current { epoch, shards: u32::try_from(shards).expect("shards are cores") };
    let path = dir.join(CURRENT);
    let written = write(platform, dir, current).await;
    written.map_err(|error| Error::from_io(&format!("journal superblock {}: writing", path.display()), &error))?;
    let removed = remove_others(platform, dir, current).await;
    removed.map_err(|error| {
        Error::from_io(&format!("journal directory {}: removing files of older epochs", dir.display()), &error)
    })
}

pub(super) async fn write<P: Platform>(platform: &P, dir: &Path, current: Current) -> io::Result<()> {
    let (path, tmp) = (dir.join(CURRENT), dir.join(CURRENT_TMP));
    remove_if_exists(platform, &tmp).await?;
    let file = platform.open(&tmp, OpenMode::CreateNew).await?;
    let mut block = platform.alloc(BLOCK_BYTES);
    current.encode(&mut block);
    file.write_at(0, block).await?;
    if !mutation::on(Mutation::SuperblockNotSynced) {
        file.datasync().await?;
    }
    file.close().await?;
    platform.rename(&tmp, &path).await?;
    platform.sync_dir(dir).await
}

/// Removes every segment, finished or not, that is not of `current`; other files are not ours to touch.
async fn remove_others<P: Platform>(platform: &P, dir: &Path, current: Current) -> io::Result<()> {
    for entry in platform.list_dir(dir).await? {
        let file_name = entry.name.strip_suffix(TMP_SUFFIX).unwrap_or(&entry.name);
        let Some(name) = SegmentName::parse(file_name) else { continue };
        if name.epoch != current.epoch || name.shard >= current.shards {
            platform.remove_file(&dir.join(&entry.name)).await?;
        }
    }
    platform.sync_dir(dir).await
}
