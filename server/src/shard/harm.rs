//! Do no harm: how fast a store may hydrate while guests use it, by what they feel of it. Plain synchronous core: time is
//! an argument.
//!
//! Each kind of guest I/O is compared with itself: with how long it takes while no fill is at the disk, its *baseline*.
//! When clearly more than one in a hundred take longer than the bound allows, the rate falls by a factor; when no more
//! than that do, it rises; in between it waits for more samples. Every few seconds a *probe* holds all fills back for a
//! moment, so that the baseline is that of now. A store that no guest uses has no limit.

use std::time::Duration;

use crate::platform::Time;
use crate::shard::latencies::{Latencies, micros};

/// Most bytes of fills in flight, while no guest uses the store: what it takes to keep a fast disk busy.
pub const IN_FLIGHT_QUIET_BYTES: u64 = 4 << 20;
/// While guests do, before anything is known of them, and always where there is no bound: about half a millisecond of a
/// disk with 2 GB/s.
pub const IN_FLIGHT_BUSY_BYTES: u64 = 1 << 20;
/// Fills in flight are what the rate moves in a 256th of a second, so one number says both.
const IN_FLIGHT_PER_SECOND: u64 = 256;
/// So long after its last guest I/O a store counts as used.
pub const GUEST_PAUSE: Duration = Duration::from_millis(200);
/// Between two decisions.
const PERIOD: Duration = Duration::from_millis(100);
/// So long a decision waits for some samples, and then for any.
const PATIENCE: Duration = Duration::from_millis(500);
const PATIENCE_MAX: Duration = Duration::from_secs(2);
const SAMPLES: u64 = 64;
/// Fewer say nothing, neither of harm nor of quiet.
const SAMPLES_MIN: u64 = 16;
const BASELINE_SAMPLES_MIN: u64 = 32;
/// After a fill; the disk's queue is empty by then.
const SETTLE: Duration = Duration::from_millis(10);
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Where the baseline of a kind is not known, or from few samples only.
const PROBE_AGAIN: Duration = Duration::from_secs(2);
const BASELINE_SAMPLES: u64 = 300;
const PROBE: Duration = Duration::from_millis(300);
/// A probe that has so many ends early.
const PROBE_SAMPLES: u64 = 1000;
/// A generation of quiet samples is full, or old and not empty. The last two are the baseline.
const GENERATION_SAMPLES: u64 = 1000;
const GENERATION_MIN: Duration = Duration::from_secs(1);
const GENERATION_MAX: Duration = Duration::from_secs(30);
/// Less than this nobody can tell from the noise of clocks and cores.
const NOISE_US: u64 = 100;
/// The smallest rate that is not raised by what hydration does not even use.
const UNUSED_MAX: u64 = IN_FLIGHT_BUSY_BYTES * IN_FLIGHT_PER_SECOND;

/// The floor of a store whose hydration bandwidth has no limit.
const FLOOR_UNLIMITED: u64 = 4 << 20;
/// Faster than any disk.
const RATE_MAX: u64 = 1 << 40;

/// Guest I/O that reaches the disk, by what may be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestIo {
    Read,
    LargeRead,
    Write,
    LargeWrite,
    Flush,
}

impl GuestIo {
    pub const ALL: [GuestIo; 5] =
        [GuestIo::Read, GuestIo::LargeRead, GuestIo::Write, GuestIo::LargeWrite, GuestIo::Flush];
    /// Bytes from which on an I/O is a large one.
    const LARGE: u64 = 64 << 10;

    #[must_use]
    pub fn read(bytes: u64) -> GuestIo {
        if bytes < GuestIo::LARGE { GuestIo::Read } else { GuestIo::LargeRead }
    }

    #[must_use]
    pub fn write(bytes: u64) -> GuestIo {
        if bytes < GuestIo::LARGE { GuestIo::Write } else { GuestIo::LargeWrite }
    }
}

/// What the operator allows, for one store and shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HarmLimits {
    /// p99 of guests by their baseline, in hundredths; `None`: guests' latency is not looked at.
    pub bound_percent: Option<u32>,
    /// Bytes per second that hydration may move at least, over a second with a probe in it too.
    pub floor: u64,
}

/// What the operator allows, for each store of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HarmConfig {
    /// As in [`HarmLimits`].
    pub bound_percent: Option<u32>,
    /// Bytes per second of a store; `None`: a twentieth of its hydration bandwidth, or 4 MiB/s where that has no limit.
    pub floor: Option<u64>,
}

impl Default for HarmConfig {
    fn default() -> HarmConfig {
        HarmConfig { bound_percent: Some(120), floor: None }
    }
}

impl HarmConfig {
    /// One shard's part of a store with this hydration bandwidth.
    #[must_use]
    pub fn limits(&self, bandwidth: Option<u64>, shards: u64) -> HarmLimits {
        let floor = self.floor.unwrap_or_else(|| bandwidth.map_or(FLOOR_UNLIMITED, |bytes| bytes / 20));
        let floor = floor.min(bandwidth.unwrap_or(u64::MAX)) / shards;
        HarmLimits { bound_percent: self.bound_percent, floor: floor.max(1) }
    }
}

/// What hydration may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    pub in_flight_bytes: u64,
    /// `None`: as fast as it can.
    pub bytes_per_second: Option<u64>,
    /// What may be made up for in one go of what was not used: enough for the floor to hold over a second, no more than guests
    /// hardly feel.
    pub burst_bytes: u64,
    /// A probe: nothing begins that no guest waits for. It lasts for less than half a second.
    pub paused: bool,
}

#[derive(Default)]
struct Kind {
    /// Samples while hydration did not disturb: the last generation and this one.
    quiet: [Latencies; 2],
    quiet_since: Time,
    /// Everything of the last half second, and of the one before.
    recent: [Latencies; 2],
    recent_since: Time,
    /// p99 of the quiet ones in µs, if there are enough.
    baseline: Option<u64>,
    /// Since the last decision: samples, those over the bound, and those over it that earlier ones left to make good.
    samples: u64,
    above: u64,
    debt: u64,
}

impl Kind {
    fn add_recent(&mut self, us: u64, now: Time) {
        if now.since(self.recent_since) >= PATIENCE {
            let [last, this] = &mut self.recent;
            std::mem::swap(last, this);
            this.clear();
            if now.since(self.recent_since) >= 2 * PATIENCE {
                last.clear();
            }
            self.recent_since = now;
        }
        self.recent[1].add(us);
    }

    fn add_quiet(&mut self, us: u64, now: Time) {
        let age = now.since(self.quiet_since);
        let full = self.quiet[1].total() >= GENERATION_SAMPLES && age >= GENERATION_MIN;
        let old = self.quiet[1].total() >= SAMPLES && age >= GENERATION_MAX;
        if full || old {
            self.next_generation(now);
        }
        self.quiet[1].add(us);
        if self.baseline.is_none() {
            self.learn();
        }
    }

    fn next_generation(&mut self, now: Time) {
        let [last, this] = &mut self.quiet;
        if this.total() >= SAMPLES {
            std::mem::swap(last, this);
            this.clear();
            self.quiet_since = now;
        }
    }

    /// A probe has ended. If it is enough by itself, what was before is forgotten.
    fn probed(&mut self) {
        let [last, this] = &mut self.quiet;
        if this.total() >= BASELINE_SAMPLES {
            last.clear();
        }
        self.learn();
        self.debt = 0;
    }

    fn learn(&mut self) {
        let [last, this] = &self.quiet;
        if last.total() + this.total() >= BASELINE_SAMPLES_MIN {
            self.baseline = Some(last.p99_with(this));
        }
    }

    /// Longer than this is over the bound.
    fn most(&self, bound_percent: u32) -> Option<u64> {
        let baseline = self.baseline?;
        Some((baseline.saturating_mul(bound_percent.into()) / 100).max(baseline + NOISE_US))
    }

    fn judge(&self) -> Verdict {
        if self.samples < SAMPLES_MIN || self.baseline.is_none() {
            return Verdict::Nothing;
        }
        // Three deviations over one in a hundred are no chance.
        let (expected, above) = (self.samples as f64 / 100.0, self.above as f64);
        let tolerated = expected + 0.3 * (self.samples as f64).sqrt();
        if above > tolerated.max(self.samples as f64 / 10.0) {
            Verdict::Severe
        } else if above > tolerated {
            Verdict::Harmed
        } else if above > expected.max(1.0) {
            Verdict::Unsure
        } else if self.debt > 0 && above + self.debt as f64 > expected {
            Verdict::Owing
        } else {
            Verdict::Fine
        }
    }

    /// A decision was made: what is over one in a hundred has to be made good before the rate rises again.
    fn decided(&mut self) {
        if self.samples < SAMPLES_MIN {
            // It had no part in it: rare I/O is collected until it says something.
            return;
        }
        let due = self.samples / 100;
        self.debt = (self.debt + self.above).saturating_sub(due).min(self.debt.max(self.samples));
        (self.samples, self.above) = (0, 0);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Nothing,
    Fine,
    /// Fine, but for earlier harm.
    Owing,
    /// More samples will tell.
    Unsure,
    Harmed,
    Severe,
}

/// The controller of one store and shard.
pub struct Harm {
    limits: HarmLimits,
    kinds: [Kind; GuestIo::ALL.len()],
    /// The latest time heard of: time does not go back.
    now: Time,
    guests: u32,
    guest_at: Option<Time>,
    /// Bytes per second while guests use the store.
    rate: u64,
    /// Where harm was seen last: near it the rate rises slowly.
    edge: Option<u64>,
    /// The last change was one down.
    falling: bool,
    /// Since the rate changed last.
    since: Time,
    filled: u64,
    /// What began earlier has met more fills than there are now, or a probe. A long I/O may see many decisions, so it is not
    /// the last one that counts.
    fair_from: Time,
    /// Fills at the disk, and when there was one last.
    fills: u32,
    fill_at: Option<Time>,
    probe_until: Option<Time>,
    probe_samples: u64,
    probed_at: Time,
    slow_downs: u64,
}

impl Harm {
    #[must_use]
    pub fn new(limits: HarmLimits, now: Time) -> Harm {
        Harm {
            limits,
            kinds: Default::default(),
            now,
            guests: 0,
            guest_at: None,
            rate: UNUSED_MAX.max(limits.floor),
            edge: None,
            falling: false,
            since: now,
            fair_from: now,
            filled: 0,
            fills: 0,
            fill_at: None,
            probe_until: None,
            probe_samples: 0,
            probed_at: now,
            slow_downs: 0,
        }
    }

    /// A guest's I/O goes to the disk.
    pub fn guest_begins(&mut self, now: Time) {
        self.hear(now);
        if !self.used() {
            self.begin_window();
        }
        self.guests += 1;
        self.guest_at = Some(self.now);
    }

    /// It has ended; it began at `begun`.
    pub fn guest_ends(&mut self, io: GuestIo, begun: Time, now: Time) {
        self.hear(now);
        self.guests = self.guests.saturating_sub(1);
        self.guest_at = Some(self.now);
        let Some(bound) = self.limits.bound_percent else { return };
        let us = micros(self.now.since(begun));
        let quiet = self.fills == 0 && self.fill_at.is_none_or(|at| begun >= at.after(SETTLE));
        let kind = &mut self.kinds[io as usize];
        kind.add_recent(us, self.now);
        if quiet {
            kind.add_quiet(us, self.now);
            self.probe_samples += 1;
        }
        if begun >= self.fair_from {
            kind.samples += 1;
            kind.above += u64::from(kind.most(bound).is_some_and(|most| us > most));
        }
        self.decide();
    }

    /// A fill begins, for a guest that waits for it or for hydration.
    pub fn fill_begins(&mut self, bytes: u64, for_guest: bool, now: Time) {
        self.hear(now);
        self.filled = self.filled.saturating_add(if for_guest { 0 } else { bytes });
        self.fills = self.fills.saturating_add(1);
    }

    pub fn fill_ends(&mut self, now: Time) {
        self.hear(now);
        self.fills = self.fills.saturating_sub(1);
        self.fill_at = Some(self.now);
    }

    pub fn allowed(&mut self, now: Time) -> Allowed {
        self.hear(now);
        let floor = self.limits.floor;
        let limited = |in_flight_bytes: u64, bytes_per_second, paused| {
            let burst_bytes = in_flight_bytes.max(floor / 2).max(1);
            Allowed { in_flight_bytes, bytes_per_second, burst_bytes, paused }
        };
        if !self.used() {
            return limited(IN_FLIGHT_QUIET_BYTES, None, false);
        }
        if self.limits.bound_percent.is_none() {
            return limited(IN_FLIGHT_BUSY_BYTES, None, false);
        }
        self.decide();
        let in_flight_bytes = (self.rate / IN_FLIGHT_PER_SECOND).min(IN_FLIGHT_QUIET_BYTES);
        limited(in_flight_bytes, Some(self.rate), self.probe_until.is_some())
    }

    /// What the rate is or would be if guests used the store now; 0: it is not looked at.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.limits.bound_percent.map_or(0, |_| self.rate)
    }

    #[must_use]
    pub fn floor(&self) -> u64 {
        self.limits.floor
    }

    /// How often the rate was lowered.
    #[must_use]
    pub fn slow_downs(&self) -> u64 {
        self.slow_downs
    }

    /// p99 in µs of the baseline, and of the last half second to second; 0: not known, no guest.
    #[must_use]
    pub fn p99(&self, io: GuestIo, now: Time) -> (u64, u64) {
        let kind = &self.kinds[io as usize];
        let fresh = now.since(kind.recent_since) < 2 * PATIENCE;
        let [last, this] = &kind.recent;
        (kind.baseline.unwrap_or(0), if fresh { last.p99_with(this) } else { 0 })
    }

    fn hear(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    fn used(&self) -> bool {
        self.guests > 0 || self.guest_at.is_some_and(|at| self.now < at.after(GUEST_PAUSE))
    }

    fn begin_window(&mut self) {
        (self.since, self.fair_from, self.filled, self.probe_until) = (self.now, self.now, 0, None);
        self.kinds.iter_mut().for_each(|kind| (kind.samples, kind.above) = (0, 0));
    }

    fn decide(&mut self) {
        if let Some(until) = self.probe_until {
            if self.now >= until || self.probe_samples >= PROBE_SAMPLES {
                self.probed_at = self.now;
                self.kinds.iter_mut().for_each(Kind::probed);
                self.begin_window();
            }
            return;
        }
        let age = self.now.since(self.since);
        let most = self.kinds.iter().map(|kind| kind.samples).max().unwrap_or(0);
        let enough = if age < PATIENCE { SAMPLES } else { SAMPLES_MIN };
        if age < PERIOD || (age < PATIENCE_MAX && most < enough) {
            return;
        }
        if self.filled == 0 {
            // Whatever guests feel, it is not hydration.
            self.kinds.iter_mut().for_each(Kind::learn);
            return self.begin_window();
        }
        if self.probe_is_due() {
            self.begin_window();
            self.probe_samples = 0;
            self.kinds.iter_mut().for_each(|kind| kind.next_generation(self.now));
            self.probe_until = Some(self.now.after(PROBE));
            return;
        }
        self.kinds.iter_mut().for_each(Kind::learn);
        let used = (u128::from(self.filled) * 1_000_000_000 / age.as_nanos().max(1)) as u64;
        match self.kinds.iter().map(Kind::judge).max().unwrap_or(Verdict::Nothing) {
            Verdict::Severe => self.slow_down(used, 50),
            Verdict::Harmed => self.slow_down(used, 70),
            Verdict::Unsure => {}
            Verdict::Owing => self.decided(),
            Verdict::Fine | Verdict::Nothing => self.speed_up(used),
        }
    }

    fn probe_is_due(&self) -> bool {
        // Of rare I/O a probe teaches nothing.
        let few = |kind: &Kind| kind.quiet[0].total() + kind.quiet[1].total() < BASELINE_SAMPLES;
        let unknown = |kind: &Kind| kind.samples >= SAMPLES_MIN && kind.baseline.is_none();
        let unknown = self.kinds.iter().any(|kind| unknown(kind) || (kind.samples >= SAMPLES && few(kind)));
        let since = self.now.since(self.probed_at);
        since >= PROBE_EVERY || (unknown && since >= PROBE_AGAIN)
    }

    fn slow_down(&mut self, used: u64, percent: u64) {
        // What it was allowed and did not use has done no harm.
        let did = self.rate.min(used.saturating_add(used / 8)).max(self.limits.floor);
        let known = self.edge.is_some_and(|edge| did > edge / 10 * 8 && did < edge / 10 * 12);
        let slower = (did / 100 * if known { 80 } else { percent }).max(self.limits.floor);
        if slower < self.rate {
            self.slow_downs += 1;
            // Step by step it goes down from one and the same edge.
            self.edge = self.edge.filter(|edge| self.falling && *edge > did).or(Some(did));
            (self.rate, self.falling, self.fair_from) = (slower, true, self.now);
        }
        self.decided();
    }

    fn speed_up(&mut self, used: u64) {
        if self.rate <= UNUSED_MAX || self.rate <= used.saturating_add(used / 4) {
            let fast = self.rate.saturating_add(self.rate / 4);
            let near = self.edge.is_some_and(|edge| fast > edge / 10 * 9);
            let faster = if near { self.rate.saturating_add((self.rate / 20).max(1)) } else { fast };
            self.rate = faster.min(RATE_MAX.max(self.limits.floor));
            self.edge = self.edge.filter(|edge| self.rate <= edge / 2 * 3);
        }
        self.falling = false;
        self.decided();
    }

    fn decided(&mut self) {
        self.kinds.iter_mut().for_each(Kind::decided);
        (self.since, self.filled) = (self.now, 0);
    }
}

#[cfg(test)]
#[path = "harm_tests.rs"]
mod tests;
