//! The disk cache in the simulation: in which lives there is one, what happens to its files, and what it did.
//!
//! Half of the seeds have it. Its faults excuse nobody: the cache is never the reason for a guest's error.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use volley_server::cache::record::SLOT_BYTES;
use volley_server::platform::sim::{DiskOp, SimRng, SimWorld};

use crate::guest::Guests;
use crate::node::{CACHE, Node};

/// The budget of a node that only looks at what others left.
const BUDGET: u64 = 8 << 20;
/// Slots and records damaged between two lives, at most.
const FLIPS_MAX: u64 = 40;

/// Whether the lives of a seed may have a disk cache.
pub fn takes_part(seed: u64) -> bool {
    seed % 2 == 1
}

/// The disk cache of a node without faults.
pub fn healthy(seed: u64) -> Option<u64> {
    takes_part(seed).then_some(BUDGET)
}

/// Draws by itself, so that seeds without a disk cache run as if there were none.
pub struct Dice {
    rng: SimRng,
    on: bool,
}

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice { rng: SimRng::stream(seed, "disk cache"), on: takes_part(seed) }
    }

    /// The budget of a life: none, a few chunks, or all of them.
    pub fn budget(&mut self) -> Option<u64> {
        let budget = [Some(1 << 20), Some(3 << 20), Some(BUDGET), None][self.rng.index(4)];
        budget.filter(|_| self.on)
    }

    /// What the disk under the cache does in a life that begins now.
    pub fn set_faults(&mut self, world: &SimWorld, guests: &Guests) {
        if !self.on {
            return;
        }
        if self.rng.below(4) == 0 {
            guests.count("bad cache disk");
            let op = [DiskOp::Read, DiskOp::Write, DiskOp::Directory][self.rng.index(3)];
            world.fail_disk(CACHE, op, [20_000, 300_000][self.rng.index(2)]);
        }
        if self.rng.below(2) == 0 {
            for _ in 0..self.rng.below(FLIPS_MAX) {
                self.flip(world);
            }
        }
    }

    /// Damages a byte of some file, where there is one: mostly of slots that are in use.
    fn flip(&mut self, world: &SimWorld) {
        let shard = self.rng.below(3);
        let kind = if self.rng.below(8) == 0 { "index" } else { "slots" };
        let path: PathBuf = Path::new(CACHE).join(format!("shard-{shard}.{kind}"));
        let Ok(bytes) = world.file_bytes(&path) else { return };
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        if kind == "slots" && self.rng.coin() {
            return self.misdirect(world, &path, used.div_ceil(SLOT_BYTES as u64));
        }
        if used > 0 {
            world.flip_file_byte(&path, self.rng.below(used)).expect("the file is there");
        }
    }

    /// Writes two slots, which is what a chunk of noise takes, over two others: whole chunks in the wrong place.
    fn misdirect(&mut self, world: &SimWorld, path: &Path, slots: u64) {
        if slots > 1 {
            let mut slot = || self.rng.below(slots - 1) * SLOT_BYTES as u64;
            world.misdirect_file(path, slot(), slot(), 2 * SLOT_BYTES as u64).expect("the file is there");
        }
    }
}

/// Counts what the tiers did when a life ends, however it ends.
pub struct Tally {
    pub node: Rc<Node>,
    pub guests: Rc<Guests>,
}

impl Drop for Tally {
    fn drop(&mut self) {
        for shard in &self.node.shards {
            for store in shard.sharing() {
                self.guests.count_many("clone of the base", store.cloned_chunks);
                self.guests.count_many("base eviction", store.base_evicted_bytes.min(1));
                self.guests.count_many("base failure", store.clone_failures);
            }
            let (ram, disk) = shard.tiers();
            self.guests.count_many("RAM cache hit", ram.hits);
            self.guests.count_many("RAM cache eviction", ram.evicted);
            let Some(disk) = disk else { continue };
            self.guests.count_many("disk cache hit", disk.hits);
            self.guests.count_many("disk cache insertion", disk.inserted);
            self.guests.count_many("disk cache eviction", disk.evicted);
            self.guests.count_many("corrupt slot", disk.corrupt);
            self.guests.count_many("stale slot", disk.stale);
            self.guests.count_many("disk cache failure", disk.errors);
        }
    }
}
