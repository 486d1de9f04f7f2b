//! Torture of the real processes: killed, stopped, starved of space and given a failing disk while guests write.
//!
//! The judge is a checker of ours ([`model`]): through the agent it must find everything acknowledged when the server alone
//! dies (the agent sends again what was not flushed), and everything flushed when both die. fio verifies beside it.
//!
//! `VOLLEY_TORTURE_ROUNDS` kills per file system (default 30), `VOLLEY_TORTURE_SEED` the requests; tools/torture sets them.

pub(crate) mod guest;
mod kills;
mod model;
mod resources;
mod stops;
pub(crate) mod workers;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) use kills::{Fio, SetAtEnd, verify_with_fio};
use workers::{Place, Tolerance, Workers};

use crate::disk::{Disk, FileSystem};
use crate::harness::{Agent, Node, NodeOptions, Random, Site, number};
use crate::image_file::{MIB, write_image};

/// Large enough for hydration to be under way in every round, small enough to be read back often.
const IMAGE_BYTES: u64 = 48 * MIB;
const WORKERS_PER_VOLUME: u64 = 3;

/// One tortured node: its disk, its agent, and what its guests write on it.
pub(crate) struct Arena {
    pub(crate) site: Site,
    /// Where the node keeps its data or its store; `None`: in the test's folder.
    disk: Option<Disk>,
    pub(crate) options: NodeOptions,
    image: Arc<Vec<u8>>,
    tolerance: Arc<Tolerance>,
    agents_killed: Arc<std::sync::atomic::AtomicU64>,
    pub(crate) answered: Arc<std::sync::atomic::AtomicU64>,
    /// Of requests answered, in no order.
    pub(crate) latencies: Arc<Mutex<Vec<Duration>>>,
    pub(crate) rng: Random,
}

impl Arena {
    /// A site with an imported image. Data lie on the disk, if there is one; `rate` is that of hydration.
    pub(crate) fn new(disk: Option<Disk>, rate: &'static str, seed: u64) -> Arena {
        let site = Site::new();
        let image = site.path("image.raw");
        write_image(&image, IMAGE_BYTES, seed);
        site.import(&image, "debian-12");
        let image = Arc::new(std::fs::read(&image).expect("the image"));
        let mut options = NodeOptions { default_rate: rate, ..NodeOptions::default() };
        if let Some(disk) = &disk {
            options.data = Some(disk.mount().join("node"));
            options.namespace = Some(disk.pid());
        }
        let rng = Random::new(seed);
        eprintln!("torture: seed {seed}");
        let (tolerance, agents_killed, answered, latencies) = Default::default();
        Arena { site, disk, options, image, tolerance, agents_killed, answered, latencies, rng }
    }

    fn place(&self, agent: &Agent, export: &str) -> Place {
        Place {
            socket: agent.socket(),
            export: export.to_owned(),
            image: self.image.clone(),
            tolerance: self.tolerance.clone(),
            agents_killed: self.agents_killed.clone(),
            answered: self.answered.clone(),
            latencies: self.latencies.clone(),
        }
    }

    /// Creates volumes and starts their workers.
    pub(crate) fn populate(&mut self, node: &Node, agent: &Agent, prefix: &str, count: u32) -> Vec<Workers> {
        node.create(&self.site, "debian-12", count, prefix);
        let places: Vec<_> = (0..count).map(|n| self.place(agent, &format!("{prefix}{n}"))).collect();
        places.iter().map(|place| Workers::start(place, WORKERS_PER_VOLUME, self.rng.below(u64::MAX))).collect()
    }

    /// A pause of random length: it chooses the moment of what comes next.
    fn some_time(&mut self, most: Duration) {
        let most = most.as_millis() as u64;
        std::thread::sleep(Duration::from_millis(self.rng.below(most)));
    }

    /// Ends the load, hydrates everything, stops the node in order, and compares every raw file with the model.
    pub(crate) fn judge(&self, node: Node, workers: Vec<Workers>) {
        let expected: Vec<_> = workers.into_iter().map(Workers::finish).collect();
        let mut files = Vec::new();
        for volume in &expected {
            node.volley(&self.site, &["volume", "set", &volume.export, "--rate", "unlimited"]).success();
            node.wait_hydrated(&self.site, &volume.export, "120s");
            let shown = node.volume(&self.site, &volume.export);
            assert_eq!(number(&shown, "remaining_bytes"), 0, "{shown}");
            files.push(self.volume_file(shown["id"].as_str().expect("id")));
        }
        assert!(node.stop().0.success(), "a clean stop");
        expected.iter().zip(&files).for_each(|(expected, file)| expected.check_file(file));
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("this arena has a disk")
    }

    /// A volume's file as this process sees it.
    fn volume_file(&self, id: &str) -> PathBuf {
        let mut places = vec![self.site.data()];
        places.extend(self.disk.as_ref().map(|disk| disk.outside(disk.mount())));
        let found = places.iter().filter(|place| place.exists()).find_map(|place| crate::foreign::find(place, id));
        found.unwrap_or_else(|| panic!("no file of volume {id} in {places:?}")).into()
    }
}

/// Asserts that no worker has ended: it would have found something wrong, and `finish` tells what.
pub(crate) fn all_well(workers: &mut Vec<Workers>) {
    if let Some(failed) = workers.iter().position(Workers::any_failed) {
        workers.swap_remove(failed).finish();
    }
}

fn environment(variable: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number"))
}

pub(crate) fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    environment("VOLLEY_TORTURE_SEED", now.as_secs())
}
