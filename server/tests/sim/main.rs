//! The real shards and journals on the simulator: random guests, faults, crashes at any step, and a model that knows
//! every value a sector may hold. docs/simulation.md describes all of it.
//!
//! A failing seed prints the command that runs it again. `VOLLEY_SIM_SEED=n` runs one seed; `VOLLEY_SIM_SECONDS=n` runs
//! fresh seeds for so long (tools/sim does).

mod guest;
mod inspector;
mod model;
#[cfg(feature = "mutations")]
mod mutations;
mod node;
mod points;
mod report;
mod run;

use std::time::{Duration, Instant};

use report::Report;
use volley_server::platform::glommio::kernel_random_u64;

/// Seeds beyond the fixed ones that found bugs once: checkpoints without what was appended before them, a file without
/// its length, a deletion half undone.
const REGRESSIONS: [u64; 5] = [101, 114, 173, 186, 193];
/// How long fresh seeds run where nobody says.
const FRESH_SECONDS: u64 = 5;

fn run_seeds(what: &str, seeds: impl Iterator<Item = u64>) -> Report {
    let mut report = Report::default();
    for seed in seeds {
        report.add(&run::seed(seed).1);
    }
    println!("simulation, {what}: {report}");
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
    fixed(0..20);
}

#[test]
fn guests_see_only_what_they_may_in_every_life_2() {
    fixed(20..40);
}

#[test]
fn guests_see_only_what_they_may_in_every_life_3() {
    fixed(40..60);
}

#[test]
fn seeds_that_found_bugs_stay_green() {
    match number("VOLLEY_SIM_SEED") {
        Some(seed) => drop(run_seeds("one seed", std::iter::once(seed))),
        None => drop(run_seeds("regressions", REGRESSIONS.into_iter())),
    }
}

/// Seeds nobody has seen, until the time is over.
#[test]
fn fresh_seeds() {
    if number("VOLLEY_SIM_SEED").is_some() {
        return;
    }
    let first = number("VOLLEY_SIM_START").unwrap_or_else(|| kernel_random_u64().expect("randomness") >> 16);
    let limit = Duration::from_secs(number("VOLLEY_SIM_SECONDS").unwrap_or(FRESH_SECONDS));
    #[expect(clippy::disallowed_methods, reason = "the real clock ends a run, no simulated one")]
    let begun = Instant::now();
    let seeds = (first..).take_while(|_| begun.elapsed() < limit);
    run_seeds(&format!("fresh seeds from {first}"), seeds);
}

#[test]
fn every_durable_point_of_writes_and_flushes() {
    println!("simulation, crash points: {}", points::every_durable_point(&points::WRITES_AND_FLUSHES));
}

#[test]
fn every_durable_point_of_holes_and_fetches() {
    println!("simulation, crash points: {}", points::every_durable_point(&points::HOLES_AND_FETCHES));
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
