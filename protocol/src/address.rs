//! Shard addresses: how a client turns an entry of HELLO's shard map into something to dial.
//!
//! A server does not know by which name or through which forwarding a client reached it, so for TCP it sends only
//! `:PORT` and the client keeps the host it dialled. A unix socket is sent whole, as `unix:/PATH`.

/// The address to dial for `entry` of the shard map after having dialled `dialled` (`host:port` or `unix:/path`).
///
/// # Errors
/// A sentence when the two do not fit together.
pub fn resolve(dialled: &str, entry: &str) -> Result<String, String> {
    if entry.strip_prefix("unix:").is_some_and(|path| path.starts_with('/')) {
        return Ok(entry.to_owned());
    }
    let port = entry.strip_prefix(':').and_then(|p| p.parse::<u16>().ok()).filter(|p| *p != 0);
    let Some(port) = port else {
        return Err(format!("shard map entry {entry:?} is neither \":PORT\" nor \"unix:/PATH\""));
    };
    match dialled.rsplit_once(':') {
        Some((host, _)) if !host.is_empty() && host != "unix" => Ok(format!("{host}:{port}")),
        _ => Err(format!("shard map entry {entry:?} can't be combined with the address {dialled:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::resolve;

    #[test]
    fn ports_keep_the_dialled_host_and_paths_stand_alone() {
        for (dialled, entry, want) in [
            ("127.0.0.1:7400", ":7401", Some("127.0.0.1:7401")),
            ("[::1]:7400", ":7401", Some("[::1]:7401")),
            ("node-3.example:7400", ":7400", Some("node-3.example:7400")),
            ("unix:/run/v.sock", "unix:/run/v.sock.1", Some("unix:/run/v.sock.1")),
            ("127.0.0.1:7400", "unix:/run/v.sock.1", Some("unix:/run/v.sock.1")),
            ("unix:/run/v.sock", ":7401", None),
            ("127.0.0.1:7400", "7401", None),
            ("127.0.0.1:7400", ":0", None),
            ("127.0.0.1:7400", ":70000", None),
            ("127.0.0.1:7400", "unix:relative", None),
            ("nonsense", ":7401", None),
        ] {
            assert_eq!(resolve(dialled, entry).ok().as_deref(), want, "{dialled} {entry}");
        }
    }
}
