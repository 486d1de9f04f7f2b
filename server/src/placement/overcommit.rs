//! How much more may be promised than there is.

use std::fmt;
use std::str::FromStr;

use crate::units::parse_hundredths;

/// A larger ratio is `unlimited` in all but name.
pub const OVERCOMMIT_MAX: u32 = 1_000_000;

/// What volumes may be promised for each free byte. 1: no volume can run out of space because of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overcommit {
    /// In hundredths.
    Ratio(u32),
    /// Promises are not counted; a store without free space still gets no volume.
    Unlimited,
}

impl Overcommit {
    /// The most that may be promised on `usable_bytes`.
    #[must_use]
    pub fn limit(self, usable_bytes: u64) -> u128 {
        match self {
            Overcommit::Ratio(hundredths) => u128::from(usable_bytes) * u128::from(hundredths) / 100,
            Overcommit::Unlimited if usable_bytes == 0 => 0,
            Overcommit::Unlimited => u128::MAX,
        }
    }

    /// `None`: unlimited.
    #[must_use]
    pub fn ratio(self) -> Option<f64> {
        match self {
            Overcommit::Ratio(hundredths) => Some(f64::from(hundredths) / 100.0),
            Overcommit::Unlimited => None,
        }
    }
}

/// Nothing is promised twice.
impl Default for Overcommit {
    fn default() -> Overcommit {
        Overcommit::Ratio(100)
    }
}

impl fmt::Display for Overcommit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ratio() {
            Some(ratio) => write!(f, "{ratio}"),
            None => f.write_str("unlimited"),
        }
    }
}

/// `unlimited`, or a number with at most two decimals: `1`, `1.5`, `20`.
impl FromStr for Overcommit {
    type Err = String;

    fn from_str(text: &str) -> Result<Overcommit, String> {
        let text = text.trim();
        if text == "unlimited" {
            return Ok(Overcommit::Unlimited);
        }
        match parse_hundredths(text) {
            Some(hundredths) if (1..=OVERCOMMIT_MAX * 100).contains(&hundredths) => Ok(Overcommit::Ratio(hundredths)),
            _ => Err(format!(
                "{text:?} is not an over-commit ratio: write unlimited or a number from 0.01 to {OVERCOMMIT_MAX}, as 1.5"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Overcommit;

    #[test]
    fn ratios_are_read_as_written() {
        for (text, ratio) in [
            ("1", Overcommit::Ratio(100)),
            ("1.5", Overcommit::Ratio(150)),
            ("0.05", Overcommit::Ratio(5)),
            ("20.25", Overcommit::Ratio(2025)),
            ("unlimited", Overcommit::Unlimited),
        ] {
            assert_eq!(text.parse(), Ok(ratio));
            assert_eq!(ratio.to_string(), text);
        }
        for text in ["", "0", "0.00", "-1", "1.", ".5", "1.505", "1e3", "none", "1000001", "99999999999"] {
            assert!(text.parse::<Overcommit>().is_err(), "{text}");
        }
    }

    #[test]
    fn toml_and_json_may_give_numbers() {
        #[derive(serde::Deserialize)]
        struct Key {
            ratio: Overcommit,
        }
        for text in ["ratio = 2", "ratio = 2.0", "ratio = \"2\""] {
            assert_eq!(toml::from_str::<Key>(text).unwrap().ratio, Overcommit::Ratio(200), "{text}");
        }
        assert_eq!(serde_json::from_str::<Key>("{\"ratio\": 2.5}").unwrap().ratio, Overcommit::Ratio(250));
    }

    #[test]
    fn limits_do_not_overflow() {
        assert_eq!(Overcommit::Ratio(150).limit(1 << 30), 3 << 29);
        assert!(Overcommit::Ratio(u32::MAX).limit(u64::MAX) < u128::MAX);
        assert_eq!(Overcommit::Unlimited.limit(0), 0);
    }
}
