//! How to reach a bucket: the `[s3]` section of the configuration, the standard environment, and the shared profile files,
//! made into one complete [`S3Settings`] at the start.
//!
//! For each setting the first that says something wins: `[s3]`, environment, profile, default.
#![allow(clippy::disallowed_methods)] // Profiles are read once at the start, before any shard exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::object_store::url::S3Location;
use crate::units::Span;

use super::credentials::Source;
use super::profile::Profile;
use super::transport::split_url;

/// Region of stores that have none.
const REGION_DEFAULT: &str = "us-east-1";

/// Section `[s3]` of the configuration. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Config {
    /// `http://` or `https://` host of the service, without the bucket; none: AWS in the region.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub addressing: Addressing,
    /// PEM file with the only certificate authorities to trust; none: those of the Mozilla programme.
    pub ca_file: Option<PathBuf>,
    /// Sign nothing.
    pub anonymous: bool,
    /// Profile of the shared credentials and configuration files.
    pub profile: Option<String>,
    pub connect_timeout: Span,
    pub read_timeout: Span,
    /// Connections of one shard.
    pub connections_max: usize,
    pub conditional_put: ConditionalPut,
}

/// Where the bucket's name goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Addressing {
    /// Virtual-host style for AWS, path style for other endpoints.
    #[default]
    Auto,
    /// `https://endpoint/bucket/key`.
    Path,
    /// `https://bucket.endpoint/key`.
    Virtual,
}

/// How an object is put only if it does not exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConditionalPut {
    /// By `If-None-Match: *`; the first one finds out whether the store honours it, and if not, as `Off`.
    #[default]
    Auto,
    /// A look and then a put, which lets racing writers overwrite each other.
    Off,
}

impl Addressing {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Addressing::Auto => "auto",
            Addressing::Path => "path",
            Addressing::Virtual => "virtual",
        }
    }
}

impl ConditionalPut {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ConditionalPut::Auto => "auto",
            ConditionalPut::Off => "off",
        }
    }
}

impl S3Config {
    /// # Errors
    /// One line that names the key and what is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        for (key, span) in [("s3.connect_timeout", self.connect_timeout), ("s3.read_timeout", self.read_timeout)] {
            if span.0 < Duration::from_millis(100) || span.0 > Duration::from_secs(300) {
                return Err(format!("{key}: {span} is not between 100ms and 5m"));
            }
        }
        if !(1..=1024).contains(&self.connections_max) {
            return Err(format!("s3.connections_max: {} is not between 1 and 1024", self.connections_max));
        }
        match &self.endpoint {
            Some(endpoint) => split_url(endpoint).map(drop).map_err(|why| format!("s3.endpoint: {why}")),
            None => Ok(()),
        }
    }
}

impl Default for S3Config {
    fn default() -> S3Config {
        S3Config {
            endpoint: None,
            region: None,
            addressing: Addressing::Auto,
            ca_file: None,
            anonymous: false,
            profile: None,
            connect_timeout: Span(Duration::from_secs(5)),
            read_timeout: Span(Duration::from_secs(10)),
            connections_max: 32,
            conditional_put: ConditionalPut::Auto,
        }
    }
}

/// Environment variables that matter here, taken once.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Environment {
        Environment::of(std::env::vars().filter(|(name, _)| name.starts_with("AWS_") || name == "HOME"))
    }

    #[must_use]
    pub fn of(variables: impl IntoIterator<Item = (String, String)>) -> Environment {
        Environment(variables.into_iter().filter(|(_, value)| !value.is_empty()).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn owned(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| self.get(name)).map(str::to_owned)
    }
}

/// Everything about a bucket that is decided at the start.
#[derive(Clone, Debug)]
pub struct S3Settings {
    pub(super) location: S3Location,
    pub(super) endpoint: String,
    pub(super) region: String,
    pub(super) path_style: bool,
    pub ca_file: Option<PathBuf>,
    pub(super) credentials: Source,
    pub connect_timeout: Duration,
    pub(super) read_timeout: Duration,
    pub connections_max: usize,
    pub(super) conditional_put: ConditionalPut,
}

impl S3Settings {
    /// Puts together what the configuration, the environment and the profile files say.
    ///
    /// # Errors
    /// One line that names the setting and what is wrong with it.
    pub fn resolve(location: &S3Location, config: &S3Config, env: &Environment) -> Result<S3Settings, String> {
        let profile_name = config.profile.clone().or_else(|| env.owned(&["AWS_PROFILE"]));
        let files = ProfileFiles::of(env);
        let profile = files.read(profile_name.as_deref())?;
        let endpoint = config
            .endpoint
            .clone()
            .or_else(|| env.owned(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]))
            .or_else(|| profile.get("endpoint_url").map(str::to_owned));
        let region = config
            .region
            .clone()
            .or_else(|| env.owned(&["AWS_REGION", "AWS_DEFAULT_REGION"]))
            .or_else(|| profile.get("region").map(str::to_owned))
            .unwrap_or_else(|| REGION_DEFAULT.to_owned());
        let path_style = match config.addressing {
            Addressing::Path => true,
            Addressing::Virtual => false,
            // The certificate of *.s3.amazonaws.com does not cover names with dots.
            Addressing::Auto => endpoint.is_some() || location.bucket.contains('.'),
        };
        let credentials = match config.anonymous {
            true => Source::Anonymous,
            false => Source::choose(env, &profile, files, &region)?,
        };
        Ok(S3Settings {
            location: location.clone(),
            endpoint: endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com")),
            region,
            path_style,
            ca_file: config.ca_file.clone().or_else(|| env.get("AWS_CA_BUNDLE").map(PathBuf::from)),
            credentials,
            connect_timeout: config.connect_timeout.0,
            read_timeout: config.read_timeout.0,
            connections_max: config.connections_max,
            conditional_put: config.conditional_put,
        })
    }
}

/// Where the shared files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProfileFiles {
    pub(super) credentials: Option<PathBuf>,
    pub(super) config: Option<PathBuf>,
}

impl ProfileFiles {
    fn of(env: &Environment) -> ProfileFiles {
        let home = |file: &str| env.get("HOME").map(|home| Path::new(home).join(".aws").join(file));
        let given = |name: &str| env.get(name).map(PathBuf::from);
        ProfileFiles {
            credentials: given("AWS_SHARED_CREDENTIALS_FILE").or_else(|| home("credentials")),
            config: given("AWS_CONFIG_FILE").or_else(|| home("config")),
        }
    }

    /// The profile of this name, or the one called `default`, which may be missing.
    fn read(&self, name: Option<&str>) -> Result<Profile, String> {
        let mut texts = Vec::new();
        for path in [&self.config, &self.credentials].into_iter().flatten() {
            match std::fs::read_to_string(path) {
                Ok(text) => texts.push(text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("profile file {}: {e}", path.display())),
            }
        }
        let profile = Profile::find(name.unwrap_or("default"), &texts);
        match (profile, name) {
            (Some(profile), _) => Ok(profile),
            (None, None) => Ok(Profile::default()),
            (None, Some(name)) => {
                let paths = [&self.credentials, &self.config].into_iter().flatten();
                let paths: Vec<_> = paths.map(|path| path.display().to_string()).collect();
                Err(format!("profile {name:?} is not in {}", paths.join(" or ")))
            }
        }
    }
}
