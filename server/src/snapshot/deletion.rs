//! Deletion of a snapshot: an intention first, then, once no node needs it, the manifest.
//!
//! The intention `deletions/<name>` is put before references are looked at, and a node looks for it after it has put its
//! reference: one of the two sees the other, so no manifest goes away under a volume. An intention is never taken back; it
//! ends with the snapshot. What was left half-way is carried out by garbage collection.

use volley_protocol::name::check_name;

use super::gc::{Clock, condemned, lease, mark, references};
use super::{CatalogError, Manifest, catalog, import_key, manifest_key, marker};
use crate::bootset::boot_set_key;
use crate::mutation::{self, Mutation};
use crate::object_store::{ObjectError, ObjectStore};

pub const DELETION_PREFIX: &str = "deletions/";
const HEAD: &str = "volley-deletion 1 ";
const UNKNOWN_ID: &str = "damaged";

/// What became of a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Deleted(Released),
    /// It will be, once these nodes need it no more.
    WhenUnused {
        nodes: Vec<String>,
    },
}

/// Packs that only the deleted snapshot referenced: condemned now, removed by garbage collection after its grace period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Released {
    pub packs_condemned: u64,
    pub bytes_condemned: u64,
}

/// Key of the intention to delete the snapshot `name`.
#[must_use]
pub fn deletion_key(name: &str) -> String {
    format!("{DELETION_PREFIX}{name}")
}

/// The bytes of an intention: one line of text. `None`: the manifest is damaged, so its id is not known.
#[must_use]
pub fn encode(id: Option<u128>) -> Vec<u8> {
    let id = id.map_or(UNKNOWN_ID.to_owned(), |id| format!("{id:032x}"));
    format!("{HEAD}{id}\n").into_bytes()
}

/// Whether an intention is about the snapshot `id`, and not about an earlier one of the same name.
#[must_use]
pub fn concerns(intention: &[u8], id: u128) -> bool {
    // What can't be read is believed: it costs a new volume, not an old one.
    decode(intention).is_none_or(|found| found == id)
}

/// The id of the snapshot that an intention is about, if it says so.
fn decode(intention: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(intention).ok()?;
    u128::from_str_radix(text.strip_prefix(HEAD)?.strip_suffix('\n')?, 16).ok()
}

/// Deletes the snapshot `name`. Also one whose manifest is damaged.
///
/// # Errors
/// `Referenced` while nodes need it, unless `when_unused`; it exists unchanged then. `Announced` when a node began to need
/// it in the same moment, `Rewriting` when its packs are being rewritten or somebody else deletes it: the deletion is carried out by garbage collection.
pub async fn delete<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    name: &str,
    when_unused: bool,
) -> Result<Outcome, CatalogError> {
    let bytes = match catalog::load_bytes(store, name).await {
        Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) if intention(store, name).await?.is_some() => {
            // A deletion was stopped after the manifest had gone.
            clean_up(store, name).await?;
            return Err(CatalogError::Unknown(name.to_owned()));
        }
        other => other?,
    };
    let nodes = references(store, name).await?;
    if !nodes.is_empty() && !when_unused {
        return Err(CatalogError::Referenced { name: name.to_owned(), nodes });
    }
    let id = Manifest::decode(&bytes).ok().map(|manifest| manifest.id);
    store.put(&deletion_key(name), &encode(id)).await?;
    match carry_out(store, clock, name).await {
        Ok(Outcome::WhenUnused { nodes }) if !when_unused => {
            Err(CatalogError::Announced { name: name.to_owned(), nodes })
        }
        // A collection found the intention at once.
        Err(CatalogError::Unknown(_)) if is_gone(store, name, id).await? => Ok(Outcome::Deleted(Released::default())),
        other => other,
    }
}

/// Whether the snapshot is no more, though another one may have the name. A manifest that can't be read, now or then, may be its own.
async fn is_gone<S: ObjectStore>(store: &S, name: &str, id: Option<u128>) -> Result<bool, ObjectError> {
    match store.get(&manifest_key(name)).await {
        Ok(bytes) => Ok(id.is_some_and(|id| Manifest::decode(&bytes).is_ok_and(|manifest| manifest.id != id))),
        Err(ObjectError::NotFound(_)) => Ok(true),
        Err(e) => Err(e),
    }
}

/// Carries out what was intended, as far as nodes let it. Gives the name and outcome of each.
///
/// # Errors
/// When the object store fails. The intentions that are left stay.
pub async fn carry_out_all<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
) -> Result<Vec<(String, Outcome)>, CatalogError> {
    let mut outcomes = Vec::new();
    for name in intended(store).await? {
        match carry_out(store, clock, &name).await {
            Ok(outcome) => outcomes.push((name, outcome)),
            Err(CatalogError::Rewriting(_) | CatalogError::Unknown(_)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(outcomes)
}

/// Names of the snapshots that are to be deleted.
///
/// # Errors
/// When the object store fails.
pub async fn intended<S: ObjectStore>(store: &S) -> Result<Vec<String>, CatalogError> {
    let objects = store.list(DELETION_PREFIX).await?;
    let names = objects.iter().filter_map(|o| o.key.strip_prefix(DELETION_PREFIX));
    Ok(names.filter(|name| check_name(name).is_ok()).map(str::to_owned).collect())
}

/// The intention to delete a snapshot of this name, if there is one. Whoever relies on a manifest looks for it before
/// the manifest is read: without an intention then, whoever deletes the manifest later sees what the reader has put before.
///
/// # Errors
/// When the object store fails.
pub async fn intention<S: ObjectStore>(store: &S, name: &str) -> Result<Option<Vec<u8>>, ObjectError> {
    match store.get(&deletion_key(name)).await {
        Ok(intention) => Ok(Some(intention)),
        Err(ObjectError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// With the intention in place. `Unknown` when there is nothing to delete any more.
async fn carry_out<S: ObjectStore>(store: &S, clock: &impl Clock, name: &str) -> Result<Outcome, CatalogError> {
    let nodes = references(store, name).await?;
    if !nodes.is_empty() && !mutation::on(Mutation::DeletionIgnoresReferences) {
        return Ok(Outcome::WhenUnused { nodes });
    }
    if lease::is_held(store, clock, name).await? {
        return Err(CatalogError::Rewriting(name.to_owned()));
    }
    // Read after the intention and the look for a lease: from here on nobody replaces it.
    let bytes = match store.get(&manifest_key(name)).await {
        Ok(bytes) => bytes,
        Err(ObjectError::NotFound(_)) => {
            clean_up(store, name).await?;
            return Err(CatalogError::Unknown(name.to_owned()));
        }
        Err(e) => return Err(e.into()),
    };
    let manifest = Manifest::decode(&bytes).ok();
    let intended = intention(store, name).await?;
    let is_meant = intended.as_deref().is_some_and(|intention| match &manifest {
        Some(manifest) => concerns(intention, manifest.id),
        // What can't be read may be another's by now, or a newer program's: only who deletes just that has it deleted.
        None => decode(intention).is_none(),
    });
    if !is_meant {
        if manifest.is_some() {
            // Another snapshot has the name by now.
            store.delete(&deletion_key(name)).await?;
        }
        return Err(CatalogError::Unknown(name.to_owned()));
    }
    let (opened, released) = condemn_own(store, clock, name, manifest.as_ref()).await?;
    let deleted = lease::delete_manifest(store, clock, name, &bytes).await;
    if let Some(opened) = opened {
        // Also if somebody else was at it: what is in use is not removed for being condemned.
        condemned::seal(store, clock, opened).await?;
    }
    match deleted? {
        true => clean_up(store, name).await?,
        // Another one who carries out the same has come first.
        false => return Err(CatalogError::Unknown(name.to_owned())),
    }
    Ok(Outcome::Deleted(released))
}

/// Condemns the packs that only this snapshot references, and those that are condemned already: their grace period
/// begins anew, because whoever read this manifest may still read by it.
async fn condemn_own<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    name: &str,
    manifest: Option<&Manifest>,
) -> Result<(Option<condemned::Condemnation>, Released), CatalogError> {
    let Some(manifest) = manifest else { return Ok((None, Released::default())) };
    let others = match mark::mark(store, mark::Depth::Packs, Some(name)).await {
        Ok(others) => others,
        // Condemning too much does no harm: only what no manifest references is ever removed.
        Err(CatalogError::Unreadable(_)) => mark::Mark::default(),
        Err(e) => return Err(e),
    };
    let condemned = condemned::packs(store).await?;
    let goes = |pack: &&String| !others.is_used(pack) || condemned.contains(pack.as_str());
    let mut packs: Vec<String> = manifest.pack_keys().iter().filter(goes).cloned().collect();
    packs.sort_unstable();
    packs.dedup();
    if packs.is_empty() {
        return Ok((None, Released::default()));
    }
    let listed = store.list(super::PACK_PREFIX).await?;
    let gone = listed.iter().filter(|pack| packs.binary_search(&pack.key).is_ok());
    let released = gone.fold(Released::default(), |sum, pack| Released {
        packs_condemned: sum.packs_condemned + 1,
        bytes_condemned: sum.bytes_condemned + pack.size_bytes,
    });
    Ok((Some(condemned::open(store, clock, packs, Vec::new()).await?), released))
}

/// Removes what is left of a snapshot without a manifest; the intention last, so that a crash leaves it.
async fn clean_up<S: ObjectStore>(store: &S, name: &str) -> Result<(), CatalogError> {
    let Some(intention) = intention(store, name).await? else { return Ok(()) };
    store.delete(&boot_set_key(name)).await?;
    // The import that made it may have failed to remove its marker.
    let id = decode(&intention);
    if id.is_some() && marker::read(store, name).await?.is_some_and(|marker| marker.id == id) {
        store.delete(&import_key(name)).await?;
    }
    Ok(store.delete(&deletion_key(name)).await?)
}

#[cfg(test)]
mod tests {
    use super::{concerns, encode};

    #[test]
    fn an_intention_concerns_its_snapshot_and_one_in_doubt_concerns_all() {
        assert!(concerns(&encode(Some(7)), 7) && !concerns(&encode(Some(7)), 8));
        assert!(concerns(&encode(None), 7) && concerns(b"", 7) && concerns(b"volley-deletion 2 x\n", 7));
    }
}
