//! HTTP on the shard: hyper's client over glommio sockets, with no thread hop and connections kept for the next request.
//!
//! A connection serves one request at a time. It is kept only when its response was read to the end; a request that
//! fails, is late or is dropped closes it, so that no response can ever be taken for another's.

mod connect;
mod pool;
mod wire;

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures::future::{Either, select};
use glommio::sync::Semaphore;
use glommio::timer::Timer;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::{Bytes, Incoming};

use self::connect::Connector;
pub use self::connect::Resolver;
use self::pool::{Kept, Pool};
use super::{Glommio, off_reactor};
use crate::object_store::s3::transport::{
    HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpTransport, Method, Origin, split_url,
};

/// A body's buffer is made in one piece up to here, and grows beyond it.
const BODY_BYTES_EXPECTED_MAX: u64 = 64 << 20;

/// Clones share connections.
#[derive(Clone)]
pub struct GlommioHttp {
    inner: Rc<Inner>,
}

struct Inner {
    connector: Connector,
    pool: Pool,
    /// Connections in use; a request without one waits, within its deadline.
    permits: Semaphore,
}

/// Why an exchange on one connection ended without a response.
enum Ended {
    /// A kept connection that the peer had closed: the request never reached it, or may be sent again.
    Stale,
    Failed(HttpError),
}

impl GlommioHttp {
    /// `ca_file`: the only authorities to trust; without it those of the Mozilla programme. At most `connections_max`
    /// connections are open at a time.
    ///
    /// # Errors
    /// One line that names the file and what is wrong with it.
    pub fn new(
        platform: Glommio,
        resolver: Resolver,
        ca_file: Option<&Path>,
        connections_max: usize,
    ) -> Result<GlommioHttp, String> {
        let connector = Connector::new(platform, resolver, ca_file)?;
        let permits = Semaphore::new(connections_max as u64);
        Ok(GlommioHttp { inner: Rc::new(Inner { connector, pool: Pool::new(connections_max), permits }) })
    }

    async fn exchange(&self, request: &HttpRequest<'_>) -> Result<HttpResponse, HttpError> {
        let Inner { connector, pool, permits } = &*self.inner;
        let split = split_url(request.url).map_err(|why| HttpError::new(HttpErrorKind::Unreachable, why))?;
        let (origin, host, path) = split;
        let closed = |_| HttpError::new(HttpErrorKind::Broken, "the shard is stopping");
        let _permit = permits.acquire_permit(1).await.map_err(closed)?;
        if let Some(kept) = pool.take(&origin) {
            match self.on(kept, true, request, host, path).await {
                Err(Ended::Stale) => {}
                Err(Ended::Failed(error)) => {
                    self.doubt(&origin, &error);
                    return Err(error);
                }
                Ok((response, kept)) => {
                    pool.keep(origin, kept);
                    return Ok(response);
                }
            }
        }
        let connecting = connector.connect(&origin);
        let late = || {
            let text = format!("no connection to {host} within {:?}", request.deadlines.connect);
            HttpError::new(HttpErrorKind::Unreachable, text)
        };
        let fresh = within(request.deadlines.connect, connecting, late).await.flatten();
        let answered = match fresh {
            Ok(fresh) => self.on(fresh, false, request, host, path).await.map_err(|ended| match ended {
                Ended::Failed(error) => error,
                Ended::Stale => HttpError::new(HttpErrorKind::Broken, format!("{host} closed the connection")),
            }),
            Err(error) => Err(error),
        };
        let (response, kept) = answered.inspect_err(|error| self.doubt(&origin, error))?;
        pool.keep(origin, kept);
        Ok(response)
    }

    /// No answer: the name may lead elsewhere by now, and a peer that is silent is silent on its other connections too.
    fn doubt(&self, origin: &Origin, error: &HttpError) {
        self.inner.connector.forget(origin);
        if error.kind == HttpErrorKind::Timeout {
            self.inner.pool.forget(origin);
        }
    }

    /// One request and its response; gives the connection back if it can serve another.
    async fn on(
        &self,
        mut connection: Kept,
        kept: bool,
        request: &HttpRequest<'_>,
        host: &str,
        path: &str,
    ) -> Result<(HttpResponse, Kept), Ended> {
        let stall = request.deadlines.stall;
        // Nothing arrives while a body goes out: then only the total deadline counts.
        let head_wait = if request.body.is_empty() { stall } else { request.deadlines.total };
        let late = |what: &str| HttpError::new(HttpErrorKind::Timeout, format!("{host}: {what} within {stall:?}"));
        let message = message(request, host, path).map_err(Ended::Failed)?;
        let sending = async {
            connection.sender.ready().await.map_err(|_| Ended::Stale)?;
            connection.sender.send_request(message).await.map_err(|error| {
                let repeatable = matches!(request.method, Method::Get | Method::Head | Method::Delete);
                let unsent = error.is_canceled();
                let cut = error.is_incomplete_message() || error.is_closed() || is_reset(&error);
                match kept && (unsent || (cut && repeatable)) {
                    true => Ended::Stale,
                    false => Ended::Failed(broken(host, &error)),
                }
            })
        };
        let response = within(head_wait, sending, || Ended::Failed(late("no response"))).await??;
        let (head, mut body) = response.into_parts();
        let expected = hyper::body::Body::size_hint(&body).lower().min(BODY_BYTES_EXPECTED_MAX);
        let mut bytes = Vec::with_capacity(usize::try_from(expected.min(request.response_bytes_max)).unwrap_or(0));
        loop {
            let next = within(stall, next_part(&mut body), || Ended::Failed(late("no more of the body"))).await?;
            let Some(part) = next else { break };
            let part = part.map_err(|error| Ended::Failed(broken(host, &error)))?;
            if (bytes.len() + part.len()) as u64 > request.response_bytes_max {
                let text = format!("{host} sent more than {} bytes", request.response_bytes_max);
                return Err(Ended::Failed(HttpError::new(HttpErrorKind::TooLong, text)));
            }
            bytes.extend_from_slice(&part);
        }
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
        let response = HttpResponse { status: head.status.as_u16(), headers: headers.collect(), body: bytes };
        Ok((response, connection))
    }
}

impl HttpTransport for GlommioHttp {
    async fn send(&self, request: HttpRequest<'_>) -> Result<HttpResponse, HttpError> {
        let total = request.deadlines.total;
        let late = || HttpError::new(HttpErrorKind::Timeout, format!("no whole response within {total:?}"));
        within(total, self.exchange(&request), late).await?
    }

    async fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        let path = path.to_owned();
        off_reactor(move || std::fs::read(path)).await
    }
}

/// The outcome of `work`, or `late` when it takes longer; `work` is dropped then.
async fn within<T, E>(limit: Duration, work: impl Future<Output = T>, late: impl FnOnce() -> E) -> Result<T, E> {
    match select(pin!(work), pin!(Timer::new(limit))).await {
        Either::Left((outcome, _)) => Ok(outcome),
        Either::Right(_) => Err(late()),
    }
}

fn message(request: &HttpRequest<'_>, host: &str, path: &str) -> Result<Request<Full<Bytes>>, HttpError> {
    let mut builder = Request::builder().method(request.method.as_str()).uri(path).header("host", host);
    for (name, value) in &request.headers {
        builder = builder.header(name, value);
    }
    if matches!(request.method, Method::Put | Method::Post) {
        builder = builder.header("content-length", request.body.len());
    }
    let body = Full::new(Bytes::copy_from_slice(request.body));
    builder.body(body).map_err(|e| HttpError::new(HttpErrorKind::Broken, format!("the request is no HTTP: {e}")))
}

/// The next bytes of a body; `None` at its end.
async fn next_part(body: &mut Incoming) -> Option<hyper::Result<Bytes>> {
    loop {
        match body.frame().await? {
            Ok(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Some(Ok(bytes));
                }
            }
            Err(error) => return Some(Err(error)),
        }
    }
}

fn broken(host: &str, error: &hyper::Error) -> HttpError {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    HttpError::new(HttpErrorKind::Broken, format!("{host}: {error}{cause}"))
}

fn is_reset(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    cause.is_some_and(|e| matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof))
}
