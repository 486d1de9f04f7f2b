//! The configuration of a node: a TOML file, flags that override it, and every default in one place.
//!
//! Unknown keys are errors, and `volleyd --print-config` writes out every key, so a typing error can't silently leave
//! a default in force. `docs/config.md` describes the keys for operators.

mod bandwidth;
mod cache;
mod isolation;
mod print;
mod store;
mod transfer;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

pub use bandwidth::Bandwidth;
pub use cache::{CACHE_RAM_BYTES_MIN, CacheConfig};
pub use isolation::{Floor, GuestBound};
pub use store::{BASE_PERCENT_DEFAULT, BASE_PERCENT_MAX, StoreConfig};
pub use transfer::TransferConfig;

use crate::cache::disk::DiskCacheConfig;
use crate::datadir::CACHE_DIR;
use crate::object_store::ObjectStoreUrl;
use crate::object_store::s3::S3Config;
use crate::placement::Overcommit;
use crate::shard::harm::HarmConfig;
use crate::transfer::{QueueLimits, RetryPolicy};
use crate::types::HydrationRate;
use crate::units::{ByteSize, Span};

/// The whole configuration. Relative paths are relative to the working directory of the server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the node keeps its identity, its journals and, unless `store` says otherwise, its volumes.
    pub data: PathBuf,
    /// `file:DIR` or `s3://BUCKET/PREFIX`. Has no default: a node without an object store is a mistake.
    pub object_store: Option<String>,
    /// Data port of shard 0; shard k listens on port + k, or on `path.k` of a unix socket.
    pub listen: ListenAddr,
    /// `host:port` of the HTTP API.
    pub http: String,
    /// Number of shards; 0 means one for each core this process may run on.
    pub cores: usize,
    /// How long a shard without work looks for some before it sleeps. Waking up takes longer than most disks.
    pub idle_poll: Span,
    /// Log filter: `error`, `warn`, `info`, `debug`, `trace`, or per module as `info,volley_server::shard=debug`.
    pub log: String,
    /// Guest reads of absent data that take longer are logged with their stages; 0s: none.
    pub trace_slow: Span,
    pub cache: CacheConfig,
    pub hydration: HydrationConfig,
    pub transfer: TransferConfig,
    pub placement: PlacementConfig,
    pub snapshots: SnapshotConfig,
    pub deadlines: DeadlineConfig,
    pub retries: RetryConfig,
    /// How to reach a bucket.
    pub s3: S3Config,
    /// Volume stores; none means one called `default` at `<data>/store`.
    #[serde(rename = "store")]
    pub stores: Vec<StoreConfig>,
}

/// Limits of hydration. Per shard, so that nothing is shared between cores.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HydrationConfig {
    /// Rate of a volume whose creator names none.
    pub default_rate: HydrationRate,
    /// Object-store reads in flight, of all classes.
    pub reads_max: usize,
    /// Of those, how many background hydration may occupy; the rest is reserved for guests and priority fetches.
    pub background_reads_max: usize,
    /// Largest coalesced read of a pack.
    pub read_bytes_max: ByteSize,
    /// What a volume's guest touches within this of its first attachment is its boot; 0s: none is recorded.
    pub boot_window: Span,
    /// How much longer than without hydration guests' I/O may take.
    pub guest_p99_bound: GuestBound,
    /// What hydration of a store may write whatever guests feel.
    pub floor: Floor,
}

/// Where volumes go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementConfig {
    /// What volumes may be promised for each free byte, in stores that say nothing else.
    pub overcommit: Overcommit,
}

/// Snapshots of volumes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// What they may read of volumes each second, over the whole node.
    pub bandwidth: Bandwidth,
    /// What guests overwrite while a snapshot still needs it may take so much of each store; then the snapshot is given up.
    pub staging_bytes: ByteSize,
    /// What the scrub reads of volumes and the disk cache each second; 0: there is none.
    pub scrub_bandwidth: ByteSize,
    /// Between two rounds of the scrub.
    pub scrub_pause: Span,
    /// So often the node collects garbage in the object store; 0s: never.
    pub gc_every: Span,
}

impl Default for SnapshotConfig {
    fn default() -> SnapshotConfig {
        SnapshotConfig {
            bandwidth: Bandwidth(None),
            staging_bytes: ByteSize(10 << 30),
            scrub_bandwidth: ByteSize(0),
            scrub_pause: Span(Duration::from_secs(24 * 3600)),
            gc_every: Span(Duration::ZERO),
        }
    }
}

/// How long things may take.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeadlineConfig {
    /// A guest read that needs the object store gets an I/O error after this long.
    pub guest_read: Span,
    /// The whole of a clean stop; exceeding it is an error exit. Nothing acknowledged is lost either way.
    pub stop: Span,
}

/// Retries of object-store requests within a deadline, with jittered exponential back-off.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// After this a fetch counts as failed; its waiters get the error, and background work starts it anew later.
    pub deadline: Span,
    pub backoff_min: Span,
    pub backoff_max: Span,
    /// How often a chunk that fails its digest is fetched again.
    pub corrupt_attempts: u32,
}

/// Where a data port listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddr {
    /// `host` may be a name or an address; port 0 picks free ports.
    Tcp {
        host: String,
        port: u16,
    },
    Unix(PathBuf),
}

/// Values of flags and environment that override the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub data: Option<PathBuf>,
    pub object_store: Option<String>,
    pub listen: Option<String>,
    pub http: Option<String>,
    pub cores: Option<usize>,
    pub log: Option<String>,
    pub trace_slow: Option<Duration>,
    /// `LABEL=PATH`; any of them replaces the stores of the file.
    pub stores: Vec<String>,
}

/// One line that names the file or flag and the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// More executors than this is a typing error rather than a machine.
pub const CORES_MAX: usize = 1024;
/// A shard that polls for longer hardly ever sleeps: nobody wants that by mistake.
pub const IDLE_POLL_MAX: Duration = Duration::from_millis(10);
/// A collection reads every manifest: nobody wants one more often.
pub const GC_EVERY_MIN: Duration = Duration::from_secs(1);
/// Label of the store that exists when none is configured.
pub const DEFAULT_STORE_LABEL: &str = "default";

impl Default for Config {
    fn default() -> Config {
        Config {
            data: PathBuf::from("/var/lib/volley/node"),
            object_store: None,
            listen: ListenAddr::Tcp { host: "127.0.0.1".to_string(), port: 7400 },
            http: "127.0.0.1:7480".to_string(),
            cores: 0,
            idle_poll: Span(Duration::from_micros(100)),
            log: "info".to_string(),
            trace_slow: Span(Duration::ZERO),
            cache: CacheConfig::default(),
            hydration: HydrationConfig::default(),
            transfer: TransferConfig::default(),
            placement: PlacementConfig::default(),
            snapshots: SnapshotConfig::default(),
            deadlines: DeadlineConfig::default(),
            retries: RetryConfig::default(),
            s3: S3Config::default(),
            stores: Vec::new(),
        }
    }
}

impl Default for HydrationConfig {
    fn default() -> HydrationConfig {
        let (limits, harm) = (QueueLimits::default(), HarmConfig::default());
        HydrationConfig {
            default_rate: HydrationRate::Unlimited,
            reads_max: limits.gate.gets_max,
            background_reads_max: limits.gate.gets_background_max,
            read_bytes_max: ByteSize(limits.get_bytes_max),
            boot_window: Span(Duration::from_secs(60)),
            guest_p99_bound: GuestBound(harm.bound_percent),
            floor: Floor(harm.floor),
        }
    }
}

impl Default for DeadlineConfig {
    fn default() -> DeadlineConfig {
        DeadlineConfig { guest_read: Span(Duration::from_secs(30)), stop: Span(Duration::from_secs(12)) }
    }
}

impl Default for RetryConfig {
    fn default() -> RetryConfig {
        let RetryPolicy { deadline, backoff_min, backoff_max, corrupt_attempts, .. } = RetryPolicy::default();
        RetryConfig {
            deadline: Span(deadline),
            backoff_min: Span(backoff_min),
            backoff_max: Span(backoff_max),
            corrupt_attempts,
        }
    }
}

impl Config {
    /// Reads the file (if any), applies the overrides and checks the result.
    ///
    /// # Errors
    /// One line that names the file or flag, the key, and what is wrong with it.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Config, ConfigError> {
        let config = match file {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        config.accept(overrides)
    }

    /// Like [`Config::load`] of a file with this text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_text(text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
        Config::parse(text)?.accept(overrides)
    }

    fn accept(mut self, overrides: &Overrides) -> Result<Config, ConfigError> {
        self.apply(overrides)?;
        self.check()?;
        Ok(self)
    }

    #[allow(clippy::disallowed_methods)] // Before any shard exists.
    fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| ConfigError(format!("can't read the configuration {}: {e}", path.display())))?;
        Config::parse(&text).map_err(|e| ConfigError(format!("configuration {}: {e}", path.display())))
    }

    /// Parses a configuration file's text; keys that are absent have their defaults.
    ///
    /// # Errors
    /// One line with the line number and the key.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|e| ConfigError(one_line(text, &e)))
    }

    /// The configuration as a commented TOML file that [`Config::parse`] reads back to the same value.
    #[must_use]
    pub fn to_toml(&self) -> String {
        print::to_toml(self)
    }

    fn apply(&mut self, overrides: &Overrides) -> Result<(), ConfigError> {
        let Overrides { data, object_store, listen, http, cores, log, trace_slow, stores } = overrides;
        if let Some(data) = data {
            self.data.clone_from(data);
        }
        if object_store.is_some() {
            self.object_store.clone_from(object_store);
        }
        if let Some(listen) = listen {
            self.listen = listen.parse().map_err(|e| ConfigError(format!("--listen: {e}")))?;
        }
        if let Some(http) = http {
            self.http.clone_from(http);
        }
        if let Some(cores) = cores {
            self.cores = *cores;
        }
        if let Some(log) = log {
            self.log.clone_from(log);
        }
        if let Some(trace_slow) = trace_slow {
            self.trace_slow = Span(*trace_slow);
        }
        if !stores.is_empty() {
            self.stores = stores.iter().map(|store| StoreConfig::from_flag(store)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        let fail = |message: String| Err(ConfigError(message));
        if self.data.as_os_str().is_empty() {
            return fail("data: the data directory must not be empty".to_string());
        }
        if let Err(e) = check_host_port(&self.http) {
            return fail(format!("http: {e}"));
        }
        if self.cores > CORES_MAX {
            return fail(format!("cores: {} is more than {CORES_MAX}", self.cores));
        }
        if self.idle_poll.0 > IDLE_POLL_MAX {
            return fail(format!("idle_poll: {} is more than {}", self.idle_poll, Span(IDLE_POLL_MAX)));
        }
        self.cache.check()?;
        if let Some(Err(e)) = self.object_store.as_ref().map(|url| url.parse::<ObjectStoreUrl>()) {
            return fail(format!("object_store: {e}"));
        }
        let gc_every = self.snapshots.gc_every;
        if !gc_every.0.is_zero() && gc_every.0 < GC_EVERY_MIN {
            return fail(format!(
                "snapshots.gc_every: {gc_every} is less than {}: write 0s for never",
                Span(GC_EVERY_MIN)
            ));
        }
        self.check_hydration()?;
        self.transfer.check()?;
        self.check_deadlines()?;
        self.s3.check().map_err(ConfigError)?;
        self.check_stores()
    }

    fn check_hydration(&self) -> Result<(), ConfigError> {
        let HydrationConfig { reads_max, background_reads_max, read_bytes_max, .. } = &self.hydration;
        if !(u64::from(crate::types::CHUNK_BYTES_MAX)..=64 << 20).contains(&read_bytes_max.0) {
            return Err(ConfigError(format!(
                "hydration.read_bytes_max: {read_bytes_max} is not between 4MiB (the largest chunk) and 64MiB (a pack)"
            )));
        }
        if !(2..=1024).contains(reads_max) {
            return Err(ConfigError(format!("hydration.reads_max: {reads_max} is not between 2 and 1024")));
        }
        if !(1..*reads_max).contains(background_reads_max) {
            return Err(ConfigError(format!(
                "hydration.background_reads_max: {background_reads_max} is not between 1 and {}, one less than \
                 reads_max",
                reads_max - 1
            )));
        }
        Ok(())
    }

    fn check_deadlines(&self) -> Result<(), ConfigError> {
        let RetryConfig { deadline, backoff_min, backoff_max, corrupt_attempts } = self.retries;
        let spans = [
            ("deadlines.guest_read", self.deadlines.guest_read),
            ("deadlines.stop", self.deadlines.stop),
            ("retries.deadline", deadline),
        ];
        for (key, span) in spans {
            if span.0 < Duration::from_millis(100) || span.0 > Duration::from_secs(3600) {
                return Err(ConfigError(format!("{key}: {span} is not between 100ms and 1h")));
            }
        }
        if backoff_min.0.is_zero() || backoff_min > backoff_max || backoff_max > deadline {
            return Err(ConfigError("retries: needs 0 < backoff_min <= backoff_max <= deadline".to_string()));
        }
        if !(1..=100).contains(&corrupt_attempts) {
            return Err(ConfigError(format!("retries.corrupt_attempts: {corrupt_attempts} is not between 1 and 100")));
        }
        Ok(())
    }

    fn check_stores(&self) -> Result<(), ConfigError> {
        let mut labels = HashSet::new();
        let mut paths = HashSet::new();
        for store in &self.stores {
            store.check()?;
            let StoreConfig { label, path, .. } = store;
            if !labels.insert(label) {
                return Err(ConfigError(format!("store label {label:?} is given twice: labels name volume stores")));
            }
            if !paths.insert(path) {
                return Err(ConfigError(format!("store path {} is given twice", path.display())));
            }
        }
        Ok(())
    }

    /// The disk cache, if there is to be one.
    #[must_use]
    pub fn disk_cache(&self) -> Option<DiskCacheConfig> {
        let dir = self.cache.dir.clone().unwrap_or_else(|| self.data.join(CACHE_DIR));
        (self.cache.disk_bytes.0 > 0).then_some(DiskCacheConfig { dir, bytes: self.cache.disk_bytes.0 })
    }

    /// The configured volume stores, or the one default store.
    #[must_use]
    pub fn stores(&self) -> Vec<StoreConfig> {
        if !self.stores.is_empty() {
            return self.stores.clone();
        }
        vec![StoreConfig::new(DEFAULT_STORE_LABEL, self.data.join("store"))]
    }
}

/// toml's error spans several lines with an excerpt; operators grep logs by line.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = text.as_bytes()[..span.start.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1;
            let key = text.lines().nth(line - 1).unwrap_or_default().trim();
            format!("line {line}: {message} (in {key:?})")
        }
        None => message,
    }
}

fn check_host_port(text: &str) -> Result<(String, u16), String> {
    let bad = || format!("{text:?} is not an address: write host:port, as 127.0.0.1:7480");
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host.contains('/') || (host.contains(':') && !bracketed) {
        return Err(bad());
    }
    Ok((host.to_string(), port.parse().map_err(|_| bad())?))
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<ListenAddr, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err("unix: needs a path, as unix:/run/volley.sock".to_string());
            }
            return Ok(ListenAddr::Unix(PathBuf::from(path)));
        }
        let (host, port) = check_host_port(text)
            .map_err(|_| format!("{text:?} is not an address: write host:port or unix:PATH, as 127.0.0.1:7400"))?;
        Ok(ListenAddr::Tcp { host, port })
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddr::Tcp { host, port } => write!(f, "{host}:{port}"),
            ListenAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for ListenAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ListenAddr, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
