//! A real S3 server on a thread of the test: `s3s-fs` over a scratch directory, on a free port of 127.0.0.1.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s_fs::FileSystem;
use tokio::sync::oneshot;

pub const KEY: &str = "AKIATEST";
pub const SECRET: &str = "secret-of-the-test";
pub const BUCKET: &str = "images";

/// Ends with the test.
pub struct S3Server {
    pub address: SocketAddr,
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
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || serve(listener, service, stopped));
        S3Server { address, dir, stop: Some(stop), thread: Some(thread) }
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

fn serve(listener: TcpListener, service: S3Service, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async move {
        listener.set_nonblocking(true).expect("nonblocking");
        let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
        let accepting = async {
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), service.clone());
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
