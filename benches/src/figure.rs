//! What a benchmark measured: one value per run, beside what a peer did in the same run.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::process::machine;

/// One published figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Its name, stable over commits.
    pub figure: String,
    /// Our median over the runs.
    pub value: f64,
    pub unit: &'static str,
    /// Median over the runs of our speed over the peer's in the same run: above 1 we are faster. Of a cost
    /// ([`Figure::cost`]) ours over the peer's: below 1 we are.
    pub ratio: Option<f64>,
    /// What we compare with, and its settings.
    pub peer: Option<String>,
    pub runs: usize,
    /// Smallest and largest value of a run.
    pub min: f64,
    pub max: f64,
}

/// One run: our value and the peer's, in the same unit.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub ours: f64,
    pub peer: f64,
}

impl Figure {
    /// A figure that stands alone.
    ///
    /// # Panics
    /// Without a value.
    #[must_use]
    pub fn alone(figure: &str, unit: &'static str, values: &[f64]) -> Figure {
        let (min, max) = spread(values);
        let (figure, value, runs) = (figure.to_owned(), median(values), values.len());
        Figure { figure, value, unit, ratio: None, peer: None, runs, min, max }
    }

    /// A figure beside a peer's. `unit` is a rate: more is faster.
    ///
    /// # Panics
    /// Without a run.
    #[must_use]
    pub fn against(figure: &str, unit: &'static str, peer: &str, runs: &[Pair]) -> Figure {
        Figure::beside(figure, unit, peer, runs, |run| run.ours / run.peer)
    }

    /// A figure beside a peer's. `unit` is a time that work takes: less is faster.
    ///
    /// # Panics
    /// Without a run.
    #[must_use]
    pub fn time(figure: &str, unit: &'static str, peer: &str, runs: &[Pair]) -> Figure {
        Figure::beside(figure, unit, peer, runs, |run| run.peer / run.ours)
    }

    /// What something costs over what it costs without us: `unit` is a time, and the ratio ours over the peer's.
    ///
    /// # Panics
    /// Without a run.
    #[must_use]
    pub fn cost(figure: &str, unit: &'static str, peer: &str, runs: &[Pair]) -> Figure {
        Figure::beside(figure, unit, peer, runs, |run| run.ours / run.peer)
    }

    fn beside(figure: &str, unit: &'static str, peer: &str, runs: &[Pair], ratio: fn(&Pair) -> f64) -> Figure {
        let ours: Vec<f64> = runs.iter().map(|run| run.ours).collect();
        let ratios: Vec<f64> = runs.iter().map(ratio).collect();
        Figure { ratio: Some(median(&ratios)), peer: Some(peer.to_owned()), ..Figure::alone(figure, unit, &ours) }
    }
}

/// Says which run of how many it is, before each of them.
pub fn runs(what: &str, runs: u32) -> impl Iterator<Item = u32> + use<> {
    let what = what.to_owned();
    (0..runs).inspect(move |run| eprintln!("{what}: run {} of {runs}", run + 1))
}

/// How often a benchmark measures, and where its figures go.
#[derive(Clone, Debug, clap::Args)]
pub struct Publication {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Append one JSON line for each figure, with commit and machine, to FILE.
    #[arg(long, value_name = "FILE", default_value = "benches/results.jsonl")]
    results: PathBuf,
    /// Runs of each figure; the median is published.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

impl Publication {
    /// As [`runs`].
    pub fn runs(&self, what: &str) -> impl Iterator<Item = u32> + use<> {
        runs(what, self.runs)
    }

    /// As [`conclude`], after the lines of results.
    #[must_use]
    pub fn conclude(&self, bench: &str, measured: Result<Vec<Figure>, String>) -> ExitCode {
        let published = measured.and_then(|figures| append_results(&self.results, &figures).map(|()| figures));
        conclude(bench, published, self.json.as_deref())
    }
}

/// A duration in milliseconds, as figures have it.
#[must_use]
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The middle value; of an even number the mean of the two in the middle.
///
/// # Panics
/// Without a value.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn spread(values: &[f64]) -> (f64, f64) {
    let ends = |(min, max): (f64, f64), &value: &f64| (min.min(value), max.max(value));
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), ends)
}

/// The end of a benchmark: its report, or one line that says why there is none.
#[must_use]
pub fn conclude(bench: &str, measured: Result<Vec<Figure>, String>, json: Option<&Path>) -> ExitCode {
    match measured.and_then(|figures| report(&figures, json).map_err(|e| e.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tools/bench {bench}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Appends a line for each figure to a file of results: the figure, the commit of the work tree, and the machine.
fn append_results(path: &Path, figures: &[Figure]) -> Result<(), String> {
    let describe = std::process::Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    let commit = describe.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    let unix_seconds = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let mut text = String::new();
    for figure in figures {
        let mut line = serde_json::to_value(figure).map_err(|e| e.to_string())?;
        line["commit"] = commit.clone().into();
        line["machine"] = machine().into();
        line["unix_seconds"] = unix_seconds.into();
        text.push_str(&line.to_string());
        text.push('\n');
    }
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| format!("{}: {e}", path.display()))
}

/// Prints the figures as a table, and as a JSON array of objects into a file where one is named.
///
/// # Errors
/// As writing the file or stdout.
fn report(figures: &[Figure], json: Option<&Path>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<32} {:>12} {:<8} {:>7} {:>12} {:>12} {:>4}  PEER",
        "FIGURE", "MEDIAN", "UNIT", "RATIO", "MIN", "MAX", "RUNS"
    )?;
    for figure in figures {
        let ratio = figure.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"));
        let Figure { figure: name, value, unit, min, max, runs, .. } = figure;
        let peer = figure.peer.as_deref().unwrap_or("-");
        writeln!(out, "{name:<32} {value:>12.2} {unit:<8} {ratio:>7} {min:>12.2} {max:>12.2} {runs:>4}  {peer}")?;
    }
    if let Some(path) = json {
        let mut text = serde_json::to_string_pretty(figures)?;
        text.push('\n');
        std::fs::write(path, text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Figure, Pair, median};

    #[test]
    fn medians_and_ratios_are_of_the_runs() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        // The ratio is the median of the runs' ratios, not the ratio of the medians: 0.5, 1, 2.
        let runs = [Pair { ours: 1.0, peer: 2.0 }, Pair { ours: 9.0, peer: 9.0 }, Pair { ours: 8.0, peer: 4.0 }];
        let figure = Figure::against("f", "1/s", "p", &runs);
        assert_eq!((figure.value, figure.ratio, figure.min, figure.max), (8.0, Some(1.0), 1.0, 9.0));
        // Half the time is twice the speed, and half the cost.
        let run = [Pair { ours: 1.0, peer: 2.0 }];
        assert_eq!(Figure::time("f", "s", "p", &run).ratio, Some(2.0));
        assert_eq!(Figure::cost("f", "s", "p", &run).ratio, Some(0.5));
    }
}
