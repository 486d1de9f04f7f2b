//! The hot work of a node, case by case: the micro benchmarks time it (`benches/cases.rs`), and [`crate::instructions`] counts its
//! instructions. Nothing here touches io_uring, which valgrind does not know.

mod cache;
mod chunk;
mod connection;
mod journal;
mod residency;
mod scheduling;
mod wire;

pub use chunk::entry_of;
pub use journal::{JOURNAL_RECORDS, append_all, new_journal};

/// One piece of hot work.
pub struct Case {
    /// Stable over commits: bounds are kept by it.
    pub name: &'static str,
    /// What is counted: one frame, one look-up.
    pub unit: &'static str,
    /// So many of them are one [`Work::run`].
    pub units: u32,
    prepare: fn() -> Box<dyn Work>,
}

impl Case {
    const fn new(name: &'static str, (units, unit): (u32, &'static str), prepare: fn() -> Box<dyn Work>) -> Case {
        Case { name, unit, units, prepare }
    }

    /// Sets the work up.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn prepare(&self) -> Box<dyn Work> {
        (self.prepare)()
    }
}

/// Work that is set up. Every run does the same.
pub trait Work {
    /// Called before each run, and not measured: undoes what the runs before have changed.
    fn renew(&mut self) {}

    fn run(&mut self);
}

impl<F: FnMut()> Work for F {
    fn run(&mut self) {
        self();
    }
}

/// All cases, in the order of a request's way.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        &wire::CASES[..],
        &connection::CASES,
        &residency::CASES,
        &cache::CASES,
        &chunk::CASES,
        &scheduling::CASES,
        &journal::CASES,
    ]
    .into_iter()
    .flat_map(|cases| cases.iter().map(|case| Case { ..*case }))
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::all;

    #[test]
    fn every_case_runs_again_and_again() {
        for case in all() {
            let mut work = case.prepare();
            for _ in 0..3 {
                work.renew();
                work.run();
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = all().iter().map(|case| case.name).collect();
        assert_eq!(names.len(), all().len());
    }
}
