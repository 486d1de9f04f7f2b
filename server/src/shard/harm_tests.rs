//! The controller on simulated devices, and with inputs no device would give.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::{Allowed, GUEST_PAUSE, GuestIo, Harm, HarmLimits, IN_FLIGHT_QUIET_BYTES, NOISE_US};
use crate::budget::TokenBucket;
use crate::platform::Time;
use crate::platform::sim::SimRng;

const CHUNK: u64 = 512 << 10;
const SECOND: u64 = 1_000_000_000;
/// Guests begin their I/O, and fills begin and end, at multiples of this.
const STEP: u64 = 100_000;

#[derive(Clone, Copy, Debug)]
struct Device {
    /// Bytes per second of fills.
    speed: u64,
    /// Of a guest's I/O on an idle disk.
    base_us: u64,
    /// In hundredths, how much of the fills before it a guest's I/O waits for.
    shared_percent: u64,
    guest_ios_per_second: u64,
}

/// A disk where guests' I/O waits for the fills given to it before, and hydration that always has more to write.
struct Lab {
    device: Device,
    rng: SimRng,
    harm: Harm,
    pace: TokenBucket,
    now: u64,
    busy_until: u64,
    fills: VecDeque<u64>,
    guests: BTreeSet<(u64, u64)>,
    filled: u64,
    rates: Vec<u64>,
    took_us: Vec<u64>,
}

impl Lab {
    fn new(device: Device, limits: HarmLimits, seed: u64) -> Lab {
        let (harm, pace) = (Harm::new(limits, Time(0)), TokenBucket::new(None, Time(0)));
        let rng = SimRng::new(seed);
        let (now, busy_until, filled) = (20 * SECOND, 0, 0);
        let (fills, guests, rates, took_us) = <_>::default();
        Lab { device, rng, harm, pace, now, busy_until, fills, guests, filled, rates, took_us }
    }

    /// Most take a little longer than the fastest, a few much longer.
    fn quiet_us(&mut self) -> u64 {
        let spread = 100 + self.rng.below(20) + self.rng.below(20) * u64::from(self.rng.below(10) == 0);
        let rare = if self.rng.below(500) == 0 { 3 } else { 1 };
        self.device.base_us * spread / 100 * rare
    }

    /// p99 of guests while nothing hydrates.
    fn quiet_p99(&mut self) -> u64 {
        let mut all: Vec<u64> = (0..20_000).map(|_| self.quiet_us()).collect();
        all.sort_unstable();
        all[all.len() * 99 / 100]
    }

    fn run(&mut self, seconds: u64, hydrates: bool) {
        (self.rates, self.took_us, self.filled) = <_>::default();
        let end = self.now + seconds * SECOND;
        while self.now < end {
            self.now += STEP;
            let now = Time(self.now);
            while self.fills.front().is_some_and(|end| *end <= self.now) {
                self.harm.fill_ends(now);
                self.fills.pop_front();
            }
            while let Some((ends, begun)) = self.guests.first().copied().filter(|(ends, _)| *ends <= self.now) {
                self.guests.pop_first();
                self.harm.guest_ends(GuestIo::Read, Time(begun), Time(ends));
                self.took_us.push((ends - begun) / 1000);
            }
            while hydrates && self.may_fill() {
                self.busy_until = self.busy_until.max(self.now) + CHUNK * SECOND / self.device.speed;
                self.harm.fill_begins(CHUNK, false, now);
                self.fills.push_back(self.busy_until);
                self.filled += CHUNK;
            }
            if self.rng.below(SECOND / STEP) < self.device.guest_ios_per_second {
                let begun = self.now + self.rng.below(STEP);
                let wait = self.busy_until.saturating_sub(begun) * self.device.shared_percent / 100;
                self.harm.guest_begins(now);
                // Two that end together are one: the set keeps them apart by their beginning.
                let ends = begun + self.quiet_us() * 1000 + wait;
                if !self.guests.insert((ends, begun)) {
                    self.harm.guest_ends(GuestIo::Read, Time(begun), now);
                }
            }
            self.rates.push(self.harm.rate());
        }
    }

    fn may_fill(&mut self) -> bool {
        let now = Time(self.now);
        let Allowed { in_flight_bytes, bytes_per_second, burst_bytes, paused } = self.harm.allowed(now);
        self.pace.set_rate(bytes_per_second, burst_bytes, now);
        let room = self.fills.is_empty() || (self.fills.len() as u64 + 1) * CHUNK <= in_flight_bytes;
        !paused && room && self.pace.take(CHUNK, now).is_ok()
    }

    /// How many of a thousand took longer than so many µs.
    fn above_per_mille(&self, us: u64) -> u64 {
        self.took_us.iter().filter(|took| **took > us).count() as u64 * 1000 / (self.took_us.len() as u64).max(1)
    }
}

fn device() -> impl Strategy<Value = Device> {
    (50_u64..4000, 50_u64..1500, 20_u64..=100, 100_u64..5000).prop_map(|(speed, base_us, shared_percent, ios)| Device {
        speed: speed * 1_000_000,
        base_us,
        shared_percent,
        guest_ios_per_second: ios,
    })
}

fn limits() -> impl Strategy<Value = HarmLimits> {
    (110_u32..200, 1_u64..8).prop_map(|(bound, floor)| HarmLimits { bound_percent: Some(bound), floor: floor << 20 })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn guests_stay_within_their_bound_and_hydration_above_its_floor(
        device in device(), limits in limits(), seed in any::<u64>()
    ) {
        let mut lab = Lab::new(device, limits, seed);
        let quiet = lab.quiet_p99();
        let most = (quiet * u64::from(limits.bound_percent.unwrap_or(0)) / 100).max(quiet + NOISE_US);
        lab.run(20, true);
        // Each second on its own: the floor holds always, but for a probe and what is in flight. A disk may be slower than it.
        let floor = limits.floor.min(device.speed / 10 * 9);
        let (mut rates, mut took) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            lab.run(1, true);
            prop_assert!(lab.filled + 2 * CHUNK >= floor / 10 * 8, "{} bytes in a second, floor {floor}", lab.filled);
            rates.append(&mut lab.rates);
            took.append(&mut lab.took_us);
        }
        lab.took_us = took;
        let (least, greatest) = (*rates.iter().min().unwrap(), *rates.iter().max().unwrap());
        let above = lab.above_per_mille(most);
        prop_assert!(least >= limits.floor);
        // One in a hundred is the bound, which few I/Os a second tell late: fewer than 200 by so much that only the worst is
        // ruled out. Where the floor is harm already nobody can help.
        let late = if device.guest_ios_per_second < 200 { 300 } else { 60 };
        prop_assert!(above <= late || least <= limits.floor * 2, "{above} of 1000 over {most} us, rate {least}-{greatest}");
        prop_assert!(greatest / 12 <= least, "it swings between {least} and {greatest}");
        // The guests leave.
        let ios = std::mem::take(&mut lab.device.guest_ios_per_second);
        lab.run(1, true);
        let free = lab.harm.allowed(Time(lab.now));
        prop_assert_eq!((free.in_flight_bytes, free.bytes_per_second), (IN_FLIGHT_QUIET_BYTES, None));
        prop_assert!(lab.filled >= device.speed / 2, "{} bytes in the first second", lab.filled);
        lab.device.guest_ios_per_second = ios;
    }

    #[test]
    fn whatever_it_hears_it_allows_the_floor_and_no_nonsense(
        bound in prop::option::of(100_u32..10_000),
        floor in prop_oneof![Just(1_u64), 1_u64 << 20..1 << 30, Just(u64::MAX)],
        events in prop::collection::vec((0_u8..6, any::<u64>(), 0_u64..3 * SECOND), 1..300)
    ) {
        let mut harm = Harm::new(HarmLimits { bound_percent: bound, floor }, Time(5));
        let mut now = 5_u64;
        for (event, big, pause) in events {
            now = now.saturating_add(pause);
            match event {
                0 => harm.guest_begins(Time(now)),
                // No time at all, or more than there ever was.
                1 => harm.guest_ends(GuestIo::ALL[(big % 5) as usize], Time(now), Time(now)),
                2 => harm.guest_ends(GuestIo::Write, Time(big), Time(now)),
                // The clock jumps.
                3 => harm.guest_begins(Time(big % (100 * SECOND))),
                4 => harm.fill_begins(big, big.is_multiple_of(2), Time(now)),
                _ => harm.fill_ends(Time(now / 2)),
            }
            let Allowed { in_flight_bytes, bytes_per_second, paused, .. } = harm.allowed(Time(now));
            prop_assert!(in_flight_bytes <= IN_FLIGHT_QUIET_BYTES);
            prop_assert!(bytes_per_second.is_none_or(|rate| rate >= floor && bound.is_some()));
            prop_assert!(!paused || bytes_per_second.is_some());
        }
        // A probe ends by itself.
        let late = Time(u64::MAX / 2);
        harm.allowed(late);
        prop_assert!(!harm.allowed(late.after(GUEST_PAUSE * 3)).paused);
    }
}

const FAST: Device = Device { speed: 2_000_000_000, base_us: 100, shared_percent: 0, guest_ios_per_second: 3000 };
const LIMITS: HarmLimits = HarmLimits { bound_percent: Some(120), floor: 4 << 20 };

#[test]
fn hydration_that_disturbs_nobody_is_not_slowed_down() {
    let mut lab = Lab::new(FAST, LIMITS, 1);
    lab.run(10, true);
    lab.run(10, true);
    assert!(lab.filled >= FAST.speed * 10 / 10 * 8, "{} bytes in 10 s", lab.filled);
}

#[test]
fn guests_that_are_slower_for_a_reason_of_their_own_are_a_new_baseline() {
    let mut lab = Lab::new(FAST, LIMITS, 2);
    lab.run(15, true);
    let before = lab.harm.slow_downs();
    lab.device.base_us *= 4;
    lab.run(1, true);
    assert!(lab.harm.slow_downs() > before, "it can't know better at first");
    lab.run(15, true);
    lab.run(10, true);
    assert!(lab.filled >= FAST.speed * 10 / 10 * 7, "{} bytes in 10 s", lab.filled);
    // And back: what was learnt from slow guests is forgotten.
    lab.device.base_us /= 4;
    lab.device.shared_percent = 100;
    lab.run(30, true);
    let quiet = lab.quiet_p99();
    lab.run(10, true);
    assert!(
        lab.above_per_mille(quiet * 6 / 5 + NOISE_US) <= 20,
        "{} of 1000",
        lab.above_per_mille(quiet * 6 / 5 + NOISE_US)
    );
}

#[test]
fn a_disk_that_guests_share_is_left_to_them_within_a_second() {
    let device = Device { speed: 400_000_000, base_us: 200, shared_percent: 100, guest_ios_per_second: 2000 };
    let mut lab = Lab::new(device, LIMITS, 3);
    lab.run(5, false);
    let (baseline, _) = lab.harm.p99(GuestIo::Read, Time(lab.now));
    assert!(baseline > 0, "learnt while nothing hydrates");
    lab.run(2, true);
    let (_, present) = lab.harm.p99(GuestIo::Read, Time(lab.now));
    assert!(lab.harm.slow_downs() >= 3 && present > 0);
    lab.run(1, true);
    assert!(lab.filled < device.speed / 4, "{} bytes in a second", lab.filled);
}

#[test]
fn one_sample_and_guests_that_are_hardly_there_change_nothing() {
    let mut harm = Harm::new(LIMITS, Time(0));
    let start = harm.rate();
    for second in 10..40 {
        let begun = Time(second * SECOND);
        harm.guest_begins(begun);
        harm.fill_begins(CHUNK, false, begun);
        harm.guest_ends(GuestIo::Read, begun, begun.after(GUEST_PAUSE));
        harm.fill_ends(begun.after(GUEST_PAUSE));
    }
    assert!(harm.rate() >= start && harm.slow_downs() == 0);
}

#[test]
fn a_kind_of_io_that_is_rare_is_heard_too() {
    const MS: u64 = 1_000_000;
    let mut harm = Harm::new(LIMITS, Time(0));
    for ms in 20_000..40_000 {
        let (now, fills) = (Time(ms * MS), ms >= 25_000);
        let guest = |harm: &mut Harm, io, took: u64| {
            harm.guest_begins(Time(now.0 - took));
            harm.guest_ends(io, Time(now.0 - took), now);
        };
        if fills {
            harm.fill_begins(CHUNK, false, now);
        }
        guest(&mut harm, GuestIo::Read, MS / 10);
        if ms % 100 == 0 {
            guest(&mut harm, GuestIo::Flush, if fills { 5 * MS } else { MS });
        }
        if fills {
            harm.fill_ends(now);
        }
    }
    assert!(harm.slow_downs() > 0, "ten flushes a second, five times as slow");
}

#[test]
fn without_a_bound_fills_in_flight_are_all_that_is_limited() {
    let mut lab = Lab::new(FAST, HarmLimits { bound_percent: None, floor: 1 }, 4);
    lab.device.shared_percent = 100;
    lab.run(5, true);
    assert_eq!(lab.harm.slow_downs(), 0);
    let busy = lab.harm.allowed(Time(lab.now));
    assert_eq!((busy.in_flight_bytes, busy.bytes_per_second), (super::IN_FLIGHT_BUSY_BYTES, None));
}
