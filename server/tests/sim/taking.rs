//! Snapshots of volumes that guests write to, in the order of `server/src/control/taking.rs`: marker, freeze, cut, capture,
//! packs, manifest, end of the cut.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use volley_server::error::{Error, Result, Status};
use volley_server::object_store::ObjectStore;
use volley_server::platform::Platform;
use volley_server::shard::api::{Command, CutVolume, CutWanted, Prepared};
use volley_server::snapshot::claim::{Claim, StoredPacks};
use volley_server::snapshot::draft::{Draft, Put};
use volley_server::snapshot::gc::Clock;
use volley_server::snapshot::{Manifest, SnapshotInfo, encode_chunk, is_zero, pack_prefix, parse_pack_key};
use volley_server::types::VolumeId;

use crate::control::{Control, of_catalog, of_claim, of_store};
use crate::guest::VolumeRc;
use crate::model::Moment;

/// A volume on its way.
struct Subject {
    volume: VolumeRc,
    name: String,
    snapshot: String,
    prepared: Prepared,
}

impl Control<'_> {
    /// A snapshot of a volume, or of two at one moment. `false`: nobody wanted it to the end.
    pub async fn take(&self) -> Result<bool> {
        let Some(first) = self.any_volume() else { return Ok(false) };
        let other = if self.below(3) == 0 { self.any_volume() } else { None };
        let other = other.filter(|other| !Rc::ptr_eq(other, &first));
        let mut subjects = Vec::new();
        for volume in [first].into_iter().chain(other) {
            subjects.push(self.look_up(volume).await?);
        }
        let manifests = subjects.iter().flat_map(|subject: &Subject| subject.prepared.manifests());
        let built_on: Vec<Arc<str>> = manifests.map(|manifest| manifest.name.as_str().into()).collect();
        let slow = self.below(3) == 0;
        if slow {
            self.built_on.borrow_mut().extend(built_on.iter().cloned());
        }
        let taken = self.take_of(&subjects, slow).await;
        self.built_on.borrow_mut().retain(|name| !built_on.contains(name));
        taken
    }

    pub async fn take_one(&self, volume: &VolumeRc, slow: bool) -> Result<bool> {
        let subject = self.look_up(volume.clone()).await?;
        self.take_of(&[subject], slow).await
    }

    /// With pauses, if it is `slow`: others come in between.
    async fn take_of(&self, subjects: &[Subject], slow: bool) -> Result<bool> {
        if slow {
            self.looked_up.borrow_mut().extend(subjects.iter().map(|subject| subject.volume.clone()));
            self.pause(250_000).await;
            self.looked_up.borrow_mut().clear();
        }
        let mut claims = Vec::new();
        for subject in subjects {
            match Claim::begin(&self.store, &subject.snapshot, self.clock().timed_id()).await {
                Ok(claim) => claims.push(claim),
                Err(error) => {
                    self.abandon(&claims).await;
                    return Err(of_claim(&error));
                }
            }
        }
        let cut = self.sim.random_u64();
        let (cuts, moments) = match self.cut_all(subjects, cut).await {
            Ok(made) => made,
            Err(error) => {
                self.abandon(&claims).await;
                return Err(error);
            }
        };
        for ((subject, claim), moment) in subjects.iter().zip(&claims).zip(moments) {
            self.guests.snapshots_taken.begin(&subject.snapshot, claim.id, moment);
        }
        let given_up = self.below(8) == 0;
        let mut result = self.store_all(subjects, &claims, cut, &cuts, slow).await;
        if let Some(delay) = self.before_commit.get() {
            self.sim.sleep(delay).await;
        }
        if let Ok(manifests) = &result
            && !given_up
            && let Err(error) = self.commit_all(&claims, manifests).await
        {
            result = Err(error);
        }
        for (at, (subject, made)) in subjects.iter().zip(&cuts).enumerate() {
            let snapshot = result.as_ref().ok().filter(|_| !given_up).map(|manifests| manifests[at].reference());
            let end = |reply| Command::EndCut { volume: made.volume, cut, snapshot, reply };
            // It reads more the next time.
            drop(self.node.command(&subject.name, end).await);
        }
        let manifests = result?;
        if given_up {
            self.guests.count("snapshot given up");
            return Ok(false);
        }
        self.guests.count_many("group of volumes", u64::from(manifests.len() > 1));
        self.guests.count_many("incremental snapshot", cuts.iter().filter(|cut| cut.known).count() as u64);
        Ok(true)
    }

    async fn abandon(&self, claims: &[Claim]) {
        for claim in claims {
            drop(claim.abandon(&self.store).await);
        }
    }

    async fn look_up(&self, volume: VolumeRc) -> Result<Subject> {
        let name = volume.borrow().spec.name.to_string();
        let lineage = self.lineage(&name).await?;
        let source = match lineage.source.as_ref().filter(|_| !lineage.hydrated) {
            Some(source) => Some(self.manifest_of(source).await?.ok_or_else(|| {
                // Hydrated meanwhile, or rolled back.
                Error::new(Status::UnknownSnapshot, format!("the source of {name:?} is gone"))
            })?),
            None => None,
        };
        let base = match &lineage.lineage.base {
            Some(base) => self.manifest_of(base).await?,
            None => None,
        };
        let prepared = Prepared::new(lineage, base.map(Arc::new), source.map(Arc::new));
        let snapshot = self.guests.snapshots_taken.new_name();
        Ok(Subject { volume, name, snapshot, prepared })
    }

    /// All volumes at one moment, and what each of them was then: all writes are held back, and none is at the disk.
    async fn cut_all(&self, subjects: &[Subject], cut: u64) -> Result<(Vec<CutVolume>, Vec<Moment>)> {
        let mut by_shard: BTreeMap<usize, Vec<CutWanted>> = BTreeMap::new();
        for subject in subjects {
            let shard = VolumeId::new(&subject.name, 0).owner(self.node.shards.len());
            by_shard.entry(shard).or_default().push(subject.prepared.wanted(&subject.name));
        }
        for wanted in by_shard.values() {
            let names: Vec<String> = wanted.iter().map(|wanted| wanted.name.clone()).collect();
            let first = names[0].clone();
            self.node.command(&first, |reply| Command::Freeze { names, cut, reply }).await?;
        }
        let moments: Vec<Moment> = subjects.iter().map(|subject| subject.volume.borrow().moment()).collect();
        if self.below(2) == 0 {
            self.pause(3000).await;
        }
        let mut cuts: BTreeMap<String, CutVolume> = BTreeMap::new();
        let mut failed = None;
        for wanted in by_shard.into_values() {
            let first = wanted[0].name.clone();
            match self.node.command(&first, |reply| Command::Cut { wanted, cut, reply }).await {
                Ok(made) => cuts.extend(made.into_iter().map(|cut| (cut.name.clone(), cut))),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        for subject in subjects {
            match self.lineage(&subject.name).await {
                Ok(now) if cuts.get(&subject.name).is_some_and(|made| made.fits(&subject.prepared.lineage, &now)) => {}
                Ok(_) => failed = failed.or(Some(Error::new(Status::Conflict, "changed by others meanwhile"))),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let Some(error) = failed else {
            return Ok((subjects.iter().filter_map(|subject| cuts.remove(&subject.name)).collect(), moments));
        };
        for made in cuts.values() {
            let end = |reply| Command::EndCut { volume: made.volume, cut, snapshot: None, reply };
            drop(self.node.command(&made.name, end).await);
        }
        Err(error)
    }

    async fn store_all(
        &self,
        subjects: &[Subject],
        claims: &[Claim],
        cut: u64,
        cuts: &[CutVolume],
        slow: bool,
    ) -> Result<Vec<Manifest>> {
        let mut manifests = Vec::new();
        for ((subject, claim), made) in subjects.iter().zip(claims).zip(cuts) {
            manifests.push(self.store_one(subject, claim, (cut, made), slow).await?);
        }
        Ok(manifests)
    }

    async fn store_one(
        &self,
        subject: &Subject,
        claim: &Claim,
        (cut, made): (u64, &CutVolume),
        slow: bool,
    ) -> Result<Manifest> {
        let builds_on = subject.prepared.builds_on(made);
        let mut prefixes = BTreeSet::new();
        for key in builds_on.iter().flat_map(|manifest| manifest.pack_keys()) {
            prefixes.extend(parse_pack_key(key).map(|(id, _)| pack_prefix(id)));
        }
        let stored = StoredPacks::under(&self.store, prefixes).await.map_err(|e| of_catalog(&e))?;
        let lineage = &subject.prepared.lineage;
        let info = SnapshotInfo {
            id: claim.id,
            name: subject.snapshot.clone(),
            size_bytes: lineage.size_bytes,
            chunk_bytes: lineage.chunk_bytes,
            parent: subject.prepared.parent(),
            created_unix_ms: 0,
        };
        let mut draft = Draft::new(info, builds_on.cloned());
        // What it builds on may be shorter.
        let end = builds_on.as_ref().map_or(lineage.chunks(), |manifest| manifest.chunk_count());
        for chunk in end..lineage.chunks() {
            draft.put(chunk, &Put::Zero).map_err(|e| Error::new(Status::Internal, e.to_string()))?;
        }
        for chunk in &made.chunks {
            if slow {
                self.pause(40_000).await;
            }
            if self.below(80) == 0 {
                return Err(Error::new(Status::Conflict, "given up on the way"));
            }
            let (volume, chunk) = (made.volume, *chunk);
            let capture = |reply| Command::Capture { volume, cut, chunk, reply };
            let raw = self.node.command(&subject.name, capture).await?;
            let put = if is_zero(&raw) { Put::Zero } else { Put::Data(encode_chunk(&raw, 1)) };
            draft.put(chunk, &put).map_err(|e| Error::new(Status::Internal, e.to_string()))?;
            if self.below(6) == 0 {
                draft.seal();
            }
            self.store_sealed(&mut draft).await?;
        }
        if slow {
            self.pause(300_000).await;
        }
        draft.seal();
        self.store_sealed(&mut draft).await?;
        let manifest = draft.manifest(self.clock().now_ms());
        let manifest = manifest.map_err(|e| Error::new(Status::Internal, e.to_string()))?;
        let (own, reusable) = (pack_prefix(claim.id), stored.reusable());
        match manifest.pack_keys().iter().find(|key| !key.starts_with(&own) && !reusable.contains_key(key.as_str())) {
            None => Ok(manifest),
            Some(gone) => Err(Error::new(Status::Conflict, format!("{gone} is gone, or about to go"))),
        }
    }

    async fn store_sealed(&self, draft: &mut Draft) -> Result<()> {
        let Some((key, bytes)) = draft.sealed() else { return Ok(()) };
        self.store.put_if_absent(key, bytes).await.map_err(of_store)?;
        draft.sealed_is_stored();
        Ok(())
    }

    /// All or none, as far as the object store lets us.
    async fn commit_all(&self, claims: &[Claim], manifests: &[Manifest]) -> Result<()> {
        for (at, (claim, manifest)) in claims.iter().zip(manifests).enumerate() {
            match claim.commit(&self.store, manifest).await {
                Ok(()) => self.guests.snapshots_taken.committed(&self.store.objects, &claim.name),
                Err(error) => {
                    for made in &claims[..at] {
                        drop(self.delete(&made.name, true).await);
                    }
                    return Err(of_claim(&error));
                }
            }
        }
        Ok(())
    }
}
