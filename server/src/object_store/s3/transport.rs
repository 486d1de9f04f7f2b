//! The seam to HTTP: one request out, one whole response back, within deadlines. What S3 needs of the world besides
//! [`crate::platform::Platform`].
//!
//! Implementations: `platform::glommio` (on the shard, keep-alive pool, no thread hop), `platform::blocking` (tools), and a
//! scripted one in the tests. None of them retries what the peer may have acted on, except a request on a kept
//! connection that the peer had closed before it answered a byte.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Head,
    Put,
    Post,
    Delete,
}

impl Method {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Put => "PUT",
            Method::Post => "POST",
            Method::Delete => "DELETE",
        }
    }
}

/// Bounds of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Name look-up, TCP and TLS handshakes.
    pub connect: Duration,
    /// Longest time in which nothing arrives.
    pub stall: Duration,
    /// The whole request: a peer that drips must end too.
    pub total: Duration,
}

/// A request. The URL may carry a signature: it is a secret, not for logs.
#[derive(Clone)]
pub struct HttpRequest<'a> {
    pub method: Method,
    pub url: &'a str,
    pub headers: Vec<(String, String)>,
    pub body: &'a [u8],
    /// A longer body of the response is an error.
    pub response_bytes_max: u64,
    pub deadlines: Deadlines,
}

/// A whole response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpResponse {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl HttpResponse {
    /// The first header of this name, given in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }
}

/// What went wrong below HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpErrorKind {
    /// No such host, nobody listens, no route, or no connection in time.
    Unreachable,
    /// The peer's certificate is not trusted, or the handshake failed.
    Tls,
    /// Connected, but the response did not come in time.
    Timeout,
    /// The connection broke, or what came is no HTTP.
    Broken,
    /// The response is longer than allowed.
    TooLong,
}

/// Why there is no response.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HttpError {
    pub kind: HttpErrorKind,
    pub message: String,
}

impl HttpError {
    pub fn new(kind: HttpErrorKind, message: impl fmt::Display) -> HttpError {
        HttpError { kind, message: message.to_string() }
    }
}

pub trait HttpTransport: Clone + 'static {
    /// Dropping the future closes the connection it used.
    fn send(&self, request: HttpRequest<'_>) -> impl Future<Output = Result<HttpResponse, HttpError>>;
    /// A small file such as a token, from any filesystem (direct I/O is not possible on all of them).
    fn read_file(&self, path: &Path) -> impl Future<Output = io::Result<Vec<u8>>>;
}

/// What can be found out of an `http:` or `https:` URL without decoding it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    pub tls: bool,
    /// Without the brackets of an IPv6 address.
    pub host: String,
    pub port: u16,
}

/// Splits a URL into where to connect, the value of `Host:`, and the path with its query.
///
/// # Errors
/// Says what is wrong with the URL, without repeating its query.
pub fn split_url(url: &str) -> Result<(Origin, &str, &str), String> {
    let (tls, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        _ => return Err("the URL begins with neither http:// nor https://".to_owned()),
    };
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(at);
    if path.starts_with('?') || authority.contains('@') {
        return Err(format!("{authority:?} is not host[:port]/path"));
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
        _ => (authority, Some(if tls { 443 } else { 80 })),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match port {
        Some(port) if !host.is_empty() => {
            let origin = Origin { tls, host: host.to_owned(), port };
            Ok((origin, authority, if path.is_empty() { "/" } else { path }))
        }
        _ => Err(format!("{authority:?} is not host or host:port")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Origin, split_url};

    #[test]
    fn urls_are_split_into_origin_host_and_path() {
        let origin = |tls, host: &str, port| Origin { tls, host: host.to_owned(), port };
        for (url, tls, host, port, authority, path) in [
            ("http://a", false, "a", 80, "a", "/"),
            ("https://a.b/c?d=e", true, "a.b", 443, "a.b", "/c?d=e"),
            ("http://127.0.0.1:9000/x/y", false, "127.0.0.1", 9000, "127.0.0.1:9000", "/x/y"),
            ("https://[::1]:1/", true, "::1", 1, "[::1]:1", "/"),
            ("https://[::1]/", true, "::1", 443, "[::1]", "/"),
        ] {
            assert_eq!(split_url(url), Ok((origin(tls, host, port), authority, path)), "{url}");
        }
        for bad in ["ftp://a", "http://", "http://a:x/", "http://:80/", "http://u:p@a/", "http://a?secret"] {
            let error = split_url(bad).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
