//! Budgets in bytes per second.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::types::HydrationRate;
use crate::units::ByteSize;

/// A budget in bytes per second; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth(pub Option<u64>);

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Bandwidth, String> {
        match text.parse::<HydrationRate>()? {
            HydrationRate::Unlimited => Ok(Bandwidth(None)),
            HydrationRate::BytesPerSecond(bytes) => Ok(Bandwidth(Some(bytes))),
            HydrationRate::None => {
                Err("a store without hydration bandwidth never hydrates: write unlimited".to_string())
            }
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{}/s", ByteSize(bytes)),
            None => f.write_str("unlimited"),
        }
    }
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bandwidth, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
