//! The object store moves: its name leads to where it was, to nobody or to a stranger, and later to where it is.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_rustls::rustls::ServerConfig;
use volley_server::bootstrap::{self, Node, NodeConfig};
use volley_server::object_store::s3::S3Config;
use volley_server::platform::glommio::Resolver;
use volley_server::types::HydrationRate;
use volley_server::units::Span;

use crate::lab::{Lab, attached, bounded_read, stop};
use crate::proxy::{Fault, Proxy};
use crate::server::SECRET;
use crate::tls::authority;

/// Name of the store's endpoint.
pub const NAME: &str = "store.test";
/// Addresses are remembered for longer: this is only enough for who asks anew.
const RECOVERY_MAX: Duration = Duration::from_secs(12);

/// Where the name leads.
struct Names {
    address: std::sync::Mutex<SocketAddr>,
    asked: AtomicUsize,
}

impl Names {
    fn new(address: SocketAddr) -> Arc<Names> {
        Arc::new(Names { address: address.into(), asked: AtomicUsize::new(0) })
    }

    fn lead_to(&self, address: SocketAddr) {
        *self.address.lock().expect("address") = address;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn resolver(self: &Arc<Names>) -> Resolver {
        let names = self.clone();
        Resolver::new(move |host, _port| {
            assert_eq!(host, NAME);
            names.asked.fetch_add(1, Ordering::SeqCst);
            Ok(vec![*names.address.lock().expect("address")])
        })
    }
}

/// Nobody listens there.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// Somebody listens there and accepts nobody: the kernel drops what would connect, as a machine that is gone does.
struct BlackHole {
    address: SocketAddr,
    _listener: TcpListener,
    _waiting: Vec<TcpStream>,
}

impl BlackHole {
    fn new() -> BlackHole {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("address");
        // SAFETY: listen only changes the length of the queue of a socket that is open.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0, "listen");
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
        let waiting: Vec<_> = std::iter::from_fn(|| connect().ok()).take(16).collect();
        assert!(waiting.len() < 16, "the queue is full");
        BlackHole { address, _listener: listener, _waiting: waiting }
    }
}

/// A bucket under a name, and a node with a volume that has read from it.
struct Move {
    lab: Lab,
    tls: Option<Arc<ServerConfig>>,
    names: Arc<Names>,
    node: Node,
}

impl Move {
    fn new(tls: Option<(Arc<ServerConfig>, String)>) -> Move {
        let (tls, authority) = tls.unzip();
        let mut lab = Lab::with_tls(tls.clone());
        if let Some(pem) = authority {
            let file = lab.path("ca.pem");
            std::fs::write(&file, pem).expect("file");
            lab.s3.ca_file = Some(file);
        }
        lab.import("debian").expect("import");
        let names = Names::new(lab.proxy.address);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let s3 = S3Config {
            endpoint: Some(format!("{scheme}://{NAME}")),
            connect_timeout: Span(Duration::from_millis(500)),
            ..lab.s3.clone()
        };
        let object_store = lab.choice_of("s3://images/prod", &s3, SECRET).expect("settings");
        let config = NodeConfig { object_store, resolver: names.resolver(), ..lab.node_config("node") };
        let node = bootstrap::start(config).expect("start");
        lab.create(&node, "web-0", HydrationRate::None);
        let moved = Move { lab, tls, names, node };
        assert!(moved.reads(0), "the store is there");
        moved
    }

    /// Whether a guest's read of this MiB brings data, which is right then; else it ended by its deadline.
    fn reads(&self, mib: usize) -> bool {
        let got = attached(&self.node, async |volume| bounded_read(&volume, mib << 20, 64 << 10).await);
        got.inspect(|bytes| self.lab.check(mib << 20, bytes)).is_some()
    }

    /// The store leaves its address: kept connections die or fall silent, and its name leads elsewhere.
    fn leave(&self, last_sign: Fault, address: SocketAddr) {
        self.names.lead_to(address);
        self.lab.proxy.fail("", last_sign, usize::MAX);
    }

    /// The store is at a new address, and its name says so; reads of this MiB find it.
    fn arrive(self, mib: usize) {
        let proxy = Proxy::start(self.lab.server.address, self.tls.clone());
        let (asked, begun) = (self.names.asked(), Instant::now());
        self.names.lead_to(proxy.address);
        while !self.reads(mib) {
            assert!(begun.elapsed() < RECOVERY_MAX, "the new address is not asked");
        }
        assert!(begun.elapsed() < RECOVERY_MAX, "{:?}", begun.elapsed());
        assert!(self.names.asked() > asked, "the name was looked up anew");
        assert!(proxy.requests().iter().any(|line| line.starts_with("GET /images/prod/packs")));
        stop(self.node);
    }
}

#[test]
fn a_store_that_moves_is_found_by_the_guest_s_read_that_lost_its_connection() {
    for last_sign in [Fault::Reset, Fault::Stall] {
        let moved = Move::new(None);
        let proxy = Proxy::start(moved.lab.server.address, None);
        moved.leave(last_sign, proxy.address);
        assert!(moved.reads(1), "the retry asks for the address anew ({last_sign:?})");
        stop(moved.node);
    }
}

#[test]
fn a_name_that_leads_to_nobody_is_asked_again_until_it_leads_to_the_store() {
    let moved = Move::new(None);
    moved.leave(Fault::Reset, nobody());
    assert!(!moved.reads(1), "refused");
    moved.arrive(1);
}

#[test]
fn a_name_that_leads_to_a_machine_that_is_gone_is_asked_again() {
    let hole = BlackHole::new();
    let moved = Move::new(None);
    moved.leave(Fault::Stall, hole.address);
    assert!(!moved.reads(1), "nobody answers");
    moved.arrive(1);
}

#[test]
fn a_name_that_leads_to_a_stranger_is_asked_again() {
    let moved = Move::new(Some(authority()));
    let stranger = Proxy::start(moved.lab.server.address, Some(authority().0));
    moved.leave(Fault::Reset, stranger.address);
    assert!(!moved.reads(1), "its certificate is not trusted");
    assert_eq!(stranger.requests(), Vec::<String>::new(), "it was told nothing");
    moved.arrive(1);
}
