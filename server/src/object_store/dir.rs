//! Objects as files of a directory, `file:DIR`: the embedded object store.
//!
//! An object appears whole under its name or not at all: it is written to a temporary file, synced, and then renamed
//! (`put`) or hard-linked (`put_if_absent`, of which the filesystem lets exactly one racing caller succeed). Every directory whose
//! entry changed is synced before the call returns. Temporary files of a crash are invisible and are
//! left alone, as another process may be writing them; their names cannot be keys.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore, check_key};
use crate::platform::{File, OpenMode, Platform};

/// Direct I/O moves whole blocks of this size.
const BLOCK_BYTES: u64 = 4096;
/// Objects are read whole only if they are metadata or packs; the largest manifest is below rkyv's 2 GiB.
const GET_BYTES_MAX: u64 = 2 << 30;
/// One write call: what the seam splits at anyway, so that a large object is not copied at once.
const WRITE_BYTES: usize = 1 << 20;
/// No key component starts with a dot, so nothing under this directory is an object.
const TMP_DIR: &str = ".tmp";

/// A directory of objects, reached through the platform's files.
#[derive(Clone)]
pub struct DirStore<P> {
    platform: P,
    root: Arc<Path>,
}

impl<P: Platform> DirStore<P> {
    /// A store in the existing directory `root`.
    ///
    /// # Errors
    /// `Fatal` if `root` is not a directory that can be listed.
    pub async fn open(platform: P, root: impl Into<PathBuf>) -> Result<DirStore<P>, ObjectError> {
        let store = DirStore::at(platform, root);
        store.check().await.map(|()| store)
    }

    /// A store in `root`, which may not be there: see [`DirStore::check`].
    #[must_use]
    pub fn at(platform: P, root: impl Into<PathBuf>) -> DirStore<P> {
        let root: PathBuf = root.into();
        DirStore { platform, root: root.into() }
    }

    /// # Errors
    /// `Fatal` if the root is not a directory that can be listed.
    pub async fn check(&self) -> Result<(), ObjectError> {
        let root = &self.root;
        match self.platform.list_dir(root).await {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ObjectError::Fatal(format!(
                "object store directory {} does not exist: create it or correct the URL",
                root.display()
            ))),
            Err(e) => Err(ObjectError::Fatal(format!("object store directory {}: {e}", root.display()))),
        }
    }

    /// Like [`DirStore::open`], but creates the directory.
    ///
    /// # Errors
    /// `Fatal` if it can't be created or listed.
    pub async fn create(platform: P, root: impl Into<PathBuf>) -> Result<DirStore<P>, ObjectError> {
        let root: PathBuf = root.into();
        create_dir_durably(&platform, &root)
            .await
            .map_err(|e| ObjectError::Fatal(format!("cannot create object store {}: {e}", root.display())))?;
        DirStore::open(platform, root).await
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, key: &str) -> Result<PathBuf, ObjectError> {
        check_key(key)?;
        Ok(self.root.join(key))
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<ObjectBytes, ObjectError> {
        let path = self.path(key)?;
        let file = match self.platform.open(&path, OpenMode::Read).await {
            Ok(file) => file,
            Err(e) => return Err(self.open_error(key, &e).await),
        };
        let result = read_open(&file, key, range).await;
        let closed = file.close().await.map_err(|e| classify(key, &e));
        let data = result?;
        closed.map(|()| data)
    }

    /// Tells an object that is not there from a store that is not there (an unmounted filesystem): that one may return.
    async fn open_error(&self, key: &str, error: &io::Error) -> ObjectError {
        if error.kind() == io::ErrorKind::NotFound
            && let Err(e) = self.platform.list_dir(&self.root).await
        {
            return ObjectError::Retry(format!("object store directory {}: {e}", self.root.display()));
        }
        classify(key, error)
    }

    /// Writes the object to a synced temporary file and returns its path.
    async fn write_tmp(&self, key: &str, data: &[u8]) -> Result<PathBuf, ObjectError> {
        let name = format!("{:016x}{:016x}", self.platform.random_u64(), self.platform.random_u64());
        let tmp = self.root.join(TMP_DIR).join(name);
        let open = || self.platform.open(&tmp, OpenMode::CreateNew);
        let file = self.with_parent(&tmp, open).await.map_err(|e| classify(key, &e))?;
        let written = write_open(&self.platform, &file, data).await;
        let closed = file.close().await;
        if let Err(e) = written.and(closed) {
            self.discard(&tmp).await;
            return Err(classify(key, &e));
        }
        Ok(tmp)
    }

    /// Removes a temporary file; if that fails, garbage stays behind that no reader sees.
    async fn discard(&self, tmp: &Path) {
        if let Err(e) = self.platform.remove_file(tmp).await {
            tracing::warn!("cannot remove temporary object {}: {e}", tmp.display());
        }
    }

    /// Runs `step`, which makes an entry for `path`; if the directory is missing, creates it and runs `step` again.
    async fn with_parent<T, F: Future<Output = io::Result<T>>>(
        &self,
        path: &Path,
        step: impl Fn() -> F,
    ) -> io::Result<T> {
        match step().await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                create_dir_durably(&self.platform, path.parent().unwrap_or(&self.root)).await?;
                step().await
            }
            result => result,
        }
    }

    async fn sync_parent(&self, path: &Path) -> io::Result<()> {
        self.platform.sync_dir(path.parent().unwrap_or(&self.root)).await
    }
}

impl<P: Platform> ObjectStore for DirStore<P> {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.read(key, None).await.map(Vec::from)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        if range.start > range.end || range.end - range.start > GET_BYTES_MAX {
            return Err(ObjectError::Fatal(format!("{key}: range {range:?} is not a range of an object")));
        }
        self.read(key, Some(range)).await
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        let path = self.path(key)?;
        let tmp = self.write_tmp(key, data).await?;
        let step = async {
            self.with_parent(&path, || self.platform.rename(&tmp, &path)).await?;
            self.sync_parent(&path).await
        };
        let result = step.await.map_err(|e| classify(key, &e));
        if result.is_err() {
            self.discard(&tmp).await;
        }
        result
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        let path = self.path(key)?;
        let tmp = self.write_tmp(key, data).await?;
        let step = async {
            self.with_parent(&path, || self.platform.hard_link(&tmp, &path)).await?;
            self.sync_parent(&path).await
        };
        let result = step.await.map_err(|e| classify(key, &e));
        self.discard(&tmp).await;
        result
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        let start = prefix.rfind('/').map_or("", |slash| &prefix[..slash]);
        if !start.is_empty() {
            check_key(start)?;
        }
        let mut found = Vec::new();
        let mut pending = vec![start.to_owned()];
        while let Some(dir) = pending.pop() {
            let entries = match self.platform.list_dir(&self.root.join(&dir)).await {
                Ok(entries) => entries,
                // No object has this prefix, or the last one went while we looked.
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
                Err(e) => return Err(classify(if dir.is_empty() { "object store" } else { &dir }, &e)),
            };
            for entry in entries {
                let key = if dir.is_empty() { entry.name } else { format!("{dir}/{}", entry.name) };
                if check_key(&key).is_err() {
                    continue;
                }
                if entry.is_dir {
                    pending.push(key);
                } else if key.starts_with(prefix) {
                    found.push(ObjectMeta { key, size_bytes: entry.len });
                }
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        let path = self.path(key)?;
        match self.platform.remove_file(&path).await {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(classify(key, &e)),
        }
        self.sync_parent(&path).await.map_err(|e| classify(key, &e))
    }
}

async fn read_open<F: File>(file: &F, key: &str, range: Option<Range<u64>>) -> Result<ObjectBytes, ObjectError>
where
    F::ReadBuf: Into<Vec<u8>>,
{
    let len = file.len().await.map_err(|e| classify(key, &e))?;
    let range = range.unwrap_or(0..len);
    if range.end > len {
        return Err(ObjectError::Corrupt(format!("{key}: object has {len} bytes, need {}", range.end)));
    }
    if range.end - range.start > GET_BYTES_MAX {
        return Err(ObjectError::Corrupt(format!("{key}: {len} bytes are too many for this object")));
    }
    let start = range.start / BLOCK_BYTES * BLOCK_BYTES;
    let end = range.end.next_multiple_of(BLOCK_BYTES);
    let blocks = file.read_at(start, to_usize(end - start)).await.map_err(|e| classify(key, &e))?;
    let (from, to) = (to_usize(range.start - start), to_usize(range.end - start));
    let shrank = || ObjectError::Corrupt(format!("{key}: object shrank while it was read"));
    ObjectBytes::part(blocks.into(), from..to).ok_or_else(shrank)
}

async fn write_open<P: Platform>(platform: &P, file: &P::File, data: &[u8]) -> io::Result<()> {
    let mut offset = 0;
    for part in data.chunks(WRITE_BYTES) {
        let mut buf = platform.alloc(part.len().next_multiple_of(BLOCK_BYTES as usize));
        buf[..part.len()].copy_from_slice(part);
        buf[part.len()..].fill(0);
        file.write_at(offset, buf).await?;
        offset += part.len() as u64;
    }
    file.set_len(data.len() as u64).await?;
    file.datasync().await
}

/// Creates the missing levels of `dir` and syncs the parent of each, so that none is lost in a crash.
async fn create_dir_durably<P: Platform>(platform: &P, dir: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    for level in dir.ancestors().filter(|level| !level.as_os_str().is_empty()) {
        match platform.list_dir(level).await {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(level),
            Err(e) => return Err(e),
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    platform.create_dir_all(dir).await?;
    for level in missing.iter().rev() {
        let parent = level.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        platform.sync_dir(parent).await?;
    }
    Ok(())
}

fn classify(key: &str, error: &io::Error) -> ObjectError {
    match error.kind() {
        io::ErrorKind::NotFound => ObjectError::NotFound(key.to_owned()),
        io::ErrorKind::AlreadyExists => ObjectError::AlreadyExists(key.to_owned()),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ObjectError::Fatal(format!("{key}: the object store is full ({error}): free space and try again"))
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ObjectError::Fatal(format!("{key}: {error}"))
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            ObjectError::Fatal(format!("{key}: {error} (part of the key is in use as another object)"))
        }
        _ => ObjectError::Retry(format!("{key}: {error}")),
    }
}

fn to_usize(len: u64) -> usize {
    usize::try_from(len).expect("bounded by GET_BYTES_MAX")
}

#[cfg(test)]
mod tests;
