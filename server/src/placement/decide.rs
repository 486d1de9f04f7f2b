//! The decision: one volume after the other, each where the load with it is smallest.

use std::cmp::Ordering;

use super::{BANDWIDTH_ASSUMED, Batch, Filesystem, Load, Overcommit, Plan, Refusal, Skip, Spread, StoreState, Verdict};

/// Space weighs most, because it stays: in the simulation less of it fills small stores with fast disks.
const WEIGHT_SPACE: f64 = 8.0;
const WEIGHT_VOLUMES: f64 = 2.0;
const WEIGHT_HYDRATION: f64 = 2.0;
const WEIGHT_GUESTS: f64 = 1.0;
/// Below these averages differences hardly matter: they are what a load of 1.0 is at least.
const SPACE_MIN: f64 = 0.05;
const BACKLOG_SECONDS_MIN: f64 = 10.0;
const PROMISED_MIN: f64 = 0.05;
const GUEST_WRITES_MIN: f64 = 16.0 * 1048576.0;
/// However busy its guests, a store gets less and not nothing: they come and go, volumes stay.
const GUESTS_MAX: f64 = 2.0;

/// Decides where each volume of the batch goes. Takes O(stores) per volume.
#[must_use]
pub fn place(stores: &[StoreState], filesystems: &[Filesystem], batch: &Batch) -> Plan {
    let mut books = Books::new(stores, filesystems, batch);
    let before: Vec<(Load, u64)> = (0..stores.len()).map(|store| (books.load(store, 0), books.room(store))).collect();
    let mut outcome = books.deal(batch);
    if let Ok(given) = &outcome
        && (given.len() as u64) < batch.count
    {
        let fit = given.len() as u64;
        outcome = Err(if books.skips.iter().all(|skip| !matches!(skip, None | Some(Skip::Full { .. }))) {
            Refusal::NoStore
        } else {
            Refusal::NoSpace { fit }
        });
    }
    let verdicts = stores.iter().zip(before).enumerate().map(|(index, (store, (before, room_before)))| Verdict {
        label: store.label.clone(),
        domain: store.domain.clone(),
        skipped: books.skips[index].clone(),
        volumes: books.given[index],
        room_before,
        room_after: books.room(index),
        before,
        after: books.load(index, 0),
        overcommit: books.overcommit(index),
        bandwidth_exceeded: books.bandwidth_exceeded(index, 0),
    });
    Plan { verdicts: verdicts.collect(), outcome }
}

/// What the stores have promised, with what was given of the batch so far.
pub(super) struct Books<'a> {
    stores: &'a [StoreState],
    batch: &'a Batch,
    disks: Vec<Disk>,
    skips: Vec<Option<Skip>>,
    given: Vec<u64>,
    average: Average,
}

/// A filesystem with what is promised on it.
#[derive(Clone, Copy, Default)]
struct Disk {
    capacity: f64,
    used: f64,
    usable_bytes: u64,
    /// Promised and not yet written.
    committed_bytes: u128,
    stores: u64,
}

/// What a load of 1.0 is.
#[derive(Clone, Copy, Default)]
struct Average {
    space: f64,
    /// Volumes for each usable byte.
    volumes: f64,
    backlog_seconds: f64,
    /// Part of the hydration bandwidth.
    promised: f64,
    guests: f64,
    /// The ratio that stands for `unlimited`.
    ratio: f64,
}

/// Smallest first: what it is about comes before how loaded it is.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Rank {
    of_domain: u64,
    bandwidth_exceeded: bool,
    load: f64,
}

impl Rank {
    pub(super) fn cmp(&self, other: &Rank) -> Ordering {
        (self.of_domain, self.bandwidth_exceeded)
            .cmp(&(other.of_domain, other.bandwidth_exceeded))
            .then(self.load.total_cmp(&other.load))
    }
}

impl<'a> Books<'a> {
    pub(super) fn new(stores: &'a [StoreState], filesystems: &[Filesystem], batch: &'a Batch) -> Books<'a> {
        let mut books = Books {
            stores,
            batch,
            disks: disks(stores, filesystems),
            skips: vec![None; stores.len()],
            given: vec![0; stores.len()],
            average: Average::default(),
        };
        books.skips = (0..stores.len()).map(|store| books.skip(store)).collect();
        books.average = books.average();
        books
    }

    fn skip(&self, store: usize) -> Option<Skip> {
        let StoreState { label, failure, .. } = &self.stores[store];
        if self.batch.store.as_ref().is_some_and(|asked| asked != label) {
            return Some(Skip::OtherStoreAsked);
        }
        if let Some(failure) = failure {
            return Some(Skip::Failing(failure.clone()));
        }
        let disk = self.disk(store);
        let wanted = disk.committed_bytes + u128::from(self.batch.volume_bytes);
        let short_bytes = wanted.saturating_sub(self.overcommit(store).limit(disk.usable_bytes));
        (short_bytes > 0).then_some(Skip::Full { short_bytes })
    }

    /// Of the stores that take volumes, with the whole batch on them.
    fn average(&self) -> Average {
        let open: Vec<usize> = (0..self.stores.len()).filter(|store| self.skips[*store].is_none()).collect();
        let sum =
            |value: &dyn Fn(&StoreState) -> f64| open.iter().map(|store| value(&self.stores[*store])).sum::<f64>();
        let count = self.batch.count as f64;
        let ratio = open.iter().filter_map(|store| self.overcommit(*store).ratio()).fold(1.0, f64::max);
        let mut filesystems: Vec<usize> = open.iter().map(|store| self.stores[*store].filesystem).collect();
        filesystems.sort_unstable();
        filesystems.dedup();
        let of_disks =
            |value: &dyn Fn(&Disk) -> f64| filesystems.iter().map(|disk| value(&self.disks[*disk])).sum::<f64>();
        let promised = of_disks(&|disk| disk.committed_bytes as f64) + count * self.batch.volume_bytes as f64;
        let bandwidth = sum(&bandwidth).max(1.0);
        let at_least = |value: f64, least: f64| if value.is_finite() { value.max(least) } else { least };
        Average {
            space: at_least(
                (of_disks(&|disk| disk.used) + promised / ratio) / of_disks(&|disk| disk.capacity),
                SPACE_MIN,
            ),
            volumes: at_least(
                (sum(&|s| s.volumes as f64) + count) / of_disks(&|disk| disk.usable_bytes as f64),
                f64::MIN_POSITIVE,
            ),
            backlog_seconds: at_least(
                (sum(&|s| s.backlog_bytes as f64) + count * self.batch.data_bytes as f64) / bandwidth,
                BACKLOG_SECONDS_MIN,
            ),
            promised: at_least(
                (sum(&|s| s.promised_bandwidth as f64) + count * self.batch.bandwidth as f64) / bandwidth,
                PROMISED_MIN,
            ),
            guests: at_least(sum(&|s| s.guest_write_bandwidth as f64) / open.len() as f64, GUEST_WRITES_MIN),
            ratio,
        }
    }

    pub(super) fn deal(&mut self, batch: &Batch) -> Result<Vec<u32>, Refusal> {
        let mut chosen = Vec::with_capacity(usize::try_from(batch.count).unwrap_or_default().min(1 << 20));
        let domains = domains(self.stores);
        let mut of_domain = vec![0_u64; self.stores.len()];
        let mut ranks: Vec<Option<Rank>> = (0..self.stores.len()).map(|store| self.rank(store)).collect();
        for _ in 0..batch.count {
            let ranked = ranks.iter().enumerate().filter_map(|(store, rank)| {
                let of_domain = if batch.spread == Spread::Domain { of_domain[domains[store]] } else { 0 };
                rank.map(|rank| (store, Rank { of_domain, ..rank }))
            });
            let Some((store, _)) = ranked.min_by(|(_, a), (_, b)| a.cmp(b)) else { break };
            self.given[store] += 1;
            let filesystem = self.stores[store].filesystem;
            self.disks[filesystem].committed_bytes += u128::from(batch.volume_bytes);
            of_domain[domains[store]] += 1;
            chosen.push(u32::try_from(store).expect("stores are counted in hundreds"));
            for (neighbour, rank) in ranks.iter_mut().enumerate() {
                if self.stores[neighbour].filesystem == filesystem {
                    *rank = self.rank(neighbour);
                }
            }
        }
        Ok(chosen)
    }

    /// With one more volume; `None` if that does not fit.
    pub(super) fn rank(&self, store: usize) -> Option<Rank> {
        let takes = self.skips[store].is_none() && self.room(store) > 0;
        takes.then(|| Rank {
            of_domain: 0,
            bandwidth_exceeded: self.bandwidth_exceeded(store, 1),
            load: self.load(store, 1).total,
        })
    }

    fn disk(&self, store: usize) -> &Disk {
        &self.disks[self.stores[store].filesystem]
    }

    fn overcommit(&self, store: usize) -> Overcommit {
        self.batch.overcommit.unwrap_or(self.stores[store].overcommit)
    }

    /// How many more volumes the store could take alone.
    fn room(&self, store: usize) -> u64 {
        if self.stores[store].failure.is_some() {
            return 0;
        }
        let disk = self.disk(store);
        let left = self.overcommit(store).limit(disk.usable_bytes).saturating_sub(disk.committed_bytes);
        u64::try_from(left / u128::from(self.batch.volume_bytes.max(1))).unwrap_or(u64::MAX)
    }

    fn bandwidth_exceeded(&self, store: usize, more: u64) -> bool {
        let state = &self.stores[store];
        let promised = state.promised_bandwidth + (self.given[store] + more) * self.batch.bandwidth;
        // Who was promised nothing gets what is left, so there should be something.
        let needs_some = u64::from(self.batch.bandwidth == 0 && self.batch.data_bytes > 0);
        state.hydration_bandwidth.is_some_and(|share| promised + needs_some > share)
    }

    /// Bytes that hydration writes into `volumes` of the batch.
    fn data_bytes(&self, store: usize, volumes: u64) -> f64 {
        let state = &self.stores[store];
        let copies = match state.shares_extents {
            true => volumes.min(1) as f64 * self.batch.data_bytes.saturating_sub(state.image_bytes) as f64,
            false => volumes as f64 * self.batch.data_bytes as f64,
        };
        state.backlog_bytes as f64 + copies
    }

    /// The load of a store with what it was given and `more`.
    fn load(&self, store: usize, more: u64) -> Load {
        let (state, disk, average) = (&self.stores[store], self.disk(store), &self.average);
        let volumes = self.given[store] + more;
        let promised_bytes = disk.committed_bytes as f64 + more as f64 * self.batch.volume_bytes as f64;
        let ratio = self.overcommit(store).ratio().unwrap_or(average.ratio);
        let space = (disk.used + promised_bytes / ratio) / disk.capacity / average.space;
        let place = (disk.usable_bytes as f64 / disk.stores as f64).max(1.0);
        let there = (state.volumes + volumes) as f64 / place / average.volumes;
        let seconds = self.data_bytes(store, volumes) / bandwidth(state);
        let promised =
            (state.promised_bandwidth as f64 + volumes as f64 * self.batch.bandwidth as f64) / bandwidth(state);
        let hydration = (seconds / average.backlog_seconds).max(promised / average.promised);
        let guests = (state.guest_write_bandwidth as f64 / average.guests).min(GUESTS_MAX);
        let parts =
            [(WEIGHT_SPACE, space), (WEIGHT_VOLUMES, there), (WEIGHT_HYDRATION, hydration), (WEIGHT_GUESTS, guests)];
        let weights: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let squares: f64 = parts.iter().map(|(weight, load)| weight * load * load).sum();
        Load { total: (squares / weights).sqrt(), space, volumes: there, hydration, guests }
    }
}

fn bandwidth(store: &StoreState) -> f64 {
    store.hydration_bandwidth.unwrap_or(BANDWIDTH_ASSUMED).max(1) as f64
}

/// Number of each store's domain: the index of its first store.
fn domains(stores: &[StoreState]) -> Vec<usize> {
    let first = |store: &StoreState| stores.iter().position(|other| other.domain == store.domain);
    stores.iter().map(|store| first(store).expect("at least itself")).collect()
}

fn disks(stores: &[StoreState], filesystems: &[Filesystem]) -> Vec<Disk> {
    let disk = |(index, filesystem): (usize, &Filesystem)| {
        let Filesystem { capacity_bytes, free_bytes } = *filesystem;
        let on_it: Vec<&StoreState> = stores.iter().filter(|store| store.filesystem == index).collect();
        let sum = |value: fn(&StoreState) -> u64| on_it.iter().map(|store| u128::from(value(store))).sum::<u128>();
        let used = capacity_bytes.saturating_sub(free_bytes);
        // Files that share extents seem to occupy more than there is: what is shared may have to be written again.
        let written = sum(|store| store.allocated_bytes).min(u128::from(used));
        Disk {
            capacity: capacity_bytes.max(1) as f64,
            used: used as f64,
            usable_bytes: filesystem.usable_bytes(),
            committed_bytes: sum(|store| store.volume_bytes).saturating_sub(written),
            stores: on_it.len().max(1) as u64,
        }
    };
    filesystems.iter().enumerate().map(disk).collect()
}
