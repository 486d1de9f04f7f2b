//! Sizes and durations as people write them on a command line and read them in a table; shared by all programs.
//!
//! The parsers have the shape clap wants of a `value_parser`.

use std::time::Duration;

pub use volley_server::units::format_size;

/// Suffixes of sizes. All are powers of 1024: a block device has no use for the decimal ones, and silently
/// reading `1GB` as one or the other is how volumes end up a few MiB short.
const SIZE_UNITS: [(&str, u64); 10] = [
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
];

const DURATION_UNITS_NS: [(&str, u64); 6] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Parses `4096`, `4KiB`, `4K`, `64 MiB`, `1.5GiB`: bytes, suffixes are powers of 1024 in any letter case.
///
/// # Errors
/// A sentence that names the text and says what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, suffix) = split_number(text);
    let unit = SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(suffix)).map(|(_, bytes)| *bytes);
    unit.and_then(|unit| scale(number, unit)).ok_or_else(|| {
        format!("{text:?} is not a size: write bytes, or a number with K, M, G, T, KiB, MiB, GiB or TiB")
    })
}

/// Parses `10s`, `250ms`, `5m`, `1.5h`. A unit is required.
///
/// # Errors
/// A sentence that names the text and says what is accepted.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, suffix) = split_number(text);
    let unit = DURATION_UNITS_NS.iter().find(|(name, _)| *name == suffix).map(|(_, ns)| *ns);
    unit.and_then(|unit| scale(number, unit))
        .map(Duration::from_nanos)
        .ok_or_else(|| format!("{text:?} is not a duration: write a number with its unit: us, ms, s, m or h"))
}

/// `870 us`, `12.5 ms`, `3.21 s`, `4m 07s`, `2h 05m`.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let whole = duration.as_secs();
    match whole {
        3600.. => format!("{}h {:02}m", whole / 3600, whole / 60 % 60),
        60.. => format!("{}m {:02}s", whole / 60, whole % 60),
        1.. => format!("{seconds:.2} s"),
        0 if seconds >= 0.001 => format!("{:.1} ms", seconds * 1e3),
        0 => format!("{:.0} us", seconds * 1e6),
    }
}

/// Splits at the first character that can't belong to a number; spaces between number and unit are fine.
fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// `number * unit` without floating point; `None` if it isn't a number, not whole, or does not fit.
fn scale(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) || fraction.len() > 12 {
        return None;
    }
    let denominator = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = digits.checked_mul(u128::from(unit))?;
    if !scaled.is_multiple_of(denominator) {
        return None;
    }
    u64::try_from(scaled / denominator).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{format_duration, format_size, parse_duration, parse_size};

    #[test]
    fn sizes_are_parsed() {
        let good = [
            ("0", 0),
            ("512", 512),
            ("4KiB", 4096),
            ("4k", 4096),
            ("64 MiB", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2T", 2 << 40),
            (" 7B ", 7),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "KiB", "4KB", "-1", "1.", ".5G", "1..2K", "0.3B", "99999999999T", "1e3", "4 K K", "ä"] {
            assert!(parse_size(text).unwrap_err().contains("not a size"), "{text}");
        }
    }

    #[test]
    fn durations_are_parsed() {
        let good = [
            ("10s", 10_000),
            ("250ms", 250),
            ("5m", 300_000),
            ("1.5h", 5_400_000),
            ("0s", 0),
            ("1000us", 1),
            ("2 s", 2000),
        ];
        for (text, ms) in good {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "10", "s", "10S", "1d", "-1s", "99999999999999h"] {
            assert!(parse_duration(text).unwrap_err().contains("not a duration"), "{text}");
        }
    }

    #[test]
    fn sizes_and_durations_are_formatted() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5 TiB")] {
            assert_eq!(format_size(bytes), text);
        }
        let cases = [
            (870, "870 us"),
            (12_500, "12.5 ms"),
            (3_210_000, "3.21 s"),
            (247_000_000, "4m 07s"),
            (7_500_000_000, "2h 05m"),
        ];
        for (us, text) in cases {
            assert_eq!(format_duration(Duration::from_micros(us)), text);
        }
    }

    proptest! {
        #[test]
        fn whole_sizes_round_trip(n in 0u64..1023, shift in 0u32..5) {
            let bytes = n << (10 * shift);
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_refused_or_parsed_without_panic(text in ".{0,24}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }
    }
}
