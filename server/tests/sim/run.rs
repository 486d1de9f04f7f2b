//! One seed: several lives of a node, each ended by a power cut, a kill or a clean stop, then full hydration.

use std::rc::Rc;
use std::time::Duration;

use futures::future::join_all;
use volley_server::error::Status;
use volley_server::platform::Platform;
use volley_server::platform::sim::{
    CrashPoint, DiskOp, ObjectFaults, RunLimits, Sim, SimObjects, SimRng, SimStop, SimWorld,
};
use volley_server::shard::api::{Command, ConnectionId, Reply, Request};
use volley_server::shard::harm::HarmConfig;
use volley_server::types::{HydrationRate, VolumeSpec};

use crate::disk_cache::{self, Dice, Tally};
use crate::guest::{Excuses, Guests, VolumeRc};
use crate::inspector;
use crate::model::{After, BLOCK, Existence};
use crate::node::{self, Node, NodeSettings, make_child, make_directories, make_snapshot};
use crate::report::Report;

const LIVES: u64 = 4;
const GUESTS: u64 = 6;
const REQUESTS: u64 = 40;
/// The connection of the judge: no guest has this one.
const JUDGE: ConnectionId = ConnectionId(u64::MAX);
/// A hundred times what the longest life takes: beyond, it hangs.
pub const LIMITS: RunLimits = RunLimits { steps: 300_000, virtual_time: Duration::from_secs(3600) };

/// How a life ends.
#[derive(Clone, Copy, Debug)]
enum End {
    PowerCut { steps: u64 },
    PowerCutAtSync { syncs: u64, point: CrashPoint },
    Kill { steps: u64 },
    Stop,
}

pub struct Run {
    seed: u64,
    pub world: SimWorld,
    pub objects: SimObjects,
    pub guests: Rc<Guests>,
    rng: SimRng,
    cache_dice: Dice,
    base_dice: SimRng,
    harm_rng: SimRng,
    power_cuts: u64,
    kills: u64,
    /// Durable points before there was anything to lose.
    pub set_up_syncs: u64,
    diary: Diary,
}

/// What the lives of a run were like: told only if it fails, with the way to run it again.
struct Diary {
    /// The command that runs it again.
    replay: String,
    lives: Vec<String>,
}

fn under_mutation() -> String {
    #[cfg(feature = "mutations")]
    if let Some(mutation) = volley_server::mutation::active() {
        return format!(" under mutation {mutation:?}");
    }
    String::new()
}

impl Drop for Diary {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.lives.join("\n"));
            eprintln!("failed{}: run it again with\n  {}", under_mutation(), self.replay);
        }
    }
}

/// Runs a seed; returns the hash of its events and what it did. Panics on the first violation.
pub fn seed(seed: u64) -> (u64, Report) {
    let mut run = Run::new(seed);
    for life in 0..LIVES {
        run.life(life);
    }
    run.final_life();
    (run.world.trace_hash(), run.report())
}

impl Run {
    fn new(seed: u64) -> Run {
        Run::prepare(seed, None, format!("tools/sim --seed {seed}"))
    }

    /// A machine with snapshots and nothing else; the power fails at durable point `crash` from here on. `replay` is the
    /// command that runs it again.
    pub fn prepare(seed: u64, crash: Option<(u64, CrashPoint)>, replay: String) -> Run {
        let world = SimWorld::new(seed);
        let objects = SimObjects::new(&world);
        let mut rng = SimRng::stream(seed, "test");
        world.share_extents(seed % 4 < 2);
        let sim = world.platform();
        world.block_on(async { make_directories(&sim).await.expect("no faults yet") });
        world.crash_at_sync(crash.map(|(point, when)| (world.syncs() + point, when)));
        let set_up_syncs = world.syncs();
        let mut size = || (1024 + rng.below(3000)) * BLOCK;
        let (first, other) = (size(), size());
        let first = make_snapshot(&objects, &mut rng, "image-0", first);
        let other = make_snapshot(&objects, &mut rng, "image-1", other);
        let child = make_child(&objects, &mut rng, "image-2", &first);
        let guests = Rc::new(Guests::new(SimRng::stream(seed, "guests"), vec![first, other, child]));
        let diary = Diary { replay, lives: Vec::new() };
        let (cache_dice, base_dice) = (Dice::new(seed), SimRng::stream(seed, "base"));
        let harm_rng = SimRng::stream(seed, "harm");
        let (power_cuts, kills) = (0, 0);
        Run {
            seed,
            world,
            objects,
            guests,
            rng,
            cache_dice,
            base_dice,
            harm_rng,
            power_cuts,
            kills,
            set_up_syncs,
            diary,
        }
    }

    pub fn report(&self) -> Report {
        let mut happened = self.guests.happened.borrow().clone();
        let stats = self.objects.stats();
        happened.insert("GET".into(), stats.gets);
        happened.insert("second GET of a slow one".into(), stats.overlapping);
        happened.insert("corrupt answer".into(), stats.corrupted);
        happened.insert("failed answer".into(), stats.failed);
        happened.insert("power cut".into(), self.power_cuts);
        happened.insert("kill".into(), self.kills);
        Report { seeds: 1, steps: self.world.steps(), syncs: self.world.syncs(), happened }
    }

    /// One life under faults, and the judgement of what it left behind.
    fn life(&mut self, life: u64) {
        let end = self.choose_end();
        let settings = self.choose_settings();
        self.set_faults(life, settings.deadline < Duration::from_secs(1));
        self.world.note("life", &[life, settings.shards as u64]);
        self.diary.lives.push(format!("life {life}: {end:?}, {settings:?}, {:?}", self.guests.excuses.get()));
        match end {
            End::PowerCut { steps } | End::Kill { steps } => self.world.stop_after_steps(Some(steps)),
            End::PowerCutAtSync { syncs, point } => {
                self.world.crash_at_sync(Some((self.world.syncs() + syncs, point)));
            }
            End::Stop => {}
        }
        let stop = self.world.run_within(LIMITS, self.live(settings, matches!(end, End::Stop)));
        self.world.on_step(None);
        self.world.stop_after_steps(None);
        self.world.crash_at_sync(None);
        match (&stop, end) {
            (Ok(()), End::Kill { .. }) | (Err(SimStop::Stopped), End::Kill { .. }) => {
                self.kills += 1;
                self.world.kill();
            }
            (Ok(()), _) | (Err(SimStop::Stopped), _) => {
                self.power_cuts += 1;
                self.world.crash();
            }
            (Err(SimStop::Crashed), _) => self.power_cuts += 1,
            (Err(stop), _) => panic!("life {life} ({end:?}) hangs: {stop}\n{}", self.tail()),
        }
        self.world.heal_disk();
        self.world.set_disk_capacity(None);
        self.objects.set_faults(ObjectFaults::default());
        let bad_disk = self.guests.excuses.take().disk;
        let after = match end {
            End::Kill { .. } if bad_disk => After::KillOnBadDisk,
            End::Kill { .. } => After::Kill,
            _ => After::PowerCut,
        };
        self.judge(&format!("life {life}"), after);
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
            disk_cache_bytes: self.cache_dice.budget(),
            hydration_bandwidth: [None, Some(4 << 20), Some(256 << 10)][self.rng.index(3)],
            base_bytes: [0, 256 << 10, 1 << 20, 64 << 20][self.base_dice.index(4)],
            deadline: [Duration::from_secs(20), Duration::from_secs(20), Duration::from_millis(30)][self.rng.index(3)],
            hedge_percent: if self.hedges() { 50 } else { 0 },
            readahead_bytes_max: [0, 512 << 10][(self.seed % 2) as usize],
            harm: self.choose_harm(),
        }
    }

    /// From a bound that nothing exceeds to one that everything does, with floors that hold hydration up for seconds.
    fn choose_harm(&mut self) -> HarmConfig {
        let bound_percent = [None, Some(101), Some(120), Some(1000)][self.harm_rng.index(4)];
        let floor = [None, Some(1 << 20), Some(64 << 10)][self.harm_rng.index(3)];
        HarmConfig { bound_percent, floor }
    }

    /// In a third of the seeds slow GETs are sent twice; in the others nothing may be.
    fn hedges(&self) -> bool {
        self.seed % 3 == 2
    }

    fn set_faults(&mut self, life: u64, impatient: bool) {
        // Guests that give up before the object store answers.
        let mut excuses = Excuses { object_store: impatient, ..Excuses::default() };
        if self.rng.below(2) == 0 {
            excuses.object_store = true;
            let faults = ObjectFaults {
                latency: Duration::from_micros(500)..Duration::from_millis([20, 20, 400][self.rng.index(3)]),
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
        if self.rng.below(2) == 0 {
            self.guests.count("slow disk");
            let op = [DiskOp::Read, DiskOp::Write, DiskOp::Sync, DiskOp::Directory][self.rng.index(4)];
            let path = ["/node", "/node/stores"][self.rng.index(2)];
            self.world.slow_disk(path, op, Duration::from_millis(1)..Duration::from_millis(100));
        }
        self.cache_dice.set_faults(&self.world, &self.guests);
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
        let _tally = Tally { node: node.clone(), guests: self.guests.clone() };
        inspector::watch(&self.world, self.seed, &node, &self.guests);
        if self.seed.is_multiple_of(2) {
            self.guests.flush_all(&node).await;
        }
        for _ in 0..2 {
            self.guests.create_some(&node).await;
        }
        let stopper = async {
            if stop {
                sim.sleep(Duration::from_millis(200)).await;
                self.guests.stopping.set(true);
                node.stop().await;
                self.guests.count("clean stop");
            }
        };
        let guests = (0..GUESTS).map(|_| self.guests.clone().run(sim.clone(), node.clone(), REQUESTS));
        futures::join!(join_all(guests), stopper);
    }

    /// Reads everything on a copy of the machine and compares it with the model; the machine itself is not touched.
    pub fn judge(&mut self, when: &str, after: After) {
        let fork = self.world.fork(self.seed ^ 0x5eed);
        let objects = self.objects.fork(&fork);
        let sim = fork.platform();
        let shards = 1 + self.rng.index(3);
        let settings =
            NodeSettings { shards, disk_cache_bytes: disk_cache::healthy(self.seed), ..NodeSettings::default() };
        let volumes = self.guests.volumes.borrow().clone();
        let guests = self.guests.clone();
        let judged = fork.run_within(LIMITS, async {
            let node = Node::start(&sim, &objects, settings).await.expect("a node starts after any crash");
            judge_names(&node, &guests).await;
            let deleted = guests.deleted.borrow().clone();
            for spec in &deleted {
                judge_deleted(&sim, &node, spec).await;
            }
            let mut kept = Vec::new();
            for volume in volumes {
                if judge_volume(&node, &volume, after).await {
                    kept.push(volume);
                }
            }
            kept
        });
        match judged {
            Ok(kept) => *self.guests.volumes.borrow_mut() = kept,
            Err(stop) => panic!("judging {when}: {stop}"),
        }
        let twice = self.objects.stats().overlapping;
        assert!(twice == 0 || self.hedges(), "{when}: {twice} times a chunk was fetched twice at the same time");
    }

    /// Everything works: hydrate all, compare, stop, and compare the files.
    pub fn final_life(&mut self) {
        self.world.note("final life", &[]);
        let sim = self.world.platform();
        let shards = 1 + self.rng.index(3);
        let settings =
            NodeSettings { shards, disk_cache_bytes: disk_cache::healthy(self.seed), ..NodeSettings::default() };
        self.guests.stopping.set(false);
        let done = self.world.run_within(LIMITS, async {
            let node = Rc::new(Node::start(&sim, &self.objects, settings).await.expect("a healthy node starts"));
            let _tally = Tally { node: node.clone(), guests: self.guests.clone() };
            inspector::watch(&self.world, self.seed, &node, &self.guests);
            let guests = (0..GUESTS).map(|_| self.guests.clone().run(sim.clone(), node.clone(), REQUESTS / 4));
            join_all(guests).await;
            let volumes = self.guests.volumes.borrow().clone();
            for volume in &volumes {
                hydrate(&node, volume).await;
                read_all(&node, volume).await;
            }
            node.stop().await;
        });
        self.world.on_step(None);
        done.unwrap_or_else(|stop| panic!("final life: {stop}\n{}", self.tail()));
        self.world.crash();
        let states = node::recovered(&self.world).volumes;
        for volume in self.guests.volumes.borrow().iter() {
            let mut volume = volume.borrow_mut();
            let mut bytes = self.world.file_bytes(&node::volume_path(&volume.spec)).expect("a volume file");
            bytes.truncate(volume.spec.size_bytes as usize);
            volume.settle(&bytes, After::PowerCut).unwrap_or_else(|complaint| panic!("raw file: {complaint}"));
            assert!(states.iter().any(|s| s.spec.id == volume.spec.id && s.hydrated), "hydrated for good");
        }
    }

    fn tail(&self) -> String {
        self.world.trace_lines().join("\n")
    }
}

/// Every volume that is there was asked for, by that name.
async fn judge_names(node: &Node, guests: &Guests) {
    for status in node.volumes().await {
        let asked_for = guests.volumes.borrow().iter().any(|volume| {
            let volume = volume.borrow();
            volume.spec.name.as_ref() == status.name && volume.spec.size_bytes == status.size_bytes
        });
        assert!(asked_for, "nobody created this: {status:?}");
    }
}

/// A deletion that was answered is for good, and its file is gone too.
async fn judge_deleted(sim: &Sim, node: &Node, spec: &VolumeSpec) {
    let name = spec.name.to_string();
    let status = node.command(&name, |reply| Command::VolumeStatus { name: name.clone(), reply }).await;
    assert_eq!(status.map(|_| ()).map_err(|e| e.status), Err(Status::UnknownVolume), "{name} was deleted and is back");
    let file = node::volume_path(spec);
    for path in [file.with_extension("deleted"), file] {
        assert!(sim.peek(&path, 0, 1).is_err(), "{name} was deleted, but {} is there", path.display());
    }
}

/// Whether the volume is there; if so its content is judged.
async fn judge_volume(node: &Node, volume: &VolumeRc, after: After) -> bool {
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
    check_holes(node, volume, &bytes).await;
    let mut volume = volume.borrow_mut();
    volume.settle(&bytes, after).unwrap_or_else(|complaint| panic!("{complaint}"));
    if after == After::PowerCut {
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

/// What is called a hole reads as zeroes: copying clients don't read it.
async fn check_holes(node: &Node, volume: &VolumeRc, bytes: &[u8]) {
    let id = volume.borrow().spec.id;
    let mut at = 0;
    while at < bytes.len() {
        let request = Request::Residency { volume: id, offset: at as u64, len: (bytes.len() - at) as u64 };
        let Ok(Reply::Residency { extents, .. }) = node.request(0, JUDGE, request).await else {
            panic!("no residency")
        };
        assert!(!extents.is_empty(), "no extents from {at}");
        for extent in extents {
            let end = at + extent.len_bytes as usize;
            assert!(!extent.hole || bytes[at..end].iter().all(|b| *b == 0), "a hole at {at}..{end} has data");
            at = end;
        }
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
