//! HTTP for command-line tools, by `ureq`: it blocks, so its futures are ready at once. One agent, with its pool of
//! kept connections, serves all threads of a tool.

use std::io;
use std::path::Path;
use std::time::Duration;

use ureq::http::{self, Request};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Timeout};

use crate::object_store::s3::transport::{HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpTransport, Method};

/// Connections kept for the next request: as many as a tool has threads, within reason.
const IDLE_CONNECTIONS_MAX: usize = 64;
/// Stores close idle connections after some seconds; one that is closed as we write costs another attempt.
const IDLE_MAX: Duration = Duration::from_secs(4);

/// Clones share connections.
#[derive(Clone)]
pub struct BlockingHttp {
    agent: Agent,
}

impl BlockingHttp {
    /// `ca_file`: the only authorities to trust; without it those of the Mozilla programme.
    ///
    /// # Errors
    /// One line that names the file and what is wrong with it.
    pub fn new(ca_file: Option<&Path>) -> Result<BlockingHttp, String> {
        let roots = ca_file.map_or(Ok(RootCerts::WebPki), roots_of)?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Shards use none either: what a check by a tool says holds for the server.
            .proxy(None)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .max_idle_connections(IDLE_CONNECTIONS_MAX)
            .max_idle_connections_per_host(IDLE_CONNECTIONS_MAX)
            .max_idle_age(IDLE_MAX)
            .build();
        Ok(BlockingHttp { agent: config.into() })
    }

    fn exchange(&self, request: &HttpRequest<'_>) -> Result<HttpResponse, ureq::Error> {
        let mut builder = Request::builder().method(request.method.as_str()).uri(request.url);
        for (name, value) in &request.headers {
            builder = builder.header(name, value);
        }
        let mut response = match request.method {
            Method::Put | Method::Post => self.run(builder.body(request.body)?, request)?,
            Method::Get | Method::Head | Method::Delete => self.run(builder.body(())?, request)?,
        };
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
        let headers = headers.collect();
        let body = response.body_mut().with_config().limit(request.response_bytes_max).read_to_vec()?;
        Ok(HttpResponse { status: response.status().as_u16(), headers, body })
    }

    fn run<B: ureq::AsSendBody>(
        &self,
        request: Request<B>,
        of: &HttpRequest<'_>,
    ) -> Result<http::Response<ureq::Body>, ureq::Error> {
        let request = self
            .agent
            .configure_request(request)
            .timeout_resolve(Some(of.deadlines.connect))
            .timeout_connect(Some(of.deadlines.connect))
            .timeout_per_read(Some(of.deadlines.stall))
            .timeout_per_write(Some(of.deadlines.stall))
            .timeout_global(Some(of.deadlines.total))
            .build();
        self.agent.run(request)
    }
}

impl HttpTransport for BlockingHttp {
    async fn send(&self, request: HttpRequest<'_>) -> Result<HttpResponse, HttpError> {
        match self.exchange(&request) {
            // A kept connection that the store closed meanwhile fails at once; a fresh one tells what is true.
            Err(ureq::Error::Io(error)) if is_repeatable(request.method) && is_stale(&error) => {
                self.exchange(&request).map_err(http_error)
            }
            result => result.map_err(http_error),
        }
    }

    async fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }
}

/// Puts are for the caller to repeat: it has to know that one may have been carried out.
fn is_repeatable(method: Method) -> bool {
    matches!(method, Method::Get | Method::Head | Method::Delete)
}

fn is_stale(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

fn http_error(error: ureq::Error) -> HttpError {
    let kind = match &error {
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::BadUri(_)
        | ureq::Error::Http(_) => HttpErrorKind::Unreachable,
        ureq::Error::Timeout(_) => HttpErrorKind::Timeout,
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::Pem(_) => HttpErrorKind::Tls,
        ureq::Error::BodyExceedsLimit(_) => HttpErrorKind::TooLong,
        ureq::Error::Io(error) => io_kind(error),
        _ => HttpErrorKind::Broken,
    };
    HttpError::new(kind, error)
}

fn io_kind(error: &io::Error) -> HttpErrorKind {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    // rustls's errors come wrapped.
    let tls = error.get_ref().is_some_and(|inner| inner.is::<futures_rustls::rustls::Error>());
    // A failed look-up has no kind of its own.
    let lookup = error.to_string().contains("lookup address");
    match error.kind() {
        _ if tls => HttpErrorKind::Tls,
        _ if lookup => HttpErrorKind::Unreachable,
        ConnectionRefused | HostUnreachable | NetworkUnreachable | AddrNotAvailable => HttpErrorKind::Unreachable,
        TimedOut => HttpErrorKind::Timeout,
        _ => HttpErrorKind::Broken,
    }
}

fn roots_of(path: &Path) -> Result<RootCerts, String> {
    let pem = std::fs::read(path).map_err(|e| format!("CA file {}: {e}", path.display()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        let item = item.map_err(|e| format!("CA file {}: {e}", path.display()))?;
        if let PemItem::Certificate(certificate) = item {
            certificates.push(certificate);
        }
    }
    match certificates.is_empty() {
        true => Err(format!("CA file {} holds no certificate in PEM form", path.display())),
        false => Ok(RootCerts::new_with_certs(&certificates)),
    }
}
