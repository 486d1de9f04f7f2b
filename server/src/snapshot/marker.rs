//! The marker of an import in progress: it carries the import's id, so that a later run finds its packs, and it keeps
//! garbage collection away from packs that the coming manifest will reference.

use volley_protocol::name::check_name;

use super::{IMPORT_PREFIX, import_key};
use crate::object_store::{ObjectError, ObjectStore};

const HEAD: &str = "volley-import 1 ";

/// An import that has begun and not yet ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportMarker {
    pub name: String,
    /// `None`: the marker is damaged.
    pub id: Option<u128>,
}

/// The bytes of a marker: one line of text.
#[must_use]
pub fn encode(id: u128) -> Vec<u8> {
    format!("{HEAD}{id:032x}\n").into_bytes()
}

/// The import id of a marker, or `None` if it is damaged or of another version.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<u128> {
    let digits = std::str::from_utf8(bytes).ok()?.strip_prefix(HEAD)?.strip_suffix('\n')?;
    let id = u128::from_str_radix(digits, 16).ok()?;
    (encode(id) == bytes).then_some(id)
}

/// The marker of the import `name`, if there is one.
///
/// # Errors
/// When the object store fails.
pub async fn read<S: ObjectStore>(store: &S, name: &str) -> Result<Option<ImportMarker>, ObjectError> {
    match store.get(&import_key(name)).await {
        Ok(bytes) => Ok(Some(ImportMarker { name: name.to_owned(), id: decode(&bytes) })),
        Err(ObjectError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// All markers, sorted by name.
///
/// # Errors
/// When the object store fails.
pub async fn list<S: ObjectStore>(store: &S) -> Result<Vec<ImportMarker>, ObjectError> {
    let mut markers = Vec::new();
    for object in store.list(IMPORT_PREFIX).await? {
        let Some(name) = object.key.strip_prefix(IMPORT_PREFIX) else { continue };
        if check_name(name).is_ok() {
            markers.extend(read(store, name).await?);
        }
    }
    Ok(markers)
}

#[cfg(test)]
mod tests {
    use super::{decode, encode};

    #[test]
    fn markers_round_trip_and_damage_is_seen() {
        let bytes = encode(0xfeed);
        assert_eq!(decode(&bytes), Some(0xfeed));
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None);
        }
        assert_eq!(decode(&String::from_utf8(bytes).unwrap().to_uppercase().into_bytes()), None);
    }
}
