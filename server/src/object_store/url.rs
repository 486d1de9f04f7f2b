//! Which object store to use, as operators write it: `file:DIR`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A parsed object store URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectStoreUrl {
    /// A directory, by absolute path.
    File(PathBuf),
}

impl FromStr for ObjectStoreUrl {
    type Err = String;

    /// Parses `file:/path` or `file:///path`; the error says what to write instead.
    fn from_str(url: &str) -> Result<ObjectStoreUrl, String> {
        if let Some(rest) = url.strip_prefix("file:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err(format!(
                    "object store {url:?} has a relative path: write an absolute one, e.g. file:/var/lib/volley/objects"
                ));
            }
            return Ok(ObjectStoreUrl::File(PathBuf::from(path)));
        }
        if url.starts_with("s3:") {
            return Err(format!("object store {url:?}: S3 is not supported yet, use file:DIR"));
        }
        Err(format!("object store {url:?} is not a URL: use file:DIR, e.g. file:/var/lib/volley/objects"))
    }
}

impl fmt::Display for ObjectStoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectStoreUrl::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectStoreUrl;

    #[test]
    fn urls_are_parsed_or_refused_with_advice() {
        for good in ["file:/a/b", "file:///a/b"] {
            assert_eq!(good.parse::<ObjectStoreUrl>().unwrap().to_string(), "file:/a/b");
        }
        for (bad, why) in [
            ("file:objects", "absolute"),
            ("file://host/a", "absolute"),
            ("s3://bucket", "not supported yet, use file:DIR"),
            ("/a/b", "use file:DIR"),
            ("", "use file:DIR"),
        ] {
            let error = bad.parse::<ObjectStoreUrl>().unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
