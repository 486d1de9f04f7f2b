//! One collection: carries out intended deletions, removes packs whose time has come, condemns what has become garbage.
//!
//! A pack is removed if it was condemned long enough ago, every import that was open then has ended, no node reads it by a
//! manifest of before a rewrite, and no manifest references it now.

use std::time::Duration;

use hashbrown::{HashMap, HashSet};
use serde::Serialize;
use volley_protocol::name::check_name;

use super::condemned::{self, Condemnation};
use super::mark::{Depth, Live, Mark, mark};
use super::rewrite::{self, Rewritten};
use super::{ABANDONED_MS, Clock, OpenImport, open_imports, references};
use crate::mutation::{self, Mutation};
use crate::object_store::{ObjectMeta, ObjectStore};
use crate::snapshot::deletion::{self, Outcome};
use crate::snapshot::{CatalogError, PACK_PREFIX, catalog, import_key, marker, parse_pack_key};

/// Longer than any export or verification should hold on to a manifest that is no more.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(3600);
/// Snapshots named as users of one pack; the rest are counted.
const USERS_NAMED: usize = 3;

#[derive(Clone, Debug)]
pub struct GcOptions {
    /// A pack stays for so long after it was condemned.
    pub grace: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Give up the interrupted import of this name first.
    pub drop_import: Option<String>,
    /// Rewrite packs of which less than so many percent are referenced.
    pub rewrite_below_percent: Option<u8>,
}

impl Default for GcOptions {
    fn default() -> GcOptions {
        GcOptions { grace: GRACE_DEFAULT, dry_run: false, drop_import: None, rewrite_below_percent: None }
    }
}

/// What is done with a pack, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing references it, and its time is over.
    Remove,
    /// Nothing references it any more: it is removed by a later collection.
    Condemn,
    /// Condemned, within the grace period.
    WaitForGrace { left_ms: u64 },
    /// Condemned, and imports that were open then, and may use it, have not ended.
    WaitForImports { imports: Vec<String> },
    /// Condemned, and nodes may still read it by a manifest of before a rewrite.
    WaitForNodes { nodes: Vec<String> },
    /// Another deletion, collection or rewrite is at it.
    WaitForOthers,
    /// Of an import that has not ended.
    Importing { import: String },
    /// Referenced by this many snapshots, of which some are named.
    Used {
        snapshots: usize,
        named: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        live_bytes: Option<u64>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PackVerdict {
    pub pack: String,
    pub bytes: u64,
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// A snapshot that is to be deleted when no node needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pending {
    pub snapshot: String,
    pub nodes: Vec<String>,
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    pub dry_run: bool,
    pub packs_removed: u64,
    pub bytes_removed: u64,
    pub packs_condemned: u64,
    pub bytes_condemned: u64,
    /// Condemned before, and not removed yet.
    pub packs_waiting: u64,
    pub bytes_waiting: u64,
    pub snapshots_deleted: Vec<String>,
    pub deletions_pending: Vec<Pending>,
    /// Names of imports that are running or were interrupted.
    pub imports_open: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewritten: Option<Rewritten>,
    /// Every pack, sorted by key.
    pub packs: Vec<PackVerdict>,
}

/// Collects garbage.
///
/// # Errors
/// See [`CatalogError`]. Whatever was done by then is whole, and the next collection goes on from there.
pub async fn collect<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    options: &GcOptions,
) -> Result<GcReport, CatalogError> {
    let mut report = GcReport { dry_run: options.dry_run, ..GcReport::default() };
    if options.dry_run {
        for snapshot in deletion::intended(store).await? {
            let nodes = references(store, &snapshot).await?;
            report.deletions_pending.push(Pending { snapshot, nodes });
        }
    } else {
        prepare(store, clock, options, &mut report).await?;
    }
    if let Some(percent) = options.rewrite_below_percent {
        report.rewritten = Some(rewrite::rewrite(store, clock, percent, options.dry_run).await?);
    }
    pass(store, clock, options, &mut report).await?;
    // Without a grace period what was condemned a moment ago is ripe.
    if options.grace.is_zero() && !options.dry_run && report.packs_condemned > 0 {
        (report.packs_condemned, report.bytes_condemned) = (0, 0);
        pass(store, clock, options, &mut report).await?;
    }
    Ok(report)
}

/// All that is not about packs.
async fn prepare<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    options: &GcOptions,
    report: &mut GcReport,
) -> Result<(), CatalogError> {
    if let Some(name) = &options.drop_import {
        check_name(name).map_err(CatalogError::Name)?;
        if marker::read(store, name).await?.is_none() {
            return Err(CatalogError::NoImport(name.clone()));
        }
        store.delete(&import_key(name)).await?;
    }
    drop_finished_markers(store, clock).await?;
    rewrite::drop_abandoned(store, clock).await?;
    for (snapshot, outcome) in deletion::carry_out_all(store, clock).await? {
        match outcome {
            Outcome::Deleted(_) => report.snapshots_deleted.push(snapshot),
            Outcome::WhenUnused { nodes } => report.deletions_pending.push(Pending { snapshot, nodes }),
        }
    }
    Ok(())
}

/// Removes markers that finished imports failed to remove: not sooner than the import, which looks for its marker once
/// more after the commit, must be over.
async fn drop_finished_markers<S: ObjectStore>(store: &S, clock: &impl Clock) -> Result<(), CatalogError> {
    for marker in marker::list(store).await? {
        if let Ok(manifest) = catalog::load(store, &marker.name).await
            && marker.id == Some(manifest.id)
            && clock.now_ms() >= manifest.created_unix_ms.saturating_add(ABANDONED_MS)
        {
            store.delete(&import_key(&marker.name)).await?;
        }
    }
    Ok(())
}

/// What one pass has seen, in this order.
struct Seen {
    condemned: Vec<Condemnation>,
    packs: Vec<ObjectMeta>,
    open: Vec<OpenImport>,
    mark: Mark,
    /// Once more, after the manifests: what changed meanwhile decides nothing.
    condemned_after: Vec<Condemnation>,
    /// Nodes that need the snapshots of the condemnations.
    nodes: HashMap<String, Vec<String>>,
    now_ms: u64,
}

impl Seen {
    async fn look<S: ObjectStore>(store: &S, clock: &impl Clock, depth: Depth) -> Result<Seen, CatalogError> {
        let now_ms = clock.now_ms();
        let condemned = condemned::list(store).await?;
        let packs = store.list(PACK_PREFIX).await?;
        let open = open_imports(store).await?;
        let mark = mark(store, depth, None).await?;
        let condemned_after = condemned::list(store).await?;
        let mut nodes = HashMap::new();
        for snapshot in condemned.iter().flat_map(|condemned| &condemned.snapshots) {
            if !nodes.contains_key(snapshot) {
                nodes.insert(snapshot.clone(), references(store, snapshot).await?);
            }
        }
        Ok(Seen { condemned, packs, open, mark, condemned_after, nodes, now_ms })
    }

    fn readers<'a>(&'a self, condemned: &'a Condemnation) -> impl Iterator<Item = &'a String> {
        condemned.snapshots.iter().filter_map(|snapshot| self.nodes.get(snapshot)).flatten()
    }

    /// Condemned with the same words before and after the manifests were read.
    fn is_settled(&self, condemned: &Condemnation) -> bool {
        self.condemned.contains(condemned) && self.condemned_after.contains(condemned)
    }

    fn verdict(&self, pack: &str, by: &HashMap<&str, Vec<&Condemnation>>, grace_ms: u64) -> Verdict {
        let id = parse_pack_key(pack).map(|(id, _)| id);
        if let Some(import) = self.open.iter().find(|import| import.id.is_some() && import.id == id) {
            return Verdict::Importing { import: import.name.clone() };
        }
        let Some(all) = by.get(pack) else { return Verdict::Condemn };
        if all.iter().any(|condemned| !self.is_settled(condemned) || condemned.sealed_ms.is_none()) {
            return Verdict::WaitForOthers;
        }
        let sealed_ms = all.iter().filter_map(|condemned| condemned.sealed_ms).max().unwrap_or(self.now_ms);
        let left_ms = sealed_ms.saturating_add(grace_ms).saturating_sub(self.now_ms);
        if left_ms > 0 {
            return Verdict::WaitForGrace { left_ms };
        }
        let may_use = |import: &&OpenImport| all.iter().any(|condemned| condemned.imports.contains(import));
        let imports: Vec<String> = self.open.iter().filter(may_use).map(|import| import.name.clone()).collect();
        if !imports.is_empty() && !mutation::on(Mutation::CollectionIgnoresImports) {
            return Verdict::WaitForImports { imports };
        }
        let mut nodes: Vec<String> = all.iter().flat_map(|condemned| self.readers(condemned)).cloned().collect();
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() { Verdict::Remove } else { Verdict::WaitForNodes { nodes } }
    }

    fn verdicts(&self, grace: Duration, depth: Depth) -> Vec<PackVerdict> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let mut by: HashMap<&str, Vec<&Condemnation>> = HashMap::new();
        for condemned in self.condemned.iter().chain(&self.condemned_after) {
            for pack in &condemned.packs {
                by.entry(pack.as_str()).or_default().push(condemned);
            }
        }
        let live = (depth == Depth::Chunks).then(|| self.mark.live());
        // Objects with other names are somebody else's.
        let packs = self.packs.iter().filter(|pack| parse_pack_key(&pack.key).is_some());
        let verdict = |pack: &ObjectMeta| match self.mark.users.get(&pack.key) {
            Some(users) => Verdict::Used {
                snapshots: users.len(),
                named: self.mark.users_of(&pack.key).take(USERS_NAMED).map(str::to_owned).collect(),
                live_bytes: live
                    .as_ref()
                    .map(|live| live.get(pack.key.as_str()).copied().map_or(0, Live::packed_bytes)),
            },
            None => self.verdict(&pack.key, &by, grace_ms),
        };
        packs
            .map(|pack| PackVerdict { pack: pack.key.clone(), bytes: pack.size_bytes, verdict: verdict(pack) })
            .collect()
    }
}

async fn pass<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    options: &GcOptions,
    report: &mut GcReport,
) -> Result<(), CatalogError> {
    let depth = if options.dry_run { Depth::Chunks } else { Depth::Packs };
    let seen = Seen::look(store, clock, depth).await?;
    let verdicts = seen.verdicts(options.grace, depth);
    let keys = |wanted: &Verdict| -> Vec<&str> {
        verdicts.iter().filter(|v| v.verdict == *wanted).map(|v| v.pack.as_str()).collect()
    };
    let (remove, condemn) = (keys(&Verdict::Remove), keys(&Verdict::Condemn));
    if !options.dry_run {
        store.delete_all(&remove).await?;
        finish(store, clock, &seen, &remove.iter().copied().collect()).await?;
        if !condemn.is_empty() {
            let packs = condemn.iter().map(|pack| (*pack).to_owned()).collect();
            let opened = condemned::open(store, clock, packs, Vec::new()).await?;
            condemned::seal(store, clock, opened).await?;
        }
    }
    report.imports_open = seen.open.iter().map(|import| import.name.clone()).collect();
    report.count(&verdicts);
    report.packs = verdicts;
    Ok(())
}

/// Removes condemnations that are carried out, and seals those of the dead.
async fn finish<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    seen: &Seen,
    removed: &HashSet<&str>,
) -> Result<(), CatalogError> {
    let there: HashSet<&str> = seen.packs.iter().map(|pack| pack.key.as_str()).collect();
    for condemned in seen.condemned.iter().filter(|condemned| seen.is_settled(condemned)) {
        if condemned.is_abandoned(seen.now_ms) {
            condemned::seal(store, clock, condemned.clone()).await?;
            continue;
        }
        let is_done = |pack: &String| {
            let pack = pack.as_str();
            !there.contains(pack) || removed.contains(pack) || seen.mark.is_used(pack)
        };
        // One that was put for a rewrite stays while a node may read by an older manifest: it alone says so.
        let done = condemned.packs.iter().all(is_done) && seen.readers(condemned).next().is_none();
        if done && condemned.sealed_ms.is_some() {
            store.delete(&condemned.key()).await?;
        }
    }
    Ok(())
}

impl GcReport {
    fn count(&mut self, verdicts: &[PackVerdict]) {
        (self.packs_waiting, self.bytes_waiting) = (0, 0);
        for PackVerdict { bytes, verdict, .. } in verdicts {
            let (packs, sum) = match verdict {
                Verdict::Remove => (&mut self.packs_removed, &mut self.bytes_removed),
                Verdict::Condemn => (&mut self.packs_condemned, &mut self.bytes_condemned),
                Verdict::Used { .. } | Verdict::Importing { .. } => continue,
                _ => (&mut self.packs_waiting, &mut self.bytes_waiting),
            };
            *packs += 1;
            *sum += bytes;
        }
    }
}
