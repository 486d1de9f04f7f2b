//! The server's configuration: a TOML file, and flags that override it. Operators write both, so what counts is that
//! every mistake is answered with one line, and that what was accepted holds.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use volley_server::config::{CACHE_RAM_BYTES_MIN, CORES_MAX, Config, IDLE_POLL_MAX, Overrides};

use super::assert_one_line;
use super::measure::within;

/// The TOML parser keeps a tree of what it read; errors quote a line of it with escapes.
const MEMORY_PER_BYTE: usize = 512;

/// The text of a file, and behind a NUL the flags: one `key=value` a line.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (file, flags) = text.split_once('\0').unwrap_or((&text, ""));
    let error_bytes_max = 1024 + 16 * text.len();
    within((256 << 10) + MEMORY_PER_BYTE * text.len(), || {
        match Config::parse(file) {
            Ok(config) => check(&config),
            Err(error) => assert_one_line(&error.to_string(), error_bytes_max),
        }
        match Config::from_text(file, &overrides(flags)) {
            Ok(config) => {
                check(&config);
                check_accepted(&config);
            }
            Err(error) => assert_one_line(&error.to_string(), error_bytes_max),
        }
    });
}

fn overrides(flags: &str) -> Overrides {
    let mut overrides = Overrides::default();
    for (key, value) in flags.lines().filter_map(|line| line.split_once('=')) {
        let text = Some(value.to_owned());
        match key {
            "data" => overrides.data = text.map(PathBuf::from),
            "object-store" => overrides.object_store = text,
            "listen" => overrides.listen = text,
            "http" => overrides.http = text,
            "cores" => overrides.cores = value.parse().ok(),
            "log" => overrides.log = text,
            "store" => overrides.stores.extend(text),
            _ => {}
        }
    }
    overrides
}

/// What was parsed is printed and parsed back to the same, whether a server would take it or not.
fn check(config: &Config) {
    assert_eq!(Config::parse(&config.to_toml()).as_ref(), Ok(config));
}

/// What the server relies on.
fn check_accepted(config: &Config) {
    assert_eq!(Config::from_text(&config.to_toml(), &Overrides::default()).as_ref(), Ok(config));
    assert!(config.cores <= CORES_MAX && config.cache.ram_bytes.0 >= CACHE_RAM_BYTES_MIN);
    assert!(config.idle_poll.0 <= IDLE_POLL_MAX && config.transfer.hedge_percent <= 100);
    assert!(config.cache.pin_waves.0 <= Duration::from_secs(3600));
    assert!(config.transfer.readahead_bytes_max.0 <= 64 << 20);
    let hydration = &config.hydration;
    assert!(hydration.background_reads_max >= 1 && hydration.background_reads_max < hydration.reads_max);
    assert!((4 << 20..=64 << 20).contains(&hydration.read_bytes_max.0));
    let (retries, hour) = (&config.retries, Duration::from_secs(3600));
    assert!(!retries.backoff_min.0.is_zero() && retries.backoff_max <= retries.deadline && retries.deadline.0 <= hour);
    assert!(config.deadlines.guest_read.0 <= hour && config.deadlines.stop.0 <= hour);
    let stores = config.stores();
    assert!(!stores.is_empty());
    let labels: BTreeSet<_> = stores.iter().map(|store| &store.label).collect();
    let paths: BTreeSet<_> = stores.iter().map(|store| &store.path).collect();
    assert!(labels.len() == stores.len() && paths.len() == stores.len());
    assert!(stores.iter().all(|store| !store.path.as_os_str().is_empty() && store.hydration_bandwidth.0 != Some(0)));
    assert!(stores.iter().all(|store| store.base_percent <= 90));
}

/// The file that `--print-config` writes, each section alone, every kind of value, and flags.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    [
        ("default", Config::default().to_toml().as_str()),
        ("top", "data = \"/d\"\nobject_store = \"file:/o\"\nlisten = \"[::1]:7400\"\nhttp = \"h:1\"\ncores = 2\nlog = \"a=debug\""),
        ("unix", "listen = \"unix:/run/volley.sock\""),
        ("cache", "[cache]\nram_bytes = \"64MiB\"\npin_waves = \"1h\""),
        ("cache-number", "cache.ram_bytes = 67108864"),
        ("hydration", "[hydration]\ndefault_rate = \"200MiB/s\"\nreads_max = 5\nbackground_reads_max = 2\nread_bytes_max = \"8MiB\""),
        ("hydration-none", "[hydration]\ndefault_rate = \"none\""),
        ("transfer", "[transfer]\nbandwidth = \"1MiB/s\"\ngets_per_second = 9\nhedge_percent = 100\nreadahead_bytes_max = \"64MiB\"\nprice_per_million_gets = 40"),
        ("deadlines", "[deadlines]\nguest_read = \"1500ms\"\nstop = \"1h\""),
        ("retries", "[retries]\ndeadline = \"1m\"\nbackoff_min = \"1ms\"\nbackoff_max = \"2ms\"\ncorrupt_attempts = 9"),
        ("stores", "[[store]]\nlabel = \"a\"\npath = \"/a\"\n[[store]]\nlabel = \"b\"\npath = '''/b \"'''\nhydration_bandwidth = \"unlimited\""),
        ("inline", "store = [{ label = \"a\", path = \"/a\", hydration_bandwidth = \"1KiB/s\", base_percent = 0 }]"),
        ("unknown-key", "cors = 4"),
        ("bad-value", "[deadlines]\nguest_read = \"30\""),
        ("flags", "cores = 4\0data=/d\nobject-store=file:///o\nlisten=0.0.0.0:0\nhttp=[::]:0\ncores=3\nlog=warn\nstore=a=/a\nstore=b=/b=c"),
        ("flags-bad", "\0listen=nowhere\nstore=a"),
    ]
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .to_vec()
}
