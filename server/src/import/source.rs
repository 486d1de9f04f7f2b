//! The image being imported, whatever its format, as a device that many threads read at once.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use imago::format::gate::ImplicitOpenGate;
use imago::{FormatAccess, FormatDriverBuilder, Mapping, Storage, StorageOpenOptions};

use super::{ImageFormat, qcow2};
use crate::types::LOGICAL_BLOCK_BYTES;

type ImagoFile = imago::file::File;

/// A chain of backing files longer than this is taken for a loop.
const BACKING_FILES_MAX: usize = 64;

/// Magics of formats that must not be mistaken for raw disks: offset, bytes, name.
const FOREIGN: [(u64, &[u8], &str); 7] = [
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"QED\0", "QED"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
];

/// An open image.
pub(super) struct Source {
    path: PathBuf,
    file: File,
    opened: Stamp,
    content: Content,
    /// Size of the disk in the image, as it is.
    pub image_bytes: u64,
    pub format: ImageFormat,
    /// What the operator should know.
    pub notes: Vec<String>,
}

enum Content {
    Raw,
    Qcow2 { disk: FormatAccess<ImagoFile>, cluster_bytes: u64 },
}

/// Tells whether a file was changed.
#[derive(PartialEq, Eq)]
struct Stamp {
    len: u64,
    mtime: (i64, i64),
}

impl Source {
    /// Opens an image; `format` none: detects it by its magic.
    pub(super) fn open(path: &Path, format: Option<ImageFormat>) -> Result<Source, String> {
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let metadata = file.metadata().map_err(|e| e.to_string())?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err("it is neither a file nor a block device".to_owned());
        }
        let file_bytes = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        let format = match format {
            Some(format) => format,
            None => detect(&file)?,
        };
        let opened = Stamp::of(&metadata);
        let path = path.to_path_buf();
        let mut source =
            Source { path, file, opened, content: Content::Raw, image_bytes: file_bytes, format, notes: Vec::new() };
        if format == ImageFormat::Qcow2 {
            source.open_qcow2(file_bytes)?;
        }
        match source.image_bytes {
            0 => Err("it is empty".to_owned()),
            size if size.checked_next_multiple_of(u64::from(LOGICAL_BLOCK_BYTES)).is_none() => {
                Err(format!("its size of {size} bytes is impossible"))
            }
            _ => Ok(source),
        }
    }

    /// Size of the device: the image's, padded with zeroes to a multiple of 512.
    pub(super) fn device_bytes(&self) -> u64 {
        self.image_bytes.next_multiple_of(u64::from(LOGICAL_BLOCK_BYTES))
    }

    /// Reads `len` bytes at `offset`, zeroes past the end of the image. `None`: known to be all zeroes without reading.
    pub(super) fn read(&self, offset: u64, len: u32) -> io::Result<Option<Vec<u8>>> {
        match &self.content {
            Content::Raw => self.read_raw(offset, len),
            Content::Qcow2 { disk, cluster_bytes } => self.read_qcow2(disk, *cluster_bytes, offset, len),
        }
    }

    /// Whether the file is still the one that was opened, as far as its length and times tell.
    pub(super) fn is_unchanged(&self) -> io::Result<bool> {
        Ok(Stamp::of(&self.file.metadata()?) == self.opened)
    }

    fn open_qcow2(&mut self, file_bytes: u64) -> Result<(), String> {
        let facts = qcow2::check(&self.file, file_bytes)?;
        if facts.internal_snapshots > 0 {
            let n = facts.internal_snapshots;
            self.notes.push(format!("{n} internal qcow2 snapshot(s) are not imported, only the current content"));
        }
        let gate = Gate::default();
        let chain = Arc::clone(&gate.chain);
        let storage = StorageOpenOptions::new().filename(&self.path);
        let storage = ImagoFile::open(storage).map_err(|e| e.to_string())?;
        let disk = imago::qcow2::Qcow2::<ImagoFile>::builder(storage).open(gate).map_err(|e| e.to_string())?;
        let disk = FormatAccess::new(disk);
        self.image_bytes = disk.size();
        let chain = chain.lock().unwrap_or_else(PoisonError::into_inner);
        for path in &chain.files {
            self.notes.push(format!("includes the content of backing file {}", path.display()));
        }
        let cluster_bytes = facts.cluster_bytes.max(chain.cluster_bytes_max);
        self.content = Content::Qcow2 { disk, cluster_bytes };
        Ok(())
    }

    fn read_raw(&self, offset: u64, len: u32) -> io::Result<Option<Vec<u8>>> {
        let end = (offset + u64::from(len)).min(self.image_bytes);
        if self.next_data(offset)? >= end {
            return Ok(None);
        }
        let mut buf = vec![0; len as usize];
        let inside = usize::try_from(end - offset).expect("at most a chunk");
        self.file.read_exact_at(&mut buf[..inside], offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(e.kind(), "the image shrank while it was read"),
            _ => e,
        })?;
        Ok(Some(buf))
    }

    /// Where the next byte is that is not in a hole; the filesystem may not know, and then it's `offset`.
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        let Ok(at) = libc::off_t::try_from(offset) else { return Ok(offset) };
        // SAFETY: the descriptor is open as long as `self.file` lives. All reads are positioned, so the file
        // position this call moves means nothing to anyone.
        let data = unsafe { libc::lseek(self.file.as_raw_fd(), at, libc::SEEK_DATA) };
        if let Ok(data) = u64::try_from(data) {
            return Ok(data);
        }
        match io::Error::last_os_error().raw_os_error() {
            // No data up to the end of the file.
            Some(libc::ENXIO) => Ok(u64::MAX),
            _ => Ok(offset),
        }
    }

    fn read_qcow2(
        &self,
        disk: &FormatAccess<ImagoFile>,
        cluster_bytes: u64,
        offset: u64,
        len: u32,
    ) -> io::Result<Option<Vec<u8>>> {
        let end = (offset + u64::from(len)).min(self.image_bytes);
        let mut at = offset;
        let mut has_data = false;
        while at < end {
            let (mapping, mapped) = disk.get_mapping(at, end - at)?;
            match mapping {
                Mapping::Zero { .. } => {}
                Mapping::Eof { .. } => break,
                Mapping::Raw { storage, offset: host, .. } => {
                    has_data = true;
                    check_in_file(storage, host, mapped, cluster_bytes)?;
                }
                _ => has_data = true,
            }
            if mapped == 0 {
                return Err(io::Error::other(format!("the image maps nothing at {at}")));
            }
            at += mapped;
        }
        if !has_data {
            return Ok(None);
        }
        let mut buf = vec![0; len as usize];
        let inside = usize::try_from(end - offset).expect("at most a chunk");
        disk.read(&mut buf[..inside], offset)?;
        Ok(Some(buf))
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp { len: metadata.len(), mtime: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

/// A cluster may end past the end of the file (qemu does not fill up the last one), but it must begin inside.
fn check_in_file(storage: &ImagoFile, host: u64, len: u64, cluster_bytes: u64) -> io::Result<()> {
    let last_cluster = (host + len - 1) / cluster_bytes * cluster_bytes;
    let file_bytes = storage.size()?;
    if last_cluster.max(host) < file_bytes {
        return Ok(());
    }
    let name = storage.get_filename().unwrap_or_default();
    let text = format!("{} is truncated: data at {last_cluster}, end at {file_bytes}", name.display());
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, text))
}

fn detect(file: &File) -> Result<ImageFormat, String> {
    let has = |at: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        file.read_exact_at(&mut found, at).is_ok() && found == magic
    };
    if has(0, &qcow2::MAGIC) {
        return Ok(ImageFormat::Qcow2);
    }
    match FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)) {
        Some((.., name)) => Err(format!(
            "it looks like {name}: convert it with 'qemu-img convert -O qcow2', or import it as it is with --format raw"
        )),
        None => Ok(ImageFormat::Raw),
    }
}

/// Opens the backing files that an image names: checks each as its image was checked, and notes its name.
#[derive(Clone, Default)]
struct Gate {
    chain: Arc<Mutex<Chain>>,
}

#[derive(Default)]
struct Chain {
    files: Vec<PathBuf>,
    cluster_bytes_max: u64,
}

impl ImplicitOpenGate<ImagoFile> for Gate {
    fn open_format<F: FormatDriverBuilder<ImagoFile>>(&mut self, builder: F) -> io::Result<FormatAccess<ImagoFile>> {
        Ok(FormatAccess::new(builder.open(self.clone())?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImagoFile> {
        let path = options.get_filename().map(Path::to_path_buf).unwrap_or_default();
        let mut chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        if chain.files.len() >= BACKING_FILES_MAX {
            return Err(io::Error::other(format!("more than {BACKING_FILES_MAX} backing files")));
        }
        let file = File::open(&path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("it is neither a file nor a block device"));
        }
        if detect(&file).map_err(io::Error::other)? == ImageFormat::Qcow2 {
            let facts = qcow2::check(&file, (&file).seek(SeekFrom::End(0))?).map_err(io::Error::other)?;
            chain.cluster_bytes_max = chain.cluster_bytes_max.max(facts.cluster_bytes);
        }
        chain.files.push(path);
        ImagoFile::open(options)
    }
}
