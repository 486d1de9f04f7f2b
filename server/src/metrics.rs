//! `/metrics`: what the shards count, in the Prometheus text format 0.0.4.
//!
//! Names are `volley_<what>_<unit>`; the shards name and describe their own counters, this module only adds the label
//! of the shard and what is known of the process.
#![allow(clippy::disallowed_methods)] // Runs on the control thread, outside of the platform seam.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::{Display, Write as _};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::datadir::Store;
use crate::histogram::HistogramCounts;
use crate::platform::SpaceInfo;
use crate::shard::api::{ShardStats, StoreSharing, StoreStats};

pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Name, kind, help text and value of a metric; the name may carry labels. Those of one name follow each other.
pub type Metric = (&'static str, &'static str, &'static str, u64);

/// Space of one volume store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreGauges {
    pub label: String,
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub sharing: StoreSharing,
}

impl StoreGauges {
    /// `None`, with a log line, when the file system can't be asked: metrics of the rest still matter.
    #[must_use]
    pub fn of(store: &Store, sharing: StoreSharing) -> Option<StoreGauges> {
        match space_of(&store.path) {
            Ok(SpaceInfo { total_bytes, free_bytes }) => {
                let label = store.label.to_string();
                Some(StoreGauges { label, capacity_bytes: total_bytes, free_bytes, sharing })
            }
            Err(error) => {
                tracing::warn!(store = &*store.label, %error, "no space information");
                None
            }
        }
    }
}

/// Size of the file system at `path` and what an unprivileged process may still use of it.
///
/// # Errors
/// Of `statvfs`.
pub fn space_of(path: &Path) -> io::Result<SpaceInfo> {
    let info = statvfs(path)?;
    Ok(SpaceInfo { total_bytes: info.f_blocks * info.f_frsize, free_bytes: info.f_bavail * info.f_frsize })
}

/// Whether the file system at `path` is mounted read-only, as after an error of its disk.
///
/// # Errors
/// Of `statvfs`.
pub fn is_read_only(path: &Path) -> io::Result<bool> {
    Ok(statvfs(path)?.f_flag & libc::ST_RDONLY != 0)
}

fn statvfs(path: &Path) -> io::Result<libc::statvfs> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut info = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a nul-terminated string and `info` has room for one statvfs; both outlive the call.
    if unsafe { libc::statvfs(path.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statvfs succeeded, so it filled the structure.
    let info = unsafe { info.assume_init() };
    Ok(info)
}

type SharingMetric = (&'static str, &'static str, &'static str, fn(&StoreSharing) -> u64);

/// What the volumes of a store share, by name, kind and help text.
const SHARING: [SharingMetric; 9] = [
    ("shares_extents", "gauge", "Whether volumes share chunks with the base of their store.", |s| {
        u64::from(s.shares_extents)
    }),
    ("base_bytes", "gauge", "Bytes of chunks in the base of a volume store.", |s| s.base_bytes),
    ("base_bytes_max", "gauge", "What the base of a volume store may hold.", |s| s.base_bytes_max),
    ("base_written_bytes_total", "counter", "Bytes of chunks written into the base.", |s| s.base_written_bytes),
    ("base_evicted_bytes_total", "counter", "Bytes of chunks that left the base.", |s| s.base_evicted_bytes),
    ("clone_chunks_total", "counter", "Chunks that volumes got by sharing the base's.", |s| s.cloned_chunks),
    ("clone_bytes_total", "counter", "Bytes that volumes share instead of having a copy.", |s| s.cloned_bytes),
    ("clones_total", "counter", "Clones that this took: neighbours are cloned together.", |s| s.clones),
    ("clone_failures_total", "counter", "Clones and writes of the base that failed; volumes got copies.", |s| {
        s.clone_failures
    }),
];

/// Encodes everything.
#[must_use]
pub fn encode(stats: &[ShardStats], stores: &[StoreGauges], of_process: &[Metric], started_unix_ms: u64) -> String {
    let mut out = String::with_capacity(16 << 10);
    family(
        &mut out,
        "volley_build_info",
        "gauge",
        "Version of this server.",
        [(format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1)],
    );
    shard_gauge(&mut out, stats, "volley_volumes", "Volumes.", |s| s.volumes);
    shard_gauge(&mut out, stats, "volley_volumes_hydrated", "Volumes whose every chunk is resident.", |s| {
        s.volumes_hydrated
    });
    shard_gauge(&mut out, stats, "volley_volumes_attached", "Volumes that a host has attached.", |s| {
        s.volumes_attached
    });
    shard_gauge(&mut out, stats, "volley_connections", "Open connections to the data port.", |s| s.connections);
    reported(&mut out, stats, "counter", |s| &s.counters, |s| &s.counters);
    reported(&mut out, stats, "gauge", |s| &s.gauges, |s| &s.gauges);
    histograms(&mut out, stats);
    let of_store = |value: &dyn Fn(&StoreGauges) -> u64| {
        stores.iter().map(|s| (format!("store=\"{}\"", escape(&s.label)), value(s))).collect::<Vec<_>>()
    };
    let capacity = "Size of the file system of a volume store.";
    family(&mut out, "volley_store_capacity_bytes", "gauge", capacity, of_store(&|s| s.capacity_bytes));
    let free = "Free bytes of the file system of a volume store.";
    family(&mut out, "volley_store_free_bytes", "gauge", free, of_store(&|s| s.free_bytes));
    for (name, kind, help, value) in SHARING {
        family(&mut out, &format!("volley_store_{name}"), kind, help, of_store(&|s| value(&s.sharing)));
    }
    for samples in of_process.chunk_by(|a, b| labels_of(a.0).0 == labels_of(b.0).0) {
        let (name, kind, help, _) = samples[0];
        let values = samples.iter().map(|(name, .., value)| (labels_of(name).1.to_owned(), *value));
        family(&mut out, &format!("volley_{}", labels_of(name).0), kind, help, values);
    }
    process(&mut out, started_unix_ms);
    out
}

fn shard_gauge(out: &mut String, stats: &[ShardStats], name: &str, help: &str, value: fn(&ShardStats) -> u64) {
    family(out, name, "gauge", help, stats.iter().map(|s| (shard_label(s), value(s))));
}

/// Name, help text and value of what a shard reports.
type Values = Vec<(&'static str, &'static str, u64)>;

/// What shards and their stores report, each with its labels.
fn with_stores<T>(
    stats: &[ShardStats],
    of: fn(&ShardStats) -> &T,
    of_store: fn(&StoreStats) -> &T,
) -> Vec<(String, &T)> {
    let mut all = Vec::new();
    for shard in stats {
        all.push((shard_label(shard), of(shard)));
        let label = |store: &StoreStats| format!("{},store=\"{}\"", shard_label(shard), escape(&store.store));
        all.extend(shard.stores.iter().map(|store| (label(store), of_store(store))));
    }
    all
}

/// What the shards report by name, which may carry labels of its own: one family per name over all shards.
fn reported(
    out: &mut String,
    stats: &[ShardStats],
    kind: &str,
    of: fn(&ShardStats) -> &Values,
    of_store: fn(&StoreStats) -> &Values,
) {
    type Samples = Vec<(String, u64)>;
    let mut families: BTreeMap<&str, (&str, Samples)> = BTreeMap::new();
    for (prefix, values) in with_stores(stats, of, of_store) {
        for (name, help, value) in values {
            let (name, labels) = match name.split_once('{') {
                Some((name, labels)) => (name, format!("{prefix},{}", labels.trim_end_matches('}'))),
                None => (*name, prefix.clone()),
            };
            families.entry(name).or_insert((help, Vec::new())).1.push((labels, *value));
        }
    }
    for (name, (help, samples)) in families {
        family(out, &format!("volley_{name}"), kind, help, samples);
    }
}

/// Histograms that the shards report, in Prometheus' cumulative buckets.
fn histograms(out: &mut String, stats: &[ShardStats]) {
    type Series<'a> = Vec<(String, &'a HistogramCounts)>;
    let mut families: BTreeMap<&str, (&str, Series)> = BTreeMap::new();
    for (prefix, values) in with_stores(stats, |s| &s.histograms, |s| &s.histograms) {
        for (name, help, counts) in values {
            let (name, labels) = name.split_once('{').unwrap_or((name, ""));
            let labels = format!("{prefix},{}", labels.trim_end_matches('}'));
            families.entry(name).or_insert((help, Vec::new())).1.push((labels, counts));
        }
    }
    for (name, (help, series)) in families {
        let _ = writeln!(out, "# HELP volley_{name} {help}\n# TYPE volley_{name} histogram");
        for (labels, counts) in series {
            let mut cumulative = 0;
            for (i, count) in counts.counts.iter().enumerate() {
                cumulative += count;
                let bound = HistogramCounts::bound_seconds(i).map_or("+Inf".to_string(), |bound| bound.to_string());
                let _ = writeln!(out, "volley_{name}_bucket{{{labels},le=\"{bound}\"}} {cumulative}");
            }
            let _ = writeln!(out, "volley_{name}_sum{{{labels}}} {}", counts.sum_us as f64 / 1e6);
            let _ = writeln!(out, "volley_{name}_count{{{labels}}} {cumulative}");
        }
    }
}

/// The name of a metric, and the labels that it carries.
fn labels_of(name: &str) -> (&str, &str) {
    name.split_once('{').map_or((name, ""), |(name, labels)| (name, labels.trim_end_matches('}')))
}

fn shard_label(stats: &ShardStats) -> String {
    format!("shard=\"{}\"", stats.shard)
}

fn process(out: &mut String, started_unix_ms: u64) {
    let started = started_unix_ms as f64 / 1000.0;
    plain(out, "volley_process_start_time_seconds", "gauge", "Start of the process since the epoch.", started);
    if let Some(bytes) = resident_memory_bytes() {
        plain(out, "volley_process_resident_memory_bytes", "gauge", "Resident memory of the process.", bytes);
    }
    if let Some(seconds) = cpu_seconds() {
        plain(out, "volley_process_cpu_seconds_total", "counter", "User and system time of the process.", seconds);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        plain(out, "volley_process_open_fds", "gauge", "Open file descriptors.", files.count());
    }
}

fn plain(out: &mut String, name: &str, kind: &str, help: &str, value: impl Display) {
    family(out, name, kind, help, [(String::new(), value)]);
}

fn family<V: Display>(
    out: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    samples: impl IntoIterator<Item = (String, V)>,
) {
    let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", help.replace('\\', "\\\\").replace('\n', "\\n"));
    for (labels, value) in samples {
        let _ = match labels.as_str() {
            "" => writeln!(out, "{name} {value}"),
            labels => writeln!(out, "{name}{{{labels}}} {value}"),
        };
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn resident_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds() -> Option<f64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` has room for one rusage and outlives the call.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: getrusage succeeded, so it filled the structure.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Some(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(shard: usize, reads: u64) -> ShardStats {
        let mut spans = HistogramCounts::default();
        (spans.counts[0], spans.counts[10], spans.sum_us) = (2, 1, 1_026);
        ShardStats {
            shard,
            volumes: 3,
            counters: vec![
                ("guest_reads_total", "Reads of guests.", reads),
                ("frames_refused_total{reason=\"magic\"}", "Frames refused.", 2),
                ("frames_refused_total{reason=\"body\"}", "Frames refused.", 3),
            ],
            gauges: vec![("cache_ram_bytes", "Bytes of chunks in RAM.", 4096)],
            histograms: vec![("fetch_stage_seconds{stage=\"queue\"}", "Stages.", spans.clone())],
            stores: vec![StoreStats {
                store: "nvme \"0\"".to_string(),
                counters: vec![("store_class_bytes_total{class=\"guest\"}", "Bytes.", 9)],
                gauges: vec![("store_volumes_asleep", "Volumes.", 2)],
                histograms: vec![("store_class_wait_seconds{class=\"priority\"}", "Waits.", spans)],
            }],
            ..ShardStats::default()
        }
    }

    #[test]
    fn one_family_covers_all_shards() {
        let store = StoreGauges {
            label: "a\"b".to_string(),
            capacity_bytes: 10,
            free_bytes: 5,
            sharing: StoreSharing::default(),
        };
        let text = encode(&[stats(0, 17), stats(1, 4)], &[store], &[], 1_500);
        let family = "# HELP volley_guest_reads_total Reads of guests.\n# TYPE volley_guest_reads_total counter\n\
                      volley_guest_reads_total{shard=\"0\"} 17\nvolley_guest_reads_total{shard=\"1\"} 4\n";
        assert!(text.contains(family), "{text}");
        assert!(text.contains("volley_frames_refused_total{shard=\"1\",reason=\"body\"} 3\n"), "{text}");
        assert!(text.contains("volley_cache_ram_bytes{shard=\"1\"} 4096\n"), "{text}");
        for line in [
            "_bucket{shard=\"1\",stage=\"queue\",le=\"0.000001\"} 2",
            "_bucket{shard=\"1\",stage=\"queue\",le=\"0.001024\"} 3",
            "_bucket{shard=\"1\",stage=\"queue\",le=\"+Inf\"} 3",
            "_sum{shard=\"1\",stage=\"queue\"} 0.001026",
            "_count{shard=\"1\",stage=\"queue\"} 3",
        ] {
            assert!(text.contains(&format!("volley_fetch_stage_seconds{line}\n")), "{line} in {text}");
        }
        for line in [
            r#"volley_store_class_bytes_total{shard="1",store="nvme \"0\"",class="guest"} 9"#,
            r#"volley_store_volumes_asleep{shard="0",store="nvme \"0\""} 2"#,
            r#"volley_store_class_wait_seconds_count{shard="1",store="nvme \"0\"",class="priority"} 3"#,
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in {text}");
        }
        assert!(text.contains("volley_store_free_bytes{store=\"a\\\"b\"} 5\n"), "{text}");
        assert!(text.contains("volley_process_start_time_seconds 1.5\n"), "{text}");
        assert!(text.contains("volley_process_resident_memory_bytes "), "{text}");
    }

    #[test]
    fn samples_of_one_name_are_one_family() {
        let metrics = [
            ("block_requests_total{operation=\"list\"}", "counter", "Requests.", 2),
            ("block_requests_total{operation=\"put\"}", "counter", "Requests.", 5),
            ("uploads_open", "gauge", "Uploads.", 1),
        ];
        let text = encode(&[], &[], &metrics, 0);
        let families = "# HELP volley_block_requests_total Requests.\n# TYPE volley_block_requests_total counter\n\
                        volley_block_requests_total{operation=\"list\"} 2\nvolley_block_requests_total{operation=\"put\"} 5\n\
                        # HELP volley_uploads_open Uploads.\n# TYPE volley_uploads_open gauge\nvolley_uploads_open 1\n";
        assert!(text.contains(families), "{text}");
    }

    #[test]
    fn every_family_is_announced_once_and_has_lines_prometheus_can_parse() {
        let text = encode(&[stats(0, 1), stats(1, 2)], &[], &[("http_connections", "gauge", "Open.", 3)], 0);
        let mut types = std::collections::HashSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(types.insert(rest.split(' ').next().unwrap().to_string()), "{line}");
            } else if !line.starts_with("# HELP ") {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let name = name.split('{').next().unwrap();
                let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
                assert!(types.contains(name) || types.contains(family.unwrap_or(name)), "{line}");
            }
        }
    }

    #[test]
    fn a_file_system_has_a_size() {
        let space = space_of(Path::new("/")).unwrap();
        assert!(space.total_bytes >= space.free_bytes && space.total_bytes > 0);
        assert!(space_of(Path::new("/nowhere/at/all")).is_err());
    }
}
