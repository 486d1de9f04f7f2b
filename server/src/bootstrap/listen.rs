//! Where the shards listen. All addresses are taken before anything else starts, so that "in use" is found first.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::ListenAddr;
use crate::error::{Error, Result, Status};
use crate::limits::BIND_WAIT_MAX;
use crate::platform::glommio::Acceptor;

const BIND_RETRY: Duration = Duration::from_millis(20);

/// An address that belongs to one shard.
pub(super) enum Bound {
    Tcp(TcpListener, SocketAddr),
    /// Free to bind, which the shard does.
    Unix(PathBuf),
}

impl Bound {
    /// As the shard map of HELLO says it: clients keep the host that they dialled.
    pub(super) fn map_entry(&self) -> String {
        match self {
            Bound::Tcp(_, address) => format!(":{}", address.port()),
            Bound::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// As an operator writes it.
    pub(super) fn address(&self) -> String {
        match self {
            Bound::Tcp(_, address) => address.to_string(),
            Bound::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// The acceptor of the executor that runs the caller, and the socket file to remove at the end.
    pub(super) fn into_acceptor(self) -> Result<(Acceptor, Option<PathBuf>)> {
        match self {
            Bound::Tcp(listener, address) => {
                let acceptor = Acceptor::from_tcp(listener).map_err(|e| cannot_listen(&address.to_string(), &e))?;
                Ok((acceptor, None))
            }
            Bound::Unix(path) => {
                let acceptor =
                    Acceptor::bind_unix(&path).map_err(|e| cannot_listen(&format!("unix:{}", path.display()), &e))?;
                Ok((acceptor, Some(path)))
            }
        }
    }
}

/// Takes an address for each shard.
///
/// # Errors
/// One line that names the address and what is wrong with it.
pub(super) fn bind(listen: &ListenAddr, shards: usize) -> Result<Vec<Bound>> {
    bind_within(BIND_WAIT_MAX, listen, shards)
}

/// Waits at most `patience` for an address that is in use.
fn bind_within(patience: Duration, listen: &ListenAddr, shards: usize) -> Result<Vec<Bound>> {
    match listen {
        ListenAddr::Tcp { host, port } => (0..shards).map(|shard| bind_tcp(patience, host, *port, shard)).collect(),
        ListenAddr::Unix(path) => {
            let path = std::path::absolute(path).map_err(|e| Error::from_io(&path.display().to_string(), &e))?;
            (0..shards).map(|shard| claim_unix(patience, shard_path(&path, shard))).collect()
        }
    }
}

fn bind_tcp(patience: Duration, host: &str, first_port: u16, shard: usize) -> Result<Bound> {
    let port = match first_port {
        0 => Some(0),
        first => u16::try_from(shard).ok().and_then(|shard| first.checked_add(shard)),
    };
    let port = port.ok_or_else(|| {
        let message = format!(
            "shard {shard} listens on port {first_port} + {shard}, which does not exist: choose a lower --listen port"
        );
        Error::new(Status::Invalid, message)
    })?;
    let name = format!("{host}:{port}");
    let address = (host, port).to_socket_addrs().map_err(|e| cannot_listen(&name, &e))?.next();
    let address = address.ok_or_else(|| Error::new(Status::Invalid, format!("{host:?} has no address")))?;
    // The standard listener sets SO_REUSEADDR (a restart does not wait for old connections) and not SO_REUSEPORT.
    let listener = patiently(patience, || TcpListener::bind(address)).map_err(|e| cannot_listen(&name, &e))?;
    let address = listener.local_addr().map_err(|e| cannot_listen(&name, &e))?;
    Ok(Bound::Tcp(listener, address))
}

/// Tries again while the address is in use: the kernel may close the sockets of a server that was killed a moment ago
/// only after its process has ended.
fn patiently<T>(patience: Duration, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let since = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && since.elapsed() < patience => {
                std::thread::sleep(BIND_RETRY);
            }
            other => return other,
        }
    }
}

/// Why nobody listens on the socket; `AddrInUse` while somebody does.
fn why_not_in_use(path: &Path) -> io::Result<io::Error> {
    match UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) => Ok(error),
    }
}

/// `path` for shard 0, `path.k` for shard k.
fn shard_path(path: &Path, shard: usize) -> PathBuf {
    match shard {
        0 => path.to_owned(),
        _ => PathBuf::from(format!("{}.{shard}", path.display())),
    }
}

/// Makes sure that a socket path can be bound: a socket that a killed server left behind is removed.
fn claim_unix(patience: Duration, path: PathBuf) -> Result<Bound> {
    let name = format!("unix:{}", path.display());
    let metadata = match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Bound::Unix(path)),
        other => other.map_err(|e| cannot_listen(&name, &e))?,
    };
    if !metadata.file_type().is_socket() {
        let message = format!("can't listen on {name}: the path exists and is no socket: choose another --listen");
        return Err(Error::new(Status::Conflict, message));
    }
    let refused = patiently(patience, || why_not_in_use(&path)).map_err(|e| cannot_listen(&name, &e))?;
    if refused.kind() != io::ErrorKind::ConnectionRefused {
        return Err(cannot_listen(&name, &refused));
    }
    std::fs::remove_file(&path).map_err(|e| cannot_listen(&name, &e))?;
    Ok(Bound::Unix(path))
}

fn cannot_listen(name: &str, error: &io::Error) -> Error {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => ": another program listens there; stop it or choose another --listen",
        io::ErrorKind::AddrNotAvailable => ": this machine does not have that address",
        io::ErrorKind::PermissionDenied => ": choose a port above 1023 or a path this user may write",
        _ => "",
    };
    Error::new(Status::Conflict, format!("can't listen on {name}: {error}{advice}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use super::{Bound, bind_within};
    use crate::config::ListenAddr;
    use crate::error::Result;

    fn bind(listen: &ListenAddr, shards: usize) -> Result<Vec<Bound>> {
        bind_within(Duration::ZERO, listen, shards)
    }

    fn tcp(port: u16) -> ListenAddr {
        ListenAddr::Tcp { host: "127.0.0.1".into(), port }
    }

    #[test]
    fn each_shard_takes_a_free_port() {
        let bound = bind(&tcp(0), 3).expect("bind");
        let mut entries: Vec<_> = bound.iter().map(Bound::map_entry).collect();
        entries.sort();
        entries.dedup();
        assert_eq!(entries.len(), 3);
        assert!(entries.iter().all(|entry| entry.starts_with(':') && entry != ":0"));
    }

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = taken.local_addr().expect("address").port();
        let error = bind(&tcp(port), 1).err().expect("refused");
        assert!(error.message.contains(&format!("127.0.0.1:{port}")) && error.message.contains("--listen"), "{error}");
        assert!(bind(&tcp(65535), 2).is_err());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_respected() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        let listen = ListenAddr::Unix(path.clone());
        let live = UnixListener::bind(&path).expect("bind");
        assert!(bind(&listen, 1).err().expect("in use").message.contains("another program listens there"));
        drop(live);
        let bound = bind(&listen, 2).expect("stale sockets are removed");
        assert!(!path.exists());
        assert_eq!(bound[1].map_entry(), format!("unix:{}.1", path.display()));
        std::fs::write(&path, b"precious").expect("write");
        assert!(bind(&listen, 1).err().expect("refused").message.contains("is no socket"));
    }
}
