//! The keys of a volume store.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Bandwidth, ConfigError};
use crate::placement::Overcommit;

/// A volume store: a directory that holds one file per volume.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    pub label: String,
    pub path: PathBuf,
    /// Bytes per second that hydration may write to this store, so that guests are not disturbed.
    #[serde(default)]
    pub hydration_bandwidth: Bandwidth,
    /// What fails together with it; its label unless given.
    #[serde(default)]
    pub domain: Option<String>,
    /// `placement.overcommit` unless given.
    #[serde(default)]
    pub overcommit: Option<Overcommit>,
    /// Where the filesystem can share extents, volumes share chunks with a base of at most so much of it; 0: they don't.
    #[serde(default = "base_percent_default")]
    pub base_percent: u8,
}

/// More would leave hardly anything to volumes that share nothing any more.
pub const BASE_PERCENT_MAX: u8 = 90;
pub const BASE_PERCENT_DEFAULT: u8 = 20;

const fn base_percent_default() -> u8 {
    BASE_PERCENT_DEFAULT
}

impl StoreConfig {
    /// A store about which no more is said than where it is.
    #[must_use]
    pub fn new(label: &str, path: PathBuf) -> StoreConfig {
        StoreConfig {
            label: label.to_string(),
            path,
            hydration_bandwidth: Bandwidth(None),
            domain: None,
            overcommit: None,
            base_percent: BASE_PERCENT_DEFAULT,
        }
    }

    pub(super) fn from_flag(text: &str) -> Result<StoreConfig, ConfigError> {
        match text.split_once('=') {
            Some((label, path)) if !label.is_empty() && !path.is_empty() => {
                Ok(StoreConfig::new(label, PathBuf::from(path)))
            }
            _ => Err(ConfigError(format!("--store {text:?}: write LABEL=PATH"))),
        }
    }

    /// Checks what a store says for itself.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let StoreConfig { label, path, domain, base_percent, .. } = self;
        volley_protocol::name::check_name(label).map_err(|e| ConfigError(format!("store label: {e}")))?;
        let fail = |what: String| Err(ConfigError(format!("store {label:?}: {what}")));
        if let Some(Err(e)) = domain.as_ref().map(|domain| volley_protocol::name::check_name(domain)) {
            return fail(format!("domain: {e}"));
        }
        if path.as_os_str().is_empty() {
            return fail("its path must not be empty".to_string());
        }
        if *base_percent > BASE_PERCENT_MAX {
            return fail(format!("base_percent: {base_percent} is more than {BASE_PERCENT_MAX}"));
        }
        Ok(())
    }
}
