//! What the snapshots of an object store take, and what would be freed.

use hashbrown::HashSet;
use serde::Serialize;

use super::mark::{Depth, Live, Mark, SHARED, mark};
use super::{OpenImport, condemned, open_imports};
use crate::object_store::{ObjectMeta, ObjectStore};
use crate::snapshot::{CatalogError, PACK_PREFIX, parse_pack_key};

/// What one snapshot takes. All bytes are stored bytes; a chunk that occurs twice counts once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SnapshotUsage {
    pub name: String,
    /// Different chunks that are stored.
    pub chunks: u64,
    /// Of packs that no other snapshot references: deleting this one alone frees them, after the grace period.
    pub own_bytes: u64,
    /// Of chunks that no other snapshot references, in packs that others do: freed when those packs are rewritten.
    pub own_in_shared_packs_bytes: u64,
    /// Of chunks that other snapshots reference as well.
    pub shared_bytes: u64,
}

/// Sums over all packs: `live`, `dead`, `condemned` and `importing` add up to `bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub packs: u64,
    pub bytes: u64,
    /// Of chunks that snapshots reference, and of what packs need around them.
    pub live_bytes: u64,
    /// What nothing references: parts of packs that are in use, and whole packs that no collection has met yet.
    pub dead_bytes: u64,
    /// Of packs that are removed by a later collection.
    pub condemned_bytes: u64,
    /// Of packs of imports that are running or were interrupted.
    pub importing_bytes: u64,
    /// Objects under `packs/` that are no packs; they count nowhere else.
    pub foreign_objects: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub snapshots: Vec<SnapshotUsage>,
    pub total: Totals,
}

/// Reads all manifests and lists all packs.
///
/// # Errors
/// `Unreadable` names a snapshot whose manifest is damaged.
pub async fn usage<S: ObjectStore>(store: &S) -> Result<Usage, CatalogError> {
    let condemned = condemned::packs(store).await?;
    let packs = store.list(PACK_PREFIX).await?;
    let open = open_imports(store).await?;
    let mark = mark(store, Depth::Chunks, None).await?;
    Ok(Usage { total: totals(&mark, &packs, &condemned, &open), snapshots: snapshots(&mark, &packs) })
}

fn totals(mark: &Mark, packs: &[ObjectMeta], condemned: &HashSet<String>, open: &[OpenImport]) -> Totals {
    let live = mark.live();
    let mut total = Totals::default();
    for ObjectMeta { key, size_bytes } in packs {
        let Some((id, _)) = parse_pack_key(key) else {
            total.foreign_objects += 1;
            continue;
        };
        total.packs += 1;
        total.bytes += size_bytes;
        if mark.is_used(key) {
            let live = live.get(key.as_str()).copied().map_or(0, Live::packed_bytes).min(*size_bytes);
            total.live_bytes += live;
            total.dead_bytes += size_bytes - live;
        } else if open.iter().any(|import| import.id == Some(id)) {
            total.importing_bytes += size_bytes;
        } else if condemned.contains(key) {
            total.condemned_bytes += size_bytes;
        } else {
            total.dead_bytes += size_bytes;
        }
    }
    total
}

fn snapshots(mark: &Mark, packs: &[ObjectMeta]) -> Vec<SnapshotUsage> {
    let named = |name: &String| SnapshotUsage { name: name.clone(), ..SnapshotUsage::default() };
    let mut usage: Vec<SnapshotUsage> = mark.names.iter().map(named).collect();
    // Packs by number that only one snapshot references.
    let mut sole = HashSet::new();
    for ObjectMeta { key, size_bytes } in packs {
        if let Some([only]) = mark.users.get(key).map(Vec::as_slice) {
            usage[*only as usize].own_bytes += size_bytes;
            sole.extend(mark.number(key));
        }
    }
    for (snapshot, sum) in usage.iter_mut().zip(&mark.sums) {
        (snapshot.chunks, snapshot.shared_bytes) = (sum.chunks, sum.bytes);
    }
    for (pack, part) in mark.parts().filter(|(_, part)| part.owner != SHARED) {
        let (of, bytes) = (&mut usage[part.owner as usize], u64::from(part.stored_len));
        of.shared_bytes -= bytes;
        if !sole.contains(&pack) {
            of.own_in_shared_packs_bytes += bytes;
        }
    }
    usage
}
