//! Rewriting: what is still referenced of packs that are mostly dead is copied to new packs, and the manifests that
//! reference them are replaced by ones that say where the same chunks are now.
//!
//! Nothing else ever replaces a manifest. It happens under a lease on the snapshot that a deletion looks for, so the object
//! under the name is the one that was read; `docs/snapshot.md`, "Rewriting", has the order and the proof.

use std::ops::Range;

use hashbrown::{HashMap, HashSet};
use serde::Serialize;

use super::condemned;
use super::lease::{self, LEASE_PREFIX, Lease};
use super::mark::{Depth, Mark, mark};
use super::{ABANDONED_MS, Clock, id_ms, open_imports};
use crate::object_store::{ObjectError, ObjectMeta, ObjectStore};
use crate::snapshot::claim::{Claim, ClaimError};
use crate::snapshot::{
    CatalogError, ChunkEntry, EncodedChunk, Encoding, IMPORT_PREFIX, Manifest, PACK_PREFIX, PackBuilder, SnapshotInfo,
    catalog, decode_chunk, deletion, import_key, manifest_key, marker, pack_key, parse_pack_key,
};

/// Live chunks that lie side by side are read together, up to this.
const READ_BYTES_MAX: u64 = 8 << 20;

/// What a rewrite did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rewritten {
    /// Packs whose live chunks were copied; they are condemned.
    pub packs: u64,
    pub bytes: u64,
    /// What the copies take, in new packs.
    pub live_bytes: u64,
    pub packs_written: u64,
    pub bytes_written: u64,
    /// Snapshots with a new manifest.
    pub snapshots: Vec<String>,
    /// Snapshots that were left as they are, and why.
    pub left: Vec<String>,
}

/// Rewrites the packs of which less than `below_percent` is referenced.
///
/// # Errors
/// `NoConditionalPut` on a store where it can't be made safe. What was done by then is whole.
pub async fn rewrite<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    below_percent: u8,
    dry_run: bool,
) -> Result<Rewritten, CatalogError> {
    if dry_run {
        return Ok(plan(store, below_percent).await?.report);
    }
    let id = clock.timed_id();
    let claim = Claim::begin(store, &claim_name(id), id).await.map_err(of_claim)?;
    let result = claimed(store, clock, below_percent, &claim).await;
    // What was copied in vain is garbage from here on.
    let ended = claim.end(store).await;
    let report = result?;
    ended?;
    Ok(report)
}

/// Drops the markers and leases of rewrites that are dead.
///
/// # Errors
/// When the object store fails.
pub async fn drop_abandoned<S: ObjectStore>(store: &S, clock: &impl Clock) -> Result<(), CatalogError> {
    for marker in marker::list(store).await? {
        if let Some(id) = marker.id
            && marker.name == claim_name(id)
            && clock.now_ms() >= id_ms(id).saturating_add(ABANDONED_MS)
        {
            store.delete(&import_key(&marker.name)).await?;
        }
    }
    for object in store.list(LEASE_PREFIX).await? {
        let Some(name) = object.key.strip_prefix(LEASE_PREFIX) else { continue };
        if Lease::read(store, name).await?.is_some_and(|id| lease::is_expired(id, clock)) {
            store.delete(&object.key).await?;
        }
    }
    Ok(())
}

/// Marker name of the rewrite `id`: in the list of open imports it tells what it is.
fn claim_name(id: u128) -> String {
    format!("rewrite-{id:032x}")
}

fn of_claim(error: ClaimError) -> CatalogError {
    match error {
        ClaimError::Store(e) => e.into(),
        // The name is nobody else's.
        other => CatalogError::Store(ObjectError::Fatal(format!("{IMPORT_PREFIX}rewrite-…: {other}"))),
    }
}

struct Plan {
    sparse: HashSet<String>,
    /// Snapshots that reference any of them.
    snapshots: Vec<String>,
    report: Rewritten,
}

async fn plan<S: ObjectStore>(store: &S, below_percent: u8) -> Result<Plan, CatalogError> {
    let condemned = condemned::packs(store).await?;
    let packs = store.list(PACK_PREFIX).await?;
    let importing: HashSet<u128> = open_imports(store).await?.into_iter().filter_map(|import| import.id).collect();
    let mark = mark(store, Depth::Chunks, None).await?;
    let live = mark.live();
    let mut report = Rewritten::default();
    let mut sparse = HashSet::new();
    for ObjectMeta { key, size_bytes } in packs {
        let Some((id, _)) = parse_pack_key(&key) else { continue };
        let Some(live) = live.get(key.as_str()).map(|live| live.packed_bytes()) else { continue };
        let is_sparse = u128::from(live) * 100 < u128::from(size_bytes) * u128::from(below_percent);
        if is_sparse && !condemned.contains(&key) && !importing.contains(&id) {
            report.packs += 1;
            report.bytes += size_bytes;
            report.live_bytes += live;
            sparse.insert(key);
        }
    }
    let snapshots = users(&mark, &sparse);
    Ok(Plan { sparse, snapshots, report })
}

fn users(mark: &Mark, packs: &HashSet<String>) -> Vec<String> {
    let mut names: Vec<&str> = packs.iter().flat_map(|pack| mark.users_of(pack)).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(str::to_owned).collect()
}

async fn claimed<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    below_percent: u8,
    claim: &Claim,
) -> Result<Rewritten, CatalogError> {
    if !store.puts_once() {
        return Err(CatalogError::NoConditionalPut);
    }
    let Plan { sparse, snapshots, report } = plan(store, below_percent).await?;
    if sparse.is_empty() {
        return Ok(report);
    }
    let mut copier = Copier::new(store, claim.id, sparse, report);
    for name in &snapshots {
        in_time(clock, claim.id, ABANDONED_MS / 4)?;
        match catalog::load(store, name).await {
            Ok(manifest) => copier.copy(&manifest).await?,
            Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => {}
            Err(e) => return Err(e),
        }
    }
    let mut copied = copier.finish().await?;
    if copied.packs.is_empty() {
        return Ok(copied.report);
    }
    let mut packs: Vec<String> = copied.packs.iter().cloned().collect();
    packs.sort_unstable();
    // Before the first manifest is replaced: whatever happens then, somebody knows of the readers of the old ones.
    let opened = condemned::open(store, clock, packs, snapshots.clone()).await?;
    for name in snapshots {
        in_time(clock, claim.id, ABANDONED_MS / 2)?;
        match replace(store, clock, claim, &name, &copied).await? {
            Replaced::Yes => copied.report.snapshots.push(name),
            Replaced::Needless => {}
            Replaced::Left(why) => copied.report.left.push(format!("{name}: {why}")),
        }
    }
    condemned::seal(store, clock, opened).await?;
    Ok(copied.report)
}

/// Whoever takes longer may be taken for dead.
fn in_time(clock: &impl Clock, id: u128, limit_ms: u64) -> Result<(), CatalogError> {
    if clock.now_ms() < id_ms(id).saturating_add(limit_ms) {
        Ok(())
    } else {
        Err(CatalogError::TooSlow(limit_ms / 3_600_000))
    }
}

/// Where a chunk is now.
#[derive(Clone, Copy)]
struct Place {
    /// Number among the new packs.
    pack: u32,
    offset: u64,
    stored_len: u32,
    encoding: Encoding,
}

/// Sparse packs whose live chunks are in new packs.
struct Copied {
    id: u128,
    /// Those of which every live chunk could be read.
    packs: HashSet<String>,
    places: HashMap<[u8; 32], Place>,
    report: Rewritten,
}

/// Copies chunks, in the order of the snapshots' devices.
struct Copier<'a, S> {
    store: &'a S,
    copied: Copied,
    filling: PackBuilder,
    number: u32,
}

impl<'a, S: ObjectStore> Copier<'a, S> {
    fn new(store: &'a S, id: u128, packs: HashSet<String>, report: Rewritten) -> Copier<'a, S> {
        let copied = Copied { id, packs, places: HashMap::new(), report };
        Copier { store, copied, filling: PackBuilder::new(id, 0), number: 0 }
    }

    async fn copy(&mut self, manifest: &Manifest) -> Result<(), CatalogError> {
        let chunks: Vec<u32> = (0..manifest.chunk_count()).filter(|index| self.is_wanted(manifest, *index)).collect();
        let mut rest = chunks.as_slice();
        while let Some(first) = rest.first() {
            let (run, range) = run_of(manifest, rest);
            rest = &rest[run..];
            let ChunkEntry::Stored { pack, .. } = manifest.chunk(*first) else { continue };
            let pack = manifest.pack_key(pack);
            match self.store.get_range(pack, range.clone()).await {
                Ok(bytes) => {
                    self.take(manifest, &chunks[chunks.len() - rest.len() - run..][..run], range.start, &bytes).await?
                }
                Err(e @ (ObjectError::NotFound(_) | ObjectError::Corrupt(_))) => self.spoil(pack, &e.to_string()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn is_wanted(&self, manifest: &Manifest, index: u32) -> bool {
        match manifest.chunk(index) {
            ChunkEntry::Zero => false,
            ChunkEntry::Stored { pack, digest, .. } => {
                self.copied.packs.contains(manifest.pack_key(pack)) && !self.copied.places.contains_key(&digest)
            }
        }
    }

    /// Chunks of one pack, read from `start` of it on.
    async fn take(
        &mut self,
        manifest: &Manifest,
        chunks: &[u32],
        start: u64,
        bytes: &[u8],
    ) -> Result<(), CatalogError> {
        for index in chunks {
            let entry = manifest.chunk(*index);
            let ChunkEntry::Stored { pack, offset, stored_len, encoding, digest } = entry else { continue };
            if self.copied.places.contains_key(&digest) {
                continue;
            }
            let at = usize::try_from(offset - start).expect("within one read");
            let stored = &bytes[at..at + stored_len as usize];
            // Damage is not carried on under a new key.
            if let Err(e) = decode_chunk(&entry, stored, manifest.chunk_len(*index)) {
                self.spoil(manifest.pack_key(pack), &format!("chunk {index} of snapshot {:?}: {e}", manifest.name));
                continue;
            }
            let raw_len = manifest.chunk_len(*index);
            self.push(EncodedChunk { digest, encoding, stored: stored.to_vec(), raw_len }).await?;
        }
        Ok(())
    }

    async fn push(&mut self, chunk: EncodedChunk) -> Result<(), CatalogError> {
        if !self.filling.has_room(chunk.stored.len()) {
            self.store_filled().await?;
        }
        let offset = u64::from(self.filling.push(&chunk));
        let stored_len = u32::try_from(chunk.stored.len()).expect("a chunk has at most 4 MiB");
        let place = Place { pack: self.number, offset, stored_len, encoding: chunk.encoding };
        self.copied.places.insert(chunk.digest, place);
        Ok(())
    }

    async fn store_filled(&mut self) -> Result<(), CatalogError> {
        let filled = std::mem::replace(&mut self.filling, PackBuilder::new(self.copied.id, self.number + 1));
        if filled.is_empty() {
            return Ok(());
        }
        let bytes = filled.finish();
        self.store.put_if_absent(&pack_key(self.copied.id, self.number), &bytes).await?;
        self.copied.report.packs_written += 1;
        self.copied.report.bytes_written += bytes.len() as u64;
        self.number += 1;
        Ok(())
    }

    /// Leaves a damaged pack as it is.
    fn spoil(&mut self, pack: &str, why: &str) {
        if self.copied.packs.remove(pack) {
            self.copied.report.packs -= 1;
            self.copied.report.left.push(format!("{pack}: {why}"));
        }
    }

    async fn finish(mut self) -> Result<Copied, CatalogError> {
        self.store_filled().await?;
        Ok(self.copied)
    }
}

/// How many of `chunks` lie side by side in one pack, and where.
fn run_of(manifest: &Manifest, chunks: &[u32]) -> (usize, Range<u64>) {
    let place = |index: u32| match manifest.chunk(index) {
        ChunkEntry::Stored { pack, offset, stored_len, .. } => (pack, offset..offset + u64::from(stored_len)),
        ChunkEntry::Zero => (u32::MAX, 0..0),
    };
    let (pack, mut range) = place(chunks[0]);
    let mut len = 1;
    while let Some(next) = chunks.get(len).map(|index| place(*index))
        && next.0 == pack
        && next.1.start == range.end
        && next.1.end - range.start <= READ_BYTES_MAX
    {
        range.end = next.1.end;
        len += 1;
    }
    (len, range)
}

enum Replaced {
    Yes,
    /// It does not reference any of the packs.
    Needless,
    Left(&'static str),
}

/// Replaces the manifest of one snapshot, under its lease.
async fn replace<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    claim: &Claim,
    name: &str,
    copied: &Copied,
) -> Result<Replaced, CatalogError> {
    let Some(lease) = Lease::take(store, clock, name).await? else {
        return Ok(Replaced::Left("another rewrite is at it"));
    };
    let replaced = replace_under(&lease, store, clock, claim, copied).await;
    lease.end(store).await?;
    replaced
}

async fn replace_under<S: ObjectStore>(
    lease: &Lease<'_>,
    store: &S,
    clock: &impl Clock,
    claim: &Claim,
    copied: &Copied,
) -> Result<Replaced, CatalogError> {
    // The intention first. If there is none, and the manifest is there after that, then whoever deletes it sees the lease.
    let intention = deletion::intention(store, lease.name).await?;
    let manifest = match catalog::load(store, lease.name).await {
        Ok(manifest) => manifest,
        Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => return Ok(Replaced::Left("it was deleted")),
        Err(e) => return Err(e),
    };
    let Some(new) = relocated(&manifest, copied)? else { return Ok(Replaced::Needless) };
    if intention.is_some_and(|intention| deletion::concerns(&intention, manifest.id)) {
        return Ok(Replaced::Left("it is to be deleted"));
    }
    if !claim.is_in_place(store).await? {
        return Ok(Replaced::Left("the rewrite was dropped by 'volley image gc --incomplete'"));
    }
    if !lease.is_held(store, clock).await? {
        return Ok(Replaced::Left("it took too long"));
    }
    store.put(&manifest_key(lease.name), &new.encode()).await?;
    Ok(Replaced::Yes)
}

/// The same snapshot with its chunks where they are now; `None` if it references none of the packs.
fn relocated(manifest: &Manifest, copied: &Copied) -> Result<Option<Manifest>, CatalogError> {
    if !manifest.pack_keys().iter().any(|key| copied.packs.contains(key)) {
        return Ok(None);
    }
    let mut keys: Vec<String> = Vec::new();
    let mut numbers: HashMap<String, u32> = HashMap::new();
    let mut number_of = |key: String| {
        *numbers.entry(key).or_insert_with_key(|key| {
            keys.push(key.clone());
            u32::try_from(keys.len() - 1).expect("fewer packs than chunks")
        })
    };
    let relocate = |index: u32| {
        let entry = manifest.chunk(index);
        let ChunkEntry::Stored { pack, digest, .. } = entry else { return entry };
        let key = manifest.pack_key(pack);
        match copied.places.get(&digest).filter(|_| copied.packs.contains(key)) {
            None => in_pack(entry, number_of(key.to_owned())),
            Some(Place { pack, offset, stored_len, encoding }) => {
                let pack = number_of(pack_key(copied.id, *pack));
                ChunkEntry::Stored { pack, offset: *offset, stored_len: *stored_len, encoding: *encoding, digest }
            }
        }
    };
    let entries: Vec<ChunkEntry> = (0..manifest.chunk_count()).map(relocate).collect();
    let info = SnapshotInfo {
        id: manifest.id,
        name: manifest.name.clone(),
        size_bytes: manifest.size_bytes,
        chunk_bytes: manifest.chunk_bytes,
        parent: manifest.parent.clone(),
        created_unix_ms: manifest.created_unix_ms,
    };
    let invalid = |source| CatalogError::Manifest { name: manifest.name.clone(), source };
    Manifest::new(info, keys, &entries).map(Some).map_err(invalid)
}

/// The same entry with another number for its pack.
fn in_pack(entry: ChunkEntry, number: u32) -> ChunkEntry {
    match entry {
        ChunkEntry::Zero => ChunkEntry::Zero,
        ChunkEntry::Stored { offset, stored_len, encoding, digest, .. } => {
            ChunkEntry::Stored { pack: number, offset, stored_len, encoding, digest }
        }
    }
}
