//! Where a file has data and where it has holes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Whether any byte of the range (not past the end of the file) is backed by data.
pub(super) fn has_data(file: &File, start: u64, end: u64) -> io::Result<bool> {
    Ok(seek(file, start, libc::SEEK_DATA)?.is_some_and(|data| data < end))
}

/// `None`: there is no such place before the end of the file.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open as long as `file` is; the call touches no memory of ours.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::has_data;

    #[test]
    fn holes_and_data_are_told_apart() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[7; 4096], 1 << 20).unwrap();
        file.sync_all().unwrap();
        assert!(has_data(&file, 0, 4 << 20).unwrap());
        assert!(has_data(&file, 1 << 20, (1 << 20) + 4096).unwrap());
        assert!(!has_data(&file, 0, 1 << 20).unwrap());
        assert!(!has_data(&file, 2 << 20, 4 << 20).unwrap());
        assert!(!has_data(&file, 5 << 20, 6 << 20).unwrap());
    }
}
