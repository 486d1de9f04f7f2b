//! Volume names and how a name leads to the shard that owns the volume.

/// Longest volume or snapshot name in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// The 16-bit tag of a volume name. A volume id carries it in its top 16 bits, so both the name and the id lead
/// to the owner: `shard = tag % shards`.
#[must_use]
pub fn name_tag(name: &str) -> u16 {
    (crc32fast::hash(name.as_bytes()) & 0xffff) as u16
}

/// Checks a volume or snapshot name: 1 to 128 bytes of `[A-Za-z0-9._-]`, not starting with `.` or `-`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!("name {name:?} must have 1 to {NAME_BYTES_MAX} bytes"));
    }
    if name.starts_with(['.', '-']) || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!(
            "name {name:?} may contain only letters, digits, '.', '_' and '-', and must not start with '.' or '-'"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{check_name, name_tag};

    #[test]
    fn tags_are_frozen() {
        assert_eq!(name_tag("web-7"), (crc32fast::hash(b"web-7") & 0xffff) as u16);
        assert_eq!(name_tag(""), 0);
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-7", "debian_12.x"] {
            assert_eq!(check_name(good), Ok(()));
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
