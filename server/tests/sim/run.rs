//! One seed: several lives of a node, each ended by a power cut, a kill or a clean stop, then full hydration.

use std::rc::Rc;
use std::time::Duration;

use futures::future::join_all;
use volley_server::platform::Platform;
use volley_server::platform::sim::{
    CrashPoint, DiskOp, ObjectFaults, RunLimits, SimObjects, SimRng, SimStop, SimWorld,
};
use volley_server::shard::harm::HarmConfig;

use crate::control::Control;
use crate::disk_cache::{self, Dice, Tally};
use crate::guest::{Excuses, Guests};
use crate::inspector;
use crate::judge::{hydrate, judge_deleted, judge_names, judge_volume, read_all};
use crate::model::{After, BLOCK};
use crate::node::{self, Node, NodeSettings, make_child, make_directories, make_snapshot};
use crate::report::Report;
use crate::snapshots::{self, Snapshots};

const LIVES: u64 = 4;
const GUESTS: u64 = 6;
const REQUESTS: u64 = 40;
/// Of a seed with snapshots: whoever gives orders about them, and how many.
const OPERATORS: u64 = 2;
const ORDERS: u64 = 6;
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
        let run = Run::prepare(seed, None, format!("tools/sim --seed {seed}"));
        run.guests.snapshots_taken.on.set(snapshots::take_part(seed));
        run
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
        let guests =
            Rc::new(Guests::new(SimRng::stream(seed, "guests"), vec![first, other, child], Snapshots::new(seed)));
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
        let control = Control::new(&self.world, &node, &self.objects, &self.guests);
        futures::join!(join_all(guests), self.operate(&control, ORDERS), stopper);
    }

    /// Orders about snapshots, where the seed has them.
    async fn operate(&self, control: &Control<'_>, orders: u64) {
        if self.guests.snapshots_taken.on.get() {
            join_all((0..OPERATORS).map(|_| control.run(orders))).await;
        }
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
        self.guests.snapshots_taken.judge(&self.objects);
        self.guests.snapshots_taken.let_time_pass();
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
            let control = Control::new(&self.world, &node, &self.objects, &self.guests);
            futures::join!(join_all(guests), self.operate(&control, ORDERS));
            let volumes = self.guests.volumes.borrow().clone();
            for volume in &volumes {
                hydrate(&node, volume).await;
                read_all(&node, volume).await;
            }
            if self.guests.snapshots_taken.on.get() {
                control.clear_away(&self.objects).await;
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
            let state = states.iter().find(|s| s.spec.id == volume.spec.id && s.hydrated).expect("hydrated for good");
            let source = state.spec.snapshot.as_ref().map(|snapshot| &*snapshot.name);
            let settled = volume.settle(&bytes, After::PowerCut, source);
            settled.unwrap_or_else(|complaint| panic!("raw file: {complaint}"));
        }
        self.guests.snapshots_taken.judge(&self.objects);
    }

    fn tail(&self) -> String {
        self.world.trace_lines().join("\n")
    }
}
