//! What the control thread asks of a shard: creating, deleting and describing volumes, counters, stopping.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};

use crate::cache::{tier_counters, tier_gauges};
use crate::error::{Error, Result, Status};
use crate::journal::Record;
use crate::mutation::{self, Mutation};
use crate::object_store::{ObjectError, ObjectStore};
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::api::{Command, ObjectOp, ObjectOpReply, ShardStats, VolumeStatus};
use crate::shard::signal::within;
use crate::shard::volume::Volume;
use crate::types::{HydrationRate, Lineage, SnapshotRef, VolumeSpec, VolumeState};

/// Files created at the same time.
const CREATES_MAX: usize = 32;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    pub(super) async fn serve_commands(self, commands: flume::Receiver<Command>) {
        while let Ok(command) = commands.recv_async().await {
            let last = matches!(command, Command::Stop { .. });
            let shard = self.clone();
            self.0.platform.spawn(Queue::Serve, async move { shard.command(command).await });
            if last {
                return;
            }
        }
    }

    async fn command(self, command: Command) {
        // A reply nobody waits for any more is no error.
        match command {
            Command::CreateVolumes { specs, reply } => drop(reply.send(self.create_volumes(specs).await)),
            Command::DeleteVolume { name, force, reply } => drop(reply.send(self.delete_volume(&name, force).await)),
            Command::VolumeStatus { name, reply } => drop(reply.send(self.by_name(&name).map(|v| self.status(&v)))),
            Command::ListVolumes { reply } => {
                drop(reply.send(self.volumes().iter().map(|volume| self.status(volume)).collect()));
            }
            Command::SetRate { name, rate, reply } => drop(reply.send(self.set_rate(&name, rate).await)),
            Command::SetDeadline { batch, deadline_unix_ms, reply } => {
                self.set_deadline(batch, deadline_unix_ms);
                let _ = reply.send(());
            }
            Command::WaitHydrated { name, timeout_ms, reply } => {
                drop(reply.send(self.wait_hydrated(&name, Duration::from_millis(timeout_ms)).await));
            }
            Command::Stats { reply } => drop(reply.send(self.stats())),
            Command::BatchTotals { reply } => drop(reply.send(self.batch_totals())),
            Command::FirstTaken { names, reply } => {
                let known = self.0.names.borrow();
                drop(reply.send(names.into_iter().find(|name| known.contains_key(name.as_str()))));
            }
            Command::StoreLoads { snapshot, reply } => drop(reply.send(self.store_loads(snapshot))),
            Command::Ledger { reply } => drop(reply.send(self.0.transfer.ledger().totals())),
            Command::ShowCache { reply } => drop(reply.send(self.cache_status())),
            Command::WarmCache { snapshot, pin, reply } => drop(reply.send(self.warm_cache(&snapshot, pin).await)),
            Command::UnpinCache { image, reply } => drop(reply.send(self.unpin_image(&image))),
            Command::DropCache { snapshot, reply } => drop(reply.send(self.drop_cache(&snapshot).await)),
            Command::ScrubCache { from, bytes_max, reply } => self.scrub_cache(from, bytes_max, reply),
            Command::UseBootSet { snapshot, chunks, prefetch, reply } => {
                drop(reply.send(self.use_boot_set(&snapshot, &chunks, prefetch).await));
            }
            Command::PrefetchImage { snapshot, reply } => drop(reply.send(self.prefetch_image(&snapshot).await)),
            Command::ForgetManifest { snapshot, reply } => {
                self.0.manifests.forget(&snapshot);
                let _ = reply.send(());
            }
            Command::Lineage { name, reply } => drop(reply.send(self.lineage(&name))),
            Command::Freeze { names, cut, reply } => drop(reply.send(self.freeze(&names, cut).await)),
            Command::Cut { wanted, cut, reply } => drop(reply.send(self.cut(&wanted, cut))),
            Command::Capture { volume, cut, chunk, reply } => drop(reply.send(self.capture(volume, cut, chunk).await)),
            Command::EndCut { volume, cut, snapshot, reply } => {
                drop(reply.send(self.end_cut(volume, cut, snapshot).await));
            }
            Command::RollBack { name, snapshot, base, differs, force, reply } => {
                drop(reply.send(self.roll_back(&name, snapshot, base.as_ref(), &differs, force).await));
            }
            Command::Absent { name, max, reply } => drop(reply.send(self.absent(&name, max))),
            Command::CheckChunk { volume, chunk, len, base, content, reply } => {
                drop(reply.send(self.check_chunk(volume, chunk, len, base.as_ref(), content).await));
            }
            Command::RepairChunk { volume, chunk, base, content, reply } => {
                drop(reply.send(self.repair_chunk(volume, chunk, base.as_ref(), &content).await));
            }
            Command::Grow { name, size_bytes, reply } => drop(reply.send(self.grow(&name, size_bytes).await)),
            Command::TakeBoots { reply } => drop(reply.send(self.take_boots())),
            Command::Objects { op, reply } => drop(reply.send(self.object_op(op).await)),
            Command::Stop { reply } => {
                self.stop().await;
                let _ = reply.send(());
            }
        }
    }

    async fn create_volumes(&self, specs: Vec<VolumeSpec>) -> Result<()> {
        self.refuse_when_stopping()?;
        let mut reserved = Vec::with_capacity(specs.len());
        let mut result = Ok(());
        for spec in &specs {
            result = self.reserve(&spec.name);
            if result.is_err() {
                break;
            }
            reserved.push(spec.name.clone());
        }
        if result.is_ok() {
            result = self.create_reserved(specs).await;
        }
        for name in reserved {
            self.0.reserved.borrow_mut().remove(&name);
        }
        result
    }

    fn reserve(&self, name: &Arc<str>) -> Result<()> {
        let taken = self.0.names.borrow().contains_key(name) || !self.0.reserved.borrow_mut().insert(name.clone());
        if taken {
            let message = format!("a volume named {:?} exists already: choose another name or delete it", &**name);
            return Err(Error::new(Status::NameTaken, message));
        }
        Ok(())
    }

    async fn create_reserved(&self, specs: Vec<VolumeSpec>) -> Result<()> {
        let mut volumes = Vec::with_capacity(specs.len());
        for spec in specs {
            volumes.push(self.new_volume(spec).await?);
        }
        let files = stream::iter(volumes.iter().map(|volume| volume.create_file())).buffered(CREATES_MAX);
        let created: Vec<Result<()>> = files.collect().await;
        let made: Vec<_> =
            volumes.iter().zip(&created).filter(|(_, made)| made.is_ok()).map(|(v, _)| v.clone()).collect();
        let mut result: Result<()> = created.into_iter().collect();
        if result.is_ok() {
            result = self.sync_names(&volumes).await;
        }
        if result.is_err() {
            // The journal knows nothing of them.
            remove_files(&made).await;
        } else {
            result = self.commit_volumes(&volumes).await;
        }
        for volume in volumes {
            self.0.creating.borrow_mut().retain(|creating| creating.spec.id != volume.spec.id);
            if result.is_ok() {
                self.adopt(volume);
            }
        }
        result
    }

    async fn new_volume(&self, spec: VolumeSpec) -> Result<Rc<Volume<P>>> {
        let store = self.store_of(&spec)?;
        let manifest = match &spec.snapshot {
            Some(snapshot) => Some(self.load_manifest(snapshot).await?),
            None => None,
        };
        if let Some(manifest) = &manifest
            && (spec.size_bytes < manifest.size_bytes || spec.chunk_bytes != manifest.chunk_bytes)
        {
            let message = format!("volume {:?} does not fit snapshot {:?}", &*spec.name, manifest.name);
            return Err(Error::new(Status::Invalid, message));
        }
        let hydrated = manifest.is_none();
        let lineage = Lineage::new(spec.snapshot.clone());
        let state = VolumeState { spec, generation: 0, residency: Vec::new(), hydrated, lineage };
        let volume = self.open_volume(state, store)?;
        if let Some(manifest) = manifest {
            volume.set_manifest(manifest, true);
        }
        Ok(Rc::new(volume))
    }

    /// Directory entries first, then the journal: a volume the journal knows has its file.
    async fn sync_names(&self, volumes: &[Rc<Volume<P>>]) -> Result<()> {
        let mut stores: Vec<usize> = volumes.iter().map(|volume| volume.store).collect();
        stores.sort_unstable();
        stores.dedup();
        for store in stores.into_iter().filter(|_| !mutation::on(Mutation::DirectoryNotSynced)) {
            self.sync_store(store).await?;
        }
        // What follows, and its undoing, is bounded by the largest request.
        self.0.journal.admit().await
    }

    async fn commit_volumes(&self, volumes: &[Rc<Volume<P>>]) -> Result<()> {
        let mut last = None;
        self.0.creating.borrow_mut().extend(volumes.iter().cloned());
        for volume in volumes {
            last = Some(self.0.journal.append(&Record::Created(volume.spec.clone())));
            if volume.hydrated.get() {
                last = Some(self.0.journal.append(&Record::Hydrated { volume: volume.spec.id }));
            }
        }
        let Some(lsn) = last else { return Ok(()) };
        let committed = self.0.journal.commit(lsn).await;
        if committed.is_err() {
            self.take_back(volumes.to_vec());
        }
        committed
    }

    /// The records of a creation that failed stay in the journal's buffer, or are on the disk already: they must not create
    /// anything. Until the deletion is durable a restart may find the volumes, and then with their files.
    fn take_back(&self, volumes: Vec<Rc<Volume<P>>>) {
        let mut last = None;
        for volume in &volumes {
            last = Some(self.0.journal.append(&Record::Deleted(volume.spec.id)));
        }
        let Some(lsn) = last else { return };
        let shard = self.clone();
        self.0.platform.spawn(Queue::Background, async move {
            if shard.0.journal.commit(lsn).await.is_ok() {
                remove_files(&volumes).await;
            }
        });
    }

    /// Makes names of volume files durable.
    async fn sync_store(&self, store: usize) -> Result<()> {
        let dir = &self.0.stores[store].volumes_dir;
        let synced = self.0.platform.sync_dir(dir).await;
        synced.map_err(|e| Error::from_io(&format!("volume store {}: sync", dir.display()), &e))
    }

    async fn delete_volume(&self, name: &str, force: bool) -> Result<()> {
        self.refuse_when_stopping()?;
        let volume = self.by_name(name)?;
        if !force && volume.attached.get().is_some() {
            let message = format!("volume {name:?} is attached: detach it first, or delete it with --force");
            return Err(Error::new(Status::Conflict, message));
        }
        self.0.journal.admit().await?;
        // What is about to take its place would be left without a file; one that failed half-way may go.
        let is_replaced = volume.retired.get() && !volume.takes_no_writes();
        if is_replaced && !mutation::on(Mutation::DeletionDuringRollback) {
            let message = format!("volume {name:?} is being rolled back or resized: try again");
            return Err(Error::new(Status::Conflict, message));
        }
        // From here on the volume is gone for guests. The file first gets a name that a restart may remove, or turn
        // back if the record below never became durable.
        volume.deleted.set(true);
        volume.account.volumes.set(volume.account.volumes.get().saturating_sub(1));
        self.end_read_ahead(&volume);
        self.0.volumes.borrow_mut().remove(&volume.spec.id);
        self.0.names.borrow_mut().remove(name);
        self.0.stores[volume.store].queue.borrow_mut().remove(volume.spec.id);
        volume.changed.wake_all();
        self.drop_staging(&volume).await;
        volume.changes.borrow_mut().fail("the volume was deleted".to_owned());
        volume.set_aside().await?;
        if !mutation::on(Mutation::DeletionBeforeItsName) {
            // The new name first: a restart that knows nothing of the volume must not find its file under the old one.
            self.sync_store(volume.store).await?;
        }
        if !mutation::on(Mutation::DeletionNotJournaled) {
            let lsn = self.0.journal.append(&Record::Deleted(volume.spec.id));
            self.0.journal.commit(lsn).await?;
        }
        volume.remove_set_aside().await
    }

    async fn set_rate(&self, name: &str, rate: HydrationRate) -> Result<()> {
        self.refuse_when_stopping()?;
        let volume = self.by_name(name)?;
        self.0.journal.admit().await?;
        volume.set_rate(rate);
        let lsn = self.0.journal.append(&Record::Rate { volume: volume.spec.id, rate });
        self.0.journal.commit(lsn).await?;
        self.wake_hydrator(&volume);
        Ok(())
    }

    async fn wait_hydrated(&self, name: &str, timeout: Duration) -> Result<VolumeStatus> {
        let volume = self.by_name(name)?;
        let done = || volume.hydrated.get() || volume.deleted.get() || self.0.stopping.get();
        if within(&self.0.platform, timeout, volume.changed.until(done)).await.is_none() {
            let message = format!("volume {name:?} is not hydrated after {} ms", timeout.as_millis());
            return Err(Error::new(Status::DeadlineExceeded, message));
        }
        self.refuse_when_stopping()?;
        if volume.deleted.get() {
            return Err(Error::new(Status::UnknownVolume, format!("volume {name:?} was deleted")));
        }
        Ok(self.status(&volume))
    }

    async fn object_op(&self, op: ObjectOp) -> std::result::Result<ObjectOpReply, ObjectError> {
        let objects = &self.0.objects;
        Ok(match op {
            ObjectOp::Get { key } => ObjectOpReply::Data(objects.get(&key).await?),
            ObjectOp::GetRange { key, range } => ObjectOpReply::Data(objects.get_range(&key, range).await?.into()),
            ObjectOp::List { prefix } => ObjectOpReply::Listing(objects.list(&prefix).await?),
            ObjectOp::Put { key, data } => {
                objects.put(&key, &data).await?;
                ObjectOpReply::Done
            }
            ObjectOp::PutIfAbsent { key, data } => {
                objects.put_if_absent(&key, &data).await?;
                ObjectOpReply::Done
            }
            ObjectOp::Delete { key } => {
                objects.delete(&key).await?;
                ObjectOpReply::Done
            }
        })
    }

    pub(super) fn status(&self, volume: &Volume<P>) -> VolumeStatus {
        let now = self.0.platform.now();
        let spec = &volume.spec;
        let resident = volume.resident_bytes();
        let mut hydration = volume.hydration.borrow_mut();
        let remaining = spec.size_bytes - resident;
        let per_second = hydration.meter.per_second(now);
        let stalled = per_second == 0 || hydration.rate == HydrationRate::None;
        let done = volume.hydrated.get();
        VolumeStatus {
            id: spec.id.to_string(),
            name: spec.name.to_string(),
            size_bytes: spec.size_bytes,
            chunk_bytes: spec.chunk_bytes,
            snapshot: spec.snapshot.as_ref().map(|s| s.name.to_string()),
            store: spec.store.to_string(),
            rate: match hydration.rate {
                HydrationRate::Unlimited => "unlimited".into(),
                HydrationRate::None => "none".into(),
                HydrationRate::BytesPerSecond(rate) => rate.to_string(),
            },
            batch: spec.batch.map(|batch| format!("{batch:016x}")),
            created_unix_ms: spec.created_unix_ms,
            shard: self.0.config.shard,
            generation: volume.generation.get(),
            attached: volume.attached.get().is_some(),
            hydrated: done,
            resident_bytes: resident,
            remaining_bytes: remaining,
            eta_seconds: match (done, stalled) {
                (true, _) => Some(0.0),
                (false, true) => None,
                (false, false) => Some(remaining as f64 / per_second as f64),
            },
            hydration_bytes_per_second: per_second,
            hydration_state: hydration.state.into(),
            last_error: hydration.last_error.clone(),
            reads: volume.counters.reads.get(),
            read_bytes: volume.counters.read_bytes.get(),
            writes: volume.counters.writes.get(),
            written_bytes: volume.counters.written_bytes.get(),
            flushes: volume.counters.flushes.get(),
            read_misses: volume.counters.read_misses.get(),
            priority_fetches: volume.counters.priority_fetches.get(),
        }
    }

    fn stats(&self) -> ShardStats {
        let volumes = self.volumes();
        let count = |which: &dyn Fn(&Rc<Volume<P>>) -> bool| volumes.iter().filter(|v| which(v)).count() as u64;
        let (ram, disk) = self.0.transfer.tiers();
        let needed = |v: &Rc<Volume<P>>| v.spec.snapshot.as_ref().filter(|_| !v.hydrated.get()).map(|s| s.name.clone());
        // Of a replacement that failed half-way a restart tells whether it happened.
        let replacements: Vec<_> = volumes.iter().filter_map(|v| v.replacement.borrow().clone()).collect();
        let mut snapshots_needed: Vec<String> =
            volumes.iter().chain(&replacements).filter_map(needed).map(|name| name.to_string()).collect();
        snapshots_needed.sort_unstable();
        snapshots_needed.dedup();
        let mut counters = self.0.counters.snapshot();
        counters.extend(self.0.connections.counters());
        counters.extend(tier_counters(&ram, disk.as_ref()));
        let mut gauges = tier_gauges(&ram, disk.as_ref());
        gauges.extend(self.0.transfer.gauges());
        gauges.push(("requests_in_flight", "Data-path requests being served.", self.0.in_flight.get()));
        gauges.push((
            "connections_held_bytes",
            "Bytes held for peers: requests, replies not taken yet, large receive buffers.",
            self.0.connections.held_bytes() as u64,
        ));
        ShardStats {
            shard: self.0.config.shard,
            volumes: volumes.len() as u64,
            volumes_hydrated: count(&|v| v.hydrated.get()),
            volumes_attached: count(&|v| v.attached.get().is_some()),
            connections: self.0.connections.open(),
            counters,
            gauges,
            histograms: self.0.stages.snapshot(),
            sharing: self.sharing(),
            stores: self.store_stats(),
            snapshots_needed,
            events: self.0.counters.events(),
        }
    }

    pub(super) async fn load_manifest(&self, snapshot: &SnapshotRef) -> Result<Arc<crate::snapshot::Manifest>> {
        // The load is a task of its own: a caller whose deadline passes must not drop it half done.
        let (sender, receiver) = flume::bounded(1);
        let (manifests, snapshot) = (self.0.manifests.clone(), snapshot.clone());
        self.0.platform.spawn(Queue::Serve, async move { drop(sender.send(manifests.get(&snapshot).await)) });
        let stopped = |_| Err(Error::new(Status::ShuttingDown, "the server is stopping"));
        receiver.recv_async().await.unwrap_or_else(stopped)
    }

    pub(super) fn store_of(&self, spec: &VolumeSpec) -> Result<usize> {
        let found = self.0.stores.iter().position(|store| store.label == spec.store);
        found.ok_or_else(|| {
            let message = format!("volume {:?}: no volume store {:?} is configured", &*spec.name, &*spec.store);
            Error::new(Status::Invalid, message)
        })
    }
}

/// Removes files of volumes that do not exist; one that stays behind is named by the next start.
async fn remove_files<P: Platform>(volumes: &[Rc<Volume<P>>]) {
    for volume in volumes {
        drop(volume.remove_file().await);
    }
}
