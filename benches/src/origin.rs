//! An S3 server for measurements: objects in memory, a delay before each answer, a bandwidth for each connection.
//!
//! It knows what Volley asks: ranged GET, HEAD, PUT with `If-None-Match`, multipart uploads one at a time, DELETE,
//! ListObjectsV2 in one page. It looks at no
//! signature. What it sent it counts itself, so that a server under test is not believed about its own traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{ACCEPT_RANGES, CONTENT_RANGE, ETAG, IF_NONE_MATCH, RANGE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

/// Bytes handed to the connection at once.
const FRAME_BYTES: usize = 64 << 10;
const ETAG_OF_ALL: &str = "\"0\"";

/// How the server answers.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// Before the first byte of each answer.
    pub first_byte: Duration,
    /// Of each connection.
    pub bytes_per_second: u64,
}

/// A running server; it ends with its thread, and that with this.
pub struct Origin {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    manners: Mutex<Manners>,
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// Parts of objects that are being put, by key and number.
    parts: Mutex<BTreeMap<(String, u32), Bytes>>,
    /// GETs of parts of packs, and bytes of their bodies.
    gets: AtomicU64,
    bytes: AtomicU64,
}

impl Origin {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When it can't listen.
    pub fn start(manners: Manners) -> std::io::Result<Origin> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (gets, bytes, objects, parts) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { manners: Mutex::new(manners), objects, parts, gets, bytes });
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let serving = shared.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener without blocking");
                tokio::select! {
                    () = accept(listener, serving) => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Origin { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set_manners(&self, manners: Manners) {
        *self.shared.manners.lock().expect("nobody panics holding it") = manners;
    }

    /// Puts an object there without a request; returns its URL.
    pub fn put(&self, key: &str, object: Bytes) -> String {
        self.shared.objects.lock().expect("nobody panics holding it").insert(key.to_owned(), object);
        format!("{}/{key}", self.endpoint())
    }

    /// URLs of all packs.
    #[must_use]
    pub fn packs(&self) -> Vec<String> {
        let objects = self.shared.objects.lock().expect("nobody panics holding it");
        let packs = objects.keys().filter(|key| key.contains("/packs/"));
        packs.map(|key| format!("{}/{key}", self.endpoint())).collect()
    }

    /// GETs of packs and bytes sent for them since the last call.
    #[must_use]
    pub fn take_counts(&self) -> (u64, u64) {
        (self.shared.gets.swap(0, Ordering::SeqCst), self.shared.bytes.swap(0, Ordering::SeqCst))
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        // Both fail only when the thread has ended already.
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn accept(listener: tokio::net::TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let shared = shared.clone();
        let service = service_fn(move |request| {
            let shared = shared.clone();
            async move { Ok::<_, Infallible>(shared.answer(request).await) }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>) -> Response<Paced> {
        let manners = *self.manners.lock().expect("nobody panics holding it");
        sleep(manners.first_byte).await;
        let (head, body) = request.into_parts();
        let key = head.uri.path().trim_start_matches('/').to_owned();
        let reply = |status: StatusCode, body: Bytes| {
            let answer = Response::builder().status(status).header(ETAG, ETAG_OF_ALL).header(ACCEPT_RANGES, "bytes");
            answer.body(Paced::new(body, manners.bytes_per_second)).expect("sound headers")
        };
        let query = head.uri.query().unwrap_or_default();
        if head.method == Method::POST || query.contains("partNumber=") {
            return match body.collect().await {
                Ok(body) => reply(StatusCode::OK, self.multipart(key, query, body.to_bytes())),
                Err(_) => reply(StatusCode::BAD_REQUEST, Bytes::new()),
            };
        }
        let found = self.objects.lock().expect("nobody panics holding it").get(&key).cloned();
        match (head.method, found) {
            (Method::PUT, Some(_)) if head.headers.contains_key(IF_NONE_MATCH) => reply(
                StatusCode::PRECONDITION_FAILED,
                Bytes::from_static(b"<Error><Code>PreconditionFailed</Code></Error>"),
            ),
            (Method::PUT, _) => match body.collect().await {
                Ok(body) => {
                    self.objects.lock().expect("nobody panics holding it").insert(key, body.to_bytes());
                    reply(StatusCode::OK, Bytes::new())
                }
                Err(_) => reply(StatusCode::BAD_REQUEST, Bytes::new()),
            },
            (Method::DELETE, _) => {
                self.objects.lock().expect("nobody panics holding it").remove(&key);
                reply(StatusCode::NO_CONTENT, Bytes::new())
            }
            (Method::GET, _) if head.uri.query().is_some_and(|query| query.contains("list-type=2")) => {
                reply(StatusCode::OK, self.list(&key, head.uri.query().unwrap_or_default()).into())
            }
            (_, None) => reply(StatusCode::NOT_FOUND, Bytes::from_static(b"<Error><Code>NoSuchKey</Code></Error>")),
            (_, Some(object)) => {
                let range = head.headers.get(RANGE).and_then(|range| range_of(range.to_str().ok()?, object.len()));
                let Some((start, end)) = range else { return reply(StatusCode::OK, object) };
                if key.contains("/packs/") {
                    self.gets.fetch_add(1, Ordering::SeqCst);
                    self.bytes.fetch_add((end - start) as u64, Ordering::SeqCst);
                }
                let mut answer = reply(StatusCode::PARTIAL_CONTENT, object.slice(start..end));
                let range = format!("bytes {start}-{}/{}", end - 1, object.len());
                answer.headers_mut().insert(CONTENT_RANGE, range.parse().expect("digits"));
                answer
            }
        }
    }

    /// A step of a multipart upload: its beginning, a part, or its end.
    fn multipart(&self, key: String, query: &str, body: Bytes) -> Bytes {
        let mut parts = self.parts.lock().expect("nobody panics holding it");
        let number = query.split('&').find_map(|pair| pair.strip_prefix("partNumber=")?.parse().ok());
        if let Some(number) = number {
            parts.insert((key, number), body);
            return Bytes::new();
        }
        if query.contains("uploads") {
            return Bytes::from_static(
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
            );
        }
        let whole: Vec<u8> =
            parts.range((key.clone(), 0)..=(key.clone(), u32::MAX)).flat_map(|(_, part)| part.to_vec()).collect();
        parts.retain(|(of, _), _| *of != key);
        self.objects.lock().expect("nobody panics holding it").insert(key, whole.into());
        Bytes::from_static(b"<CompleteMultipartUploadResult><ETag>\"0\"</ETag></CompleteMultipartUploadResult>")
    }

    /// All objects of the bucket whose keys start with the prefix asked for; with a delimiter, folders for those deeper.
    fn list(&self, bucket: &str, query: &str) -> String {
        let field = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)).unwrap_or_default();
        let prefix = field("prefix=").replace("%2F", "/");
        let base = format!("{}/", bucket.trim_end_matches('/'));
        let objects = self.objects.lock().expect("nobody panics holding it");
        let (mut contents, mut folders) = (String::new(), BTreeSet::new());
        for (key, object) in objects.iter() {
            let Some(key) = key.strip_prefix(&base).filter(|key| key.starts_with(&prefix)) else { continue };
            let deeper = key[prefix.len()..].find('/').filter(|_| !field("delimiter=").is_empty());
            match deeper {
                Some(slash) => drop(folders.insert(&key[..prefix.len() + slash + 1])),
                None => contents.push_str(&format!(
                    "<Contents><Key>{key}</Key><Size>{}</Size><ETag>{ETAG_OF_ALL}</ETag>\
                     <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>",
                    object.len()
                )),
            }
        }
        let folder = |folder| format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
        let folders: String = folders.into_iter().map(folder).collect();
        format!(
            "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{contents}{folders}</ListBucketResult>"
        )
    }
}

/// Start and end of `bytes=A-B`; as HTTP has it, what lies beyond the object is left out.
fn range_of(text: &str, len: usize) -> Option<(usize, usize)> {
    let (start, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let (start, last): (usize, usize) = (start.parse().ok()?, last.parse().ok()?);
    (start <= last && start < len).then_some((start, last.min(len - 1) + 1))
}

/// A body that leaves at a bandwidth.
struct Paced {
    rest: Bytes,
    bytes_per_second: u64,
    pause: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(rest: Bytes, bytes_per_second: u64) -> Paced {
        Paced { rest, bytes_per_second, pause: Box::pin(sleep_until(Instant::now())) }
    }
}

impl Body for Paced {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        std::task::ready!(self.pause.as_mut().poll(context));
        let len = self.rest.len().min(FRAME_BYTES);
        let frame = self.rest.split_to(len);
        let time = Duration::from_secs_f64(len as f64 / self.bytes_per_second.max(1) as f64);
        // Timers are coarse: a late one makes the next frames come sooner.
        let next = self.pause.deadline() + time;
        self.pause.as_mut().reset(next);
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::range_of;

    #[test]
    fn a_range_ends_where_the_object_does() {
        assert_eq!(range_of("bytes=0-9", 10), Some((0, 10)));
        assert_eq!(range_of("bytes=4-10", 10), Some((4, 10)));
        assert_eq!(range_of("bytes=10-11", 10), None);
        assert_eq!(range_of("bytes=3-2", 10), None);
    }
}
