//! Sizes, durations and rates as people write them: `256MiB`, `30s`, `200MiB/s`. One grammar for the configuration
//! file, the HTTP API and the command line.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::{Floor, GuestBound};
use crate::placement::Overcommit;
use crate::types::HydrationRate;

/// Suffixes of sizes, in any letter case: powers of 1024, as in the command-line tools.
const SIZE_UNITS: [(&str, u64); 12] = [
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("T", 1 << 40),
    ("TiB", 1 << 40),
    ("P", 1 << 50),
    ("PiB", 1 << 50),
];

/// In microseconds.
const DURATION_UNITS: [(&str, u64); 5] =
    [("us", 1), ("ms", 1_000), ("s", 1_000_000), ("m", 60_000_000), ("h", 3_600_000_000)];

/// Parses a whole number of bytes with an optional unit, e.g. `4096`, `512K`, `10GiB`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    scaled(text, &SIZE_UNITS)
        .ok_or_else(|| format!("{text:?} is not a size: write a whole number and a unit, as 10GiB"))
}

/// Parses a whole number with one of the units `us`, `ms`, `s`, `m`, `h`, e.g. `30s`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    scaled(text, &DURATION_UNITS)
        .map(Duration::from_micros)
        .ok_or_else(|| format!("{text:?} is not a duration: write a whole number and us, ms, s, m or h, as 30s"))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let (_, scale) = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?;
    number.parse::<u64>().ok()?.checked_mul(*scale)
}

/// A size that [`parse_size`] reads back exactly: the largest binary unit that divides it.
#[must_use]
pub fn exact_size(bytes: u64) -> String {
    for (unit, scale) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= scale && bytes.is_multiple_of(scale) {
            return format!("{}{unit}", bytes / scale);
        }
    }
    bytes.to_string()
}

/// A duration that [`parse_duration`] reads back, exact to the microsecond.
#[must_use]
pub fn exact_duration(duration: Duration) -> String {
    let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    for (unit, scale) in DURATION_UNITS.into_iter().rev() {
        if us >= scale && us.is_multiple_of(scale) {
            return format!("{}{unit}", us / scale);
        }
    }
    format!("{us}us")
}

/// A number of bytes, in text with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A duration, in text with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&exact_size(self.0))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&exact_duration(self.0))
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        parse_size(text).map(ByteSize)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        parse_duration(text).map(Span)
    }
}

/// `unlimited`, `none`, or the bytes per second as a plain number: the `rate` of the HTTP API.
impl fmt::Display for HydrationRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HydrationRate::Unlimited => f.write_str("unlimited"),
            HydrationRate::None => f.write_str("none"),
            HydrationRate::BytesPerSecond(bytes) => write!(f, "{bytes}"),
        }
    }
}

/// `unlimited`, `none`, or a size per second: `200MiB/s`, `200MiB`, `209715200`.
impl FromStr for HydrationRate {
    type Err = String;

    fn from_str(text: &str) -> Result<HydrationRate, String> {
        match text.trim() {
            "unlimited" => return Ok(HydrationRate::Unlimited),
            "none" => return Ok(HydrationRate::None),
            _ => {}
        }
        match parse_size(text.trim().strip_suffix("/s").unwrap_or(text)) {
            Ok(0) => Err("a rate of 0 never finishes: write none to switch background hydration off".to_string()),
            Ok(bytes) => Ok(HydrationRate::BytesPerSecond(bytes)),
            Err(_) => Err(format!("{text:?} is not a rate: write unlimited, none or bytes per second, as 200MiB/s")),
        }
    }
}

/// `512 B`, `4 KiB`, `1.5 GiB`: at most one decimal, in the largest unit that leaves a number of at least 1.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    let (name, unit) = match bytes {
        0..1024 => return format!("{bytes} B"),
        _ if bytes >= 1 << 40 => ("TiB", 1u64 << 40),
        _ if bytes >= 1 << 30 => ("GiB", 1 << 30),
        _ if bytes >= 1 << 20 => ("MiB", 1 << 20),
        _ => ("KiB", 1 << 10),
    };
    if bytes.is_multiple_of(unit) {
        return format!("{} {name}", bytes / unit);
    }
    format!("{:.1} {name}", bytes as f64 / unit as f64)
}

/// Deserialises from a string through `FromStr`, or from a plain number through the same text.
fn from_text_or_number<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<T, D::Error> {
    struct Visitor<T>(std::marker::PhantomData<T>);

    impl<T: FromStr<Err = String>> serde::de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string with a unit")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }

        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<T, E> {
            // With its point, which sizes and rates refuse.
            self.visit_str(&format!("{number:?}"))
        }
    }

    deserializer.deserialize_any(Visitor(std::marker::PhantomData))
}

macro_rules! serde_through_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                from_text_or_number(deserializer)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}

serde_through_text!(ByteSize, Span, HydrationRate, Overcommit, GuestBound, Floor);

/// Hundredths of a number with at most two decimals: `1`, `1.5`, `0.25`.
pub(crate) fn parse_hundredths(text: &str) -> Option<u32> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(decimals) || decimals.len() > 2 {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(format!("{decimals:0<2}").parse().ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_whole_numbers_in_binary_units() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4K", 4096), ("256MiB", 256 << 20), ("10 GiB", 10 << 30), ("1 tib", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5GiB", "1 XiB", "1GB", "18446744073709551616", "999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_read_with_and_without_the_per_second() {
        assert_eq!("unlimited".parse(), Ok(HydrationRate::Unlimited));
        assert_eq!("none".parse(), Ok(HydrationRate::None));
        for text in ["200MiB/s", "200MiB", "209715200"] {
            assert_eq!(text.parse(), Ok(HydrationRate::BytesPerSecond(200 << 20)), "{text}");
        }
        for text in ["0", "fast", "-1", "10MiB/m"] {
            assert!(text.parse::<HydrationRate>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert!(parse_duration("30").is_err());
    }

    proptest! {
        #[test]
        fn exact_text_reads_back(bytes: u64, us: u32, scale in prop::sample::select(vec![1, 1000, 60_000_000])) {
            prop_assert_eq!(parse_size(&exact_size(bytes)), Ok(bytes));
            let span = Duration::from_micros(u64::from(us) * scale);
            prop_assert_eq!(parse_duration(&exact_duration(span)), Ok(span));
        }
    }
}
