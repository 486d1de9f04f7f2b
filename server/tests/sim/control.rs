//! The control thread of a node in the simulation: it takes snapshots, makes volumes of them and rolls volumes back, in the
//! order of `server/src/control`, and deletes and collects as the tools do.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{Either, join_all, select};
use futures::lock::Mutex;
use volley_server::error::{Error, Result, Status};
use volley_server::object_store::{ObjectError, ObjectStore};
use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, Sim, SimObjects, SimWorld};
use volley_server::shard::api::{Command, FetchUntil, Request, VolumeLineage};
use volley_server::snapshot::claim::ClaimError;
use volley_server::snapshot::deletion::{self, Outcome};
use volley_server::snapshot::diff::differing;
use volley_server::snapshot::gc::{GcOptions, GcReport, collect};
use volley_server::snapshot::{CatalogError, Manifest, REFERENCE_PREFIX, catalog, reference_key};
use volley_server::types::SnapshotRef;

use crate::guest::{Guests, Session, VolumeRc};
use crate::lifecycle::VOLUMES_MAX;
use crate::model::{BLOCK, Existence, VolumeModel};
use crate::node::{CHUNK_BYTES, NODE_ID, Node, Snapshot, volume_spec};
use crate::patient::{Patient, SimClock};
use crate::snapshots::{NAMES, State};

/// Older ones are deleted when there are so many.
const SNAPSHOTS_MAX: usize = 5;
/// Volumes of snapshots, beside those that guests create.
const MORE_VOLUMES_MAX: usize = 3;

/// Of one life.
pub struct Control<'a> {
    world: &'a SimWorld,
    pub sim: Sim,
    pub node: Rc<Node>,
    pub guests: Rc<Guests>,
    pub store: Patient,
    /// Whoever makes or needs references, one at a time: the names of those that are there.
    references: Mutex<RefCell<BTreeSet<String>>>,
    /// What snapshots that take long build on.
    pub built_on: RefCell<Vec<Arc<str>>>,
    /// Volumes that were looked up for a snapshot, and are not cut yet.
    pub looked_up: RefCell<Vec<VolumeRc>>,
    /// Snapshots that are stored are committed so much later.
    pub before_commit: Cell<Option<Duration>>,
}

impl Control<'_> {
    pub fn new<'a>(world: &'a SimWorld, node: &Rc<Node>, objects: &SimObjects, guests: &Rc<Guests>) -> Control<'a> {
        let sim = world.platform();
        Control {
            world,
            node: node.clone(),
            guests: guests.clone(),
            store: Patient { objects: objects.clone(), sim: sim.clone() },
            references: Mutex::default(),
            built_on: RefCell::default(),
            looked_up: RefCell::default(),
            before_commit: Cell::default(),
            sim,
        }
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.guests.snapshots_taken.below(bound)
    }

    pub fn clock(&self) -> SimClock {
        SimClock { sim: self.sim.clone(), forward_ms: self.guests.snapshots_taken.forward_ms.get() }
    }

    pub async fn pause(&self, micros_max: u64) {
        let pause = Duration::from_micros(self.below(micros_max));
        self.sim.sleep(pause).await;
    }

    /// So many orders of operators, one after the other.
    pub async fn run(&self, orders: u64) {
        for _ in 0..orders {
            if self.guests.stopping.get() {
                return;
            }
            self.pause(15_000).await;
            self.any_order().await;
            if self.below(2) == 0 {
                self.done("references", self.reconcile().await);
            }
        }
    }

    async fn any_order(&self) {
        let many = self.guests.snapshots_taken.known().len() > SNAPSHOTS_MAX;
        match self.below(16) {
            // What others are at is pulled from under them.
            _ if !self.built_on.borrow().is_empty() && self.below(2) == 0 => self.delete_and_collect().await,
            _ if !self.looked_up.borrow().is_empty() && self.below(2) == 0 => {
                self.done("rollback", self.roll_back().await);
            }
            _ if many && self.below(2) == 0 => self.done("deletion", self.delete_one().await),
            0..8 => self.done("snapshot", self.take().await),
            8..10 => self.done("volume of a snapshot", self.create().await),
            10..13 => self.done("rollback", self.roll_back().await),
            13 => self.done("deletion", self.delete_one().await),
            14 => self.delete_and_collect().await,
            _ => self.done("collection", self.collect().await),
        }
    }

    async fn delete_and_collect(&self) {
        self.done("deletion", self.delete_one().await);
        if self.below(2) == 0 {
            self.pause(600_000).await;
        }
        self.done("collection", self.collect_after(Duration::ZERO, false).await);
    }

    /// Counts it, or panics unless this life has an excuse for the error.
    pub fn done(&self, what: &str, result: Result<bool>) {
        let error = match result {
            Ok(true) => return self.guests.count(what),
            Ok(false) => return,
            Err(error) => error,
        };
        self.guests.count(format!("failed {what}"));
        let excuses = self.guests.excuses.get();
        let excused = match error.status {
            // Others were at it, or came before.
            Status::Conflict | Status::UnknownVolume | Status::UnknownSnapshot | Status::Busy => true,
            Status::DeadlineExceeded | Status::ObjectStore | Status::Corrupt => excuses.object_store,
            // A volume may have failed for want of space before.
            Status::Io => excuses.disk || excuses.no_space && error.message.contains("no storage space"),
            Status::NoSpace => excuses.no_space,
            Status::ShuttingDown => self.guests.stopping.get(),
            _ => false,
        };
        assert!(excused, "{what} failed without an excuse: {error:?}");
    }

    /// A volume that is there.
    pub fn any_volume(&self) -> Option<VolumeRc> {
        let volumes = self.guests.volumes.borrow();
        let usable = |v: &&VolumeRc| v.borrow().existence == Existence::Sure && !v.borrow().is_rolling();
        let known: Vec<&VolumeRc> = volumes.iter().filter(usable).collect();
        Some(Rc::clone(known.get(self.below(known.len() as u64) as usize)?))
    }

    /// A snapshot that is there, or an image, of this size at most.
    fn any_snapshot(&self, size_max: u64) -> Option<Snapshot> {
        let mut all = self.guests.snapshots_taken.known();
        if all.is_empty() || self.below(4) == 0 {
            all = self.guests.snapshots.clone();
        }
        all.retain(|snapshot| snapshot.image.bytes.len() as u64 <= size_max);
        Some(all.get(self.below(all.len() as u64) as usize)?.clone())
    }

    pub async fn lineage(&self, name: &str) -> Result<VolumeLineage> {
        self.node.command(name, |reply| Command::Lineage { name: name.to_owned(), reply }).await
    }

    /// The manifest of just this snapshot, if it is still there.
    pub async fn manifest_of(&self, snapshot: &SnapshotRef) -> Result<Option<Manifest>> {
        match catalog::load(&self.store, &snapshot.name).await {
            Ok(manifest) => Ok(Some(manifest).filter(|manifest| manifest.id == snapshot.id)),
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => Ok(None),
            Err(e) => Err(of_catalog(&e)),
        }
    }

    /// Makes sure that the snapshot stays; then it is there, or it is not and never comes back.
    async fn hold(&self, held: &RefCell<BTreeSet<String>>, snapshot: &SnapshotRef) -> Result<Manifest> {
        let name = snapshot.name.to_string();
        if name.starts_with(NAMES) && !held.borrow().contains(&name) {
            self.store.put(&reference_key(&name, &NODE_ID), b"").await.map_err(of_store)?;
            held.borrow_mut().insert(name.clone());
        }
        let intention = deletion::intention(&self.store, &name).await.map_err(of_store)?;
        let manifest = self.manifest_of(snapshot).await?;
        let stays = |manifest: &Manifest| intention.is_none_or(|i| !deletion::concerns(&i, manifest.id));
        manifest.filter(stays).ok_or_else(|| Error::new(Status::UnknownSnapshot, format!("{name} is deleted")))
    }

    /// Makes the references equal to what volumes need.
    pub async fn reconcile(&self) -> Result<bool> {
        let references = self.references.lock().await;
        let listed = self.store.list(REFERENCE_PREFIX).await.map_err(of_store)?;
        let suffix = format!("/{}", *NODE_ID);
        let name = |key: &str| Some(key.strip_prefix(REFERENCE_PREFIX)?.strip_suffix(&suffix)?.to_owned());
        let held: BTreeSet<String> = listed.iter().filter_map(|object| name(&object.key)).collect();
        *references.borrow_mut() = held.clone();
        let mut needed = self.node.snapshots_needed().await?;
        needed.retain(|name| name.starts_with(NAMES));
        if let Some(missing) = needed.difference(&held).next() {
            panic!("nobody holds snapshot {missing:?}, which a volume needs");
        }
        for volume in &*self.guests.volumes.borrow() {
            // Whether it is there is known after a restart.
            if volume.borrow().existence != Existence::Sure {
                needed.extend(volume.borrow().may_need().map(|name| name.to_string()));
            }
        }
        for name in held.difference(&needed) {
            references.borrow_mut().remove(name);
            self.store.delete(&reference_key(name, &NODE_ID)).await.map_err(of_store)?;
        }
        Ok(true)
    }

    /// A volume of a snapshot that was taken, as large or larger.
    async fn create(&self) -> Result<bool> {
        if self.guests.volumes.borrow().len() >= VOLUMES_MAX + MORE_VOLUMES_MAX {
            return Ok(false);
        }
        let known = self.guests.snapshots_taken.known();
        let Some(snapshot) = known.get(self.below(known.len() as u64) as usize) else { return Ok(false) };
        let references = self.references.lock().await;
        self.hold(&references, &snapshot.reference).await?;
        let name = format!("vm-{}", self.guests.next_name.replace(self.guests.next_name.get() + 1));
        let longer = self.below(2) * self.below(300) * BLOCK;
        let size = snapshot.image.bytes.len() as u64 + longer;
        let spec = volume_spec(&mut self.guests.snapshots_taken.rng.borrow_mut(), &name, size, Some(snapshot));
        let model = VolumeModel::new(spec.clone(), Some(snapshot.image.clone()));
        self.guests.create_all(&self.node, vec![spec], vec![Rc::new(RefCell::new(model))]).await;
        Ok(true)
    }

    /// A volume goes back to a snapshot, attached or not, while guests write and chunks come; perhaps to another one
    /// right after that.
    async fn roll_back(&self) -> Result<bool> {
        let looked_up = self.looked_up.borrow().last().cloned();
        let Some(volume) = looked_up.or_else(|| self.any_volume()) else { return Ok(false) };
        let done = self.roll_back_to_any(&volume).await?;
        if !done || self.below(3) > 0 {
            return Ok(done);
        }
        self.roll_back_to_any(&volume).await
    }

    pub async fn roll_back_to_any(&self, volume: &VolumeRc) -> Result<bool> {
        let (name, size) = (volume.borrow().spec.name.to_string(), volume.borrow().spec.size_bytes);
        let Some(target) = self.any_snapshot(size) else { return Ok(false) };
        let references = self.references.lock().await;
        let manifest = self.hold(&references, &target.reference).await?;
        let lineage = self.lineage(&name).await?;
        let base = match &lineage.lineage.base {
            Some(base) => self.manifest_of(base).await?,
            None => None,
        };
        let differs = match (&base, &lineage.lineage.base) {
            (None, Some(_)) => (0..lineage.chunks()).collect(),
            _ => differing(base.as_ref(), &manifest, lineage.chunks()).collect(),
        };
        let (snapshot, base, of) = (target.reference.clone(), lineage.lineage.base, name.clone());
        let command = |reply| Command::RollBack { name: of, snapshot, base, differs, force: true, reply };
        if self.below(4) == 0 {
            // Writes that are under way stay so for long.
            let long = Duration::from_millis(1)..Duration::from_millis(60);
            self.world.slow_disk("/node/stores", DiskOp::Write, long);
        }
        let chunk = u64::from(CHUNK_BYTES);
        let fetches: Vec<u64> = (0..self.below(6)).map(|_| self.below(size.div_ceil(chunk)) * chunk).collect();
        let fetched = join_all(fetches.iter().map(|offset| self.fetch(volume, *offset)));
        let rolled = async {
            self.pause([1000, 7000, 40_000][self.below(3) as usize]).await;
            // Others may have come before.
            let free = volume.borrow().existence == Existence::Sure && volume.borrow().attaching == 0;
            if !free {
                return Err(Error::new(Status::Conflict, "somebody attaches"));
            }
            volume.borrow_mut().begin_rollback(target.reference.name.clone(), target.image.clone());
            let rolled = self.node.command(&name, command).await;
            let mut model = volume.borrow_mut();
            match &rolled {
                Ok(()) => model.rolled_back(),
                Err(e) if matches!(e.status, Status::Conflict | Status::UnknownVolume) => model.rollback_refused(),
                Err(_) => model.rollback_in_doubt(),
            }
            rolled
        };
        let deleted = async {
            let session = Session::of(volume);
            if self.below(6) == 0 {
                self.pause(15_000).await;
                if volume.borrow().existence == Existence::Sure {
                    self.guests.delete(&self.node, &session).await;
                }
            }
        };
        let used = async {
            rolled.await?;
            drop(references);
            if self.below(3) > 0 {
                self.use_at_once(volume, &fetches).await;
            }
            Ok(())
        };
        let (used, _, ()) = futures::join!(used, fetched, deleted);
        used.map(|()| true)
    }

    async fn fetch(&self, volume: &VolumeRc, offset: u64) {
        let volume = volume.borrow().spec.id;
        let fetch = Request::PriorityFetch { volume, offset, len: BLOCK, until: FetchUntil::Resident };
        drop(self.guests.send(&self.node, self.guests.new_connection(), fetch).await);
    }

    /// The first thing after a rollback: what was under way before must not come through.
    async fn use_at_once(&self, volume: &VolumeRc, places: &[u64]) {
        self.guests.attach(&self.node, volume).await;
        if !volume.borrow().attached {
            return;
        }
        let session = Session::of(volume);
        let size = volume.borrow().spec.size_bytes;
        let range = |offset: u64| (offset, (size - offset).min(u64::from(CHUNK_BYTES)));
        join_all(places.iter().map(|at| self.guests.write_to(&self.node, &session, range(*at)))).await;
        self.pause(80_000).await;
        join_all(places.iter().map(|at| self.guests.read_from(&self.node, &session, range(*at)))).await;
    }

    /// Any snapshot; sooner one that somebody needs, or builds on.
    async fn delete_one(&self) -> Result<bool> {
        let mut names: Vec<Arc<str>> =
            self.guests.snapshots_taken.known().into_iter().map(|snapshot| snapshot.reference.name).collect();
        if self.below(6) > 0 {
            let mut wanted = self.built_on.borrow().clone();
            if wanted.is_empty() || self.below(4) == 0 {
                for volume in &*self.guests.volumes.borrow() {
                    wanted.extend(volume.borrow().may_need().cloned());
                }
            }
            if names.iter().any(|name| wanted.contains(name)) {
                names.retain(|name| wanted.contains(name));
            }
        }
        let Some(name) = names.get(self.below(names.len() as u64) as usize) else { return Ok(false) };
        self.delete(name, self.below(2) == 0).await
    }

    pub async fn delete(&self, name: &str, when_unused: bool) -> Result<bool> {
        let snapshots = &self.guests.snapshots_taken;
        snapshots.set(name, State::Leaving);
        match deletion::delete(&self.store, &self.clock(), name, when_unused).await {
            Ok(Outcome::Deleted(_)) => {
                snapshots.deleted(name);
                Ok(true)
            }
            Ok(Outcome::WhenUnused { .. }) => Ok(true),
            Err(CatalogError::Referenced { .. }) => {
                // Refused before anything was done.
                snapshots.set(name, State::Sure);
                Ok(false)
            }
            Err(error) => Err(of_catalog(&error)),
        }
    }

    /// A collection, which may be stopped at any moment.
    async fn collect(&self) -> Result<bool> {
        let grace = Duration::from_millis([0, 0, 30, 500][self.below(4) as usize]);
        self.collect_after(grace, self.below(3) == 0).await
    }

    pub async fn collect_after(&self, grace: Duration, dies: bool) -> Result<bool> {
        let snapshots = &self.guests.snapshots_taken;
        let drop_import = match self.below(3) {
            0 => snapshots.interrupted.borrow_mut().pop(),
            _ => None,
        };
        let options = GcOptions { grace, drop_import, ..GcOptions::default() };
        let (clock, patience) = (self.clock(), Duration::from_micros(self.below(400_000)));
        let collected = {
            let collection = collect(&self.store, &clock, &options);
            match dies {
                true => match select(pin!(collection), pin!(self.sim.sleep(patience))).await {
                    Either::Left((collected, _)) => collected,
                    Either::Right(_) => {
                        self.guests.count("collection cut short");
                        return Ok(false);
                    }
                },
                false => collection.await,
            }
        };
        snapshots.check_packs(&self.store.objects);
        match collected {
            Ok(report) => {
                report.snapshots_deleted.iter().for_each(|name| snapshots.deleted(name));
                self.count_packs(&report);
                Ok(true)
            }
            // Its marker was never put, or is gone already.
            Err(CatalogError::NoImport(_)) => Ok(false),
            Err(error) => Err(of_catalog(&error)),
        }
    }

    pub fn count_packs(&self, report: &GcReport) {
        self.guests.count_many("pack removed", report.packs_removed);
        self.guests.count_many("pack condemned", report.packs_condemned);
    }
}

pub fn of_store(error: ObjectError) -> Error {
    let status = if matches!(error, ObjectError::Corrupt(_)) { Status::Corrupt } else { Status::ObjectStore };
    Error::new(status, error.to_string())
}

pub fn of_catalog(error: &CatalogError) -> Error {
    let status = match error {
        CatalogError::Unknown(_) | CatalogError::Incomplete(_) => Status::UnknownSnapshot,
        CatalogError::Announced { .. } | CatalogError::Rewriting(_) => Status::Conflict,
        CatalogError::Store(_) => Status::ObjectStore,
        _ => Status::Corrupt,
    };
    Error::new(status, error.to_string())
}

pub fn of_claim(error: &ClaimError) -> Error {
    let status = match error {
        ClaimError::Store(_) => Status::ObjectStore,
        ClaimError::Marker(_) => Status::Corrupt,
        ClaimError::NameTaken(_) | ClaimError::Interfered(_) => Status::Conflict,
    };
    Error::new(status, error.to_string())
}
