//! 100 unequal stores take 100,000 volumes in batches, while volumes hydrate and guests write: placement beside round robin and
//! random, which also skip what is full.

use std::fmt;

use super::tests::{GIB, MIB, batch, store};
use super::*;

const STORES: usize = 100;
const VOLUMES: u64 = 100_000;
const SECONDS_BETWEEN_BATCHES: u64 = 60;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

struct World {
    stores: Vec<StoreState>,
    disks: Vec<Filesystem>,
    /// Longest any store ever needed to hydrate what it had.
    backlog_seconds_max: f64,
    /// Volumes that went to the tenth of the stores whose guests write most.
    volumes_among_busy: u64,
}

/// How a policy did. Smaller is better.
struct Outcome {
    /// How far the fullest store is above the average, in points of its capacity.
    space_imbalance: f64,
    backlog_seconds_max: f64,
    busy_part: f64,
    refused: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { space_imbalance, backlog_seconds_max, busy_part, refused } = self;
        write!(
            f,
            "fullest store {:.1} points above the average, longest backlog {backlog_seconds_max:.0} s, {:.1} % of the volumes on \
             the busiest tenth, {refused} refused",
            100.0 * space_imbalance,
            100.0 * busy_part
        )
    }
}

impl World {
    fn new(random: &mut Random) -> World {
        let mut world =
            World { stores: Vec::new(), disks: Vec::new(), backlog_seconds_max: 0.0, volumes_among_busy: 0 };
        for index in 0..STORES {
            let capacity_bytes = (2 + random.next(15)) << 40;
            let used = capacity_bytes / 100 * random.next(30);
            world.disks.push(Filesystem { capacity_bytes, free_bytes: capacity_bytes - used });
            world.stores.push(StoreState {
                volumes: used / (50 * GIB),
                volume_bytes: used,
                allocated_bytes: used,
                hydration_bandwidth: Some((200 + random.next(800)) * MIB),
                // One store in ten is written by its guests.
                guest_write_bandwidth: if index % 10 == 0 {
                    (200 + random.next(200)) * MIB
                } else {
                    random.next(20) * MIB
                },
                ..store(&format!("s{index}"), index)
            });
        }
        world
    }

    fn fits(&self, store: usize, bytes: u64) -> bool {
        let StoreState { volume_bytes, allocated_bytes, .. } = self.stores[store];
        volume_bytes - allocated_bytes + bytes <= self.disks[store].usable_bytes()
    }

    fn create(&mut self, store: usize, batch: &Batch) {
        assert!(self.fits(store, batch.volume_bytes), "store {store} over its capacity");
        self.volumes_among_busy += u64::from(store.is_multiple_of(10));
        let state = &mut self.stores[store];
        state.volumes += 1;
        state.volume_bytes += batch.volume_bytes;
        state.backlog_bytes += batch.data_bytes;
    }

    fn pass(&mut self, seconds: u64) {
        for (state, disk) in self.stores.iter_mut().zip(&mut self.disks) {
            let share = state.hydration_bandwidth.expect("every store has one");
            self.backlog_seconds_max = self.backlog_seconds_max.max(state.backlog_bytes as f64 / share as f64);
            let written = state.backlog_bytes.min(share * seconds);
            state.backlog_bytes -= written;
            state.allocated_bytes += written;
            disk.free_bytes -= written;
        }
    }

    fn outcome(&self, refused: u64) -> Outcome {
        let part = |used: u64, of: u64| used as f64 / of as f64;
        let full =
            self.stores.iter().zip(&self.disks).map(|(store, disk)| part(store.volume_bytes, disk.capacity_bytes));
        let sizes: u64 = self.stores.iter().map(|store| store.volume_bytes).sum();
        let average = part(sizes, self.disks.iter().map(|disk| disk.capacity_bytes).sum());
        Outcome {
            space_imbalance: full.fold(0.0, f64::max) - average,
            backlog_seconds_max: self.backlog_seconds_max,
            busy_part: part(self.volumes_among_busy, VOLUMES - refused),
            refused,
        }
    }
}

/// The same world and the same batches for each policy, which names the stores of a batch.
fn run(seed: u64, mut policy: impl FnMut(&World, &Batch, &mut Random) -> Vec<usize>) -> Outcome {
    let mut random = Random(seed);
    let mut world = World::new(&mut random);
    let mut of_policy = Random(!seed);
    let (mut asked, mut refused) = (0, 0);
    while asked < VOLUMES {
        let gib = 1 + random.next(8);
        let count = (1 + random.next(2000)).min(VOLUMES - asked);
        let batch = Batch { volume_bytes: gib * GIB, data_bytes: gib * GIB / 4, ..batch(count) };
        asked += count;
        let given = policy(&world, &batch, &mut of_policy);
        refused += count - given.len() as u64;
        given.into_iter().for_each(|store| world.create(store, &batch));
        world.pass(SECONDS_BETWEEN_BATCHES);
    }
    world.outcome(refused)
}

/// The first store from `start` on that has room, as the simple policies find it.
fn with_room(world: &World, batch: &Batch, given: &[u64], start: usize) -> Option<usize> {
    (0..STORES)
        .map(|step| (start + step) % STORES)
        .find(|store| world.fits(*store, (given[*store] + 1) * batch.volume_bytes))
}

fn simple(world: &World, batch: &Batch, mut next: impl FnMut() -> usize) -> Vec<usize> {
    let mut given = vec![0; STORES];
    let mut chosen = Vec::new();
    for _ in 0..batch.count {
        let Some(store) = with_room(world, batch, &given, next()) else { break };
        given[store] += 1;
        chosen.push(store);
    }
    chosen
}

#[test]
fn placement_beats_round_robin_and_random_over_100_stores_and_100_000_volumes() {
    for seed in [1, 2, 3] {
        let ours = run(seed, |world, batch, _| {
            let given = place(&world.stores, &world.disks, batch).outcome.unwrap_or_default();
            given.into_iter().map(|store| store as usize).collect()
        });
        let mut turn = 0;
        let round_robin = run(seed, |world, batch, _| {
            simple(world, batch, || {
                turn += 1;
                turn % STORES
            })
        });
        let random = run(seed, |world, batch, random| simple(world, batch, || random.next(STORES as u64) as usize));
        println!("seed {seed}\n  placement: {ours}\n  round robin: {round_robin}\n  random: {random}");
        for other in [&round_robin, &random] {
            assert!(ours.space_imbalance < 0.5 * other.space_imbalance, "space: {ours} | {other}");
            assert!(ours.backlog_seconds_max < 0.8 * other.backlog_seconds_max, "backlog: {ours} | {other}");
            assert!(ours.busy_part < other.busy_part, "guests: {ours} | {other}");
            assert!(ours.refused == 0, "{ours}");
        }
    }
}

/// One batch at once: a decision that is quadratic in volumes would never end.
#[test]
fn one_batch_of_100_000_volumes_over_100_stores_is_decided_at_once() {
    let mut random = Random(7);
    let world = World::new(&mut random);
    let all = Batch { data_bytes: GIB / 4, ..batch(VOLUMES) };
    let given = place(&world.stores, &world.disks, &all).outcome.expect("it fits");
    assert_eq!(given.len() as u64, VOLUMES);
    let (mut emptier, mut fuller) = (0, 0);
    let used = |disk: &Filesystem| 1.0 - disk.free_bytes as f64 / disk.capacity_bytes as f64;
    for store in given {
        let half = if used(&world.disks[store as usize]) < 0.15 { &mut emptier } else { &mut fuller };
        *half += 1;
    }
    assert!(emptier > fuller && fuller > 0, "{emptier} {fuller}");
}
