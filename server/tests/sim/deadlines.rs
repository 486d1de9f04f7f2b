//! Deadlines: batches get, change and lose them at random, and the order of hydration follows them.

use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::platform::sim::{SimObjects, SimRng, SimWorld};
use volley_server::shard::api::Command;
use volley_server::types::{HydrationRate, VolumeSpec};

use crate::guest::Guests;
use crate::node::{Node, NodeSettings, make_directories, make_snapshot, volume_spec};

/// Batches that volumes belong to.
pub const BATCHES: u64 = 3;
/// A volume of the scenario takes eight seconds at this.
const BANDWIDTH: u64 = 256 << 10;

impl Guests {
    /// One of the batches gets another deadline, or none, on all shards or, as when a message is late, on some.
    pub(crate) async fn set_deadline(&self, node: &Node) {
        self.count("set deadline");
        let batch = self.below(BATCHES);
        let deadline = Some(self.below(5)).filter(|deadline| *deadline > 0);
        let shards = 1 + self.below(node.shards.len() as u64) as usize;
        node.set_deadline(batch, deadline, shards).await;
    }
}

/// While the share of the store is spent, volumes wait: whose deadline is the earliest goes on first.
pub fn the_earliest_is_first() {
    let world = SimWorld::new(77);
    let objects = SimObjects::new(&world);
    let sim = world.platform();
    let mut rng = SimRng::new(77);
    let snapshot = make_snapshot(&objects, &mut rng, "image", 2 << 20);
    world.block_on(async {
        make_directories(&sim).await.expect("no faults");
        let settings = NodeSettings { hydration_bandwidth: Some(BANDWIDTH), ..NodeSettings::default() };
        let node = Node::start(&sim, &objects, settings).await.expect("started");
        let mut create = async |name: &str, batch: Option<u64>| {
            let spec = volume_spec(&mut rng, name, 2 << 20, Some(&snapshot));
            let spec = VolumeSpec { rate: HydrationRate::Unlimited, store: "a".into(), batch, ..spec };
            node.command(name, |reply| Command::CreateVolumes { specs: vec![spec], reply }).await.expect("created");
        };
        create("first", None).await;
        sim.sleep(Duration::from_secs(1)).await;
        create("none", None).await;
        create("late", Some(1)).await;
        create("early", Some(2)).await;
        create("moved", Some(3)).await;
        for (batch, deadline) in [(1, 20), (2, 10), (3, 30)] {
            node.set_deadline(batch, Some(deadline), 1).await;
        }
        node.set_deadline(3, Some(5), 1).await;
        let mut done = Vec::new();
        while done.len() < 5 {
            sim.sleep(Duration::from_secs(1)).await;
            for volume in node.volumes().await.into_iter().filter(|volume| volume.remaining_bytes == 0) {
                if !done.contains(&volume.name) {
                    done.push(volume.name);
                }
            }
        }
        done.retain(|name| name != "first");
        assert_eq!(done, ["moved", "early", "late", "none"], "in the order of their deadlines");
        node.stop().await;
    });
}
