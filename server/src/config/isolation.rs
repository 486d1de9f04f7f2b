//! What hydration may do to guests: a bound on their latency, and a floor for hydration.

use std::fmt;
use std::str::FromStr;

use crate::units::{ByteSize, parse_hundredths};

/// A larger bound is none in all but name.
const BOUND_MAX: u32 = 100;

/// p99 of guests' I/O by what it is without hydration, in hundredths; `None`: it is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestBound(pub Option<u32>);

impl fmt::Display for GuestBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(hundredths) => write!(f, "{}", f64::from(hundredths) / 100.0),
            None => f.write_str("none"),
        }
    }
}

/// `none`, or a number with at most two decimals: `1.2`, `3`.
impl FromStr for GuestBound {
    type Err = String;

    fn from_str(text: &str) -> Result<GuestBound, String> {
        let text = text.trim();
        if text == "none" {
            return Ok(GuestBound(None));
        }
        match parse_hundredths(text) {
            Some(hundredths) if (101..=BOUND_MAX * 100).contains(&hundredths) => Ok(GuestBound(Some(hundredths))),
            _ => Err(format!("{text:?} is no bound: write none or a number from 1.01 to {BOUND_MAX}, as 1.2")),
        }
    }
}

/// Bytes per second that hydration of a store may always write; `None`: a part of its bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor(pub Option<u64>);

impl fmt::Display for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{}/s", ByteSize(bytes)),
            None => f.write_str("auto"),
        }
    }
}

/// `auto`, or a size per second that is not zero.
impl FromStr for Floor {
    type Err = String;

    fn from_str(text: &str) -> Result<Floor, String> {
        let text = text.trim();
        if text == "auto" {
            return Ok(Floor(None));
        }
        let bad = || format!("{text:?} is no floor: write auto or a size per second above 0, as 4MiB/s");
        let bytes: ByteSize = text.strip_suffix("/s").ok_or_else(bad)?.parse().map_err(|_| bad())?;
        if bytes.0 == 0 { Err(bad()) } else { Ok(Floor(Some(bytes.0))) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Floor, GuestBound};

    #[test]
    fn bounds_and_floors_are_read_as_written() {
        for (text, bound) in
            [("1.2", Some(120)), ("1.01", Some(101)), ("3", Some(300)), ("100", Some(10_000)), ("none", None)]
        {
            assert_eq!(text.parse(), Ok(GuestBound(bound)));
            assert_eq!(GuestBound(bound).to_string(), text);
        }
        for text in ["", "1", "1.00", "0.5", "-2", "1.234", "100.01", "unlimited", "1,2", "1.", "99999999999"] {
            assert!(text.parse::<GuestBound>().is_err(), "{text}");
        }
        for (text, floor) in [("auto", None), ("4MiB/s", Some(4 << 20)), ("1000/s", Some(1000))] {
            assert_eq!(text.parse(), Ok(Floor(floor)));
            assert_eq!(Floor(floor).to_string().parse(), Ok(Floor(floor)));
        }
        for text in ["", "0/s", "4MiB", "none", "unlimited", "-1/s"] {
            assert!(text.parse::<Floor>().is_err(), "{text}");
        }
    }
}
