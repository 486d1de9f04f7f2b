//! Power cuts on the simulated disk: at every durable point and at every step, what recovery finds holds everything
//! that was acknowledged, and nothing that was not appended.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use super::super::{Journal, Lsn, Record, commit_epoch, recover};
use super::model::{Change, Model};
use crate::platform::sim::{CrashPoint, Sim, SimRng, SimStop, SimWorld};
use crate::platform::{Platform, Queue};
use crate::types::VolumeState;

const DIR: &str = "/data/journal";

/// What the world outside knows: states after each append, and how many of them must survive.
struct Outside {
    /// States after each change since the model was set up; the first one is before any.
    history: Vec<Vec<VolumeState>>,
    /// Index into `history` of the last acknowledged one.
    acknowledged: usize,
}

impl Outside {
    fn new(states: Vec<VolumeState>) -> Rc<RefCell<Outside>> {
        Rc::new(RefCell::new(Outside { history: vec![states], acknowledged: 0 }))
    }

    fn acknowledge(&mut self, index: usize) {
        self.acknowledged = self.acknowledged.max(index);
    }

    /// The recovered states must be those after some change from the acknowledged one on.
    fn check(&self, found: &[VolumeState], context: &str) {
        let candidates = &self.history[self.acknowledged..];
        assert!(
            candidates.iter().any(|states| states == found),
            "{context}: recovered states are none of the {} after acknowledgement {}: {found:?}",
            candidates.len(),
            self.acknowledged
        );
    }
}

struct Shard {
    model: Model,
    journal: Journal<Sim>,
    outside: Rc<RefCell<Outside>>,
}

impl Shard {
    fn change(&mut self, change: &Change) -> (Lsn, usize) {
        if let Some(record) = self.model.change(change) {
            self.journal.append(&record);
            self.outside.borrow_mut().history.push(self.model.states());
        }
        let empty = Record::Residency { volume: crate::types::VolumeId(0), chunks: Vec::new() };
        (self.journal.append(&empty), self.outside.borrow().history.len() - 1)
    }
}

fn random_change(rng: &mut SimRng) -> Change {
    let id = rng.below(5);
    let (chunk, sector) = (rng.below(4) as u32, rng.below(10) as u32);
    match rng.below(8) {
        0 | 1 => Change::Create(id),
        2 => Change::Delete(id),
        3 => Change::Attach(id),
        4 => Change::Rate(id, rng.below(100)),
        5 => Change::Chunks(id, chunk, 2),
        _ => Change::Sectors(id, chunk, sector, 3),
    }
}

/// Starts a node with one shard: everything that [`recover`] gives goes to a journal of the next epoch.
async fn start(platform: &Sim, outside: &Rc<RefCell<Outside>>, context: &str) -> Rc<RefCell<Shard>> {
    let dir = Path::new(DIR);
    let recovered = recover(platform, dir).await.unwrap_or_else(|error| panic!("{context}: {error}"));
    outside.borrow().check(&recovered.volumes, context);
    *outside.borrow_mut() = Outside { history: vec![recovered.volumes.clone()], acknowledged: 0 };
    let model = Model::from_states(&recovered.volumes);
    let epoch = recovered.epoch + 1;
    let journal = Journal::create(platform, dir, epoch, 0, recovered.volumes.into_iter()).await.expect("create");
    commit_epoch(platform, dir, epoch, 1).await.expect("commit");
    Rc::new(RefCell::new(Shard { model, journal, outside: Rc::clone(outside) }))
}

/// A writer that appends and commits, remembering what was acknowledged.
async fn write(platform: Sim, shard: Rc<RefCell<Shard>>, mut rng: SimRng, rounds: u64) {
    for _ in 0..rounds {
        let changes: Vec<_> = (0..=rng.below(3)).map(|_| random_change(&mut rng)).collect();
        let (mut lsn, mut index) = (Lsn::default(), 0);
        changes.iter().for_each(|change| (lsn, index) = shard.borrow_mut().change(change));
        let journal = shard.borrow().journal.clone();
        journal.commit(lsn).await.expect("commit");
        let outside = Rc::clone(&shard.borrow().outside);
        outside.borrow_mut().acknowledge(index);
        platform.yield_now().await;
    }
}

/// Two writers and two checkpoints, then a clean end.
async fn live(platform: Sim, outside: Rc<RefCell<Outside>>, seed: u64, context: String) {
    let shard = start(&platform, &outside, &context).await;
    let (done, ended) = flume::unbounded();
    for writer in 0..2 {
        let rng = SimRng::new(seed * 10 + writer);
        let (task, done) = (write(platform.clone(), Rc::clone(&shard), rng, 6), done.clone());
        platform.spawn(Queue::Serve, async move {
            task.await;
            let _ = done.send(());
        });
    }
    for _ in 0..2 {
        let (journal, dumped) = (shard.borrow().journal.clone(), Rc::clone(&shard));
        let mut reached = None;
        let next = || {
            let id = dumped.borrow().model.ids().into_iter().find(|id| reached.is_none_or(|last| *id > last))?;
            reached = Some(id);
            dumped.borrow().model.state(id)
        };
        journal.checkpoint(next).await.expect("checkpoint");
    }
    for _ in 0..2 {
        ended.recv_async().await.expect("a writer ended");
    }
    let journal = shard.borrow().journal.clone();
    journal.close().await.expect("close");
    let mut outside = outside.borrow_mut();
    outside.acknowledged = outside.history.len() - 1;
}

/// Runs a life that the planned crash may cut short, then a second one to its end, and checks what each finds.
fn crash_and_restart(seed: u64, plan: impl FnOnce(&SimWorld)) -> SimWorld {
    let world = SimWorld::new(seed);
    let outside = Outside::new(Vec::new());
    // The data directory is there before the node starts, durably: that is the operator's, or the data directory's, part.
    let data = async {
        world.platform().create_dir_all(Path::new("/data")).await?;
        world.platform().sync_dir(Path::new("/")).await
    };
    world.block_on(data).expect("an empty disk");
    plan(&world);
    for life in 0..3 {
        let context = format!("seed {seed}, life {life}");
        match world.run(live(world.platform(), Rc::clone(&outside), seed * 3 + life, context)) {
            Ok(()) | Err(SimStop::Crashed) => {}
            Err(stop) => panic!("seed {seed}, life {life}: {stop}"),
        }
        world.crash_after_steps(None);
        world.crash();
    }
    let recovered = world.block_on(async { recover(&world.platform(), Path::new(DIR)).await });
    outside.borrow().check(&recovered.expect("the last life ended well").volumes, "after the last life");
    world
}

/// Two passes: count the durable points, then cut the power right before and right after each.
#[test]
fn acknowledged_records_survive_a_crash_at_every_sync() {
    for seed in 0..2 {
        let syncs = crash_and_restart(seed, |_| ()).syncs();
        assert!(syncs > 20, "{syncs}");
        for nth in 1..=syncs {
            for point in [CrashPoint::Before, CrashPoint::After] {
                crash_and_restart(seed, |world| world.crash_at_sync(Some((nth, point))));
            }
        }
    }
}

/// Between the syncs: steps all over a run, with its torn writes and half-renamed files.
#[test]
fn acknowledged_records_survive_a_crash_at_any_step() {
    for seed in 100..102 {
        let steps = crash_and_restart(seed, |_| ()).steps();
        for after in (1..=steps).step_by(7) {
            crash_and_restart(seed, |world| world.crash_after_steps(Some(after)));
        }
    }
}
