//! New connections: name look-up off the reactor, TCP, TLS, and the task that drives HTTP on it.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::channel::oneshot;
use futures::future::select;
use futures_rustls::TlsConnector;
use futures_rustls::pki_types::pem::PemObject;
use futures_rustls::pki_types::{CertificateDer, ServerName};
use futures_rustls::rustls::crypto::ring;
use futures_rustls::rustls::{self, ClientConfig, RootCertStore};
use glommio::net::TcpStream;
use hashbrown::HashMap;
use hyper::client::conn::http1;

use super::super::{Glommio, plain_error};
use super::pool::Kept;
use super::wire::{Stream, Wire};
use crate::object_store::s3::transport::{HttpError, HttpErrorKind, Origin};
use crate::platform::{Platform, Queue};

/// Services move slowly; a look-up for each connection would only add to the first byte.
const ADDRESSES_LIFE: Duration = Duration::from_secs(30);
/// hyper's read buffer grows up to this: a chunk in a few reads.
const READ_BUFFER_BYTES_MAX: usize = 512 << 10;

type LookUp = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// How names become addresses: the C library's way, unless a test has its own. It may block.
#[derive(Clone)]
pub struct Resolver(Arc<LookUp>);

impl Resolver {
    pub fn new(look_up: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static) -> Resolver {
        Resolver(Arc::new(look_up))
    }
}

impl Default for Resolver {
    fn default() -> Resolver {
        Resolver::new(|host, port| (host, port).to_socket_addrs().map(Iterator::collect))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

pub(super) struct Connector {
    platform: Glommio,
    resolver: Resolver,
    tls: TlsConnector,
    addresses: RefCell<HashMap<Origin, (Instant, Vec<SocketAddr>)>>,
}

impl Connector {
    pub(super) fn new(platform: Glommio, resolver: Resolver, ca_file: Option<&Path>) -> Result<Connector, String> {
        let roots = match ca_file {
            Some(path) => roots_of(path)?,
            None => webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect(),
        };
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS: {e}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tls = TlsConnector::from(Arc::new(config));
        Ok(Connector { platform, resolver, tls, addresses: RefCell::default() })
    }

    /// What was remembered of the origin's name led to no answer: the next connection asks for its addresses anew.
    pub(super) fn forget(&self, origin: &Origin) {
        self.addresses.borrow_mut().remove(origin);
    }

    pub(super) async fn connect(&self, origin: &Origin) -> Result<Kept, HttpError> {
        let stream = self.tcp(origin).await?;
        let stream = match origin.tls {
            true => Stream::Tls(Box::new(self.handshake(origin, stream).await?)),
            false => Stream::Tcp(stream),
        };
        let hyper = http1::Builder::new().max_buf_size(READ_BUFFER_BYTES_MAX).handshake(Wire::new(stream)).await;
        let (sender, connection) = hyper.map_err(|e| HttpError::new(HttpErrorKind::Broken, e))?;
        let (open, closed) = oneshot::channel::<()>();
        self.platform.spawn(Queue::Serve, async move {
            // Whichever ends first: the peer closed, or nobody wants the connection any more. Errors reach the request.
            select(connection, closed).await;
        });
        Ok(Kept::new(sender, open))
    }

    async fn tcp(&self, origin: &Origin) -> Result<TcpStream, HttpError> {
        let Origin { host, port, .. } = origin;
        let mut last = None;
        for address in self.resolve(origin).await? {
            match TcpStream::connect(address).await.map_err(plain_error) {
                Ok(stream) => {
                    // A request is written whole: Nagle would only hold it back.
                    stream.set_nodelay(true).map_err(|e| unreachable(host, *port, &plain_error(e)))?;
                    return Ok(stream);
                }
                Err(error) => last = Some(error),
            }
        }
        let none = || io::Error::new(io::ErrorKind::NotFound, "the name has no addresses");
        Err(unreachable(host, *port, &last.unwrap_or_else(none)))
    }

    async fn handshake(
        &self,
        origin: &Origin,
        stream: TcpStream,
    ) -> Result<futures_rustls::client::TlsStream<TcpStream>, HttpError> {
        let host = &origin.host;
        let name = ServerName::try_from(host.clone());
        let name = name.map_err(|e| HttpError::new(HttpErrorKind::Tls, format!("{host}: {e}")))?;
        self.tls.connect(name, stream).await.map_err(|error| {
            let tls = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
            let kind = if tls { HttpErrorKind::Tls } else { HttpErrorKind::Broken };
            HttpError::new(kind, format!("TLS with {host}: {error}"))
        })
    }

    async fn resolve(&self, origin: &Origin) -> Result<Vec<SocketAddr>, HttpError> {
        let Origin { host, port, .. } = origin;
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, *port)]);
        }
        if let Some((since, addresses)) = self.addresses.borrow().get(origin)
            && since.elapsed() < ADDRESSES_LIFE
        {
            return Ok(addresses.clone());
        }
        let found =
            look_up(self.resolver.clone(), host.clone(), *port).await.map_err(|e| unreachable(host, *port, &e))?;
        self.addresses.borrow_mut().insert(origin.clone(), (Instant::now(), found.clone()));
        Ok(found)
    }
}

/// On a thread of its own: it may take as long as it likes, and the executor's helper threads have directories to sync.
async fn look_up(resolver: Resolver, host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let (answer, asked) = oneshot::channel();
    let look = move || {
        // The request may be gone by now.
        let _ = answer.send((resolver.0)(&host, port));
    };
    std::thread::Builder::new().name("volley-resolve".to_owned()).spawn(look)?;
    asked.await.unwrap_or_else(|_| Err(io::Error::other("the look-up was given up")))
}

fn unreachable(host: &str, port: u16, error: &io::Error) -> HttpError {
    HttpError::new(HttpErrorKind::Unreachable, format!("connect to {host}:{port}: {error}"))
}

fn roots_of(path: &Path) -> Result<RootCertStore, String> {
    let problem = |why: &dyn std::fmt::Display| format!("CA file {}: {why}", path.display());
    let pem = std::fs::read(path).map_err(|e| problem(&e))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| problem(&e))?;
        roots.add(certificate).map_err(|e| problem(&e))?;
    }
    match roots.is_empty() {
        true => Err(problem(&"holds no certificate in PEM form")),
        false => Ok(roots),
    }
}
