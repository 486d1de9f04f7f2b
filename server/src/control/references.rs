//! Which snapshots this node holds a reference on, so that nobody deletes a snapshot that volumes here still need.
//!
//! A reference is the object `refs/<snapshot>/<node id>`. It is written before a volume is created and before the
//! manifest is checked for the last time, and dropped once no shard needs the snapshot any more. Creation and upkeep
//! hold the same mutex, so upkeep can't drop the reference of a creation in progress.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::shard::api::Command;
use crate::snapshot::{REFERENCE_PREFIX, reference_key};

use super::Control;

/// How long a snapshot that is no longer needed stays referenced, at most, when no deletion prompts the upkeep.
const UPKEEP_PERIOD: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct References {
    /// Snapshot names whose reference object exists, as far as is known.
    held: BTreeSet<String>,
    /// The references that exist have been read, and no put or delete since then has an unknown outcome.
    listed: bool,
}

impl References {
    pub(super) fn holds(&self, snapshot: &str) -> bool {
        self.held.contains(snapshot)
    }

    /// Makes the reference durable. What shards hand out from here on was read after that: packs of an older manifest may be gone.
    pub(super) async fn hold(&mut self, control: &Control, snapshot: &str) -> Result<()> {
        let held = References::put(control, snapshot).await;
        match held {
            Ok(()) => drop(self.held.insert(snapshot.to_string())),
            Err(_) => self.listed = false,
        }
        held
    }

    async fn put(control: &Control, snapshot: &str) -> Result<()> {
        let (node, shards) = (control.node_id_text(), &control.0.shards);
        shards.put_object(reference_key(snapshot, &node), format!("{node}\n").into_bytes()).await?;
        let snapshot: Arc<str> = snapshot.into();
        shards.query_all(|reply| Command::ForgetManifest { snapshot: snapshot.clone(), reply }).await?;
        Ok(())
    }

    async fn release(&mut self, control: &Control, snapshot: &str) -> Result<()> {
        // First of all: from here on a creation must write it again.
        self.held.remove(snapshot);
        let deleted = control.0.shards.delete_object(reference_key(snapshot, &control.node_id_text())).await;
        if deleted.is_err() {
            self.listed = false;
        }
        deleted
    }

    async fn list(&mut self, control: &Control) -> Result<()> {
        let node = control.node_id_text();
        let objects = control.0.shards.list_objects(REFERENCE_PREFIX).await?;
        let of_this_node = objects.iter().filter_map(|object| {
            object.key.strip_prefix(REFERENCE_PREFIX)?.strip_suffix(&node)?.strip_suffix('/').map(str::to_string)
        });
        self.held.extend(of_this_node);
        self.listed = true;
        Ok(())
    }

    /// Makes what is held equal to what the shards need.
    async fn reconcile(&mut self, control: &Control) -> Result<()> {
        if !self.listed {
            self.list(control).await?;
        }
        let stats = control.0.shards.query_all(|reply| Command::Stats { reply }).await?;
        let mut needed: BTreeSet<String> = stats.into_iter().flat_map(|stats| stats.snapshots_needed).collect();
        needed.extend(control.0.batches.snapshots_needed());
        for missing in needed.difference(&self.held.clone()) {
            tracing::warn!(snapshot = missing, "reference was missing: writing it again");
            self.hold(control, missing).await?;
        }
        for unneeded in self.held.clone().difference(&needed) {
            self.release(control, unneeded).await?;
            tracing::info!(snapshot = unneeded, "reference released");
        }
        Ok(())
    }
}

impl Control {
    pub(super) fn node_id_text(&self) -> String {
        format!("{:032x}", self.0.settings.node_id)
    }

    /// Keeps the references equal to what is needed, for ever. Errors are logged and tried again next time.
    pub(super) async fn keep_references(&self) {
        loop {
            let mut references = self.0.references.lock().await;
            if let Err(error) = references.reconcile(self).await {
                tracing::warn!(%error, "references not updated: trying again");
            }
            drop(references);
            let _ = tokio::time::timeout(UPKEEP_PERIOD, self.0.upkeep_due.notified()).await;
        }
    }
}
