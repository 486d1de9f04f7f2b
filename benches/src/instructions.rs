//! Instructions that each of [`crate::cases`] takes, counted by valgrind's callgrind, and the bounds that are committed for them.
//!
//! A count is the same on an idle and on a busy machine, so a case that needs more instructions than it did was changed. The bounds are of
//! the dev profile, which the tests are built with, of x86-64 with AVX2, and of one toolchain: another one may move them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::cases::{self, Case, Work};

/// The committed bounds.
pub const BOUNDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.toml");
/// How much more than its bound a case may take, in percent; by as much less, the bound should be renewed.
pub const TOLERANCE_PERCENT: f64 = 5.0;
/// Runs that are counted, after some that are not: they fill caches and grow buffers.
const ROUNDS: u32 = 8;
const WARM_UP_ROUNDS: u32 = 2;
const HEAD: &str = "\
# Instructions that each case of the hot requests takes, per unit, in the dev profile on x86-64 with AVX2: docs/benchmarks.md.
# A test fails when a case takes 5 % more. Renew them with `tools/bench instructions --write`, and say why in the commit.
";

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Count {
    pub case: String,
    pub unit: String,
    /// Instructions for one of these.
    pub instructions: f64,
    /// The committed bound; `None`: the case is new, or not compared.
    pub bound: Option<f64>,
}

/// What `instructions.toml` holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// The compiler that they were made with: the first thing to look at when many cases move at once.
    pub rustc: String,
    pub bounds: BTreeMap<String, f64>,
}

impl Bounds {
    /// # Errors
    /// When the file can't be read or says something else.
    pub fn read(path: &Path) -> Result<Bounds, String> {
        let said = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        toml::from_str(&std::fs::read_to_string(path).map_err(|e| said(&e))?).map_err(|e| said(&e))
    }

    /// # Errors
    /// When the file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let said = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = toml::to_string(self).map_err(|e| said(&e))?;
        std::fs::write(path, format!("{HEAD}\n{text}")).map_err(|e| said(&e))
    }
}

/// What this machine compiles with.
#[must_use]
pub fn rustc() -> String {
    let output = Command::new("rustc").arg("--version").output();
    output.map_or_else(|_| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Why counts of this machine and build can't be held against the bounds.
#[must_use]
pub fn incomparable() -> Option<&'static str> {
    if !cfg!(debug_assertions) {
        return Some("the bounds are of the dev profile, and this is another one");
    }
    #[cfg(target_arch = "x86_64")]
    let comparable = std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let comparable = false;
    (!comparable).then_some("the bounds are of x86-64 with AVX2, and this processor is another one")
}

/// Whether valgrind is installed.
#[must_use]
pub fn valgrind_is_installed() -> bool {
    Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Runs a case of this program as its child under valgrind does it.
pub fn run(case: &Case) {
    let mut work = case.prepare();
    for round in 0..WARM_UP_ROUNDS + ROUNDS {
        work.renew();
        match round < WARM_UP_ROUNDS {
            true => work.run(),
            false => measured_round(&mut *work),
        }
    }
}

/// callgrind counts what happens in here: it goes by this name.
#[inline(never)]
fn measured_round(work: &mut dyn Work) {
    work.run();
}

/// Counts the instructions of a case for one unit: `program`, called with the name of the case, must [`run`] it.
///
/// # Errors
/// When the program fails or valgrind says nothing.
pub fn count(program: &Path, case: &Case) -> Result<f64, String> {
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*instructions*measured_round*"])
        // glibc copies with `rep movsb` from some length on, which valgrind counts byte by byte.
        .env(
            "GLIBC_TUNABLES",
            "glibc.cpu.x86_rep_movsb_threshold=0x40000000:glibc.cpu.x86_rep_stosb_threshold=0x40000000",
        )
        .arg(program)
        .args(["--case", case.name]);
    let output = command.output().map_err(|e| format!("valgrind: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = collected(&said).filter(|_| output.status.success());
    let collected = collected.ok_or_else(|| format!("{}: valgrind counted nothing:\n{said}", case.name))?;
    Ok(rounded(collected as f64 / f64::from(ROUNDS * case.units)))
}

/// To a tenth of an instruction.
fn rounded(instructions: f64) -> f64 {
    (instructions * 10.0).round() / 10.0
}

/// The line `==1== Collected : 123` of callgrind; zero if the marked function was never called.
fn collected(said: &str) -> Option<u64> {
    let count = said.lines().find_map(|line| line.split_once("Collected :"))?.1;
    count.trim().parse().ok().filter(|count| *count > 0)
}

/// The cases whose name contains one of these words; all, when there is none.
#[must_use]
pub fn chosen(words: &[String]) -> Vec<Case> {
    let wanted = |case: &Case| words.is_empty() || words.iter().any(|word| case.name.contains(word.as_str()));
    cases::all().into_iter().filter(wanted).collect()
}

/// The counts as a table.
#[must_use]
pub fn table(counts: &[Count]) -> String {
    let mut text = format!("{:<36} {:>12} {:>12} {:>7}  UNIT\n", "CASE", "INSTRUCTIONS", "BOUND", "MORE");
    for Count { case, unit, instructions, bound } in counts {
        let bound_text = bound.map_or_else(|| "-".into(), |bound| format!("{bound:.1}"));
        let more = bound.map_or_else(|| "-".into(), |bound| format!("{:+.1}%", percent(*instructions, bound)));
        let _ = writeln!(text, "{case:<36} {instructions:>12.1} {bound_text:>12} {more:>7}  {unit}");
    }
    text
}

fn percent(instructions: f64, bound: f64) -> f64 {
    (instructions / bound - 1.0) * 100.0
}

/// What the counts say of the bounds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Each is a reason to fail.
    pub failures: Vec<String>,
    /// Cases that take so much less that a part of what was won could be lost unseen.
    pub better: Vec<String>,
}

/// Holds counts against bounds. `whole`: these are all cases, so a bound without one is a failure.
#[must_use]
pub fn judge(counts: &[Count], bounds: &Bounds, whole: bool) -> Verdict {
    let mut verdict = Verdict::default();
    for Count { case, unit, instructions, bound } in counts {
        let Some(bound) = bound else {
            verdict.failures.push(format!("{case} has no bound"));
            continue;
        };
        let more = percent(*instructions, *bound);
        let line = format!(
            "{case}: {instructions:.1} instructions for one {unit}, {more:+.1} % against its bound of {bound:.1}"
        );
        if more > TOLERANCE_PERCENT {
            verdict.failures.push(line);
        } else if more < -TOLERANCE_PERCENT {
            verdict.better.push(line);
        }
    }
    if whole {
        let gone = bounds.bounds.keys().filter(|name| counts.iter().all(|count| count.case != **name));
        verdict.failures.extend(gone.map(|name| format!("{name} has a bound and is no case")));
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::{Bounds, Count, Verdict, collected, judge};

    fn count(case: &str, instructions: f64, bound: Option<f64>) -> Count {
        Count { case: case.into(), unit: "frame".into(), instructions, bound }
    }

    #[test]
    fn what_callgrind_collected_is_found() {
        let said = "==7== Callgrind\n==7== Events    : Ir\n==7== Collected : 85904\n==7== \n";
        assert_eq!(collected(said), Some(85904));
        assert_eq!(collected("==7== Collected : 0\n"), None);
        assert_eq!(collected("valgrind: failed to start\n"), None);
    }

    #[test]
    fn more_than_the_tolerance_fails_and_much_less_is_told() {
        let bounds = Bounds {
            bounds: [("much", 100.0), ("within", 100.0), ("less", 100.0), ("gone", 1.0)]
                .map(|(n, b)| (n.into(), b))
                .into(),
            ..Bounds::default()
        };
        let bounded = |case: &str, instructions| count(case, instructions, bounds.bounds.get(case).copied());
        let counts = [bounded("much", 105.1), bounded("within", 104.9), bounded("less", 94.0), bounded("new", 1.0)];
        let Verdict { failures, better } = judge(&counts, &bounds, true);
        let starts = |lines: &[String]| {
            lines.iter().map(|l| l.split([' ', ':']).next().unwrap().into()).collect::<Vec<String>>()
        };
        assert_eq!(
            (starts(&failures), starts(&better)),
            (vec!["much".into(), "new".into(), "gone".into()], vec!["less".into()])
        );
        assert_eq!(judge(&counts[1..2], &bounds, false), Verdict::default());
    }
}
