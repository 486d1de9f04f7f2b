//! Whole nodes of several shards on real executors, files and sockets, driven by the client crate.
#![allow(clippy::disallowed_methods)] // The test stands outside of the node, as a client and an operator do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use volley_client::{Client, Options};
use volley_server::bootstrap::{self, Node, NodeConfig};
use volley_server::config::{Config, ListenAddr};
use volley_server::datadir::DataDir;
use volley_server::error::Error;
use volley_server::object_store::any::StoreChoice;
use volley_server::shard::api::Command;
use volley_server::types::{CHUNK_BYTES_DEFAULT, HydrationRate, VolumeId, VolumeSpec};

const VOLUME_BYTES: u64 = 8 << 20;

struct Lab {
    dir: tempfile::TempDir,
    data: DataDir,
    config: Config,
}

impl Lab {
    fn new() -> Lab {
        let dir = tempfile::tempdir().expect("directory");
        let objects = dir.path().join("objects");
        std::fs::create_dir(&objects).expect("object store");
        let config = Config {
            data: dir.path().join("node"),
            object_store: Some(format!("file:{}", objects.display())),
            listen: tcp(0),
            cores: 2,
            ..Config::default()
        };
        let data = DataDir::open(&config.data, &config.stores()).expect("data directory");
        Lab { dir, data, config }
    }

    fn node_config(&self) -> NodeConfig {
        NodeConfig::new(&self.config, &self.data).expect("configuration")
    }

    fn start(&self) -> Node {
        bootstrap::start(self.node_config()).expect("start")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn tcp(port: u16) -> ListenAddr {
    ListenAddr::Tcp { host: "127.0.0.1".to_owned(), port }
}

fn create(node: &Node, names: &[&str]) {
    for (unique, name) in names.iter().enumerate() {
        let id = VolumeId::new(name, unique as u64);
        let spec = VolumeSpec {
            id,
            name: Arc::from(*name),
            size_bytes: VOLUME_BYTES,
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            snapshot: None,
            store: Arc::from("default"),
            rate: HydrationRate::Unlimited,
            batch: None,
            created_unix_ms: 1,
        };
        let (reply, answer) = flume::bounded(1);
        let shard = &node.commands[id.owner(node.commands.len())];
        shard.send(Command::CreateVolumes { specs: vec![spec], reply }).expect("send");
        answer.recv().expect("answer").expect("created");
    }
}

fn stop(node: Node) {
    let before = Instant::now();
    node.stop();
    node.join().expect("a clean end");
    assert!(before.elapsed() < Duration::from_secs(15), "stopping is bounded");
}

/// Runs a client beside the node, as another process would be.
fn client<T>(address: &str, run: impl AsyncFnOnce(Client) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let options = Options { deadline: Duration::from_secs(20), ..Options::default() };
        run(Client::connect(address, options).await.expect("connect")).await
    })
}

fn pattern(name: &str) -> Bytes {
    (0..256 << 10).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 9) as u8 ^ name.len() as u8).collect()
}

/// Names of volumes of several shards, whatever the number of shards is.
const NAMES: [&str; 4] = ["alpha", "beta-2", "gamma-33", "delta-444"];

fn write_all(address: &str) {
    client(address, async |client| {
        for name in NAMES {
            let volume = client.attach(name).await.expect("attach");
            volume.write(4096, pattern(name), false).await.expect("write");
            volume.flush().await.expect("flush");
        }
    });
}

fn check_all(address: &str) {
    client(address, async |client| {
        assert_eq!(client.volumes().await.expect("list").len(), NAMES.len());
        for name in NAMES {
            let volume = client.attach(name).await.expect("attach");
            assert_eq!(volume.size_bytes(), VOLUME_BYTES);
            assert!(volume.read(4096, 256 << 10).await.expect("read") == pattern(name), "{name}");
            assert!(volume.read(0, 4096).await.expect("read").iter().all(|&b| b == 0));
        }
    });
}

fn refused(config: NodeConfig, words: &[&str]) -> Error {
    let error = bootstrap::start(config).err().expect("refused");
    assert!(!error.message.contains('\n'), "one line: {error}");
    for word in words {
        assert!(error.message.contains(word), "{error} does not say {word}");
    }
    error
}

#[test]
fn volumes_survive_restarts_with_other_numbers_of_shards_and_other_addresses() {
    let mut lab = Lab::new();
    let node = lab.start();
    assert!(node.recovered.fresh);
    assert_eq!((node.commands.len(), node.shard_map.len()), (2, 2));
    create(&node, &NAMES);
    write_all(&node.addresses[0]);
    check_all(&node.addresses[1]);
    stop(node);

    lab.config.cores = 1;
    let node = lab.start();
    assert_eq!((node.recovered.fresh, node.recovered.volumes, node.recovered.files.len()), (false, NAMES.len(), 2));
    assert!(node.recovered.files.iter().all(|file| file.closed && file.torn_bytes == 0));
    check_all(&node.addresses[0]);
    stop(node);

    lab.config.cores = 3;
    lab.config.listen = ListenAddr::Unix(lab.path("data.sock"));
    let node = lab.start();
    assert!(node.addresses[2].ends_with("data.sock.2"));
    check_all(&node.addresses[0]);
    stop(node);
    assert!(!lab.path("data.sock").exists() && !lab.path("data.sock.1").exists(), "sockets are removed");
}

#[test]
fn an_open_connection_does_not_hold_up_a_stop_and_the_port_is_free_after_it() {
    let mut lab = Lab::new();
    let node = lab.start();
    create(&node, &NAMES);
    let address = node.addresses[0].clone();
    let node = client(&address, async |client| {
        let _attached = client.attach(NAMES[0]).await.expect("attach");
        tokio::task::spawn_blocking(move || {
            stop(node);
        })
        .await
        .expect("stop");
        address.clone()
    });
    let port = node.rsplit_once(':').expect("port").1.parse().expect("number");
    lab.config.listen = tcp(port);
    lab.config.cores = 1;
    stop(lab.start());
}

#[test]
fn a_start_that_fails_names_the_cause_and_leaves_nothing_behind() {
    let lab = Lab::new();
    stop(lab.start());

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("address").port();
    refused(NodeConfig { listen: tcp(port), ..lab.node_config() }, &[&port.to_string(), "--listen"]);

    let gone = StoreChoice::Dir(lab.path("no-such-store"));
    refused(NodeConfig { object_store: gone, ..lab.node_config() }, &["no-such-store"]);

    let mut config = lab.node_config();
    let blocked = lab.path("file");
    std::fs::write(&blocked, b"no directory").expect("write");
    config.stores[0].path.clone_from(&blocked);
    refused(config, &["file"]);

    // Every thread of the failed starts is gone, and the node is whole.
    let node = lab.start();
    create(&node, &NAMES);
    stop(node);
    assert_eq!(lab.start().recovered.volumes, NAMES.len());
}

#[test]
fn a_damaged_journal_is_refused_by_name() {
    let lab = Lab::new();
    let node = lab.start();
    create(&node, &NAMES);
    stop(node);
    let journal = lab.config.data.join("journal");
    corrupt(&journal.join("CURRENT"));
    refused(lab.node_config(), &["CURRENT"]);
}

#[test]
fn too_little_locked_memory_is_said_with_what_to_raise() {
    let lab = Lab::new();
    // dash and bash count in KiB; 64 is below what one ring needs.
    let script =
        "ulimit -l 64; exec \"$0\" --data \"$1\" --object-store \"$2\" --listen 127.0.0.1:0 --http 127.0.0.1:0";
    let output = std::process::Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_volleyd")])
        .args([lab.path("other").as_os_str(), format!("file:{}", lab.path("objects").display()).as_ref()])
        .output()
        .expect("sh runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("64 KiB") && said.contains("ulimit -l") && said.contains("LimitMEMLOCK="), "{said}");
}

fn corrupt(path: &Path) {
    let mut bytes = std::fs::read(path).expect("read");
    bytes[40] ^= 0xff;
    std::fs::write(path, bytes).expect("write");
}
