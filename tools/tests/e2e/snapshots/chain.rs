//! A hundred snapshots of a volume in use, of which half are deleted, while fio verifies another volume and the server is killed at random:
//! what is left is restored, and each is the volume at one moment.

use std::collections::BTreeSet;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Lab, Writer, restored};
use crate::disk::{Disk, FileSystem};
use crate::faults::eventually;
use crate::harness::{Node, Random, available, number};
use crate::image_file::MIB;
use crate::torture::{Fio, SetAtEnd, seed, verify_with_fio};

const IMAGE_BYTES: u64 = 4 * MIB;
const SNAPSHOTS: usize = 100;
const KILLS: usize = 6;
/// The server lives up to so long while a snapshot is taken.
const LIFE_MAX_MS: u64 = 120;
/// One of so many snapshots is of both volumes.
const GROUP_EVERY: usize = 10;
const COLLECT_EVERY: usize = 25;
/// fio leaves the others some of the processor, and verifies often.
const FIO: Fio = Fio { iops: 400, bytes: "2M" };
/// Restored at the same time.
const READERS: usize = 3;

/// A snapshot of the volume, and after which writes it may have been taken.
struct Taken {
    name: String,
    flushed: u64,
    begun: u64,
}

struct Chain<'a> {
    lab: &'a Lab,
    node: Node,
    /// Of the guest: its last write that was begun, and the last one that a flush has covered.
    begun: Arc<AtomicU64>,
    flushed: Arc<AtomicU64>,
    random: Random,
    taken: Vec<Taken>,
    /// Snapshots of fio's volume.
    beside: Vec<String>,
    stalls_us: Vec<u64>,
    deleting: Vec<Child>,
}

impl Chain<'_> {
    fn run(&mut self) {
        let mut kills = BTreeSet::new();
        while kills.len() < KILLS {
            kills.insert(usize::try_from(self.random.below(SNAPSHOTS as u64)).expect("small"));
        }
        let mut deleted = BTreeSet::new();
        for at in 0..SNAPSHOTS {
            let killed = kills.contains(&at);
            if !(killed && self.kill(at)) {
                self.take(at, !killed && at % GROUP_EVERY == GROUP_EVERY - 1);
            }
            // One of each two goes: mostly of those before, while the next one is taken, and now and then the last one of all.
            if at % 2 == 1 {
                let now = self.random.below(4) == 0;
                let which = if now { at } else { at - 1 };
                self.delete(which, now);
                deleted.insert(which);
            }
            if at % COLLECT_EVERY == COLLECT_EVERY - 1 {
                self.end_deletions();
                self.lab.site.volley(&["snapshot", "gc", "--grace", "0s"]).success();
            }
        }
        self.end_deletions();
        for at in deleted.iter().rev() {
            self.taken.remove(*at);
        }
        assert_eq!(self.taken.len(), SNAPSHOTS / 2);
        self.lab.site.volley(&["snapshot", "gc", "--grace", "0s"]).success();
    }

    fn take(&mut self, at: usize, both: bool) {
        let (name, flushed) = (format!("s{at}"), self.flushed.load(Ordering::SeqCst));
        let volumes: &[&str] = if both { &["vm", "fio"] } else { &["vm"] };
        let args = [&["snapshot", "create"][..], volumes, &["--name", &name, "--wait"]].concat();
        let task = self.node.json(&self.lab.site, &args);
        let begun = self.begun.load(Ordering::SeqCst);
        self.stalls_us.push(number(&task["snapshots"][0], "stall_us"));
        let name = if both { format!("{name}-vm") } else { name };
        self.taken.push(Taken { name, flushed, begun });
        if both {
            self.beside.push(format!("s{at}-fio"));
        }
    }

    /// Kills the server while it takes a snapshot. Whether it was taken all the same.
    fn kill(&mut self, at: usize) -> bool {
        let (name, flushed) = (format!("s{at}"), self.flushed.load(Ordering::SeqCst));
        let site = &self.lab.site;
        let mut taking =
            site.volley_command(&["--server", &self.node.http, "snapshot", "create", "vm", "--name", &name, "--wait"]);
        let mut taking = taking.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("volley");
        std::thread::sleep(Duration::from_millis(self.random.below(LIFE_MAX_MS)));
        self.node.crash();
        taking.wait().expect("volley ends");
        self.node = self.lab.start();
        // What was not flushed is sent again, in any order, before the guest goes on.
        let begun = self.begun.load(Ordering::SeqCst);
        eventually("another flush", || self.flushed.load(Ordering::SeqCst) > begun + 16);
        let exists = site.volley(&["snapshot", "show", &name]).code == 0;
        if exists {
            self.taken.push(Taken { name, flushed, begun });
        }
        exists
    }

    fn delete(&mut self, at: usize, now: bool) {
        let mut command = self.lab.site.volley_command(&["snapshot", "delete", &self.taken[at].name]);
        let mut deleting = command.stdout(Stdio::null()).spawn().expect("volley");
        match now {
            true => assert!(deleting.wait().expect("volley ends").success(), "a deletion failed"),
            false => self.deleting.push(deleting),
        }
    }

    fn end_deletions(&mut self) {
        for mut deleting in self.deleting.drain(..) {
            assert!(deleting.wait().expect("volley ends").success(), "a deletion failed");
        }
    }

    /// Makes a volume of each snapshot that is left, and looks after which write it was taken.
    fn restore_all(&self) {
        let (next, found) = (AtomicUsize::new(0), Mutex::new(vec![0; self.taken.len()]));
        let (site, history, http, data) = (&self.lab.site, &self.lab.history, &self.node.http, &self.node.data);
        let taken = &self.taken;
        std::thread::scope(|readers| {
            let one = || {
                loop {
                    let at = next.fetch_add(1, Ordering::SeqCst);
                    let Some(taken) = taken.get(at) else { return };
                    let content = restored(site, http, data, &taken.name, IMAGE_BYTES);
                    let write = history.find(&content, &taken.name);
                    let (flushed, begun) = (taken.flushed, taken.begun);
                    assert!(
                        (flushed..=begun).contains(&write),
                        "{}: write {write}, not {flushed} to {begun}",
                        taken.name
                    );
                    found.lock().expect("no reader failed")[at] = write;
                }
            };
            (0..READERS).for_each(|_| drop(readers.spawn(one)));
        });
        let found = found.into_inner().expect("no reader failed");
        assert!(found.is_sorted(), "each is later than the one before: {found:?}");
    }
}

fn a_chain_of_snapshots(file_system: FileSystem) {
    if !available(&["fio"]) {
        return;
    }
    let Some(disk) = Disk::new(file_system, 1 << 30) else { return };
    let (lab, seed, begun) = (Lab::with(Some(disk), IMAGE_BYTES), seed(), Instant::now());
    println!("VOLLEY_TORTURE_SEED={seed}");
    let node = lab.start();
    node.volley(&lab.site, &["volume", "create", "vm", "--snapshot", "debian"]).success();
    node.volley(&lab.site, &["volume", "create", "fio", "--snapshot", "debian", "--size", "32MiB"]).success();
    let agent = lab.site.agent("agent", &[]);
    let (uri, done) = (agent.uri("fio"), AtomicBool::new(false));
    std::thread::scope(|threads| {
        let _done = SetAtEnd(&done);
        let fio = threads.spawn(|| verify_with_fio(&uri, &done, &FIO));
        let writer = Writer::start(node.data.clone(), "vm", lab.history.blocks());
        let mut chain = Chain {
            lab: &lab,
            node,
            begun: writer.begun.clone(),
            flushed: writer.flushed.clone(),
            random: Random::new(seed),
            taken: Vec::new(),
            beside: Vec::new(),
            stalls_us: Vec::new(),
            deleting: Vec::new(),
        };
        chain.run();
        done.store(true, Ordering::SeqCst);
        let end = writer.end();
        let taken_after = begun.elapsed();
        chain.restore_all();
        let verified = fio.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let longest = chain.stalls_us.iter().copied().max().expect("some");
        chain.finish(end);
        println!(
            "{file_system:?}: {SNAPSHOTS} snapshots and {KILLS} kills while a guest made {end} writes, held back for {longest} us at most; \
             {verified} runs of fio verified; taken after {taken_after:.1?}, all restored after {:.1?}",
            begun.elapsed()
        );
    });
}

impl Chain<'_> {
    /// What the volumes are at the end, by the object store and by the node's own files.
    fn finish(self, end: u64) {
        let Chain { lab, node, taken, beside, .. } = self;
        for name in [&taken[0], &taken[taken.len() - 1]].map(|taken| &taken.name).into_iter().chain(&beside) {
            lab.site.volley(&["snapshot", "verify", name]).success();
        }
        // With nothing written since, nothing is read or stored.
        lab.take(&node, "quiet-1");
        let quiet = lab.take(&node, "quiet-2");
        assert_eq!((number(&quiet, "captured_chunks"), number(&quiet, "stored_bytes")), (0, 0), "{quiet}");
        assert_eq!(lab.history.find(&lab.exported("quiet-2"), "quiet-2"), end);
        assert!(node.stop().0.success());
        lab.check();
    }
}

#[test]
fn a_hundred_snapshots_half_of_them_deleted_are_the_volume_at_each_moment_on_ext4() {
    a_chain_of_snapshots(FileSystem::Ext4);
}

#[test]
fn a_hundred_snapshots_half_of_them_deleted_are_the_volume_at_each_moment_on_xfs() {
    a_chain_of_snapshots(FileSystem::Xfs);
}
