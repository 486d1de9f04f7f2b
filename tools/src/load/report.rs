//! What a load measured, for people and as JSON.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::histogram::Histogram;
use crate::units::{format_duration, format_size};

/// Requests of one kind.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Latencies of requests that succeeded.
    pub latency: Histogram,
    /// Bytes moved by them.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Text of the first failure.
    pub first_error: Option<String>,
}

impl Series {
    /// Counts a request and how it ended.
    pub fn record(&mut self, latency: Duration, bytes: u64, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.latency.record(latency);
                self.bytes += bytes;
            }
            Err(error) => {
                self.errors += 1;
                self.first_error.get_or_insert(error);
            }
        }
    }

    /// Adds everything another one counted.
    pub fn merge(&mut self, other: Series) {
        self.latency.merge(&other.latency);
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
    }
}

/// What one thread of a load measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// By kind of request.
    pub series: Vec<Series>,
    pub elapsed: Duration,
    /// Processor time of the thread.
    pub cpu_ns: u64,
}

impl Measured {
    /// Nothing yet, of so many kinds of request.
    #[must_use]
    pub fn new(kinds: usize) -> Measured {
        Measured { series: vec![Series::default(); kinds], elapsed: Duration::ZERO, cpu_ns: 0 }
    }

    /// Adds series of the same kinds.
    pub fn add(&mut self, series: Vec<Series>) {
        self.series.iter_mut().zip(series).for_each(|(mine, other)| mine.merge(other));
    }

    /// What all threads measured, with what each request cost the generator, and the server where that is known.
    #[must_use]
    pub fn report(
        threads: Vec<Measured>,
        workload: &'static str,
        kinds: &[&'static str],
        server_ns: Option<u64>,
    ) -> Report {
        let mut whole = Measured::new(kinds.len());
        for thread in threads {
            whole.elapsed = whole.elapsed.max(thread.elapsed);
            whole.cpu_ns += thread.cpu_ns;
            whole.add(thread.series);
        }
        let requests: u64 = whole.series.iter().map(|series| series.latency.count()).sum();
        let mut facts = vec![("generator_cpu_ns_per_request", whole.cpu_ns / requests.max(1))];
        facts.extend(server_ns.map(|ns| ("server_cpu_ns_per_request", ns / requests.max(1))));
        Report { workload, elapsed: whole.elapsed, series: kinds.iter().copied().zip(whole.series).collect(), facts }
    }
}

/// The outcome of a whole load.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the workload.
    pub workload: &'static str,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Kinds of requests by name; those without any request are left out of the text.
    pub series: Vec<(&'static str, Series)>,
    /// Facts of this workload alone, added to the JSON and as lines to the text.
    pub facts: Vec<(&'static str, u64)>,
}

impl Report {
    /// The requests of this kind; none were made if the workload has no such kind.
    #[must_use]
    pub fn of(&self, name: &str) -> Series {
        let found = self.series.iter().find(|(series, _)| *series == name);
        found.map(|(_, series)| series.clone()).unwrap_or_default()
    }

    /// Requests that failed.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.series.iter().map(|(_, series)| series.errors).sum()
    }

    /// The first failure's text.
    #[must_use]
    pub fn first_error(&self) -> Option<&str> {
        self.series.iter().find_map(|(_, series)| series.first_error.as_deref())
    }

    /// One JSON object; latencies in microseconds.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let seconds = self.elapsed.as_secs_f64();
        let series: serde_json::Map<String, Value> =
            self.series.iter().map(|(name, series)| ((*name).to_owned(), series_json(series, seconds))).collect();
        let mut object =
            json!({ "workload": self.workload, "seconds": seconds, "errors": self.errors(), "series": series });
        for (name, value) in &self.facts {
            object[*name] = json!(value);
        }
        object
    }
}

fn series_json(series: &Series, seconds: f64) -> Value {
    let us = |duration: Duration| duration.as_nanos() as f64 / 1e3;
    let latency = &series.latency;
    json!({
        "requests": latency.count(),
        "errors": series.errors,
        "first_error": series.first_error,
        "bytes": series.bytes,
        "requests_per_second": per_second(latency.count(), seconds),
        "bytes_per_second": per_second(series.bytes, seconds),
        "latency_us": {
            "mean": us(latency.mean()),
            "p50": us(latency.quantile(0.5)),
            "p99": us(latency.quantile(0.99)),
            "p999": us(latency.quantile(0.999)),
            "max": us(latency.max()),
        },
    })
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs_f64();
        writeln!(f, "{} for {}, {} errors", self.workload, format_duration(self.elapsed), self.errors())?;
        let head = ["", "requests", "per second", "bytes/s", "p50", "p99", "p99.9", "max"];
        write_row(f, &head.map(str::to_owned))?;
        for (name, series) in self.series.iter().filter(|(_, series)| series.latency.count() > 0) {
            let latency = &series.latency;
            let quantile = |fraction| format_duration(latency.quantile(fraction));
            write_row(
                f,
                &[
                    (*name).to_owned(),
                    latency.count().to_string(),
                    format!("{:.0}", per_second(latency.count(), seconds)),
                    format_size(per_second(series.bytes, seconds) as u64),
                    quantile(0.5),
                    quantile(0.99),
                    quantile(0.999),
                    format_duration(latency.max()),
                ],
            )?;
        }
        self.facts.iter().try_for_each(|(name, value)| writeln!(f, "{}: {value}", name.replace('_', " ")))?;
        self.first_error().map_or(Ok(()), |error| writeln!(f, "first error: {error}"))
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, cells: &[String; 8]) -> fmt::Result {
    write!(f, "{:<16}", cells[0])?;
    cells[1..].iter().try_for_each(|cell| write!(f, " {cell:>11}"))?;
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Report, Series};

    #[test]
    fn a_report_counts_successes_and_names_the_first_failure() {
        let mut series = Series::default();
        series.record(Duration::from_millis(2), 4096, Ok(()));
        series.record(Duration::from_millis(9), 4096, Err("no".into()));
        let mut other = Series::default();
        other.record(Duration::from_millis(2), 4096, Err("later".into()));
        series.merge(other);
        let elapsed = Duration::from_secs(2);
        let report =
            Report { workload: "read", elapsed, series: vec![("read", series)], facts: vec![("mismatches", 3)] };
        let json = report.to_json();
        assert_eq!((json["errors"].as_u64(), json["mismatches"].as_u64()), (Some(2), Some(3)));
        assert_eq!(json["series"]["read"]["requests"], 1);
        assert_eq!(json["series"]["read"]["bytes_per_second"], 2048.0);
        assert_eq!(json["series"]["read"]["latency_us"]["max"], 2000.0);
        let text = report.to_string();
        assert!(
            text.contains("2 errors") && text.contains("first error: no") && text.contains("mismatches: 3"),
            "{text}"
        );
    }
}
