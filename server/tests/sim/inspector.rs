//! Looks into the shards after every step: their own invariants, and one sector of one volume, drawn by lot.

use std::rc::Rc;

use volley_server::platform::sim::{SimRng, SimWorld};

use crate::guest::Guests;
use crate::model::{BLOCK, Existence};
use crate::node::{Node, volume_path};

/// Watches a node from now on; end it with `world.on_step(None)` before the life ends.
pub fn watch(world: &SimWorld, seed: u64, node: &Rc<Node>, guests: &Rc<Guests>) {
    let (sim, node, guests) = (world.platform(), node.clone(), guests.clone());
    let mut rng = SimRng::stream(seed ^ world.steps(), "inspector");
    world.on_step(Some(Box::new(move || {
        for (number, shard) in node.shards.iter().enumerate() {
            shard.check_invariants().unwrap_or_else(|complaint| panic!("shard {number}: {complaint}"));
        }
        let volumes = guests.volumes.borrow();
        if volumes.is_empty() {
            return;
        }
        let Ok(volume) = volumes[rng.index(volumes.len())].try_borrow() else { return };
        let block = rng.below(volume.spec.size_bytes / BLOCK);
        let shard = &node.shards[volume.spec.id.owner(node.shards.len())];
        let Some(resident) = shard.is_resident(volume.spec.id, block * BLOCK, BLOCK) else { return };
        if volume.existence != Existence::Sure {
            return;
        }
        let in_file = sim.peek(&volume_path(&volume.spec), block * BLOCK, BLOCK as usize).expect("the volume's file");
        let checked = volume.check_block(block as usize, resident, &in_file);
        checked.unwrap_or_else(|complaint| panic!("{complaint}"));
    })));
}
