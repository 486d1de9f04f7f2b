//! How an upload ends: its packs and the manifest are put, or what it left in the object store is removed.

use std::sync::atomic::Ordering;

use hashbrown::HashSet;

use crate::error::Status;
use crate::snapshot::draft::Draft;
use crate::snapshot::{Manifest, import_key, manifest_key, marker, pack_prefix};
use crate::upload::{self, Record};

use super::super::blocks::off_thread;
use super::super::problem::{Answer, Problem};
use super::api::unix_ms;
use super::{Control, Ended, Upload, lock, parse_id};

impl Control {
    /// Makes the snapshot exist. The same request again answers the same.
    pub(super) async fn complete_upload(&self, text: &str, blocks_changed: u32) -> Answer<Manifest> {
        let upload = match self.0.uploads.get(text) {
            Ok(upload) => upload,
            Err(problem) => {
                return match parse_id(text).and_then(|id| self.0.uploads.end_of(id)) {
                    Some(Ended::Completed { snapshot }) => self.manifest_as_it_is(&snapshot).await,
                    _ => Err(problem),
                };
            }
        };
        let mut draft = upload.draft.lock().await;
        if upload.over.load(Ordering::Relaxed) {
            return match self.0.uploads.end_of(upload.id) {
                Some(Ended::Completed { snapshot }) => self.manifest_as_it_is(&snapshot).await,
                _ => Err(self.0.uploads.gone(upload.id)),
            };
        }
        if draft.blocks_put() != blocks_changed {
            let put = draft.blocks_put();
            return Err(Problem::invalid(format!("blocks_changed: {blocks_changed}, but {put} blocks were put")));
        }
        self.store_sealed(&upload, &mut draft).await?;
        draft.seal();
        self.store_sealed(&upload, &mut draft).await?;
        let manifest = draft.manifest(unix_ms()).map_err(|e| Problem::invalid(e.to_string()))?;
        self.check_packs(upload.id, &manifest).await?;
        let manifest = self.commit(&upload, manifest).await?;
        self.0.uploads.end(&upload, Ended::Completed { snapshot: upload.snapshot.clone() });
        // The marker is of no use any more, and the packs are the snapshot's.
        self.leave_record(upload.record(), false).await;
        Ok(manifest)
    }

    /// Ends an upload without a snapshot.
    pub(super) async fn abandon_upload(&self, text: &str) -> Answer<()> {
        let upload = self.0.uploads.get(text)?;
        // A block on its way is stored or refused before the packs are removed.
        let _draft = upload.draft.lock().await;
        match self.0.uploads.end(&upload, Ended::Abandoned) {
            true => self.leave(&upload).await,
            false => return Err(self.0.uploads.gone(upload.id)),
        }
        Ok(())
    }

    /// Stores the pack that waits, if one does. An error leaves it waiting for the next request.
    pub(super) async fn store_sealed(&self, upload: &Upload, draft: &mut Draft) -> Answer<()> {
        let Some((key, bytes)) = draft.sealed() else { return Ok(()) };
        let shards = &self.0.shards;
        if !shards.put_object_if_absent(key.to_owned(), bytes.to_vec()).await?
            // By an attempt whose answer was lost; or by an import that took this upload for an interrupted one.
            && shards.get_object(key).await?.as_deref() != Some(bytes)
        {
            return Err(interfered(&upload.snapshot));
        }
        draft.sealed_is_stored();
        Ok(())
    }

    /// An upload may take hours, and the object store be another one in between: a filesystem that was not mounted, say.
    async fn check_packs(&self, id: u128, manifest: &Manifest) -> Answer<()> {
        let prefix = pack_prefix(id);
        let found: HashSet<String> =
            self.0.shards.list_objects(&prefix).await?.into_iter().map(|object| object.key).collect();
        match manifest.pack_keys().iter().find(|key| key.starts_with(&prefix) && !found.contains(*key)) {
            None => Ok(()),
            Some(gone) => {
                let why = format!("{gone} of this upload is gone from the object store: abandon it and start again");
                Err(Problem::new(Status::Conflict, why))
            }
        }
    }

    /// Puts the manifest, with the marker in place before and after: a garbage collection that was told to drop the
    /// upload may have removed packs, and then the manifest must go too.
    async fn commit(&self, upload: &Upload, manifest: Manifest) -> Answer<Manifest> {
        let shards = &self.0.shards;
        let (name, key) = (&upload.snapshot, manifest_key(&upload.snapshot));
        if !self.is_marked(&upload.record()).await? {
            return Err(interfered(name));
        }
        upload.committing.store(true, Ordering::Relaxed);
        if !shards.put_object_if_absent(key.clone(), manifest.encode()).await? {
            let found = self.manifest_as_it_is(name).await?;
            // An attempt before this one may have put it, though its answer was lost.
            return match (found.id == upload.id, same_content(&found, &manifest)) {
                (true, true) => Ok(found),
                (true, false) => Err(interfered(name)),
                (false, _) => Err(Problem::new(Status::NameTaken, format!("snapshot {name:?} exists already"))),
            };
        }
        if !self.is_marked(&upload.record()).await? {
            shards.delete_object(key).await?;
            return Err(interfered(name));
        }
        Ok(manifest)
    }

    async fn is_marked(&self, record: &Record) -> Answer<bool> {
        let found = self.0.shards.get_object(&import_key(&record.snapshot)).await?;
        Ok(found.is_some_and(|bytes| marker::decode(&bytes) == Some(record.id)))
    }

    /// Removes what an upload that is over left. What can't be removed now is removed later.
    pub(super) async fn leave(&self, upload: &Upload) {
        self.leave_record(upload.record(), !upload.committing.load(Ordering::Relaxed)).await;
    }

    pub(super) async fn leave_record(&self, record: Record, packs_too: bool) {
        lock(&self.0.uploads.left).push((record, packs_too));
        self.clean().await;
    }

    /// Tries to remove what is left of all uploads that are over.
    pub(super) async fn clean(&self) {
        let _alone = self.0.uploads.cleaning.lock().await;
        let left = lock(&self.0.uploads.left).clone();
        for (record, packs_too) in left {
            match self.clean_up(&record, packs_too).await {
                Ok(()) => lock(&self.0.uploads.left).retain(|(left, _)| *left != record),
                Err(problem) => {
                    tracing::warn!(snapshot = record.snapshot, error = problem.detail(), "an upload left its marker");
                    // The next one would wait for the same object store.
                    return;
                }
            }
        }
    }

    /// Marker first, then packs: an import that took the marker over finds it gone before it commits. Packs go only if the
    /// marker was still there and no manifest has the id.
    async fn clean_up(&self, record: &Record, packs_too: bool) -> Answer<()> {
        if self.is_marked(record).await? {
            self.0.shards.delete_object(import_key(&record.snapshot)).await?;
            if packs_too && !self.is_committed(record).await? {
                for pack in self.0.shards.list_objects(&pack_prefix(record.id)).await? {
                    self.0.shards.delete_object(pack.key).await?;
                }
            }
        }
        let (data, id) = (self.0.settings.data.clone(), record.id);
        let removed = off_thread(move || upload::remove(&data, id)).await?;
        removed.map_err(|e| Problem::new(Status::Io, format!("the file of an upload: {e}")))
    }

    async fn is_committed(&self, record: &Record) -> Answer<bool> {
        match self.manifest_as_it_is(&record.snapshot).await {
            Ok(manifest) => Ok(manifest.id == record.id),
            Err(problem) if problem.is(Status::UnknownSnapshot) => Ok(false),
            // Unreadable: it may be ours.
            Err(problem) if problem.is(Status::Corrupt) => Ok(true),
            Err(problem) => Err(problem),
        }
    }
}

fn same_content(found: &Manifest, made: &Manifest) -> bool {
    crate::snapshot::diff::changes(found, made, 0).is_ok_and(|mut changes| changes.next().is_none())
}

fn interfered(name: &str) -> Problem {
    let why = format!("the upload of {name:?} was dropped or taken over by an import of that name: start again");
    Problem::new(Status::Conflict, why)
}
