//! The real shards and journals on the simulator: random guests, faults, crashes at any step, and a model that knows
//! every value a sector may hold. docs/simulation.md describes all of it.
//!
//! A failing seed prints the command that runs it again. tools/sim runs one seed (`VOLLEY_SIM_SEED`), or fresh seeds for
//! `VOLLEY_SIM_SECONDS` from `VOLLEY_SIM_START` in `VOLLEY_SIM_JOBS` threads; with `VOLLEY_SIM_JSON` it reports in JSON.

mod clearing;
mod control;
mod deadlines;
mod disk_cache;
mod guest;
mod inspector;
mod judge;
mod lifecycle;
mod model;
#[cfg(feature = "mutations")]
mod mutations;
mod node;
mod patient;
mod points;
mod races;
mod report;
mod run;
mod snapshots;
mod taking;
mod values;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use report::Report;
use volley_server::platform::glommio::kernel_random_u64;

/// Seeds beyond the fixed ones that found bugs once: checkpoints without what was appended before them, a file without
/// its length, a deletion half undone.
const REGRESSIONS: &[u64] = &[
    101,
    114,
    173,
    186,
    193,
    169_878_677_590_276,
    20_047_942_576_219,
    77_952_736_710_253,
    121_746_990_255_264,
    229_879_750_909_562,
    28_414_839_244_519,
    24_473_683_425_130,
];
/// How long fresh seeds run where nobody says.
const FRESH_SECONDS: u64 = 5;
/// Fresh seeds tell how far they are so often.
const PROGRESS: Duration = Duration::from_secs(10);

fn run_seeds(what: &str, seeds: impl Iterator<Item = u64>) -> Report {
    let mut report = Report::default();
    seeds.for_each(|seed| report.add(&run::seed(seed).1));
    report.print(what);
    report
}

/// A part of the fixed seeds, unless one is asked for by name.
fn fixed(seeds: std::ops::Range<u64>) {
    if number("VOLLEY_SIM_SEED").is_none() {
        run_seeds("fixed seeds", seeds).assert_everything_happened();
    }
}

#[test]
fn guests_see_only_what_they_may_in_every_life_1() {
    fixed(0..60);
}

#[test]
fn guests_see_only_what_they_may_in_every_life_2() {
    fixed(60..120);
}

#[test]
fn guests_see_only_what_they_may_in_every_life_3() {
    fixed(120..180);
}

#[test]
fn seeds_that_found_bugs_stay_green() {
    match number("VOLLEY_SIM_SEED") {
        Some(seed) => drop(run_seeds("one seed", std::iter::once(seed))),
        None => drop(run_seeds("regressions", REGRESSIONS.iter().copied())),
    }
}

/// Seeds nobody has seen, until the time is over or one fails.
#[test]
fn fresh_seeds() {
    if number("VOLLEY_SIM_SEED").is_some() {
        return;
    }
    let first = number("VOLLEY_SIM_START").unwrap_or_else(|| kernel_random_u64().expect("randomness") >> 16);
    let limit = Duration::from_secs(number("VOLLEY_SIM_SECONDS").unwrap_or(FRESH_SECONDS));
    #[expect(clippy::disallowed_methods, reason = "the real clock ends a run, no simulated one")]
    let begun = Instant::now();
    let (next, failed) = (AtomicU64::new(first), AtomicBool::new(false));
    let report = Mutex::new((Report::default(), PROGRESS));
    let work = || {
        let _failing = SetWhilePanicking(&failed);
        while begun.elapsed() < limit && !failed.load(Ordering::Relaxed) {
            let done = run::seed(next.fetch_add(1, Ordering::Relaxed)).1;
            let (report, tell_at) = &mut *report.lock().expect("nobody panics with it");
            report.add(&done);
            if begun.elapsed() > *tell_at {
                *tell_at += PROGRESS;
                eprintln!("{} of {} s: {}", begun.elapsed().as_secs(), limit.as_secs(), report.headline());
            }
        }
    };
    std::thread::scope(|threads| {
        (0..number("VOLLEY_SIM_JOBS").unwrap_or(1)).for_each(|_| drop(threads.spawn(work)));
    });
    report.into_inner().expect("nobody panicked with it").0.print(&format!("fresh seeds from {first}"));
}

/// Sets its flag if its thread panics.
struct SetWhilePanicking<'a>(&'a AtomicBool);

impl Drop for SetWhilePanicking<'_> {
    fn drop(&mut self) {
        self.0.store(std::thread::panicking(), Ordering::Relaxed);
    }
}

#[test]
fn every_durable_point_of_writes_and_flushes() {
    points::every_durable_point(&points::WRITES_AND_FLUSHES).print("crash points of writes and flushes");
}

#[test]
fn every_durable_point_of_holes_and_fetches() {
    points::every_durable_point(&points::HOLES_AND_FETCHES).print("crash points of holes and fetches");
}

#[test]
fn every_durable_point_of_creations_and_checkpoints() {
    points::every_durable_point(&points::CREATIONS_AND_CHECKPOINTS).print("crash points of creations and checkpoints");
}

#[test]
fn every_durable_point_of_fragments() {
    points::every_durable_point(&points::FRAGMENTS).print("crash points of fragments");
}

#[test]
fn every_durable_point_of_batches() {
    points::every_durable_point(&points::BATCHES).print("crash points of batches");
}

#[test]
fn of_volumes_that_wait_the_one_with_the_earliest_deadline_is_first() {
    deadlines::the_earliest_is_first();
}

#[test]
fn others_come_in_between_while_a_snapshot_is_taken() {
    races::others_come_in_between();
}

#[test]
fn same_seed_gives_the_same_run_to_the_last_event() {
    for seed in [1, 2, 3] {
        let ((hash, report), (again, repeated)) = (run::seed(seed), run::seed(seed));
        assert_eq!((hash, report.steps), (again, repeated.steps), "seed {seed}");
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}
