//! The simulated disk: a tree of names over files, where nothing survives a crash for certain but what was synced.
//!
//! Fault model: after a crash any subset of the unsynced changes is there, writes torn at 512-byte sectors, holes
//! and clones at blocks; names appear and vanish only as whole operations, and those not covered by a `sync_dir` in any
//! subset. A failed datasync leaves the covered changes durable or lost for good, part by part (no later sync retries them).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::content::Inode;
use super::faults::Faults;
use super::random::SimRng;
use crate::platform::{DirEntry, OpenMode, SpaceInfo};

/// Size of a disk without a set capacity.
const CAPACITY_DEFAULT: u64 = 1 << 40;

pub(super) type InodeRc = Rc<RefCell<Inode>>;

#[derive(Clone)]
enum Node {
    Dir,
    File(InodeRc),
}

#[derive(Clone)]
enum NameChange {
    Add { path: PathBuf, node: Node },
    Remove { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf, node: Node },
}

struct PendingName {
    id: u64,
    change: NameChange,
}

/// When, relative to a durable point, the power fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPoint {
    /// The sync was called and has done nothing yet.
    Before,
    /// The sync is complete, but its caller does not know.
    After,
}

pub(super) struct Disk {
    names: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
    pending: Vec<PendingName>,
    next_id: u64,
    capacity: u64,
    /// Whether files may share blocks.
    pub(super) shares_extents: bool,
    pub(super) faults: Faults,
    pub(super) rng: SimRng,
    syncs: u64,
    crash_at_sync: Option<(u64, CrashPoint)>,
}

impl Disk {
    pub(super) fn new(seed: u64) -> Disk {
        let root: BTreeMap<PathBuf, Node> = [(PathBuf::from("/"), Node::Dir)].into();
        Disk {
            names: root.clone(),
            durable: root,
            pending: Vec::new(),
            next_id: 0,
            capacity: CAPACITY_DEFAULT,
            shares_extents: false,
            faults: Faults::default(),
            rng: SimRng::stream(seed, "disk"),
            syncs: 0,
            crash_at_sync: None,
        }
    }

    /// The same disk again, with faults of its own; hard links stay links.
    pub(super) fn fork(&self, seed: u64) -> Disk {
        let mut copies: Vec<(InodeRc, InodeRc)> = Vec::new();
        let mut copy = |node: &Node| match node {
            Node::Dir => Node::Dir,
            Node::File(inode) => Node::File(match copies.iter().find(|(old, _)| Rc::ptr_eq(old, inode)) {
                Some((_, new)) => new.clone(),
                None => {
                    let new = Rc::new(RefCell::new(inode.borrow().clone()));
                    copies.push((inode.clone(), new.clone()));
                    new
                }
            }),
        };
        let tree = |names: &BTreeMap<PathBuf, Node>, copy: &mut dyn FnMut(&Node) -> Node| {
            names.iter().map(|(path, node)| (path.clone(), copy(node))).collect()
        };
        let mut fork = Disk::new(seed);
        fork.names = tree(&self.names, &mut copy);
        fork.durable = tree(&self.durable, &mut copy);
        fork.pending = self.pending.iter().map(|p| PendingName { id: p.id, change: p.change.map(&mut copy) }).collect();
        fork.next_id = self.next_id;
        fork.shares_extents = self.shares_extents;
        fork
    }

    pub(super) fn set_capacity(&mut self, bytes: Option<u64>) {
        self.capacity = bytes.unwrap_or(CAPACITY_DEFAULT);
    }

    pub(super) fn syncs(&self) -> u64 {
        self.syncs
    }

    pub(super) fn crash_at_sync(&mut self, point: Option<(u64, CrashPoint)>) {
        self.crash_at_sync = point;
    }

    /// Counts a durable point; says whether the power fails at it.
    pub(super) fn begin_sync(&mut self) -> Option<CrashPoint> {
        self.syncs += 1;
        self.crash_at_sync.filter(|(at, _)| *at == self.syncs).map(|(_, point)| point)
    }

    pub(super) fn space(&self) -> SpaceInfo {
        let mut files: Vec<&InodeRc> = self.files().collect();
        files.sort_by_key(|file| Rc::as_ptr(file));
        files.dedup_by_key(|file| Rc::as_ptr(file));
        let used: u64 = files.iter().map(|file| file.borrow().live.allocated_bytes()).sum();
        SpaceInfo { total_bytes: self.capacity, free_bytes: self.capacity.saturating_sub(used) }
    }

    pub(super) fn open(&mut self, path: &Path, mode: OpenMode) -> io::Result<InodeRc> {
        match (self.names.get(path), mode) {
            (Some(Node::Dir), _) => Err(error(io::ErrorKind::IsADirectory, path)),
            (Some(Node::File(_)), OpenMode::CreateNew) => Err(error(io::ErrorKind::AlreadyExists, path)),
            (Some(Node::File(inode)), _) => Ok(inode.clone()),
            (None, OpenMode::CreateNew) => {
                self.check_parent(path)?;
                let inode = InodeRc::default();
                self.change(NameChange::Add { path: path.to_owned(), node: Node::File(inode.clone()) });
                Ok(inode)
            }
            (None, _) => Err(error(io::ErrorKind::NotFound, path)),
        }
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = Node::File(self.file(from)?);
        self.check_parent(to)?;
        if matches!(self.names.get(to), Some(Node::Dir)) {
            return Err(error(io::ErrorKind::IsADirectory, to));
        }
        self.change(NameChange::Rename { from: from.to_owned(), to: to.to_owned(), node });
        Ok(())
    }

    pub(super) fn hard_link(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = Node::File(self.file(from)?);
        self.check_parent(to)?;
        if self.names.contains_key(to) {
            return Err(error(io::ErrorKind::AlreadyExists, to));
        }
        self.change(NameChange::Add { path: to.to_owned(), node });
        Ok(())
    }

    pub(super) fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        self.file(path)?;
        self.change(NameChange::Remove { path: path.to_owned() });
        Ok(())
    }

    pub(super) fn create_dir_all(&mut self, path: &Path) -> io::Result<()> {
        let missing: Vec<PathBuf> =
            path.ancestors().take_while(|p| !self.names.contains_key(*p)).map(Path::to_owned).collect();
        let existing = path.ancestors().nth(missing.len()).and_then(|p| self.names.get(p));
        if !matches!(existing, Some(Node::Dir)) {
            return Err(error(io::ErrorKind::NotADirectory, path));
        }
        for path in missing.into_iter().rev() {
            self.change(NameChange::Add { path, node: Node::Dir });
        }
        Ok(())
    }

    pub(super) fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        match self.names.get(path) {
            Some(Node::Dir) => Ok(self.children(path)),
            Some(Node::File(_)) => Err(error(io::ErrorKind::NotADirectory, path)),
            None => Err(error(io::ErrorKind::NotFound, path)),
        }
    }

    /// What a `sync_dir` that starts now covers.
    pub(super) fn dir_sync_point(&self, path: &Path) -> io::Result<u64> {
        match self.names.get(path) {
            Some(Node::Dir) => Ok(self.next_id),
            _ => Err(error(io::ErrorKind::NotFound, path)),
        }
    }

    pub(super) fn sync_dir(&mut self, path: &Path, point: u64) {
        let (covered, rest) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|p: &PendingName| p.id <= point && p.change.is_in(path));
        self.pending = rest;
        for pending in covered {
            pending.change.apply(&mut self.durable);
        }
    }

    /// Power cut: see the fault model above.
    pub(super) fn crash(&mut self) {
        let keep_ppm = [0, 500_000, 900_000, 1_000_000][self.rng.index(4)];
        let mut files: Vec<InodeRc> = self.files().cloned().collect();
        for pending in std::mem::take(&mut self.pending) {
            if self.rng.chance(keep_ppm) {
                pending.change.apply(&mut self.durable);
            }
        }
        self.drop_orphans();
        self.names = self.durable.clone();
        // Each file once, in the order of names: of the tree before the crash, then those only the new tree has.
        files.extend(self.files().cloned());
        let mut done: Vec<*const RefCell<Inode>> = Vec::new();
        for file in files {
            if !done.contains(&Rc::as_ptr(&file)) {
                done.push(Rc::as_ptr(&file));
                file.borrow_mut().crash(&mut self.rng);
            }
        }
        self.crash_at_sync = None;
    }

    pub(super) fn file(&self, path: &Path) -> io::Result<InodeRc> {
        match self.names.get(path) {
            Some(Node::File(inode)) => Ok(inode.clone()),
            Some(Node::Dir) => Err(error(io::ErrorKind::IsADirectory, path)),
            None => Err(error(io::ErrorKind::NotFound, path)),
        }
    }

    fn files(&self) -> impl Iterator<Item = &InodeRc> {
        self.names.values().filter_map(|node| match node {
            Node::File(inode) => Some(inode),
            Node::Dir => None,
        })
    }

    fn children(&self, path: &Path) -> Vec<DirEntry> {
        let in_dir = self.names.iter().filter(|(name, _)| name.parent() == Some(path));
        in_dir.filter_map(|(name, node)| dir_entry(name, node)).collect()
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.next_id += 1;
        self.pending.push(PendingName { id: self.next_id, change });
    }

    fn check_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent().and_then(|parent| self.names.get(parent)) {
            Some(Node::Dir) => Ok(()),
            _ => Err(error(io::ErrorKind::NotFound, path)),
        }
    }

    /// A name whose directory did not survive is gone too.
    fn drop_orphans(&mut self) {
        let names: Vec<PathBuf> = self.durable.keys().cloned().collect();
        for name in names {
            // Parents sort before their children, so one pass removes whole subtrees.
            if name.parent().is_some_and(|parent| !matches!(self.durable.get(parent), Some(Node::Dir))) {
                self.durable.remove(&name);
            }
        }
    }
}

impl NameChange {
    fn map(&self, copy: &mut dyn FnMut(&Node) -> Node) -> NameChange {
        match self.clone() {
            NameChange::Add { path, node } => NameChange::Add { path, node: copy(&node) },
            NameChange::Remove { path } => NameChange::Remove { path },
            NameChange::Rename { from, to, node } => NameChange::Rename { from, to, node: copy(&node) },
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        match self {
            NameChange::Add { path, .. } | NameChange::Remove { path } => path.parent() == Some(dir),
            NameChange::Rename { from, to, .. } => from.parent() == Some(dir) || to.parent() == Some(dir),
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            NameChange::Add { path, node } => {
                names.insert(path.clone(), node.clone());
            }
            NameChange::Remove { path } => {
                names.remove(path);
            }
            NameChange::Rename { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), node.clone());
            }
        }
    }
}

fn dir_entry(path: &Path, node: &Node) -> Option<DirEntry> {
    let name = path.file_name()?.to_string_lossy().into_owned();
    Some(match node {
        Node::Dir => DirEntry { name, is_dir: true, len: 0 },
        Node::File(inode) => DirEntry { name, is_dir: false, len: inode.borrow().live.len },
    })
}

fn error(kind: io::ErrorKind, path: &Path) -> io::Error {
    io::Error::new(kind, format!("{}: {}", path.display(), io::Error::from(kind)))
}
