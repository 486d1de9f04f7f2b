//! Where the agent listens: addresses from the command line, sockets bound to them, and unix sockets cleaned up.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::net::{TcpListener, UnixListener};

/// An address to serve NBD on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT` or `HOST:PORT`; port 0 takes a free one.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err("unix: needs a path, e.g. unix:/run/volley.sock".to_owned());
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        let address = text.strip_prefix("tcp:").unwrap_or(text);
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Address::Tcp(address.to_owned()))
            }
            _ => Err(format!("{text:?} is not an address: write unix:PATH, tcp:HOST:PORT or HOST:PORT")),
        }
    }
}

/// A bound socket. Dropping it removes its unix socket file, if that is still the one it made.
#[derive(Debug)]
pub struct Listener {
    pub(crate) socket: Socket,
    /// Removed with the listener.
    _file: Option<SocketFile>,
    /// NBD URI of the server, without an export name.
    uri: String,
}

#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A unix socket's file, known by its inode so that a successor's is never removed.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl Listener {
    /// Binds an address. The file of a dead process' unix socket is taken over.
    ///
    /// # Errors
    /// One line that names the address and what to do: in use, not a socket, no permission.
    pub async fn bind(address: &Address) -> Result<Listener, String> {
        match address {
            Address::Unix(path) => bind_unix(path).await,
            Address::Tcp(address) => bind_tcp(address).await,
        }
    }

    /// NBD URI of the server: `nbd+unix:///?socket=PATH` or `nbd://HOST:PORT/`, with the port really bound.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

async fn bind_tcp(address: &str) -> Result<Listener, String> {
    let listener = TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => format!("{address} is in use by another process: choose another port"),
        _ => format!("can't listen on {address}: {error}"),
    })?;
    let bound = listener.local_addr().map_err(|error| format!("can't listen on {address}: {error}"))?;
    Ok(Listener { socket: Socket::Tcp(listener), _file: None, uri: format!("nbd://{bound}/") })
}

async fn bind_unix(path: &Path) -> Result<Listener, String> {
    let shown = path.display();
    let failed = |error: io::Error| format!("can't listen on unix:{shown}: {error}");
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path).await?;
            UnixListener::bind(path).map_err(failed)?
        }
        bound => bound.map_err(failed)?,
    };
    let file = SocketFile { path: path.to_owned(), inode: inode(path) };
    Ok(Listener { socket: Socket::Unix(listener), _file: Some(file), uri: format!("nbd+unix:///?socket={shown}") })
}

/// Removes a socket file that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let kind = std::fs::symlink_metadata(path).map_err(|error| format!("can't inspect {shown}: {error}"))?.file_type();
    if !kind.is_socket() {
        return Err(format!("{shown} exists and is not a socket: remove it or choose another path"));
    }
    match tokio::net::UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| format!("can't remove the stale socket {shown}: {error}"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("unix:{shown} is in use, and asking its owner failed: {error}")),
        Ok(_) => Err(format!("unix:{shown} is in use by a running process: stop it or choose another path")),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            // Nothing to be done about a failure: the next agent takes the stale file over.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::{Address, Listener};

    #[test]
    fn addresses_are_understood() {
        let tcp = |text: &str| Ok(Address::Tcp(text.to_owned()));
        assert_eq!("unix:/run/x.sock".parse(), Ok(Address::Unix("/run/x.sock".into())));
        assert_eq!("tcp:0.0.0.0:10809".parse(), tcp("0.0.0.0:10809"));
        assert_eq!("localhost:0".parse(), tcp("localhost:0"));
        assert_eq!("[::1]:7".parse(), tcp("[::1]:7"));
        for bad in ["", "unix:", "host", ":7", "host:", "host:99999", "tcp:7"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_dead_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let address = Address::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the dead process left its file");
        let live = Listener::bind(&address).await.unwrap();
        let refused = Listener::bind(&address).await.unwrap_err();
        assert!(refused.contains("in use by a running process"), "{refused}");
        drop(live);
        assert!(!path.exists(), "a clean stop removes the file");
    }

    #[tokio::test]
    async fn a_successors_socket_and_a_plain_file_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).await.unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        let second = Listener::bind(&address).await.unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        std::fs::write(&path, "precious").unwrap();
        let refused = Listener::bind(&address).await.unwrap_err();
        assert!(refused.contains("is not a socket"), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let first = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let port = first.uri().trim_end_matches('/').rsplit(':').next().unwrap().to_owned();
        let refused = Listener::bind(&format!("127.0.0.1:{port}").parse().unwrap()).await.unwrap_err();
        assert!(refused.contains(&port) && refused.contains("in use"), "{refused}");
    }
}
