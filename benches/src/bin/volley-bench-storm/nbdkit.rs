//! nbdkit as a peer: the usual way to boot many machines from one image behind HTTP without us.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use volley_benches::process::{Result, Server};
use volley_benches::site::Site;

/// At its best: one process fetches and caches in blocks of our chunks' size, one more for each volume lays its writes over it.
pub const SHARED: &str = "nbdkit: one curl+cache (blocks of 512 KiB) for all, nbd+cow for each volume";
/// At its plainest.
pub const PLAIN: &str = "nbdkit: curl+cow for each volume";

/// Processes that serve `vm-0` and so on, each at a socket of its own.
pub struct Nbdkit {
    _servers: Vec<Server>,
    sockets: tempfile::TempDir,
}

impl Nbdkit {
    /// One cache for all, with nothing in it.
    pub fn shared(site: &Site, url: &str, volumes: u32) -> Result<Nbdkit> {
        let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
        let cache = sockets.path().join("cache.sock");
        let mut servers = vec![start(
            site,
            &cache,
            &["--filter=cache", "curl", &format!("url={url}"), "cache-on-read=true", "cache-min-block-size=512K"],
        )?];
        let behind = format!("socket={}", cache.display());
        for number in 0..volumes {
            let socket = sockets.path().join(format!("vm-{number}.sock"));
            servers.push(start(site, &socket, &["--filter=cow", "nbd", &behind])?);
        }
        Ok(Nbdkit { _servers: servers, sockets })
    }

    /// Each volume for itself.
    pub fn plain(site: &Site, url: &str, volumes: u32) -> Result<Nbdkit> {
        let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
        let url = format!("url={url}");
        let start_one = |number: u32| {
            let socket = sockets.path().join(format!("vm-{number}.sock"));
            start(site, &socket, &["--filter=cow", "curl", &url])
        };
        let servers = (0..volumes).map(start_one).collect::<Result<_>>()?;
        Ok(Nbdkit { _servers: servers, sockets })
    }

    /// Where the volumes are, as the load generator takes it.
    pub fn address(&self) -> String {
        format!("unix:{}/%s.sock", self.sockets.path().display())
    }
}

fn start(site: &Site, socket: &Path, words: &[&str]) -> Result<Server> {
    let mut command = Command::new("nbdkit");
    // Caches and overlays lie on the disk where ours do.
    command.env("TMPDIR", site.dir()).args(["--foreground", "--unix"]).arg(socket).args(words);
    Server::start_silent(command, socket)
}

/// Puts a raw image beside the buckets; returns its URL. Only its data takes memory.
pub fn publish(site: &Site, image: &Path) -> Result<String> {
    let said = |e: std::io::Error| format!("{}: {e}", image.display());
    let file = std::fs::File::open(image).map_err(said)?;
    let len = usize::try_from(file.metadata().map_err(said)?.len()).map_err(|e| e.to_string())?;
    let (mut object, mut piece) = (vec![0; len], vec![0; 1 << 20]);
    for (at, target) in (0_u64..).step_by(piece.len()).zip(object.chunks_mut(1 << 20)) {
        let piece = &mut piece[..target.len()];
        file.read_exact_at(piece, at).map_err(said)?;
        if piece.iter().any(|byte| *byte != 0) {
            target.copy_from_slice(piece);
        }
    }
    Ok(site.origin().put("raw/debian.raw", Bytes::from(object)))
}
