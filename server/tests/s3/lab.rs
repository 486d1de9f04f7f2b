//! An image in a bucket, a node that serves volumes of it, and clients that check every byte.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_rustls::rustls::ServerConfig;
use volley_client::{Client, Options, Volume};
use volley_server::bootstrap::{self, Node, NodeConfig};
use volley_server::config::{Config, ListenAddr};
use volley_server::datadir::DataDir;
use volley_server::import::{self, ImportOptions, ImportReport};
use volley_server::object_store::ObjectError;
use volley_server::object_store::any::StoreChoice;
use volley_server::object_store::s3::{Environment, S3Config};
use volley_server::platform::blocking::{ToolStore, open_store};
use volley_server::shard::api::Command;
use volley_server::snapshot::catalog;
use volley_server::types::{HydrationRate, SnapshotRef, VolumeId, VolumeSpec};
use volley_server::units::Span;

use crate::proxy::Proxy;
use crate::server::{BUCKET, KEY, S3Server, SECRET};

pub const IMAGE_BYTES: usize = 40 << 20;
pub const CHUNK_BYTES: u32 = 512 << 10;
/// Guest reads give up after this long.
pub const GUEST_DEADLINE: Duration = Duration::from_secs(3);

pub struct Lab {
    pub dir: tempfile::TempDir,
    pub proxy: Proxy,
    pub server: S3Server,
    pub content: Vec<u8>,
    /// Section `[s3]` of everybody.
    pub s3: S3Config,
}

impl Lab {
    pub fn new() -> Lab {
        Lab::with_tls(None)
    }

    pub fn with_tls(tls: Option<Arc<ServerConfig>>) -> Lab {
        let dir = tempfile::tempdir().expect("directory");
        let server = S3Server::start();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let proxy = Proxy::start(server.address, tls);
        let s3 = S3Config {
            endpoint: Some(format!("{scheme}://127.0.0.1:{}", proxy.address.port())),
            connect_timeout: Span(Duration::from_secs(2)),
            read_timeout: Span(Duration::from_millis(700)),
            ..S3Config::default()
        };
        let content = noise(IMAGE_BYTES);
        std::fs::write(dir.path().join("image.raw"), &content).expect("image");
        Lab { dir, proxy, server, content, s3 }
    }

    pub fn choice(&self) -> StoreChoice {
        self.choice_of(&format!("s3://{BUCKET}/prod"), &self.s3, SECRET).expect("settings")
    }

    pub fn choice_of(&self, url: &str, s3: &S3Config, secret: &str) -> Result<StoreChoice, String> {
        let variables = [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", secret)];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        StoreChoice::new(&url.parse().expect("url"), s3, &Environment::of(variables))
    }

    /// The store as tools see it.
    pub fn store(&self) -> ToolStore {
        open_store(&self.choice()).expect("open")
    }

    pub fn import(&self, name: &str) -> Result<ImportReport, String> {
        let store = open_store(&self.choice()).map_err(|e: ObjectError| e.to_string())?;
        let options = ImportOptions {
            image: self.dir.path().join("image.raw"),
            name: name.to_owned(),
            chunk_bytes: CHUNK_BYTES,
            format: None,
            threads: Some(2),
        };
        import::import(&store, &options, |_, _| {}).map_err(|e| e.to_string())
    }

    pub fn node_config(&self, node: &str) -> NodeConfig {
        let mut config = Config {
            data: self.path(node),
            // Replaced below, with the keys of the test instead of those of the environment.
            object_store: Some("file:/nowhere".to_owned()),
            listen: ListenAddr::Tcp { host: "127.0.0.1".to_owned(), port: 0 },
            cores: 2,
            idle_poll: Span(Duration::ZERO),
            ..Config::default()
        };
        config.deadlines.guest_read = Span(GUEST_DEADLINE);
        config.retries.backoff_max = Span(Duration::from_millis(200));
        let data = DataDir::open(&config.data, &config.stores()).expect("data directory");
        let node = NodeConfig::new(&config, &data).expect("configuration");
        NodeConfig { object_store: self.choice(), ..node }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A node with one volume of the snapshot.
    pub fn node_with_volume(&self, name: &str, rate: HydrationRate) -> Node {
        let node = bootstrap::start(self.node_config(name)).expect("start");
        self.create(&node, "web-0", rate);
        node
    }

    pub fn create(&self, node: &Node, name: &str, rate: HydrationRate) {
        let manifest = futures::executor::block_on(catalog::load(&self.store(), "debian")).expect("manifest");
        let id = VolumeId::new(name, 1);
        let spec = VolumeSpec {
            id,
            name: Arc::from(name),
            size_bytes: manifest.size_bytes,
            chunk_bytes: manifest.chunk_bytes,
            snapshot: Some(SnapshotRef { name: "debian".into(), id: manifest.id }),
            store: Arc::from("default"),
            rate,
            batch: None,
            created_unix_ms: 1,
        };
        let (reply, answer) = flume::bounded(1);
        let shard = &node.commands[id.owner(node.commands.len())];
        shard.send(Command::CreateVolumes { specs: vec![spec], reply }).expect("send");
        answer.recv().expect("answer").expect("created");
    }

    /// Whether these bytes are the image's.
    pub fn check(&self, offset: usize, bytes: &[u8]) {
        assert!(bytes == &self.content[offset..offset + bytes.len()], "wrong data at {offset}");
    }
}

pub fn wait_hydrated(node: &Node, name: &str, limit: Duration) {
    let timeout_ms = u64::try_from(limit.as_millis()).expect("short");
    let (reply, answer) = flume::bounded(1);
    let shard = &node.commands[VolumeId::new(name, 1).owner(node.commands.len())];
    shard.send(Command::WaitHydrated { name: name.to_owned(), timeout_ms, reply }).expect("send");
    answer.recv().expect("answer").expect("hydrated");
}

pub fn stop(node: Node) {
    let before = Instant::now();
    node.stop();
    node.join().expect("a clean end");
    assert!(before.elapsed() < Duration::from_secs(15), "stopping is bounded");
}

/// The sum of a counter over the shards.
pub fn counter(node: &Node, name: &str) -> u64 {
    let of_shard = |commands: &flume::Sender<Command>| {
        let (reply, answer) = flume::bounded(1);
        commands.send(Command::Stats { reply }).expect("send");
        let stats = answer.recv().expect("stats");
        stats.counters.iter().find(|(counter, _, _)| *counter == name).expect(name).2
    };
    node.commands.iter().map(of_shard).sum()
}

/// What the shards noted for the operator.
pub fn events(node: &Node) -> Vec<String> {
    let of_shard = |commands: &flume::Sender<Command>| {
        let (reply, answer) = flume::bounded(1);
        commands.send(Command::Stats { reply }).expect("send");
        answer.recv().expect("stats").events
    };
    node.commands.iter().flat_map(of_shard).collect()
}

/// A client beside the node, as another process would be.
pub fn attached<T>(node: &Node, run: impl AsyncFnOnce(Volume) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let options = Options { deadline: Duration::from_secs(20), ..Options::default() };
        let client = Client::connect(&node.addresses[0], options).await.expect("connect");
        run(client.attach("web-0").await.expect("attach")).await
    })
}

/// A read that has to end: with data, or with an error soon after the deadline.
pub async fn bounded_read(volume: &Volume, offset: usize, len: usize) -> Option<Bytes> {
    let begun = Instant::now();
    let result = volume.read(offset as u64, len).await;
    assert!(begun.elapsed() < GUEST_DEADLINE * 3, "the read took {:?}", begun.elapsed());
    result.ok()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
