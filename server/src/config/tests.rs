//! Tests of the configuration: defaults, round trip, unknown keys, overrides.
#![allow(clippy::disallowed_methods)] // Tests run outside of any shard.

use super::*;
use crate::object_store::s3::{Addressing, ConditionalPut, S3Config};

fn parse_error(text: &str) -> String {
    Config::parse(text).map(|_| ()).expect_err("must be refused").to_string()
}

fn load_error(overrides: &Overrides) -> String {
    Config::load(None, overrides).map(|_| ()).expect_err("must be refused").to_string()
}

#[test]
fn defaults_printed_parse_back_to_the_defaults() {
    let config = Config::default();
    assert_eq!(Config::parse(&config.to_toml()), Ok(config));
    assert_eq!(Config::parse(""), Ok(Config::default()));
}

#[test]
fn printing_covers_every_key() {
    let store = |label: &str| StoreConfig {
        label: label.to_string(),
        path: PathBuf::from(format!("/mnt/{label} \"quoted\"")),
        hydration_bandwidth: Bandwidth(Some(300 << 20)),
        domain: Some("rack-1".to_string()),
        overcommit: Some(Overcommit::Unlimited),
        base_percent: 33,
    };
    let config = Config {
        data: PathBuf::from("/x/y"),
        object_store: Some("file:/objects".to_string()),
        listen: ListenAddr::Unix(PathBuf::from("/run/volley.sock")),
        http: "[::1]:80".to_string(),
        cores: 3,
        idle_poll: Span(Duration::from_micros(70)),
        log: "debug".to_string(),
        trace_slow: Span(Duration::from_millis(20)),
        cache: CacheConfig {
            ram_bytes: ByteSize(64 << 20),
            pin_waves: Span(Duration::from_secs(7)),
            disk_bytes: ByteSize(3 << 30),
            dir: Some(PathBuf::from("/mnt/\"fast\"/cache")),
        },
        hydration: HydrationConfig {
            default_rate: HydrationRate::BytesPerSecond(1_000_000),
            reads_max: 5,
            background_reads_max: 2,
            read_bytes_max: ByteSize(8 << 20),
            boot_window: Span(Duration::from_secs(9)),
            guest_p99_bound: GuestBound(Some(175)),
            floor: Floor(Some(7 << 20)),
        },
        transfer: TransferConfig {
            share: false,
            bandwidth: Bandwidth(Some(5 << 20)),
            gets_per_second: 70,
            hedge_percent: 3,
            readahead_bytes_max: ByteSize(3 << 20),
            price_per_million_gets: 40,
        },
        placement: PlacementConfig { overcommit: Overcommit::Ratio(250) },
        snapshots: SnapshotConfig {
            bandwidth: Bandwidth(Some(100 << 20)),
            staging_bytes: ByteSize(1 << 30),
            scrub_bandwidth: ByteSize(8 << 20),
            scrub_pause: Span(Duration::from_secs(60)),
            gc_every: Span(Duration::from_secs(3600)),
        },
        deadlines: DeadlineConfig { guest_read: Span(Duration::from_millis(1500)), stop: Span(Duration::from_secs(5)) },
        retries: RetryConfig {
            deadline: Span(Duration::from_secs(60)),
            backoff_min: Span(Duration::from_millis(1)),
            backoff_max: Span(Duration::from_millis(2)),
            corrupt_attempts: 9,
        },
        s3: S3Config {
            endpoint: Some("https://s3.example".to_string()),
            region: Some("eu-1".to_string()),
            addressing: Addressing::Virtual,
            ca_file: Some(PathBuf::from("/etc/ca.pem")),
            anonymous: true,
            profile: Some("p".to_string()),
            connect_timeout: Span(Duration::from_secs(2)),
            read_timeout: Span(Duration::from_secs(3)),
            connections_max: 7,
            conditional_put: ConditionalPut::Off,
        },
        stores: vec![store("a"), store("b")],
    };
    assert_eq!(Config::parse(&config.to_toml()), Ok(config));
}

#[test]
fn unknown_keys_are_refused_by_name_in_one_line() {
    for (text, key) in [
        ("cors = 4", "cors"),
        ("cores = 1\n[cache]\nram = \"1GiB\"", "ram"),
        ("[hydration]\nspeed = 1", "speed"),
        ("[s3]\nsecret_key = \"x\"", "secret_key"),
        ("[deadlines]\nguest_reed = \"1s\"", "guest_reed"),
        ("[[store]]\nlabel = \"a\"\npath = \"/a\"\nsize = 1", "size"),
    ] {
        let message = parse_error(text);
        assert!(message.contains(&format!("unknown field `{key}`")), "{message}");
        assert!(message.contains("line "), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn bad_values_name_their_line() {
    for text in [
        "cores = -1",
        "listen = \"7400\"",
        "[cache]\nram_bytes = \"lots\"",
        "[deadlines]\nguest_read = \"30\"",
        "[hydration]\nguest_p99_bound = \"0.9\"",
        "[hydration]\nfloor = \"0/s\"",
        "[[store]]\npath = \"/a\"",
        "= 1",
    ] {
        let message = parse_error(text);
        assert!(message.contains("line "), "{text}: {message}");
        assert!(!message.contains('\n'), "{text}: {message}");
    }
}

#[test]
fn overrides_win_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("volley.toml");
    std::fs::write(&file, "cores = 4\nhttp = \"127.0.0.1:1\"\n[[store]]\nlabel = \"f\"\npath = \"/f\"\n").unwrap();
    let overrides = Overrides {
        cores: Some(1),
        object_store: Some("file:/o".to_string()),
        listen: Some("unix:/run/v".to_string()),
        stores: vec!["a=/a".to_string(), "b=/b=c".to_string()],
        ..Overrides::default()
    };
    let config = Config::load(Some(&file), &overrides).unwrap();
    assert_eq!((config.cores, config.http.as_str()), (1, "127.0.0.1:1"));
    assert_eq!(config.listen, ListenAddr::Unix(PathBuf::from("/run/v")));
    assert_eq!(config.stores().iter().map(|s| s.label.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(config.stores()[1].path, PathBuf::from("/b=c"));
}

#[test]
fn the_default_store_lies_in_the_data_directory() {
    let overrides = Overrides { data: Some(PathBuf::from("/d")), ..Overrides::default() };
    let stores = Config::load(None, &overrides).unwrap().stores();
    assert_eq!(stores.len(), 1);
    assert_eq!((stores[0].label.as_str(), stores[0].path.clone()), ("default", PathBuf::from("/d/store")));
}

#[test]
fn contradictions_are_refused() {
    let stores = |stores: &[&str]| Overrides {
        stores: stores.iter().map(|s| (*s).to_string()).collect(),
        ..Overrides::default()
    };
    assert!(load_error(&stores(&["a=/a", "a=/b"])).contains("given twice"));
    assert!(load_error(&stores(&["a=/a", "b=/a"])).contains("given twice"));
    assert!(load_error(&stores(&["a"])).contains("LABEL=PATH"));
    assert!(load_error(&stores(&["a b=/a"])).contains("store label"));
    assert!(load_error(&Overrides { cores: Some(9999), ..Overrides::default() }).contains("cores"));
    assert!(load_error(&Overrides { http: Some("nowhere".to_string()), ..Overrides::default() }).contains("http"));
    assert!(
        load_error(&Overrides { listen: Some("nowhere".to_string()), ..Overrides::default() }).contains("--listen")
    );
}

#[test]
fn the_disk_cache_is_off_unless_it_has_a_size() {
    let parse = |text: &str| Config::from_text(text, &Overrides::default());
    assert_eq!(parse("data = \"/d\"").unwrap().disk_cache(), None);
    let on = parse("data = \"/d\"\n[cache]\ndisk_bytes = \"1GiB\"").unwrap().disk_cache().unwrap();
    assert_eq!((on.dir, on.bytes), (PathBuf::from("/d/cache"), 1 << 30));
    let placed = parse("[cache]\ndisk_bytes = \"1GiB\"\ndir = \"/fast\"").unwrap().disk_cache().unwrap();
    assert_eq!(placed.dir, PathBuf::from("/fast"));
    assert!(parse("[cache]\ndisk_bytes = \"1MiB\"").unwrap_err().to_string().contains("cache.disk_bytes"));
    assert!(parse("[cache]\ndir = \"\"").unwrap_err().to_string().contains("cache.dir"));
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Some(Path::new("/nowhere/volley.toml")), &Overrides::default()).unwrap_err();
    assert!(error.to_string().contains("/nowhere/volley.toml"), "{error}");
}
