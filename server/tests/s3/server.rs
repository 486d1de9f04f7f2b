//! A real S3 server on a thread of the test: `s3s-fs` over a scratch directory, on a free port of 127.0.0.1. It keeps a log of
//! its requests, and holds answers back when it is told to.

use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hyper::body::Incoming;
use hyper::header::RANGE;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s_fs::FileSystem;
use tokio::sync::{oneshot, watch};

pub const KEY: &str = "AKIATEST";
pub const SECRET: &str = "secret-of-the-test";
pub const BUCKET: &str = "images";

/// A request as it came, before it was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    pub method: String,
    /// With the bucket, without the query.
    pub path: String,
    /// The bytes asked for, if not all.
    pub range: Option<Range<u64>>,
}

impl Logged {
    fn of(request: &hyper::Request<Incoming>) -> Logged {
        let range = request.headers().get(RANGE).and_then(|value| range_of(value.to_str().ok()?));
        Logged { method: request.method().to_string(), path: request.uri().path().to_owned(), range }
    }

    /// Whether this asks for data of a pack.
    pub fn gets_pack(&self) -> bool {
        self.method == "GET" && self.path.contains("/packs/")
    }
}

/// `bytes=FIRST-LAST`
fn range_of(text: &str) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some(first.parse().ok()?..last.parse::<u64>().ok()? + 1)
}

/// What the server's thread shares with the test.
struct Desk {
    log: Mutex<Vec<Logged>>,
    /// Pack data waits while this is `true`.
    held: watch::Sender<bool>,
}

/// Ends with the test.
pub struct S3Server {
    pub address: SocketAddr,
    desk: Arc<Desk>,
    dir: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl S3Server {
    pub fn start() -> S3Server {
        let dir = tempfile::tempdir().expect("scratch directory");
        std::fs::create_dir(dir.path().join(BUCKET)).expect("bucket");
        let files = FileSystem::new(dir.path()).expect("s3s-fs");
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("address");
        let desk = Arc::new(Desk { log: Mutex::default(), held: watch::Sender::new(false) });
        let (stop, stopped) = oneshot::channel();
        let of_thread = desk.clone();
        let thread = std::thread::spawn(move || serve(listener, service, of_thread, stopped));
        S3Server { address, desk, dir, stop: Some(stop), thread: Some(thread) }
    }

    /// Every request so far, in the order they came.
    pub fn log(&self) -> Vec<Logged> {
        self.desk.log.lock().expect("log").clone()
    }

    /// `true`: from now on requests for pack data are logged and not answered, until `false`.
    pub fn hold(&self, held: bool) {
        self.desk.held.send_replace(held);
    }

    /// The objects of the bucket are files here.
    pub fn bucket(&self) -> PathBuf {
        self.dir.path().join(BUCKET)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed by its thread.
            let _ = thread.join();
        }
    }
}

fn serve(listener: TcpListener, service: S3Service, desk: Arc<Desk>, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async move {
        listener.set_nonblocking(true).expect("nonblocking");
        let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
        let accepting = async {
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let (desk, service) = (desk.clone(), service.clone());
                let answer = service_fn(move |request| {
                    let logged = Logged::of(&request);
                    let mut held = desk.held.subscribe();
                    let waits = logged.gets_pack();
                    desk.log.lock().expect("log").push(logged);
                    let answer = Service::call(&service, request);
                    async move {
                        if waits {
                            // Fails when the test ends, and the server with it.
                            let _ = held.wait_for(|held| !held).await;
                        }
                        answer.await
                    }
                });
                let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), answer);
                tokio::task::spawn(async move {
                    let _ = connection.await;
                });
            }
        };
        tokio::select! {
            () = accepting => {}
            _ = stopped => {}
        }
    });
}

/// Files below `dir`, by their path in it, without those that `s3s-fs` keeps for itself.
pub fn files_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(next) = pending.pop() {
        for entry in std::fs::read_dir(&next).expect("list").map(|entry| entry.expect("entry")) {
            let path = entry.path();
            let name = path.strip_prefix(dir).expect("below").display().to_string();
            match entry.file_type().expect("type").is_dir() {
                true => pending.push(path),
                false if name.contains("/.") || name.starts_with('.') => {}
                false => found.push(name),
            }
        }
    }
    found.sort();
    found
}
