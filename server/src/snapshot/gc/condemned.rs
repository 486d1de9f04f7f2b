//! Condemnations: which packs are to be removed, since when, and what has to end before.
//!
//! One object `gc/<id>` for each, put open first, then once more when it is sealed (`docs/snapshot.md` has the format and
//! the order). As long as a condemnation is there, nobody begins to reference its packs.

use hashbrown::HashSet;
use volley_protocol::name::check_name;

use super::{ABANDONED_MS, Clock, OpenImport, id_ms, open_imports};
use crate::object_store::{ObjectError, ObjectStore};
use crate::snapshot::{CatalogError, parse_pack_key};

pub const CONDEMNED_PREFIX: &str = "gc/";
const HEAD: &str = "volley-condemned 1";
const DAMAGED_MARKER: &str = "damaged";

/// Packs that are removed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condemnation {
    /// Of [`Clock::timed_id`].
    pub id: u128,
    /// When it was sealed; `None`: open, so whoever put it may still be at work.
    pub sealed_ms: Option<u64>,
    pub packs: Vec<String>,
    /// Imports that were open after the condemnation was put: they may reference the packs.
    pub imports: Vec<OpenImport>,
    /// Snapshots whose manifests referenced the packs until a rewrite: nodes may still read by those manifests.
    pub snapshots: Vec<String>,
}

impl Condemnation {
    #[must_use]
    pub fn key(&self) -> String {
        format!("{CONDEMNED_PREFIX}{:032x}", self.id)
    }

    /// Whoever put it is dead, and did not seal it.
    #[must_use]
    pub fn is_abandoned(&self, now_ms: u64) -> bool {
        self.sealed_ms.is_none() && now_ms >= id_ms(self.id).saturating_add(ABANDONED_MS)
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut lines = vec![HEAD.to_owned()];
        lines.push(self.sealed_ms.map_or("open".to_owned(), |ms| format!("sealed {ms}")));
        lines.extend(self.packs.iter().map(|pack| format!("pack {pack}")));
        lines.extend(self.imports.iter().map(|import| match import.id {
            Some(id) => format!("import {} {id:032x}", import.name),
            None => format!("import {} {DAMAGED_MARKER}", import.name),
        }));
        lines.extend(self.snapshots.iter().map(|name| format!("snapshot {name}")));
        let mut text = lines.join("\n") + "\n";
        let digest = blake3::hash(text.as_bytes()).to_hex();
        text.push_str(&format!("blake3 {digest}\n"));
        text.into_bytes()
    }

    /// # Errors
    /// Says what is wrong with the bytes.
    pub fn decode(id: u128, bytes: &[u8]) -> Result<Condemnation, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
        let (body, digest) =
            text.strip_suffix('\n').and_then(|t| t.rsplit_once("\nblake3 ")).ok_or("it is not whole")?;
        let body = format!("{body}\n");
        if digest != blake3::hash(body.as_bytes()).to_hex().as_str() {
            return Err("it fails its checksum".to_owned());
        }
        let mut lines = body.lines();
        if lines.next() != Some(HEAD) {
            return Err("it is of another version: upgrade this program".to_owned());
        }
        let sealed_ms = match lines.next().ok_or("it has no state")? {
            "open" => None,
            state => Some(state.strip_prefix("sealed ").and_then(|ms| ms.parse().ok()).ok_or("its state is unknown")?),
        };
        let mut found = Condemnation { id, sealed_ms, packs: Vec::new(), imports: Vec::new(), snapshots: Vec::new() };
        lines.try_for_each(|line| found.take(line).ok_or_else(|| format!("line {line:?} is unknown")))?;
        Ok(found)
    }

    fn take(&mut self, line: &str) -> Option<()> {
        match line.split_once(' ')? {
            ("pack", key) => self.packs.push(parse_pack_key(key).map(|_| key.to_owned())?),
            ("import", import) => {
                let (name, id) = import.split_once(' ')?;
                check_name(name).ok()?;
                let id = if id == DAMAGED_MARKER { None } else { Some(u128::from_str_radix(id, 16).ok()?) };
                self.imports.push(OpenImport { name: name.to_owned(), id });
            }
            ("snapshot", name) => self.snapshots.push(check_name(name).map(|()| name.to_owned()).ok()?),
            _ => return None,
        }
        Some(())
    }
}

/// Condemns packs: from here on nobody begins to reference them. It has no effect until it is [sealed](seal).
///
/// # Errors
/// When the object store fails.
pub async fn open<S: ObjectStore>(
    store: &S,
    clock: &impl Clock,
    packs: Vec<String>,
    snapshots: Vec<String>,
) -> Result<Condemnation, CatalogError> {
    let opened = Condemnation { id: clock.timed_id(), sealed_ms: None, packs, imports: Vec::new(), snapshots };
    store.put_if_absent(&opened.key(), &opened.encode()).await?;
    Ok(opened)
}

/// Seals a condemnation: the grace period begins. The imports are looked at after the packs were condemned, so any that
/// may have chosen one of them before is found, or has ended.
///
/// # Errors
/// When the object store fails.
pub async fn seal<S: ObjectStore>(store: &S, clock: &impl Clock, opened: Condemnation) -> Result<(), CatalogError> {
    let imports = open_imports(store).await?;
    let sealed = Condemnation { sealed_ms: Some(clock.now_ms()), imports, ..opened };
    Ok(store.put(&sealed.key(), &sealed.encode()).await?)
}

/// All condemnations.
///
/// # Errors
/// `Condemned` for one that can't be read: what it condemns is not known, so nothing may be removed or shared.
pub async fn list<S: ObjectStore>(store: &S) -> Result<Vec<Condemnation>, CatalogError> {
    let mut found = Vec::new();
    for object in store.list(CONDEMNED_PREFIX).await? {
        let Some(id) = parse_key(&object.key) else { continue };
        let bytes = match store.get(&object.key).await {
            Ok(bytes) => bytes,
            // Carried out meanwhile.
            Err(ObjectError::NotFound(_)) => continue,
            Err(e) => return Err(e.into()),
        };
        let damaged = |why| CatalogError::Condemned { key: object.key.clone(), why };
        found.push(Condemnation::decode(id, &bytes).map_err(damaged)?);
    }
    Ok(found)
}

/// Keys of all condemned packs.
///
/// # Errors
/// See [`list`].
pub async fn packs<S: ObjectStore>(store: &S) -> Result<HashSet<String>, CatalogError> {
    Ok(list(store).await?.into_iter().flat_map(|condemned| condemned.packs).collect())
}

fn parse_key(key: &str) -> Option<u128> {
    let id = u128::from_str_radix(key.strip_prefix(CONDEMNED_PREFIX)?, 16).ok()?;
    (format!("{CONDEMNED_PREFIX}{id:032x}") == key).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::pack_key;

    #[test]
    fn condemnations_round_trip_and_damage_is_seen() {
        let import = |name: &str, id| OpenImport { name: name.to_owned(), id };
        let condemned = Condemnation {
            id: 7,
            sealed_ms: Some(12),
            packs: vec![pack_key(1, 0), pack_key(2, 9)],
            imports: vec![import("a", Some(5)), import("b", None)],
            snapshots: vec!["c".to_owned()],
        };
        let bytes = condemned.encode();
        assert_eq!(Condemnation::decode(7, &bytes), Ok(condemned.clone()));
        let open = Condemnation { sealed_ms: None, packs: vec![], imports: vec![], snapshots: vec![], ..condemned };
        assert_eq!(Condemnation::decode(7, &open.encode()), Ok(open));
        for at in 0..bytes.len() {
            assert!(Condemnation::decode(7, &bytes[..at]).is_err(), "{at} bytes");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(Condemnation::decode(7, &flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn only_keys_of_one_spelling_are_condemnations() {
        assert_eq!(parse_key(&format!("gc/{:032x}", 0xab)), Some(0xab));
        for bad in ["gc/ab", "gc/", "gc/readme", "packs/ab", "gc/+0000000000000000000000000000001"] {
            assert_eq!(parse_key(bad), None, "{bad}");
        }
    }
}
