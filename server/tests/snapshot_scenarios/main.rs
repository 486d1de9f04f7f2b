//! Snapshots of volumes, rollbacks and resizes on real shards and the simulated platform: guests write all the while, and what was captured
//! is held against what the volume was at the cut.

mod cuts;
mod replaced;
#[path = "../support/mod.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::time::Duration;

use support::{CHUNK, Lab, Node, Options};
use volley_server::error::Result;
use volley_server::platform::Platform;
use volley_server::platform::sim::{SimRng, SimWorld};
use volley_server::shard::api::{AttachInfo, Command, CutVolume, CutWanted, Request, VolumeLineage};
use volley_server::types::SnapshotRef;

const CHUNKS: u32 = 24;

impl Lab {
    /// The image ends inside a chunk and a sector.
    fn new(seed: u64) -> Lab {
        Lab::of(CHUNKS, 1536, 5, seed)
    }

    async fn node(&self, options: &Options) -> Node {
        Node::start(self.world.platform(), &self.objects, options).await.expect("started")
    }

    /// Makes a snapshot of this content, as an upload would.
    fn publish(&self, name: &str, content: &[u8], number: u64) -> SnapshotRef {
        let image = support::image_of(&self.objects, name, content, u128::from(number) << 64);
        image.snapshot
    }
}

/// A guest that writes one thing after the other, and what the volume holds for it. While a write is on its way both contents are right.
struct Guest {
    before: RefCell<Vec<u8>>,
    after: RefCell<Vec<u8>>,
    stop: Cell<bool>,
    writes: Cell<u64>,
}

impl Guest {
    fn new(content: &[u8]) -> Guest {
        Guest {
            before: RefCell::new(content.to_vec()),
            after: RefCell::new(content.to_vec()),
            stop: Cell::new(false),
            writes: Cell::new(0),
        }
    }

    async fn run(&self, node: &Node, volume: &AttachInfo, rng: &mut SimRng) {
        let size = self.before.borrow().len() as u64;
        while !self.stop.get() {
            let offset = rng.below(size / 512) * 512;
            let most = if rng.below(8) == 0 { 300 } else { 20 };
            let len = (1 + rng.below(most)).min((size - offset) / 512) * 512;
            let kind = rng.below(8);
            let data: Vec<u8> = match kind {
                0 => vec![0; len as usize],
                _ => {
                    let mut data = vec![0; len as usize];
                    rng.fill(&mut data);
                    data
                }
            };
            self.after.borrow_mut()[offset as usize..][..data.len()].copy_from_slice(&data);
            let (id, generation) = (volume.volume, volume.generation);
            if kind == 0 {
                let zero = Request::WriteZeroes { volume: id, generation, offset, len, fua: false };
                node.request(0, zero).await.expect("zeroed");
            } else {
                node.write(volume, offset, data, false).await.expect("written");
            }
            *self.before.borrow_mut() = self.after.borrow().clone();
            self.writes.set(self.writes.get() + 1);
            if rng.below(6) == 0 {
                node.flush(volume).await.expect("flushed");
            }
            if rng.below(10) == 0 {
                node.platform.sleep(Duration::from_millis(rng.below(5))).await;
            }
        }
    }

    fn contents(&self) -> [Vec<u8>; 2] {
        [self.before.borrow().clone(), self.after.borrow().clone()]
    }
}

async fn lineage(node: &Node, name: &str) -> VolumeLineage {
    node.command(node.owner(name), |reply| Command::Lineage { name: name.to_owned(), reply }).await.expect("a volume")
}

/// Both halves of a cut of one volume.
async fn cut(node: &Node, name: &str, cut: u64, all: bool) -> Result<CutVolume> {
    freeze(node, name, cut).await?;
    cut_frozen(node, name, cut, all).await
}

async fn freeze(node: &Node, name: &str, cut: u64) -> Result<()> {
    node.command(node.owner(name), |reply| Command::Freeze { names: vec![name.to_owned()], cut, reply }).await
}

async fn cut_frozen(node: &Node, name: &str, cut: u64, all: bool) -> Result<CutVolume> {
    let owner = node.owner(name);
    let wanted = vec![CutWanted { name: name.to_owned(), all, also: None }];
    let mut cuts = node.command(owner, |reply| Command::Cut { wanted, cut, reply }).await?;
    Ok(cuts.remove(0))
}

/// What the volume was at the cut: what is captured over what it builds on.
async fn capture(node: &Node, name: &str, made: &CutVolume, id: u64, base: &[u8]) -> Result<Vec<u8>> {
    let mut content = base.to_vec();
    for chunk in &made.chunks {
        let (volume, chunk) = (made.volume, *chunk);
        let capture = |reply| Command::Capture { volume, cut: id, chunk, reply };
        let captured = node.command(node.owner(name), capture).await?;
        content[(chunk * CHUNK) as usize..][..captured.len()].copy_from_slice(&captured);
    }
    Ok(content)
}

async fn end(node: &Node, name: &str, made: &CutVolume, cut: u64, snapshot: Option<SnapshotRef>) {
    let volume = made.volume;
    let end = |reply| Command::EndCut { volume, cut, snapshot, reply };
    node.command(node.owner(name), end).await.expect("ended");
}

async fn whole(node: &Node, volume: &AttachInfo) -> Vec<u8> {
    let mut content = Vec::new();
    while (content.len() as u64) < volume.size_bytes {
        let at = content.len() as u64;
        let len = (volume.size_bytes - at).min(u64::from(CHUNK));
        content.extend(node.read(volume, at, len as u32).await.expect("read"));
    }
    content
}

fn staging_files(world: &SimWorld) -> usize {
    let platform = world.platform();
    let staging = std::path::Path::new(support::STORE).join("staging");
    world.block_on(async { platform.list_dir(&staging).await.map_or(0, |entries| entries.len()) })
}
