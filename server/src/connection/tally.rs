//! What happened on the connections of a shard: what was accepted, what was refused and why, how requests ended.

use std::cell::Cell;

use volley_protocol::Status;

/// Why a connection or a frame was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManyConnections,
    NoHello,
    HelloLate,
    UnsupportedVersion,
    StalledSender,
    StalledReader,
    BadMagic,
    DamagedFrame,
    UndefinedBits,
    FrameTooLong,
    BadRequest,
}

const CONNECTIONS_REFUSED: &str = "Connections that were refused, or closed because their peer stalled, by reason.";
const FRAMES_REFUSED: &str = "Frames that were refused, by reason. All but malformed bodies end their connection.";
const REQUESTS_FAILED: &str = "Data-port requests answered with an error, by its status.";

impl Refusal {
    /// Every reason.
    pub const ALL: [Refusal; 11] = [
        Refusal::TooManyConnections,
        Refusal::NoHello,
        Refusal::HelloLate,
        Refusal::UnsupportedVersion,
        Refusal::StalledSender,
        Refusal::StalledReader,
        Refusal::BadMagic,
        Refusal::DamagedFrame,
        Refusal::UndefinedBits,
        Refusal::FrameTooLong,
        Refusal::BadRequest,
    ];

    const fn metric(self) -> (&'static str, &'static str) {
        match self {
            Refusal::TooManyConnections => ("connections_refused_total{reason=\"limit\"}", CONNECTIONS_REFUSED),
            Refusal::NoHello => ("connections_refused_total{reason=\"no_hello\"}", CONNECTIONS_REFUSED),
            Refusal::HelloLate => ("connections_refused_total{reason=\"hello_late\"}", CONNECTIONS_REFUSED),
            Refusal::UnsupportedVersion => ("connections_refused_total{reason=\"version\"}", CONNECTIONS_REFUSED),
            Refusal::StalledSender => ("connections_refused_total{reason=\"stalled_sender\"}", CONNECTIONS_REFUSED),
            Refusal::StalledReader => ("connections_refused_total{reason=\"stalled_reader\"}", CONNECTIONS_REFUSED),
            Refusal::BadMagic => ("frames_refused_total{reason=\"magic\"}", FRAMES_REFUSED),
            Refusal::DamagedFrame => ("frames_refused_total{reason=\"checksum\"}", FRAMES_REFUSED),
            Refusal::UndefinedBits => ("frames_refused_total{reason=\"undefined_bits\"}", FRAMES_REFUSED),
            Refusal::FrameTooLong => ("frames_refused_total{reason=\"length\"}", FRAMES_REFUSED),
            Refusal::BadRequest => ("frames_refused_total{reason=\"body\"}", FRAMES_REFUSED),
        }
    }
}

/// Counters of a shard's connections.
#[derive(Default)]
pub(super) struct Tally {
    accepted: Cell<u64>,
    refused: [Cell<u64>; Refusal::ALL.len()],
    failed: [Cell<u64>; Status::ALL.len()],
}

impl Tally {
    pub(super) fn accept(&self) {
        self.accepted.set(self.accepted.get() + 1);
    }

    pub(super) fn refuse(&self, refusal: Refusal) {
        let counter = &self.refused[refusal as usize];
        counter.set(counter.get() + 1);
    }

    pub(super) fn refused(&self, refusal: Refusal) -> u64 {
        self.refused[refusal as usize].get()
    }

    pub(super) fn fail(&self, status: Status) {
        let counter = &self.failed[status as usize];
        counter.set(counter.get() + 1);
    }

    /// Metric name with labels, help text and value of each counter.
    pub(super) fn counters(&self) -> Vec<(&'static str, &'static str, u64)> {
        let accepted = ("connections_accepted_total", "Connections accepted on the data port.", self.accepted.get());
        let refused = Refusal::ALL.iter().map(|&refusal| {
            let (name, help) = refusal.metric();
            (name, help, self.refused(refusal))
        });
        let failed = FAILED_METRICS.iter().zip(&self.failed).skip(1);
        let failed = failed.map(|(name, count)| (*name, REQUESTS_FAILED, count.get()));
        std::iter::once(accepted).chain(refused).chain(failed).collect()
    }
}

macro_rules! failed_metrics {
    ($($code:literal)*) => { [$(concat!("requests_failed_total{status=\"", $code, "\"}")),*] };
}

/// By the number of the status; each label is the status's code.
const FAILED_METRICS: [&str; Status::ALL.len()] = failed_metrics!(
    "ok" "invalid" "unsupported" "unknown_volume" "unknown_snapshot" "name_taken" "stale_generation" "not_attached"
    "out_of_range" "misaligned" "deadline_exceeded" "object_store" "corrupt" "no_space" "io" "busy" "shutting_down"
    "too_large" "conflict" "internal"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_of_a_status_is_its_code() {
        for status in Status::ALL {
            let label = format!("requests_failed_total{{status=\"{}\"}}", status.as_str());
            assert_eq!(FAILED_METRICS[status as usize], label);
        }
    }
}
