//! The whole way of the hot request: bytes of many frames in one read, through the connection and the shard, to the bytes of
//! all replies. The shard is the real one on the simulated platform, whose executor is a small part of it.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use futures::future::poll_fn;
use volley_protocol::messages::Hello;
use volley_protocol::{Decoded, HEADER_BYTES, Status, decode, encode, limits};
use volley_server::connection::{self, Connections};
use volley_server::journal::Journal;
use volley_server::platform::sim::{Sim, SimObjects, SimWorld};
use volley_server::platform::{ByteReader, ByteWriter, Connection, Platform};
use volley_server::shard::api::Command;
use volley_server::shard::mesh::Mesh;
use volley_server::shard::{Shard, ShardConfig, StoreConfig};
use volley_server::snapshot::{Manifest, PackBuilder, SnapshotInfo, encode_chunk, manifest_key, pack_key};
use volley_server::types::{CHUNK_BYTES_MIN, HydrationRate, SnapshotRef, VolumeId, VolumeSpec};

use super::chunk::entry_of;
use super::wire::fetch;
use super::{Case, Work};
use crate::compressible;

/// Frames that arrive in one read.
const FRAMES: u32 = 64;
/// Of the volume.
const CHUNKS: u32 = 64;
const CHUNK: u32 = CHUNK_BYTES_MIN;
const SNAPSHOT_ID: u128 = 1;
const FOLDER: &str = "/node";

pub(super) const CASES: [Case; 1] =
    [Case::new("connection/priority_fetch_resident", (FRAMES, "request"), priority_fetch_resident)];

/// A socket in memory: what the peer sends arrives at once and whole.
#[derive(Clone, Default)]
struct Socket(Rc<SocketState>);

#[derive(Default)]
struct SocketState {
    requests: RefCell<Vec<u8>>,
    replies: RefCell<Vec<u8>>,
    /// Who reads requests, and who waits for replies.
    server: Cell<Option<Waker>>,
    peer: Cell<Option<Waker>>,
}

impl Socket {
    /// Sends some frames and waits for as many bytes of replies.
    async fn exchange(&self, frames: &[u8], reply_bytes: usize) {
        self.0.replies.borrow_mut().clear();
        self.0.requests.borrow_mut().extend_from_slice(frames);
        self.0.server.take().into_iter().for_each(Waker::wake);
        poll_fn(|context| {
            if self.0.replies.borrow().len() >= reply_bytes {
                return Poll::Ready(());
            }
            self.0.peer.set(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// How many of the replies say that all is well.
    fn good_replies(&self) -> usize {
        let replies = self.0.replies.borrow();
        let (mut rest, mut good) = (&replies[..], 0);
        while let Ok(Decoded::Frame(frame)) = decode(rest) {
            good += usize::from(frame.header.status == Status::Ok as u16);
            rest = &rest[frame.len()..];
        }
        good
    }
}

impl Connection for Socket {
    type Reader = Socket;
    type Writer = Socket;

    fn split(self) -> (Socket, Socket) {
        (self.clone(), self)
    }

    fn peer(&self) -> String {
        "memory".into()
    }

    fn hang_up(&self) -> impl Fn() + 'static {
        || {}
    }
}

impl ByteReader for Socket {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        poll_fn(|context| {
            let mut requests = self.0.requests.borrow_mut();
            if requests.is_empty() {
                self.0.server.set(Some(context.waker().clone()));
                return Poll::Pending;
            }
            let len = requests.len().min(buf.len());
            buf[..len].copy_from_slice(&requests[..len]);
            requests.drain(..len);
            Poll::Ready(Ok(len))
        })
        .await
    }
}

impl ByteWriter for Socket {
    async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.0.replies.borrow_mut().extend_from_slice(buf);
        self.0.peer.take().into_iter().for_each(Waker::wake);
        Ok(())
    }
}

/// A snapshot in the object store.
fn snapshot(objects: &SimObjects) -> SnapshotRef {
    let mut pack = PackBuilder::new(SNAPSHOT_ID, 0);
    let mut store = |seed: u32| {
        let encoded = encode_chunk(&compressible(u64::from(seed) + 1, CHUNK as usize), 1);
        let offset = pack.push(&encoded);
        entry_of(&encoded, offset.into())
    };
    let entries: Vec<_> = (0..CHUNKS).map(&mut store).collect();
    let info = SnapshotInfo {
        id: SNAPSHOT_ID,
        name: "debian".into(),
        size_bytes: u64::from(CHUNKS) * u64::from(CHUNK),
        chunk_bytes: CHUNK,
        parent: None,
        created_unix_ms: 0,
    };
    let manifest = Manifest::new(info, vec![pack_key(SNAPSHOT_ID, 0)], &entries).expect("a valid manifest");
    objects.insert(&pack_key(SNAPSHOT_ID, 0), pack.finish());
    objects.insert(&manifest_key("debian"), manifest.encode());
    SnapshotRef { name: "debian".into(), id: SNAPSHOT_ID }
}

fn config() -> ShardConfig {
    let store = StoreConfig { label: "default".into(), path: FOLDER.into(), hydration_bandwidth: None, base_bytes: 0 };
    ShardConfig {
        shard: 0,
        shards: 1,
        node_id: 7,
        boot_id: 1,
        shard_map: Arc::from(vec![String::new()]),
        stores: vec![store],
        cache_bytes: 1 << 20,
        pin_waves: Duration::ZERO,
        disk_cache: None,
        guest_deadline: Duration::from_secs(30),
        retry: Default::default(),
        fetch_limits: Default::default(),
        readahead_bytes_max: 0,
        harm: Default::default(),
        boot_window: Duration::ZERO,
        trace_slow: None,
        staging_bytes: 1 << 30,
    }
}

/// A shard that has begun, and where it takes commands.
async fn start(platform: &Sim, objects: SimObjects) -> (Shard<Sim, SimObjects>, flume::Sender<Command>) {
    let folder = Path::new(FOLDER);
    platform.create_dir_all(&folder.join("volumes")).await.expect("a folder");
    let journal = Journal::create(platform, folder, 1, 0, std::iter::empty()).await.expect("a journal");
    let mesh = Mesh::all(1).into_iter().next().expect("one shard");
    let (sender, receiver) = flume::unbounded();
    let shard = Shard::start(platform.clone(), objects, journal, config(), Vec::new(), mesh, receiver);
    (shard.await.expect("started"), sender)
}

/// Sends a command and awaits its answer.
async fn command<T>(commands: &flume::Sender<Command>, make: impl FnOnce(flume::Sender<T>) -> Command) -> T {
    let (reply, answer) = flume::bounded(1);
    commands.send(make(reply)).expect("the shard runs");
    answer.recv_async().await.expect("the shard answers")
}

/// Makes a volume and waits until all of it is there.
async fn hydrated_volume(commands: &flume::Sender<Command>, snapshot: SnapshotRef) -> VolumeId {
    let spec = VolumeSpec {
        id: VolumeId::new("volume", 1),
        name: "volume".into(),
        size_bytes: u64::from(CHUNKS) * u64::from(CHUNK),
        chunk_bytes: CHUNK,
        snapshot: Some(snapshot),
        store: "default".into(),
        rate: HydrationRate::Unlimited,
        batch: None,
        created_unix_ms: 0,
    };
    let id = spec.id;
    command(commands, |reply| Command::CreateVolumes { specs: vec![spec], reply }).await.expect("created");
    let wait = |reply| Command::WaitHydrated { name: "volume".into(), timeout_ms: 3_600_000, reply };
    command(commands, wait).await.expect("hydrated");
    id
}

fn priority_fetch_resident() -> Box<dyn Work> {
    let world = SimWorld::new(1);
    let (platform, objects, socket) = (world.platform(), SimObjects::new(&world), Socket::default());
    let snapshot = snapshot(&objects);
    let (shard, commands, volume) = world.block_on(async {
        let (shard, commands) = start(&platform, objects).await;
        let volume = hydrated_volume(&commands, snapshot).await;
        (shard, commands, volume)
    });
    let mut hello = Vec::new();
    let client = Hello {
        version_min: limits::VERSION_MIN,
        version_max: limits::VERSION_MAX,
        features: 0,
        client: "bench".into(),
    };
    encode::request(&mut hello, 0, 0, &client, &[]);
    let mut frames = Vec::new();
    for n in 0..FRAMES {
        let offset = u64::from(n * 17 % CHUNKS * CHUNK);
        encode::request(&mut frames, n.into(), 0, &fetch(volume.0, offset), &[]);
    }
    let reply_bytes = FRAMES as usize * HEADER_BYTES;
    connection::serve(&platform, &Rc::new(Connections::default()), &shard, socket.clone());
    world.block_on(async {
        socket.exchange(&hello, HEADER_BYTES).await;
        socket.exchange(&frames, reply_bytes).await;
    });
    assert_eq!(socket.good_replies(), FRAMES as usize);
    Box::new(move || {
        // The shard stops when nobody can send it commands.
        let _ = &commands;
        world.block_on(socket.exchange(&frames, reply_bytes));
    })
}
