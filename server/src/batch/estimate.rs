//! When a batch will be done: a pure function of what is to be moved and of how fast it was moved lately.
//!
//! Three things are done one beside the other, and the slowest says when the batch is done: every volume store writes what
//! is due there no later than the batch and then the batch's part; the object store gives the image once; and each volume
//! takes its own rate. Before them its volumes must exist.

use serde::{Deserialize, Serialize};

/// Volumes per second that a node makes which has not made any: measured on two cores with an ordinary disk.
pub const CREATED_PER_SECOND_ASSUMED: f64 = 1_500.0;
/// Bytes per second of a store and of an object store that nothing is known of.
pub const STORE_RATE_ASSUMED: f64 = 256.0 * 1048576.0;
pub const OBJECT_RATE_ASSUMED: f64 = 100.0 * 1048576.0;

/// A store's part in a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub store: String,
    /// What hydration writes for the batch.
    pub bytes: u64,
    /// What it writes before, or in turns with it.
    pub ahead_bytes: u64,
    /// Bytes per second it wrote lately while it had much to do.
    pub measured: Option<f64>,
    /// What it may write per second.
    pub share: Option<u64>,
}

/// What a batch asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    pub volumes: u64,
    pub parts: Vec<Part>,
    /// What comes from the object store, and how fast that came lately.
    pub object_bytes: u64,
    pub object_rate: Option<f64>,
    /// Volumes made per second lately.
    pub created_per_second: Option<f64>,
    /// What one volume gets, and the rate it is allowed.
    pub volume_bytes: u64,
    pub volume_rate: Option<u64>,
    /// Nothing is hydrated in the background.
    pub unhydrated: bool,
}

/// When a batch should be done, counted from its admission.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    pub created_seconds: f64,
    /// `None`: it is not hydrated in the background.
    pub hydrated_seconds: Option<f64>,
    /// What takes longest.
    pub limited_by: String,
    /// Some rate was not measured yet.
    pub assumed: bool,
}

/// Predicts. Never negative, never NaN.
#[must_use]
pub fn predict(work: &Work) -> Prediction {
    let created_seconds = work.volumes as f64 / work.created_per_second.unwrap_or(CREATED_PER_SECOND_ASSUMED).max(1.0);
    let mut assumed = work.created_per_second.is_none();
    if work.unhydrated {
        let limited_by = "making the volumes".to_string();
        return Prediction { created_seconds, hydrated_seconds: None, limited_by, assumed };
    }
    let mut slowest = (0.0, "making the volumes".to_string());
    let mut takes = |seconds: f64, what: &dyn Fn() -> String| {
        if seconds > slowest.0 {
            slowest = (seconds, what());
        }
    };
    for part in work.parts.iter().filter(|part| part.bytes > 0) {
        let (rate, how) = part.rate();
        assumed |= how == "assumed";
        let what = || {
            let ahead = if part.ahead_bytes > 0 { ", with what is due there before" } else { "" };
            format!("store {:?} at its {how} {:.0} MiB/s{ahead}", part.store, rate / 1048576.0)
        };
        takes((part.bytes as f64 + part.ahead_bytes as f64) / rate, &what);
    }
    if work.object_bytes > 0 {
        let rate = work.object_rate.unwrap_or(OBJECT_RATE_ASSUMED).max(1.0);
        assumed |= work.object_rate.is_none();
        takes(work.object_bytes as f64 / rate, &|| format!("the object store at {:.0} MiB/s", rate / 1048576.0));
    }
    if let Some(rate) = work.volume_rate {
        takes(work.volume_bytes as f64 / rate.max(1) as f64, &|| "the rate of each volume".to_string());
    }
    let (seconds, limited_by) = slowest;
    Prediction { created_seconds, hydrated_seconds: Some(created_seconds + seconds), limited_by, assumed }
}

impl Part {
    /// Bytes per second to reckon with, and what kind of figure that is.
    fn rate(&self) -> (f64, &'static str) {
        let share = self.share.map_or(f64::INFINITY, |share| share.max(1) as f64);
        match self.measured {
            Some(measured) if measured.max(1.0) < share => (measured.max(1.0), "measured"),
            None if STORE_RATE_ASSUMED < share => (STORE_RATE_ASSUMED, "assumed"),
            _ => (share, "hydration share of"),
        }
    }
}

/// A rate as it was lately, from samples of what was done; only samples of a time with much to do count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured(Option<f64>);

impl Measured {
    /// How much a new sample counts.
    const WEIGHT: f64 = 0.3;

    /// Takes in what was done per second.
    pub fn sample(&mut self, per_second: f64) {
        if per_second.is_finite() && per_second > 0.0 {
            self.0 = Some(self.0.map_or(per_second, |old| old + Self::WEIGHT * (per_second - old)));
        }
    }

    #[must_use]
    pub fn per_second(&self) -> Option<f64> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Measured, Part, Work, predict};

    const MIB: u64 = 1 << 20;

    fn part(store: &str, mib: u64, ahead_mib: u64, measured: Option<f64>, share: Option<u64>) -> Part {
        Part { store: store.to_string(), bytes: mib * MIB, ahead_bytes: ahead_mib * MIB, measured, share }
    }

    fn work(parts: Vec<Part>) -> Work {
        Work {
            volumes: 100,
            parts,
            object_bytes: 0,
            object_rate: None,
            created_per_second: Some(100.0),
            volume_bytes: MIB,
            volume_rate: None,
            unhydrated: false,
        }
    }

    #[test]
    fn the_slowest_store_says_when_and_is_named() {
        let fast = part("fast", 1000, 0, Some((200 * MIB) as f64), None);
        let slow = part("slow", 1000, 500, Some((200 * MIB) as f64), Some(100 * MIB));
        let predicted = predict(&work(vec![fast, slow]));
        assert_eq!((predicted.created_seconds, predicted.hydrated_seconds), (1.0, Some(16.0)));
        assert!(predicted.limited_by.contains("\"slow\" at its hydration share of 100 MiB/s"), "{predicted:?}");
        assert!(predicted.limited_by.contains("due there before") && !predicted.assumed, "{predicted:?}");
    }

    #[test]
    fn the_object_store_and_the_volumes_rate_can_be_slower() {
        let mut from_afar = work(vec![part("s", 10, 0, Some((100 * MIB) as f64), None)]);
        from_afar.object_bytes = 10 * MIB;
        from_afar.object_rate = Some(MIB as f64);
        assert!(predict(&from_afar).limited_by.contains("object store at 1 MiB/s"));
        from_afar.volume_bytes = 100 * MIB;
        from_afar.volume_rate = Some(MIB);
        let predicted = predict(&from_afar);
        assert_eq!(predicted.hydrated_seconds, Some(101.0));
        assert!(predicted.limited_by.contains("rate of each volume"));
        from_afar.unhydrated = true;
        assert_eq!(predict(&from_afar).hydrated_seconds, None);
    }

    #[test]
    fn what_was_never_measured_is_said_to_be_assumed() {
        assert!(predict(&work(vec![part("s", 1000, 0, None, None)])).assumed);
        assert!(!predict(&work(vec![part("s", 1000, 0, None, Some(MIB))])).assumed, "the share is known");
        let mut measured = Measured::default();
        for rate in [0.0, f64::NAN, 10.0, 20.0] {
            measured.sample(rate);
        }
        assert!(measured.per_second().is_some_and(|rate| (rate - 13.0).abs() < 1e-9));
    }

    proptest! {
        #[test]
        fn more_work_is_never_predicted_to_be_sooner(
            mib in 0_u64..1_000_000, more in 0_u64..1_000_000, ahead in 0_u64..1_000_000,
            measured in prop::option::of(0.0_f64..1e12), share in prop::option::of(0_u64..1 << 40),
        ) {
            let at = |mib| predict(&work(vec![part("s", mib, ahead, measured, share)])).hydrated_seconds.unwrap();
            let (less, much) = (at(mib), at(mib + more));
            prop_assert!(less.is_finite() && less >= 0.0 && much >= less, "{less} {much}");
        }
    }
}
