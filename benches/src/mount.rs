//! A file system of the benchmark's own, on a file.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Result, run};

/// An XFS whose files can share extents, mounted from a sparse file on a loop device as long as this lives. Root only.
pub struct Xfs {
    mount: PathBuf,
}

impl Xfs {
    /// Makes it in `dir`, of `bytes`; what it holds takes as much there.
    ///
    /// # Errors
    /// Without `mkfs.xfs`, loop devices, or the right to mount.
    pub fn new(dir: &Path, bytes: u64) -> Result<Xfs> {
        let (file, mount) = (dir.join("xfs.img"), dir.join("xfs"));
        let said = |e: std::io::Error| format!("{}: {e}", dir.display());
        std::fs::File::create(&file).and_then(|file| file.set_len(bytes)).map_err(said)?;
        std::fs::create_dir(&mount).map_err(said)?;
        run(Command::new("mkfs.xfs").args(["-q", "-f", "-m", "reflink=1"]).arg(&file))?;
        run(Command::new("mount").args(["-o", "loop"]).args([&file, &mount]))?;
        Ok(Xfs { mount })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.mount)) {
            eprintln!("{} is still mounted: {error}", self.mount.display());
        }
    }
}
