//! A node made of fake shards, served over a real socket.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::control::{Control, Measure, Settings, Space};
use crate::datadir::Store;
use crate::error::{Error, Status};
use crate::placement::Overcommit;
use crate::shard::api::{CacheStatus, Command, Dropped, VolumeStatus};
use crate::snapshot::{ChunkEntry, Encoding, Manifest, SnapshotInfo, manifest_key, pack_key};
use crate::transfer::ledger::{Origin, Totals};
use crate::types::{CHUNK_BYTES_DEFAULT, HydrationRate, VolumeSpec};

use objects::object_op;
use volumes::{create, load, stats, totals};

mod objects;
mod volumes;

pub(super) const NODE_ID: u128 = 0xabc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The last shard refuses every creation.
    StoreFull,
    /// No volume can be made in the store of this label.
    StoreFails(&'static str),
    /// Every object operation fails.
    ObjectStore,
    /// Objects are put if absent, and the answers are lost.
    LostAnswers,
    /// The manifest is deleted at the moment the reference is written.
    ManifestVanishesOnReference,
}

impl Fault {
    fn is_of(self, store: &str) -> bool {
        matches!(self, Fault::StoreFails(label) if label == store)
    }
}

pub(super) type Objects = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct World {
    volumes: Vec<BTreeMap<String, VolumeStatus>>,
    objects: Objects,
    fault: Option<Fault>,
    /// By shard and batch.
    deadlines: BTreeMap<(usize, u64), Option<u64>>,
    /// Free GiB of stores that have not 100 TiB.
    free_gib: BTreeMap<String, u64>,
}

#[derive(Default)]
struct Shared {
    world: Mutex<World>,
    changed: Condvar,
}

pub(super) struct Node {
    shared: Arc<Shared>,
    commands: Vec<flume::Sender<Command>>,
    base: String,
    agent: ureq::Agent,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Node {
    pub(super) fn start(shards: usize) -> Node {
        Node::start_with(shards, |_, _| ())
    }

    pub(super) fn start_with(shards: usize, prepare: impl FnOnce(&mut Objects, &Path)) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let shared = Arc::new(Shared::default());
        {
            let mut world = shared.world.lock().unwrap();
            world.volumes = vec![BTreeMap::new(); shards];
            prepare(&mut world.objects, dir.path());
        }
        let mut threads = Vec::new();
        let commands: Vec<_> = (0..shards)
            .map(|shard| {
                let (sender, receiver) = flume::bounded(64);
                let shared = shared.clone();
                threads.push(std::thread::spawn(move || serve_shard(&shared, shard, shards, &receiver)));
                sender
            })
            .collect();
        let store = |label: &str| Store {
            label: Arc::from(label),
            path: dir.path().to_path_buf(),
            id: 1,
            hydration_bandwidth: None,
            domain: Arc::from(label),
            overcommit: None,
            base_percent: 0,
        };
        let control = Control::new(Settings {
            node_id: NODE_ID,
            data: dir.path().to_path_buf(),
            object_store: "file:/objects".to_string(),
            object_store_choice: None,
            snapshot_bandwidth: None,
            scrub_bandwidth: None,
            scrub_pause: None,
            gc_every: None,
            stores: vec![store("a"), store("b")],
            default_rate: HydrationRate::Unlimited,
            overcommit: Overcommit::default(),
            measure: measure(&shared),
            price_per_million_gets: 500_000,
            commands: commands.clone(),
            addresses: vec!["127.0.0.1:1".to_string(); shards],
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        threads.push(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(control.serve(listener, async { drop(stopped.await) })).unwrap();
        }));
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = config.timeout_global(Some(Duration::from_secs(30))).build().into();
        Node { shared, commands, base, agent, stop: Some(stop), threads, _dir: dir }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub(super) fn get(&self, path: &str) -> (u16, Value) {
        json_of(self.agent.get(self.url(path)).call())
    }

    pub(super) fn delete(&self, path: &str) -> (u16, Value) {
        json_of(self.agent.delete(self.url(path)).call())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        json_of(self.agent.post(self.url(path)).send_json(body))
    }

    pub(super) fn patch(&self, path: &str, body: &Value) -> (u16, Value) {
        json_of(self.agent.patch(self.url(path)).send_json(body))
    }

    pub(super) fn post_raw(&self, path: &str, content_type: &str, body: &str) -> (u16, Value) {
        json_of(self.agent.post(self.url(path)).header("content-type", content_type).send(body))
    }

    /// Status, headers and body.
    pub(super) fn bytes(&self, path: &str) -> (u16, ureq::http::HeaderMap, Vec<u8>) {
        let mut response = self.agent.get(self.url(path)).call().unwrap();
        let body = response.body_mut().read_to_vec().unwrap();
        (response.status().as_u16(), response.headers().clone(), body)
    }

    pub(super) fn put_bytes(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, Value) {
        let request = headers.iter().fold(self.agent.put(self.url(path)), |r, (name, value)| r.header(*name, *value));
        json_of(request.send(body))
    }

    pub(super) fn text(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(self.url(path)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    pub(super) fn content_type(&self, path: &str) -> (String, Value) {
        let mut response = self.agent.get(self.url(path)).call().unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap().to_string();
        (kind, response.body_mut().read_json().unwrap())
    }

    /// An image of zeroes.
    pub(super) fn put_snapshot(&self, name: &str, size_bytes: u64) {
        self.put_object(&manifest_key(name), &manifest(name, size_bytes, |_| ChunkEntry::Zero).encode());
    }

    /// An image of which every chunk is stored, though nobody could read it.
    pub(super) fn put_data_snapshot(&self, name: &str, size_bytes: u64) {
        let stored = |chunk: u64| {
            let (offset, encoding) = (32 + chunk * 4096, Encoding::Zstd);
            ChunkEntry::Stored { pack: 0, offset, stored_len: 1000, encoding, digest: [chunk as u8; 32] }
        };
        self.put_object(&manifest_key(name), &manifest(name, size_bytes, stored).encode());
    }

    pub(super) fn object(&self, key: &str) -> Option<Vec<u8>> {
        self.shared.world.lock().unwrap().objects.get(key).cloned()
    }

    pub(super) fn remove_object(&self, key: &str) {
        self.shared.world.lock().unwrap().objects.remove(key);
    }

    /// Keys that start with `prefix`.
    pub(super) fn keys(&self, prefix: &str) -> Vec<String> {
        let world = self.shared.world.lock().unwrap();
        world.objects.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    pub(super) fn put_object(&self, key: &str, data: &[u8]) {
        self.shared.world.lock().unwrap().objects.insert(key.to_string(), data.to_vec());
    }

    /// What is left of a store's 100 TiB; 0 makes its filesystem read-only too.
    pub(super) fn free_gib(&self, label: &str, gib: u64) {
        self.shared.world.lock().unwrap().free_gib.insert(label.to_string(), gib);
    }

    pub(super) fn fault(&self, fault: Fault) {
        self.shared.world.lock().unwrap().fault = Some(fault);
    }

    /// What the shards were told of when batches are due.
    pub(super) fn deadlines(&self) -> Vec<Option<u64>> {
        self.shared.world.lock().unwrap().deadlines.values().copied().collect()
    }

    pub(super) fn mend(&self) {
        self.shared.world.lock().unwrap().fault = None;
    }

    pub(super) fn names(&self) -> Vec<String> {
        let world = self.shared.world.lock().unwrap();
        let mut names: Vec<String> = world.volumes.iter().flat_map(|volumes| volumes.keys().cloned()).collect();
        names.sort();
        names
    }

    pub(super) fn references(&self) -> Vec<String> {
        let world = self.shared.world.lock().unwrap();
        world.objects.keys().filter(|key| key.starts_with("refs/")).cloned().collect()
    }

    pub(super) fn hydrate(&self, name: &str) {
        self.change(name, |volume| {
            volume.hydrated = true;
            volume.resident_bytes = volume.size_bytes;
            volume.remaining_bytes = 0;
        });
    }

    pub(super) fn attach(&self, name: &str) {
        self.change(name, |volume| volume.attached = true);
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut VolumeStatus)) {
        let mut world = self.shared.world.lock().unwrap();
        change(world.volumes.iter_mut().find_map(|volumes| volumes.get_mut(name)).unwrap());
    }

    /// Waits until the shards' world is as wanted.
    pub(super) fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        while !is() {
            let world = self.shared.world.lock().unwrap();
            let (world, waited) = self.shared.changed.wait_timeout(world, Duration::from_secs(10)).unwrap();
            drop(world);
            assert!(!waited.timed_out() || is(), "not within 10 s: {what}");
        }
    }

    pub(super) fn stop_shards(&self) {
        for shard in &self.commands {
            let (reply, answer) = flume::bounded(1);
            shard.send(Command::Stop { reply }).unwrap();
            answer.recv().unwrap();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        self.commands.clear();
        for thread in self.threads.drain(..).rev() {
            thread.join().unwrap();
        }
    }
}

pub(super) fn manifest(name: &str, size_bytes: u64, entry: impl Fn(u64) -> ChunkEntry) -> Manifest {
    let chunks: Vec<ChunkEntry> = (0..size_bytes.div_ceil(u64::from(CHUNK_BYTES_DEFAULT))).map(entry).collect();
    let packs = if chunks.contains(&ChunkEntry::Zero) { Vec::new() } else { vec![pack_key(1, 0)] };
    let info = SnapshotInfo {
        id: 7,
        name: name.to_string(),
        size_bytes,
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        parent: None,
        created_unix_ms: 1,
    };
    Manifest::new(info, packs, &chunks).unwrap()
}

fn json_of(response: std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> (u16, Value) {
    let mut response = response.unwrap();
    let status = response.status().as_u16();
    match status {
        204 => (status, Value::Null),
        _ => (status, response.body_mut().with_config().limit(1 << 28).read_json().unwrap()),
    }
}

fn serve_shard(shared: &Shared, shard: usize, shards: usize, commands: &flume::Receiver<Command>) {
    while let Ok(command) = commands.recv() {
        let mut world = shared.world.lock().unwrap();
        let full = world.fault == Some(Fault::StoreFull) && shard + 1 == shards;
        let fails = |spec: &VolumeSpec| world.fault.is_some_and(|fault| fault.is_of(&spec.store));
        match command {
            Command::CreateVolumes { reply, specs } if specs.iter().any(fails) => {
                let _ = reply.send(Err(Error::new(Status::Io, "input/output error")));
            }
            Command::Stop { reply } => {
                let _ = reply.send(());
                return;
            }
            Command::CreateVolumes { reply, .. } if full => {
                let _ = reply.send(Err(Error::new(Status::NoSpace, "store is full")));
            }
            Command::Objects { op, reply } => {
                let _ = reply.send(object_op(&mut world, op));
            }
            Command::SetDeadline { batch, deadline_unix_ms, reply } => {
                world.deadlines.insert((shard, batch), deadline_unix_ms);
                let _ = reply.send(());
            }
            other => volume_command(&mut world.volumes[shard], shard, other),
        }
        shared.changed.notify_all();
    }
}

fn volume_command(volumes: &mut BTreeMap<String, VolumeStatus>, shard: usize, command: Command) {
    let unknown = |name: &str| Error::new(Status::UnknownVolume, format!("no volume {name:?}"));
    let find = |volumes: &BTreeMap<String, VolumeStatus>, name: &str| volumes.get(name).cloned().ok_or(unknown(name));
    match command {
        Command::CreateVolumes { specs, reply } => drop(reply.send(create(volumes, shard, &specs))),
        Command::VolumeStatus { name, reply } => drop(reply.send(find(volumes, &name))),
        Command::ListVolumes { reply } => drop(reply.send(volumes.values().cloned().collect())),
        Command::DeleteVolume { name, force, reply } => {
            let deleted = match find(volumes, &name) {
                Ok(volume) if volume.attached && !force => {
                    Err(Error::new(Status::Conflict, format!("volume {name:?} is attached")))
                }
                found => found.map(|_| ()),
            };
            if deleted.is_ok() {
                volumes.remove(&name);
            }
            let _ = reply.send(deleted);
        }
        Command::SetRate { name, rate, reply } => {
            let volume = volumes.get_mut(&name).ok_or(unknown(&name));
            let _ = reply.send(volume.map(|volume| volume.rate = rate.to_string()));
        }
        Command::WaitHydrated { name, reply, .. } => {
            let waited = find(volumes, &name).and_then(|volume| match volume.hydrated {
                true => Ok(volume),
                false => Err(Error::new(Status::DeadlineExceeded, format!("volume {name:?} is not hydrated yet"))),
            });
            let _ = reply.send(waited);
        }
        Command::Stats { reply } => drop(reply.send(stats(volumes, shard))),
        Command::BatchTotals { reply } => drop(reply.send(totals(volumes))),
        Command::FirstTaken { names, reply } => {
            drop(reply.send(names.into_iter().find(|name| volumes.contains_key(name))));
        }
        Command::StoreLoads { reply, .. } => drop(reply.send(["a", "b"].map(|label| load(volumes, label)).into())),
        Command::Ledger { reply } => drop(reply.send(ledger(shard))),
        Command::ShowCache { reply } => drop(reply.send(CacheStatus { shard, ..CacheStatus::default() })),
        Command::WarmCache { reply, .. } => drop(reply.send(Ok(()))),
        Command::UnpinCache { reply, .. } => drop(reply.send(1)),
        Command::DropCache { reply, .. } => {
            drop(reply.send(Ok(Dropped { chunks_ram: 1, chunks_disk: 2 })));
        }
        Command::ForgetManifest { reply, .. } => drop(reply.send(())),
        Command::ScrubCache { reply, .. } => drop(reply.send(None)),
        Command::UseBootSet { reply, .. } | Command::PrefetchImage { reply, .. } => drop(reply.send(Ok(()))),
        Command::TakeBoots { reply } => drop(reply.send(Vec::new())),
        Command::Lineage { reply, name } => drop(reply.send(Err(unknown(&name)))),
        Command::Freeze { reply, .. } | Command::EndCut { reply, .. } => drop(reply.send(Ok(()))),
        Command::RollBack { reply, .. } | Command::Grow { reply, .. } => drop(reply.send(Ok(()))),
        Command::Cut { reply, .. } => drop(reply.send(Ok(Vec::new()))),
        Command::Capture { reply, .. } => drop(reply.send(Ok(Vec::new()))),
        Command::Absent { reply, .. } => drop(reply.send(Ok(Vec::new()))),
        Command::CheckChunk { reply, .. } => drop(reply.send(Err(unknown("")))),
        Command::RepairChunk { reply, .. } => drop(reply.send(Ok(false))),
        Command::Objects { .. } | Command::SetDeadline { .. } | Command::Stop { .. } => {
            unreachable!("handled by the caller")
        }
    }
}

/// Every store is a filesystem of 100 TiB in which nothing was written.
fn measure(shared: &Arc<Shared>) -> Measure {
    let shared = shared.clone();
    Arc::new(move |store| {
        let free_gib = shared.world.lock().unwrap().free_gib.get(&*store.label).copied();
        Ok(Space {
            device: u64::from(store.label.as_bytes()[0]),
            capacity_bytes: 100 << 40,
            free_bytes: free_gib.unwrap_or(100 << 10) << 30,
            read_only: free_gib == Some(0),
            allocated_bytes: 0,
        })
    })
}

/// Each shard fetched for one batch of a shared image, and for an image of its own.
fn ledger(shard: usize) -> Vec<(Origin, Totals)> {
    let origin = |snapshot: &str, batch| Origin { snapshot: Arc::from(snapshot), batch };
    let totals = |gets| Totals { gets, object_bytes: 1000 * gets, ..Totals::default() };
    vec![
        (origin("debian", Some(0xb)), totals(1)),
        (origin("debian", None), totals(2)),
        (origin(&format!("image-{shard}"), None), totals(4)),
    ]
}
