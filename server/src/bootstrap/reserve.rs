//! Space held back on the filesystem of the journals, so that a node whose disk is full can start.
//!
//! A start writes the journals of a new epoch before it removes the old ones, and volumes often share their filesystem:
//! without this, guests that fill the disk would also keep the node from coming back, and with it every means to free
//! space. `journal/RESERVE` is allocated after each start and given up by one that finds no space.
#![allow(clippy::disallowed_methods)] // Outside of the shards.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Not a name of the journal, which leaves it alone.
pub const RESERVE: &str = "RESERVE";
/// Enough for the states of some 100,000 volumes.
const RESERVE_BYTES_MIN: u64 = 16 << 20;
/// Of what the journals take right after a start: until the next start they may grow.
const RESERVE_FACTOR: u64 = 2;

/// Gives the space up; `false` when there is none.
pub(super) fn release(journal_dir: &Path) -> bool {
    match fs::remove_file(journal_dir.join(RESERVE)) {
        Ok(()) => {
            tracing::warn!(dir = %journal_dir.display(), "the disk is full: starting with the space held back for that");
            true
        }
        Err(_) => false,
    }
}

/// Allocates the space, or as it was if there is enough. Without success the node runs all the same.
pub(super) fn hold(journal_dir: &Path) {
    if let Err(error) = try_hold(journal_dir) {
        let path = journal_dir.join(RESERVE);
        // Half of it would be of no use, and somebody else needs the space more.
        let _ = fs::remove_file(&path);
        tracing::warn!(file = %path.display(), %error, "no space is held back for a start on a full disk: free some");
    }
}

fn try_hold(journal_dir: &Path) -> io::Result<()> {
    let wanted = RESERVE_BYTES_MIN.max(RESERVE_FACTOR * journal_bytes(journal_dir)?);
    let path = journal_dir.join(RESERVE);
    let file: File = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
    if file.metadata()?.len() >= wanted {
        return Ok(());
    }
    let len = i64::try_from(wanted).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `file` is; the call touches no memory of ours.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn journal_bytes(journal_dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(journal_dir)? {
        let entry = entry?;
        if entry.file_name() != RESERVE {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::{RESERVE, RESERVE_BYTES_MIN, hold, release};

    #[test]
    fn space_is_held_once_grows_with_the_journals_and_is_released() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!release(dir.path()));
        let path = dir.path().join(RESERVE);
        for _ in 0..2 {
            hold(dir.path());
            assert_eq!(path.metadata().unwrap().len(), RESERVE_BYTES_MIN);
            assert!(path.metadata().unwrap().blocks() * 512 >= RESERVE_BYTES_MIN, "allocated, not sparse");
        }
        std::fs::File::create(dir.path().join("a.vj")).unwrap().set_len(RESERVE_BYTES_MIN).unwrap();
        hold(dir.path());
        assert_eq!(path.metadata().unwrap().len(), 2 * RESERVE_BYTES_MIN);
        assert!(release(dir.path()) && !path.exists());
    }
}
