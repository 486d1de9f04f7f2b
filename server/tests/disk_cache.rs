//! The disk cache on real executors and real files: what a restart finds, and what it makes of damage.
#![allow(clippy::disallowed_methods)] // The test stands outside of the node, as an operator does.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use volley_client::{Client, Options};
use volley_server::bootstrap::{self, Node, NodeConfig};
use volley_server::cache::TierStatus;
use volley_server::cache::record::{RECORD_BYTES, Record, RecordRead, SLOT_BYTES};
use volley_server::check::{self, Kind, Report, check};
use volley_server::config::{Config, ListenAddr};
use volley_server::datadir::DataDir;
use volley_server::import::{self, ImportOptions};
use volley_server::object_store::dir::DirStore;
use volley_server::platform::blocking::Blocking;
use volley_server::shard::api::{CacheStatus, Command, ReplyTo};
use volley_server::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec};
use volley_server::units::ByteSize;

const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 60;
/// Several stretches of a pack, so that every shard owns some.
const IMAGE_BYTES: usize = CHUNK * CHUNKS;

struct Lab {
    _dir: tempfile::TempDir,
    data: Option<DataDir>,
    config: Config,
    image: Vec<u8>,
    snapshot: SnapshotRef,
    volumes: std::cell::Cell<u64>,
}

impl Lab {
    fn new(cores: usize) -> Lab {
        let dir = tempfile::tempdir().expect("directory");
        let objects = dir.path().join("objects");
        let image = image();
        let file = dir.path().join("image.raw");
        std::fs::write(&file, &image).expect("image");
        let store = block_on(DirStore::create(Blocking, objects.clone())).expect("object store");
        let options = ImportOptions {
            image: file,
            name: "img".into(),
            chunk_bytes: CHUNK as u32,
            format: None,
            threads: Some(1),
        };
        let report = import::import(&store, &options, |_, _| {}).expect("import");
        let snapshot = SnapshotRef { name: "img".into(), id: u128::from_str_radix(&report.id, 16).expect("id") };
        let mut config = Config {
            data: dir.path().join("node"),
            object_store: Some(format!("file:{}", objects.display())),
            listen: ListenAddr::Tcp { host: "127.0.0.1".to_owned(), port: 0 },
            cores,
            ..Config::default()
        };
        config.cache.disk_bytes = ByteSize(64 << 20);
        let data = DataDir::open(&config.data, &config.stores()).expect("data directory");
        Lab { _dir: dir, data: Some(data), config, image, snapshot, volumes: std::cell::Cell::new(0) }
    }

    fn start(&self) -> Node {
        let data = self.data.as_ref().expect("open");
        bootstrap::start(NodeConfig::new(&self.config, data).expect("configuration")).expect("start")
    }

    /// `volley check`, which wants the directory for itself.
    fn check(&mut self, quick: bool) -> Report {
        self.data = None;
        let report = check(&self.config.data, &check::Options { quick, ..check::Options::default() });
        self.data = Some(DataDir::open(&self.config.data, &self.config.stores()).expect("data directory"));
        report.expect("checked")
    }

    fn slots(&self, shard: usize) -> PathBuf {
        self.config.data.join("cache").join(format!("shard-{shard}.slots"))
    }

    /// Makes a volume, reads all of it as a guest does, and compares.
    fn read_all(&self, node: &Node) {
        let number = self.volumes.replace(self.volumes.get() + 1);
        let name = format!("v{number}");
        let spec = VolumeSpec {
            id: VolumeId::new(&name, number),
            name: Arc::from(name.as_str()),
            size_bytes: IMAGE_BYTES as u64,
            chunk_bytes: CHUNK as u32,
            snapshot: Some(self.snapshot.clone()),
            store: Arc::from("default"),
            rate: HydrationRate::None,
            batch: None,
            created_unix_ms: 1,
        };
        let owner = spec.id.owner(node.commands.len());
        ask(node, owner, |reply| Command::CreateVolumes { specs: vec![spec], reply }).expect("created");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let options = Options { deadline: Duration::from_secs(30), ..Options::default() };
            let client = Client::connect(&node.addresses[0], options).await.expect("connect");
            let volume = client.attach(&name).await.expect("attach");
            for (number, expected) in self.image.chunks(CHUNK).enumerate() {
                let read = volume.read((number * CHUNK) as u64, CHUNK).await.expect("read");
                assert!(*read == *expected, "chunk {number} of {name}");
            }
        });
    }

    /// Warms with the image and waits until that is done.
    fn warm(&self, node: &Node, pin: bool) {
        for shard in 0..node.commands.len() {
            let snapshot = self.snapshot.clone();
            ask(node, shard, |reply| Command::WarmCache { snapshot, pin, reply }).expect("warming");
        }
        let begun = Instant::now();
        while caches(node).iter().flat_map(|cache| &cache.warming).any(|warming| warming.running) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", caches(node));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Chunks that compress, chunks that do not, one of zeroes, and two that are the same.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; IMAGE_BYTES];
    for (number, chunk) in bytes.chunks_mut(CHUNK).enumerate() {
        let seed = if number == 10 { 8 } else { number as u64 };
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for (at, byte) in chunk.iter_mut().enumerate() {
            if at % 8 == 0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            }
            let shift = if number % 2 == 0 { 8 * (at % 8) } else { 56 };
            *byte = (state >> shift) as u8;
        }
        if number == 4 {
            chunk.fill(0);
        }
    }
    bytes
}

fn ask<T>(node: &Node, shard: usize, command: impl FnOnce(ReplyTo<T>) -> Command) -> T {
    let (reply, answer) = flume::bounded(1);
    node.commands[shard].send(command(reply)).expect("send");
    answer.recv().expect("answer")
}

fn caches(node: &Node) -> Vec<CacheStatus> {
    (0..node.commands.len()).map(|shard| ask(node, shard, |reply| Command::ShowCache { reply })).collect()
}

fn disk(node: &Node) -> TierStatus {
    let mut sum = TierStatus::default();
    caches(node).iter().for_each(|cache| sum.add(&cache.disk.expect("a disk tier")));
    sum
}

/// GETs of chunks since the start, over all shards.
fn gets(node: &Node) -> u64 {
    let of = |shard| {
        let stats = ask(node, shard, |reply| Command::Stats { reply });
        stats.counters.iter().find(|(name, ..)| *name == "object_gets_total").expect("the counter").2
    };
    (0..node.commands.len()).map(of).sum()
}

fn events(node: &Node) -> Vec<String> {
    (0..node.commands.len()).flat_map(|shard| ask(node, shard, |reply| Command::Stats { reply }).events).collect()
}

fn stop(node: Node) {
    node.stop();
    node.join().expect("a clean end");
}

#[test]
fn a_restart_serves_an_image_without_a_get_also_with_other_numbers_of_cores() {
    let mut lab = Lab::new(2);
    let node = lab.start();
    lab.warm(&node, false);
    assert!(gets(&node) > 0);
    let held: u64 = caches(&node).iter().flat_map(|cache| &cache.warming).map(|w| u64::from(w.chunks_done)).sum();
    stop(node);
    assert_eq!(held, CHUNKS as u64 - 2, "one chunk is zero and two are the same");
    for cores in [2, 1, 3, 2] {
        lab.config.cores = cores;
        let node = lab.start();
        lab.read_all(&node);
        let disk = disk(&node);
        assert_eq!((gets(&node), disk.misses, disk.corrupt), (0, 0, 0), "{cores} cores: {disk:?}");
        assert!(disk.hits >= held, "{cores} cores: {disk:?}");
        stop(node);
    }
}

#[test]
fn what_guests_read_is_kept_and_a_smaller_budget_keeps_less() {
    let mut lab = Lab::new(1);
    let node = lab.start();
    lab.read_all(&node);
    let first = gets(&node);
    stop(node);
    let node = lab.start();
    lab.read_all(&node);
    assert_eq!(gets(&node), 0, "the first life needed {first}");
    stop(node);
    lab.config.cache.disk_bytes = ByteSize(4 << 20);
    let node = lab.start();
    lab.read_all(&node);
    let disk = disk(&node);
    assert!(gets(&node) > 0 && disk.hits > 0 && disk.used_bytes <= 4 << 20, "{disk:?}");
    stop(node);
}

#[test]
fn a_corrupt_slot_is_dropped_counted_named_and_fetched_again() {
    let mut lab = Lab::new(2);
    let node = lab.start();
    lab.warm(&node, false);
    stop(node);
    // A byte of content in the first slot that is used, and another chunk's slot in place of the last one.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(lab.slots(0)).expect("slot file");
    let used: Vec<u64> = (0..).map_while(|slot| used(&file, slot).then_some(slot)).collect();
    let (first, last) = (used[0], used[used.len() - 1]);
    let mut slot = vec![0; SLOT_BYTES];
    file.read_exact_at(&mut slot, first * SLOT_BYTES as u64).expect("read");
    file.write_all_at(&slot, last * SLOT_BYTES as u64).expect("write");
    slot[RECORD_BYTES + 100] ^= 4;
    file.write_all_at(&slot, first * SLOT_BYTES as u64).expect("write");
    let (report, quick) = (lab.check(false), lab.check(true));
    let of = |kind| report.findings.iter().filter(|finding| finding.kind == kind).count();
    assert_eq!((of(Kind::CacheCorrupt), of(Kind::CacheStale), of(Kind::Foreign)), (1, 1, 0), "{:#?}", report.findings);
    assert_eq!((report.cache_chunks, report.cache_chunks_corrupt), (CHUNKS as u64 - 2, 1));
    assert!(report.is_clean() && quick.cache_chunks_corrupt == 0, "a cache is no data");

    let node = lab.start();
    lab.read_all(&node);
    let tier = disk(&node);
    assert_eq!((tier.corrupt, tier.stale), (1, 1), "wrong and corrupt differ: {tier:?}");
    // Who asks for a chunk that is on its way already misses it too, and joins.
    assert!(gets(&node) == 2 && tier.misses >= 2, "{} GETs: {tier:?}", gets(&node));
    let events = events(&node);
    let named = events.iter().filter(|event| event.contains("shard-0.slots slot 0 is corrupt")).count();
    assert_eq!(named, 1, "{events:?}");
    stop(node);
    let node = lab.start();
    lab.read_all(&node);
    assert_eq!((gets(&node), disk(&node).corrupt), (0, 0), "what was fetched again is in the cache again");
    stop(node);
}

#[test]
fn a_scrub_finds_what_rotted_before_anybody_wants_it() {
    let lab = Lab::new(2);
    let node = lab.start();
    lab.warm(&node, false);
    stop(node);
    let node = lab.start();
    let chunks = disk(&node).chunks;
    assert_eq!(scrub(&node), (chunks, 0), "sound");
    // In the content of the first chunk of each shard.
    for shard in 0..2 {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(lab.slots(shard)).expect("slot file");
        let at = (RECORD_BYTES + 100) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 1], at).expect("write");
    }
    assert_eq!(scrub(&node), (chunks, 2));
    assert_eq!(scrub(&node), (chunks - 2, 0), "they are gone");
    let tier = disk(&node);
    assert_eq!((tier.corrupt, tier.chunks, tier.hits), (2, chunks - 2, 0), "{tier:?}");
    let events = events(&node);
    for name in ["shard-0.slots slot 0 is corrupt", "shard-1.slots slot 0 is corrupt"] {
        assert!(events.iter().any(|event| event.contains(name)), "{events:?}");
    }
    stop(node);
    let node = lab.start();
    assert_eq!(disk(&node).chunks, chunks - 2, "a restart does not find them either");
    lab.read_all(&node);
    assert_eq!((gets(&node), disk(&node).corrupt), (2, 0));
    stop(node);
}

/// Reads the disk tier of all shards to its end, in small parts: chunks read and dropped.
fn scrub(node: &Node) -> (u64, u64) {
    let (mut chunks, mut dropped) = (0, 0);
    for shard in 0..node.commands.len() {
        let mut next = Some(0);
        while let Some(from) = next {
            let part = |reply| Command::ScrubCache { from, bytes_max: 1 << 20, reply };
            let part = ask(node, shard, part).expect("a disk tier");
            (chunks, dropped, next) = (chunks + part.chunks, dropped + part.dropped, part.next);
        }
    }
    (chunks, dropped)
}

fn used(file: &std::fs::File, slot: u64) -> bool {
    let mut record = [0; RECORD_BYTES];
    file.read_exact_at(&mut record, slot * SLOT_BYTES as u64).expect("record");
    matches!(Record::decode(&record), RecordRead::Valid(_))
}

#[test]
fn a_dropped_image_is_gone_from_both_tiers_and_stays_gone() {
    let lab = Lab::new(2);
    let node = lab.start();
    lab.warm(&node, true);
    let pinned: u64 = caches(&node).iter().map(|cache| cache.ram.pinned_bytes).sum();
    assert_eq!(pinned, (CHUNK * (CHUNKS - 2)) as u64);
    for shard in 0..2 {
        let snapshot = lab.snapshot.clone();
        let dropped = ask(&node, shard, |reply| Command::DropCache { snapshot, reply }).expect("dropped");
        assert!(dropped.chunks_ram > 0 && dropped.chunks_disk > 0, "{dropped:?}");
    }
    let ram: u64 = caches(&node).iter().map(|cache| cache.ram.used_bytes).sum();
    assert_eq!((ram, disk(&node).chunks), (0, 0));
    stop(node);
    let node = lab.start();
    assert_eq!(disk(&node).chunks, 0);
    lab.read_all(&node);
    assert!(gets(&node) > 0);
    stop(node);
}

#[test]
fn a_cache_that_cannot_be_used_is_an_event_and_nothing_else() {
    let mut lab = Lab::new(1);
    let blocked = lab.config.data.join("file");
    std::fs::write(&blocked, b"no directory").expect("write");
    lab.config.cache.dir = Some(blocked);
    let node = lab.start();
    lab.read_all(&node);
    assert!(caches(&node)[0].disk.is_none());
    let events = events(&node);
    assert!(events.iter().any(|event| event.contains("without the disk cache")), "{events:?}");
    stop(node);
}
