//! File systems on a loop device over nbdfuse, which is a guest as demanding as a VM: a tree of files is worked on, checked by
//! fsck, and found again after the server was killed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use super::maps::map;
use super::{hydrate, served};
use crate::disk::{Disk, FileSystem};
use crate::faults::eventually;
use crate::harness::{Agent, Process, Random, Site};
use crate::image_file::{MIB, noise};

/// XFS makes none smaller than 300 MiB.
const DEVICE: &str = "320MiB";
/// Files worked on, beside the copied tree.
const FILES: u64 = 200;

/// A volume as a loop device, in a mount namespace that ends with the test.
struct LoopDevice {
    /// Open as long as the device is there: it detaches itself with the last user, even if that was killed.
    _open: File,
    path: String,
    fuse: Process,
}

impl LoopDevice {
    fn new(disk: &Disk, agent: &Agent, volume: &str) -> LoopDevice {
        let folder = disk.mount().with_file_name("fuse");
        fs::create_dir_all(&folder).expect("mount point");
        let file = folder.join("disk");
        let fuse =
            Process::spawn("nbdfuse", disk.command("nbdfuse", &[&file.display().to_string(), &agent.uri(volume)]));
        eventually("nbdfuse mounts", || disk.outside(&file).exists());
        let path = disk.run("losetup", &["--find", "--show", &file.display().to_string()]).success().trim().to_owned();
        let open = File::open(&path).expect("the loop device");
        disk.run("losetup", &["--detach", &path]).success();
        LoopDevice { _open: open, path, fuse }
    }

    /// Detaches it as an orderly host does; all it wrote is flushed.
    fn close(self, disk: &Disk) {
        let LoopDevice { _open: open, path, mut fuse } = self;
        drop(open);
        let folder = disk.mount().with_file_name("fuse").display().to_string();
        eventually("the loop device lets go", || disk.run("losetup", &[&path]).code != 0);
        disk.run("umount", &[&folder]).success();
        assert!(fuse.wait(std::time::Duration::from_secs(60)).success(), "nbdfuse ends in order");
    }
}

/// What is found of a file: size, links and content, or where it points to.
type Tree = BTreeMap<String, String>;

fn tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list") {
            let path = entry.expect("entry").path();
            let about = path.symlink_metadata().expect("metadata");
            let found = if about.is_dir() {
                folders.push(path.clone());
                format!("folder {:o}", about.mode())
            } else if about.is_symlink() {
                format!("to {}", fs::read_link(&path).expect("link").display())
            } else {
                let mut hasher = DefaultHasher::new();
                fs::read(&path).expect("read").hash(&mut hasher);
                format!("{} bytes, {} links, {:x}", about.len(), about.nlink(), hasher.finish())
            };
            tree.insert(path.strip_prefix(root).expect("below").display().to_string(), found);
        }
    }
    tree
}

/// What programs do to files: written, appended, cut, sparse, renamed over each other, linked, removed, synced.
fn work(root: &Path, seed: u64) {
    let mut rng = Random::new(seed);
    let path = |n: u64| root.join(format!("folder-{}/file-{n}", n % 7));
    (0..7).for_each(|n| fs::create_dir(root.join(format!("folder-{n}"))).expect("folder"));
    for n in 0..FILES {
        let mut file = File::create(path(n)).expect("create");
        let len = [10, 4096, 70_000, 400_000][rng.below(4) as usize] + rng.below(5000);
        file.write_all(&noise(seed ^ n, len)).expect("write");
        match rng.below(8) {
            0 => file.set_len(len / 3).expect("cut"),
            1 => file.write_all_at(b"far behind the end", len * 50).expect("a sparse file"),
            2 => file.write_all_at(&noise(n, 3000), len / 2).expect("overwrite"),
            3 => file.sync_all().expect("fsync"),
            _ => {}
        }
        let earlier = rng.below(n + 1);
        match rng.below(8) {
            0 if earlier != n && path(earlier).exists() => fs::remove_file(path(earlier)).expect("remove"),
            1 if earlier != n => fs::rename(path(n), path(earlier)).expect("rename"),
            2 => fs::hard_link(path(n), path(n).with_extension("link")).expect("hard link"),
            3 => symlink(format!("../file-{earlier}"), path(n).with_extension("symlink")).expect("symlink"),
            _ => {}
        }
    }
    let large = File::create(root.join("large")).expect("create");
    large.write_all_at(&noise(seed, 24 * MIB), 0).expect("write");
    large.sync_all().expect("fsync");
}

/// Bytes of the volume that are not stored.
fn holes(site: &Site, uri: &str) -> u64 {
    map(site, uri, "base:allocation").iter().filter(|extent| extent.2 == 3).map(|extent| extent.1).sum()
}

fn a_tree_of_files_survives(kind: FileSystem) {
    let (make, check): (&[&str], &[&str]) = match kind {
        FileSystem::Ext4 => (&["mkfs.ext4", "-q", "-F"], &["fsck.ext4", "-f", "-n"]),
        FileSystem::Xfs => (&["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"]),
    };
    if Disk::set_up(&["unshare", "nsenter", "losetup", "nbdfuse", "fstrim", make[0], check[0]]).is_none() {
        return;
    }
    let (site, node, agent) = served(1);
    // One over the content of a snapshot that is on its way, the other on nothing.
    match kind {
        FileSystem::Ext4 => {
            let create = ["volume", "create", "guest", "--snapshot", "debian-12", "--size", DEVICE];
            node.volley(&site, &create).success();
            hydrate(&site, &node, "guest");
        }
        FileSystem::Xfs => drop(node.volley(&site, &["volume", "create", "guest", "--size", DEVICE]).success()),
    }
    let uri = agent.uri("guest");
    let here = Site::new();
    let mount = here.path("mount");
    let disk = Disk::mount_by(here, mount.clone(), "true");
    let on = |command: &[&str], last: &[&str]| disk.run(command[0], &[&command[1..], last].concat()).success();
    let mount = mount.display().to_string();

    let device = LoopDevice::new(&disk, &agent, "guest");
    on(make, &[&device.path]);
    on(&["mount"], &[&device.path, &mount]);
    let root = disk.outside(disk.mount());
    on(&["cp", "-a", env!("CARGO_MANIFEST_DIR")], &[&format!("{mount}/tree")]);
    work(&root, 7);
    on(&["sync", "-f"], &[&mount]);
    let (before, with_large) = (tree(&root), holes(&site, &uri));
    assert!(before.len() as u64 > FILES / 2, "{} files", before.len());

    // Space of removed files goes back to the node.
    fs::remove_file(root.join("large")).expect("remove");
    // ext4 trims what it has committed as free.
    on(&["sync", "-f"], &[&mount]);
    on(&["fstrim"], &[&mount]);
    let trimmed = holes(&site, &uri);
    assert!(trimmed > with_large + 16 * MIB, "{with_large} bytes of holes before fstrim, {trimmed} after");

    let expected = tree(&root);
    on(&["umount"], &[&mount]);
    on(check, &[&device.path]);
    // All that the file system wrote is flushed when it is unmounted: nothing more is needed for it to be there.
    node.kill();
    let node = site.start_default();
    on(check, &[&device.path]);
    device.close(&disk);
    assert!(agent.stop().success());

    let agent = site.agent("agent-2", &[]);
    let device = LoopDevice::new(&disk, &agent, "guest");
    on(check, &[&device.path]);
    on(&["mount"], &[&device.path, &mount]);
    let found = tree(&root);
    for (path, about) in &expected {
        assert_eq!(found.get(path), Some(about), "{path}");
    }
    assert_eq!(found.len(), expected.len());
    // And it can be worked on.
    fs::create_dir(root.join("again")).expect("folder");
    work(&root.join("again"), 8);
    on(&["umount"], &[&mount]);
    on(check, &[&device.path]);
    device.close(&disk);
    assert!(node.stop().0.success());
}

#[test]
fn a_tree_of_files_on_ext4_survives() {
    a_tree_of_files_survives(FileSystem::Ext4);
}

#[test]
fn a_tree_of_files_on_xfs_survives() {
    a_tree_of_files_survives(FileSystem::Xfs);
}
