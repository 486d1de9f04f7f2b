//! File systems of the tests' own: on a loop device, mounted in a namespace that ends with the test.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::{Outcome, Process, Site, available, run, run_in, skip};

/// So often the space of a disk under load is looked at and taken.
const FILL_ATTEMPTS: u32 = 20;
/// Mounting takes less.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
}

/// A mounted file system. The process that holds its mount namespace dies with the test, and the mount and the loop device
/// with it.
pub(crate) struct Disk {
    _holder: Process,
    mount: PathBuf,
    pid: u32,
    /// Its folder goes away last.
    _site: Site,
}

impl Disk {
    /// A file system of `size` bytes on a file; `None` where that can't be done, which was said.
    pub(crate) fn new(kind: FileSystem, size: u64) -> Option<Disk> {
        Disk::with(kind, size, &[])
    }

    /// Likewise, made with more options.
    pub(crate) fn with(kind: FileSystem, size: u64, options: &[&str]) -> Option<Disk> {
        let make: &[&str] = match kind {
            FileSystem::Ext4 => &["mkfs.ext4", "-q", "-F", "-m", "0"],
            FileSystem::Xfs => &["mkfs.xfs", "-q", "-f"],
        };
        Disk::set_up(&["unshare", make[0]])?;
        let site = Site::new();
        let file = site.path("disk.img");
        std::fs::File::create(&file).expect("create").set_len(size).expect("size");
        run_in(&site.path(""), make[0], &[&make[1..], options, &["disk.img"]].concat()).success();
        let mount = site.path("mount");
        let line = format!("mount -o loop '{}' '{}'", file.display(), mount.display());
        Some(Disk::mount_by(site, mount, &line))
    }

    /// Whether this process may mount, and the programs are there.
    pub(crate) fn set_up(programs: &[&str]) -> Option<()> {
        // SAFETY: geteuid reads a number of the process.
        let root = unsafe { libc::geteuid() } == 0;
        (available(programs) && (root || skip("mounting a file system needs root"))).then_some(())
    }

    /// Runs a shell line that mounts at `mount` in a namespace of its own.
    pub(crate) fn mount_by(site: Site, mount: PathBuf, line: &str) -> Disk {
        std::fs::create_dir(&mount).expect("mount point");
        let mut command = Command::new("unshare");
        let script = format!("{line}; echo mounted $$; exec sleep infinity");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", &script]);
        let mut holder = Process::spawn("mount", command);
        let line = holder.wait_line(MOUNT_TIMEOUT, |line| line.starts_with("mounted"));
        let pid = line.trim_start_matches("mounted ").parse().expect("a pid");
        Disk { _holder: holder, mount, pid, _site: site }
    }

    /// Path of the file system's root in its namespace.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// A command in the namespace.
    pub(crate) fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.pid)).arg(program).args(args);
        command
    }

    /// Runs a command in the namespace to its end.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Outcome {
        run(self.command(program, args))
    }

    /// The process whose mount namespace it is.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// A path of the namespace as other processes see it.
    pub(crate) fn outside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.pid));
        root.join(path.strip_prefix("/").expect("absolute"))
    }

    /// Writes a file until the disk is full; removing it makes room again.
    pub(crate) fn fill(&self, leave_bytes: u64) -> PathBuf {
        let path = self.outside(&self.mount.join("filler"));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path).expect("the filler");
        // Others write meanwhile: what was free a moment ago may not be any more.
        for _ in 0..FILL_ATTEMPTS {
            let wanted = free_bytes(&path.with_file_name(".")).saturating_sub(leave_bytes);
            let about = file.metadata().expect("metadata");
            let from = about.len().max(about.blocks() * 512);
            // SAFETY: allocates space in an open file of ours.
            let done = unsafe {
                libc::fallocate(std::os::fd::AsRawFd::as_raw_fd(&file), 0, from as i64, wanted.max(1) as i64)
            };
            let error = std::io::Error::last_os_error();
            if done == 0 {
                return path;
            }
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "fallocate {wanted} bytes: {error}");
        }
        path
    }
}

fn free_bytes(dir: &Path) -> u64 {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).expect("no NUL");
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends with NUL, and `stat` is written by a call that succeeds.
    let stat = unsafe {
        assert_eq!(libc::statvfs(path.as_ptr(), stat.as_mut_ptr()), 0, "{}", std::io::Error::last_os_error());
        stat.assume_init()
    };
    stat.f_bavail * stat.f_frsize
}

/// Rots one bit of a file.
pub(crate) fn flip(file: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(file).expect("the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("written");
    file.sync_all().expect("synced");
}
