//! The real shards and journals on the simulator: random guests, faults, crashes at any step, and a model that knows
//! every value a sector may hold.
//!
//! A failing seed prints the command that runs it again. `VOLLEY_SIM_SEED=n` runs one seed, `VOLLEY_SIM_SEEDS=n` runs
//! that many from a fixed start instead of the usual number.

mod guest;
mod model;
mod node;
mod run;

/// Seeds of one CI run: chosen to take about a minute on two cores.
const SEEDS: u64 = 60;
/// Seeds beyond these that found bugs once: checkpoints without what was appended before them, a file without its
/// length, a deletion half undone.
const REGRESSIONS: [u64; 5] = [101, 114, 173, 186, 193];

#[test]
fn guests_see_only_what_they_may_in_every_life() {
    if let Some(seed) = number("VOLLEY_SIM_SEED") {
        run::seed(seed);
        return;
    }
    let seeds = number("VOLLEY_SIM_SEEDS").unwrap_or(SEEDS);
    for seed in (0..seeds).chain(REGRESSIONS) {
        run::seed(seed);
    }
}

#[test]
fn same_seed_gives_the_same_run_to_the_last_event() {
    for seed in [1, 2, 3] {
        assert_eq!(run::seed(seed), run::seed(seed), "seed {seed}");
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}
