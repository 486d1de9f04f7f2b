//! One seed: several lives of a node, each ended by a power cut, a kill or a clean stop, then full hydration.

use std::rc::Rc;
use std::time::Duration;

use futures::future::join_all;
use volley_server::error::Status;
use volley_server::platform::Platform;
use volley_server::platform::sim::{
    CrashPoint, DiskOp, ObjectFaults, RunLimits, SimObjects, SimRng, SimStop, SimWorld,
};
use volley_server::shard::api::{Command, ConnectionId, Reply, Request};
use volley_server::types::HydrationRate;

use crate::guest::{Excuses, Guests, VolumeRc};
use crate::model::{BLOCK, Existence};
use crate::node::{self, Node, NodeSettings, make_directories, make_snapshot};

const LIVES: u64 = 4;
const GUESTS: u64 = 6;
const REQUESTS: u64 = 40;
/// The connection of the judge: no guest has this one.
const JUDGE: ConnectionId = ConnectionId(u64::MAX);
const LIMITS: RunLimits = RunLimits { steps: 5_000_000, virtual_time: Duration::from_secs(3600) };

/// How a life ends.
#[derive(Clone, Copy, Debug)]
enum End {
    PowerCut { steps: u64 },
    PowerCutAtSync { syncs: u64, point: CrashPoint },
    Kill { steps: u64 },
    Stop,
}

struct Run {
    seed: u64,
    world: SimWorld,
    objects: SimObjects,
    guests: Rc<Guests>,
    rng: SimRng,
}

/// Prints how to run a failed seed again.
struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: run it again with\n  VOLLEY_SIM_SEED={} cargo test -p volley-server --test sim", self.0);
        }
    }
}

/// Runs a seed; returns the hash of its events. Panics on the first violation.
pub fn seed(seed: u64) -> u64 {
    let _announce = Announce(seed);
    let mut run = Run::new(seed);
    for life in 0..LIVES {
        run.life(life);
    }
    run.final_life();
    run.world.trace_hash()
}

impl Run {
    fn new(seed: u64) -> Run {
        let world = SimWorld::new(seed);
        let objects = SimObjects::new(&world);
        let mut rng = SimRng::stream(seed, "test");
        let sim = world.platform();
        world.block_on(async { make_directories(&sim).await.expect("no faults yet") });
        let snapshots = (0..2).map(|i| {
            let size = (1024 + rng.below(3000)) * BLOCK;
            make_snapshot(&objects, &mut rng, &format!("image-{i}"), size)
        });
        let snapshots = snapshots.collect();
        let guests = Rc::new(Guests::new(SimRng::stream(seed, "guests"), snapshots));
        Run { seed, world, objects, guests, rng }
    }

    /// One life under faults, and the judgement of what it left behind.
    fn life(&mut self, life: u64) {
        let end = self.choose_end();
        let settings = self.choose_settings();
        self.set_faults(life);
        self.world.note("life", &[life, settings.shards as u64]);
        eprintln!("life {life}: {end:?}, {settings:?}, {:?}", self.guests.excuses.get());
        match end {
            End::PowerCut { steps } | End::Kill { steps } => self.world.stop_after_steps(Some(steps)),
            End::PowerCutAtSync { syncs, point } => {
                self.world.crash_at_sync(Some((self.world.syncs() + syncs, point)));
            }
            End::Stop => {}
        }
        let stop = self.world.run_within(LIMITS, self.live(settings, matches!(end, End::Stop)));
        self.world.stop_after_steps(None);
        self.world.crash_at_sync(None);
        match (&stop, end) {
            (Ok(()), End::Kill { .. }) | (Err(SimStop::Stopped), End::Kill { .. }) => self.world.kill(),
            (Ok(()), _) | (Err(SimStop::Stopped), _) => self.world.crash(),
            (Err(SimStop::Crashed), _) => {}
            (Err(stop), _) => panic!("life {life} ({end:?}) hangs: {stop}\n{}", self.tail()),
        }
        self.world.heal_disk();
        self.world.set_disk_capacity(None);
        self.objects.set_faults(ObjectFaults::default());
        self.guests.excuses.set(Excuses::default());
        self.judge(life, !matches!(end, End::Kill { .. }));
    }

    fn choose_end(&mut self) -> End {
        let most = [500, 5_000, 40_000][self.rng.index(3)];
        let steps = 50 + self.rng.below(most);
        let point = if self.rng.coin() { CrashPoint::Before } else { CrashPoint::After };
        match self.rng.below(8) {
            0 => End::Stop,
            1 | 2 => End::Kill { steps },
            3..6 => End::PowerCutAtSync { syncs: 1 + self.rng.below(120), point },
            _ => End::PowerCut { steps },
        }
    }

    fn choose_settings(&mut self) -> NodeSettings {
        NodeSettings {
            shards: 1 + self.rng.index(3),
            cache_bytes: [0, 256 << 10, 8 << 20][self.rng.index(3)],
            hydration_bandwidth: [None, Some(4 << 20), Some(256 << 10)][self.rng.index(3)],
            ..NodeSettings::default()
        }
    }

    fn set_faults(&mut self, life: u64) {
        let mut excuses = Excuses::default();
        if self.rng.below(2) == 0 {
            excuses.object_store = true;
            let faults = ObjectFaults {
                retry_ppm: [0, 50_000, 500_000][self.rng.index(3)],
                corrupt_ppm: [0, 20_000, 300_000][self.rng.index(3)],
                hang_ppm: [0, 0, 5_000][self.rng.index(3)],
                ..ObjectFaults::default()
            };
            self.objects.set_faults(faults);
            if self.rng.below(3) == 0 {
                self.objects.outage(Duration::from_millis(self.rng.below(60_000)));
            }
        }
        if life > 0 && self.rng.below(6) == 0 {
            excuses.no_space = true;
            let used = (1 << 40) - self.world.disk_free_bytes();
            self.world.set_disk_capacity(Some(used + self.rng.below(1 << 20)));
        }
        if life > 0 && self.rng.below(6) == 0 {
            excuses.disk = true;
            let op = [DiskOp::Read, DiskOp::Write, DiskOp::Sync, DiskOp::Directory][self.rng.index(4)];
            let path = ["/node/stores", "/node/journal", "/node"][self.rng.index(3)];
            self.world.fail_disk(path, op, 10_000);
        }
        self.guests.excuses.set(excuses);
    }

    async fn live(&self, settings: NodeSettings, stop: bool) {
        let sim = self.world.platform();
        self.guests.stopping.set(false);
        let node = match Node::start(&sim, &self.objects, settings).await {
            Ok(node) => Rc::new(node),
            Err(error) => {
                let excuses = self.guests.excuses.get();
                assert!(excuses.disk || excuses.no_space, "the node does not start: {error:?}");
                return;
            }
        };
        for _ in 0..2 {
            self.guests.create(&node).await;
        }
        let stopper = async {
            if stop {
                sim.sleep(Duration::from_millis(200)).await;
                self.guests.stopping.set(true);
                node.stop().await;
            }
        };
        let guests = (0..GUESTS).map(|_| self.guests.clone().run(sim.clone(), node.clone(), REQUESTS));
        futures::join!(join_all(guests), stopper);
    }

    /// Reads everything on a copy of the machine and compares it with the model; the machine itself is not touched.
    fn judge(&mut self, life: u64, power_cut: bool) {
        let fork = self.world.fork(self.seed ^ 0x5eed);
        let objects = self.objects.fork(&fork);
        let sim = fork.platform();
        let settings = NodeSettings { shards: 1 + self.rng.index(3), ..NodeSettings::default() };
        let volumes = self.guests.volumes.borrow().clone();
        let judged = fork.run_within(LIMITS, async {
            let node = Node::start(&sim, &objects, settings).await.expect("a node starts after any crash");
            let mut kept = Vec::new();
            for volume in volumes {
                if judge_volume(&node, &volume, power_cut).await {
                    kept.push(volume);
                }
            }
            kept
        });
        match judged {
            Ok(kept) => *self.guests.volumes.borrow_mut() = kept,
            Err(stop) => panic!("judging life {life}: {stop}"),
        }
    }

    /// Everything works: hydrate all, compare, stop, and compare the files.
    fn final_life(&mut self) {
        self.world.note("final life", &[]);
        let sim = self.world.platform();
        let settings = NodeSettings { shards: 1 + self.rng.index(3), ..NodeSettings::default() };
        self.guests.stopping.set(false);
        let done = self.world.run_within(LIMITS, async {
            let node = Rc::new(Node::start(&sim, &self.objects, settings).await.expect("a healthy node starts"));
            let guests = (0..GUESTS).map(|_| self.guests.clone().run(sim.clone(), node.clone(), REQUESTS / 4));
            join_all(guests).await;
            let volumes = self.guests.volumes.borrow().clone();
            for volume in &volumes {
                hydrate(&node, volume).await;
                read_all(&node, volume).await;
            }
            node.stop().await;
        });
        done.unwrap_or_else(|stop| panic!("final life: {stop}\n{}", self.tail()));
        self.world.crash();
        let states = node::recovered(&self.world).volumes;
        for volume in self.guests.volumes.borrow().iter() {
            let mut volume = volume.borrow_mut();
            let mut bytes = self.world.file_bytes(&node::volume_path(&volume.spec)).expect("a volume file");
            bytes.truncate(volume.spec.size_bytes as usize);
            volume.settle(&bytes, true).unwrap_or_else(|complaint| panic!("raw file: {complaint}"));
            assert!(states.iter().any(|s| s.spec.id == volume.spec.id && s.hydrated), "hydrated for good");
        }
    }

    fn tail(&self) -> String {
        self.world.trace_lines().join("\n")
    }
}

/// Whether the volume is there; if so its content is judged.
async fn judge_volume(node: &Node, volume: &VolumeRc, power_cut: bool) -> bool {
    let (name, existence) = (volume.borrow().spec.name.to_string(), volume.borrow().existence);
    let status = match node.command(&name, |reply| Command::VolumeStatus { name: name.clone(), reply }).await {
        Ok(status) => status,
        Err(error) => {
            assert!(error.status == Status::UnknownVolume && existence != Existence::Sure, "{name}: {error:?}");
            return false;
        }
    };
    if volume.borrow().hydrated {
        assert!(status.hydrated, "{name} was hydrated for good");
    }
    check_durable_fetches(node, volume).await;
    let bytes = read_bytes(node, volume).await;
    let mut volume = volume.borrow_mut();
    volume.settle(&bytes, power_cut).unwrap_or_else(|complaint| panic!("{complaint}"));
    if power_cut {
        // After a mere kill what was found may rest on journal records that a power cut can still take.
        volume.existence = Existence::Sure;
    }
    volume.attached = false;
    volume.attaching = 0;
    true
}

async fn check_durable_fetches(node: &Node, volume: &VolumeRc) {
    let (id, ranges) = (volume.borrow().spec.id, volume.borrow().fetched_durably.clone());
    for (offset, len) in &ranges {
        let request = Request::Residency { volume: id, offset: *offset, len: *len };
        let Ok(Reply::Residency { extents, .. }) = node.request(0, JUDGE, request).await else {
            panic!("no residency")
        };
        assert!(extents.iter().all(|e| e.resident), "{offset}+{len} was fetched durably, but is absent: {extents:?}");
    }
}

/// Attaches and reads the whole volume, without a fault in sight.
async fn read_bytes(node: &Node, volume: &VolumeRc) -> Vec<u8> {
    let (name, size) = (volume.borrow().spec.name.to_string(), volume.borrow().spec.size_bytes);
    let attach = Request::Attach { name: name.clone(), resume_generation: None };
    let Ok(Reply::Attached(info)) = node.request(0, JUDGE, attach).await else { panic!("{name} can't be attached") };
    assert!(info.generation > volume.borrow().generation, "{name}: generation {} again", info.generation);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let (offset, len) = (bytes.len() as u64, (size - bytes.len() as u64).min(100 * BLOCK) as u32);
        let read = Request::Read { volume: info.volume, generation: info.generation, offset, len };
        match node.request(1, JUDGE, read).await {
            Ok(Reply::Data(data)) => bytes.extend_from_slice(&data),
            other => panic!("{name}: read of {len} bytes at {offset}: {other:?}"),
        }
    }
    bytes
}

async fn hydrate(node: &Node, volume: &VolumeRc) {
    let name = volume.borrow().spec.name.to_string();
    let rate = HydrationRate::Unlimited;
    node.command(&name, |reply| Command::SetRate { name: name.clone(), rate, reply }).await.expect("a rate");
    let wait = |reply| Command::WaitHydrated { name: name.clone(), timeout_ms: 600_000, reply };
    let status = node.command(&name, wait).await.expect("a healthy volume hydrates");
    assert!(status.hydrated && status.remaining_bytes == 0, "{status:?}");
    volume.borrow_mut().hydrated = true;
}

async fn read_all(node: &Node, volume: &VolumeRc) {
    let start = volume.borrow().begin_read(0, volume.borrow().spec.size_bytes);
    let bytes = read_bytes(node, volume).await;
    volume.borrow().check_read(&start, &bytes).unwrap_or_else(|complaint| panic!("hydrated: {complaint}"));
}
