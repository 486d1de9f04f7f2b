//! Which object store to use, as operators write it: `file:DIR` or `s3://BUCKET/PREFIX`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A parsed object store URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectStoreUrl {
    /// A directory, by absolute path.
    File(PathBuf),
    S3(S3Location),
}

/// A bucket, and what stands before every key in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Location {
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
}

/// Bucket and prefix together stay well below the 1,024 bytes of a key.
const PREFIX_BYTES_MAX: usize = 256;

impl FromStr for ObjectStoreUrl {
    type Err = String;

    /// The error says what to write instead.
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
        if let Some(rest) = url.strip_prefix("s3://") {
            return S3Location::parse(rest)
                .map(ObjectStoreUrl::S3)
                .map_err(|why| format!("object store {url:?}: {why}"));
        }
        Err(format!(
            "object store {url:?} is not a URL: use file:DIR, e.g. file:/var/lib/volley/objects, or s3://BUCKET/PREFIX"
        ))
    }
}

impl S3Location {
    fn parse(text: &str) -> Result<S3Location, String> {
        let (bucket, prefix) = text.split_once('/').unwrap_or((text, ""));
        let prefix = prefix.trim_end_matches('/');
        let of_name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if bucket.is_empty() || bucket.len() > 255 || !bucket.bytes().all(of_name) || bucket.starts_with('.') {
            return Err(
                "write s3://BUCKET or s3://BUCKET/PREFIX, the bucket of letters, digits, '.', '_' and '-'".into()
            );
        }
        // Other characters would have to be escaped, and each store does that in its own way.
        let component = |c: &str| !c.is_empty() && c != "." && c != ".." && c.bytes().all(|b| of_name(b) || b == b'=');
        if prefix.len() > PREFIX_BYTES_MAX || !(prefix.is_empty() || prefix.split('/').all(component)) {
            return Err(format!(
                "the prefix must be parts of letters, digits, '.', '_', '-' and '=' with single slashes between them, at \
                 most {PREFIX_BYTES_MAX} characters"
            ));
        }
        Ok(S3Location { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for S3Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        write!(f, "s3://{}{slash}{}", self.bucket, self.prefix)
    }
}

impl fmt::Display for ObjectStoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectStoreUrl::File(path) => write!(f, "file:{}", path.display()),
            ObjectStoreUrl::S3(location) => location.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectStoreUrl;

    #[test]
    fn urls_are_parsed_or_refused_with_advice() {
        for (good, shown) in [
            ("file:/a/b", "file:/a/b"),
            ("file:///a/b", "file:/a/b"),
            ("s3://bucket", "s3://bucket"),
            ("s3://my.bucket-1/", "s3://my.bucket-1"),
            ("s3://bucket/a/b=c/", "s3://bucket/a/b=c"),
        ] {
            assert_eq!(good.parse::<ObjectStoreUrl>().unwrap().to_string(), shown);
        }
        for (bad, why) in [
            ("file:objects", "absolute"),
            ("file://host/a", "absolute"),
            ("s3:bucket", "s3://BUCKET"),
            ("s3://", "write s3://BUCKET"),
            ("s3:///prefix", "write s3://BUCKET"),
            ("s3://buc ket", "write s3://BUCKET"),
            ("s3://bucket/a//b", "single slashes"),
            ("s3://bucket/../other", "prefix"),
            ("s3://bucket/a?b", "prefix"),
            ("/a/b", "use file:DIR"),
            ("", "use file:DIR"),
        ] {
            let error = bad.parse::<ObjectStoreUrl>().unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
