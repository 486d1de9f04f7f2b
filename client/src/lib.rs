//! Client of the Volley data port, for hypervisor agents: attach volumes, read and write them, and fetch first what a
//! guest needs first.
//!
//! ```no_run
//! use bytes::Bytes;
//! use volley_client::{Client, FetchUntil, Options};
//!
//! # async fn example() -> volley_client::Result<()> {
//! let client = Client::connect("127.0.0.1:7400", Options::default()).await?;
//! let volume = client.attach("web-7").await?;
//! volume.priority_fetch(0, 1 << 20, FetchUntil::Resident).await?;
//! let first = volume.read(0, 4096).await?;
//! volume.write(8192, Bytes::from(first), false).await?;
//! volume.flush().await?;
//! volume.detach().await?;
//! # Ok(())
//! # }
//! ```
//!
//! - One connection per shard, made when first needed; requests pipeline and may be made from many tasks at once, on a
//!   multi-thread or a current-thread tokio runtime.
//! - A lost connection is made again with bounded back-off; requests wait and go out again until their deadline
//!   ([`Options::deadline`]), and only then fail. A guest sees no error if the server comes back in time.
//! - After a *server restart*, writes that were acknowledged and not yet flushed are sent again first, in order; see
//!   [`core`] for what is repeated and why it is safe. **Do not have overlapping writes in flight at the same time.**
//! - Requests larger than the payload limit are split. A split request is not atomic.
//! - Every [`Error`] has a [`ErrorKind`] that says what to do.
//!
//! Programs that do not run tokio drive the sans-I/O [`core::Core`] themselves.
#![deny(missing_docs)]

mod call;
pub mod core;
mod driver;
mod error;
mod session;
mod volume;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use volley_protocol::{address, name_tag};

pub use call::{Answer, Call};
pub use error::{Error, ErrorKind, Result};
pub use volley_protocol::messages::{Extent, StatReply as VolumeStat};
pub use volley_protocol::{FetchUntil, Status};
pub use volume::{Residency, Volume};

use driver::{Link, Probe};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name that the server logs; at most 128 bytes.
    pub client_name: String,
    /// Within this every request is answered or fails with [`ErrorKind::Timeout`]. Default 60 s.
    pub deadline: Duration,
    /// Requests in flight per shard; more wait. Default 256.
    pub in_flight_max: u32,
    /// Bytes of acknowledged but unflushed writes kept per volume to survive a restart of the server. At half of it the client flushes
    /// by itself. Default 64 MiB.
    pub unflushed_bytes_max: usize,
    /// While an answer is awaited, the connection looks for it this long before it sleeps: waking up takes longer than a fast disk.
    /// It yields its core to whoever wants it meanwhile, and sleeps where somebody does. Zero sleeps at once. Default 100 µs.
    pub idle_poll: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            client_name: concat!("volley-client ", env!("CARGO_PKG_VERSION")).into(),
            deadline: Duration::from_secs(60),
            in_flight_max: 256,
            unflushed_bytes_max: 64 << 20,
            idle_poll: Duration::from_micros(100),
        }
    }
}

/// What LOOKUP says of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Id on its node.
    pub volume: u64,
    /// Present generation.
    pub generation: u64,
    /// Size of the device.
    pub size_bytes: u64,
    /// Size of a chunk.
    pub chunk_bytes: u32,
}

/// A node, seen through its data port. Clones share the connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    address: String,
    options: Options,
    payload_bytes_max: u32,
    shards: Vec<String>,
    /// One per shard, made when first needed.
    links: Mutex<Vec<Option<Link>>>,
}

impl Client {
    /// Greets the server at `address` (`host:port` or `unix:/path`) and learns where its shards are.
    ///
    /// # Errors
    /// `Unavailable` at once when there is no server; `Protocol` when it speaks something else.
    pub async fn connect(address: &str, options: Options) -> Result<Client> {
        let probe = Probe::open(address, &options).await?;
        let shards = resolve_all(address, &probe.shards())?;
        let links = Mutex::new(vec![None; shards.len()]);
        let payload_bytes_max = probe.payload_bytes_max();
        let inner = Inner { address: address.to_owned(), options, payload_bytes_max, shards, links };
        Ok(Client { inner: Arc::new(inner) })
    }

    /// Names of all volumes of the node, in order.
    ///
    /// # Errors
    /// Any kind but those of a volume.
    pub async fn volumes(&self) -> Result<Vec<String>> {
        // Asked anew: LIST answers for one shard, and a restarted server may have another number of them.
        let Inner { address, options, .. } = &*self.inner;
        let first = Probe::open(address, options).await?;
        let mut names = Vec::new();
        for shard in resolve_all(address, &first.shards())? {
            let mut probe = Probe::open(&shard, options).await?;
            let mut after = String::new();
            loop {
                let Answer::Names(page) = probe.call(Call::List { after }, options.deadline).await? else {
                    return Err(senseless());
                };
                let Some(last) = page.last() else { break };
                after = last.clone();
                names.extend(page);
            }
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Describes a volume without attaching it: fences nobody.
    ///
    /// # Errors
    /// `NotFound`, or what a connection can meet.
    pub async fn lookup(&self, name: &str) -> Result<VolumeInfo> {
        let link = self.link(name).await;
        let answer = link.call(Call::Lookup { name: name.to_owned() }, link.deadline()).await?;
        let Answer::Attached(info) = answer else { return Err(senseless()) };
        let (size_bytes, chunk_bytes) = (info.size_bytes, info.chunk_bytes);
        Ok(VolumeInfo { volume: info.volume, generation: info.generation, size_bytes, chunk_bytes })
    }

    /// Opens a volume as its one writer: every older attachment, of whatever host, is fenced.
    ///
    /// # Errors
    /// `NotFound`, or what a connection can meet.
    pub async fn attach(&self, name: &str) -> Result<Volume> {
        let link = self.link(name).await;
        let call = Call::Attach { name: name.to_owned(), resume_generation: None };
        let Answer::Attached(info) = link.call(call, link.deadline()).await? else { return Err(senseless()) };
        Ok(Volume::new(link, name, info, self.inner.payload_bytes_max))
    }

    /// The link to the shard that owns the volume `name`.
    async fn link(&self, name: &str) -> Link {
        let Inner { address, options, shards, links, .. } = &*self.inner;
        let shard = usize::from(name_tag(name)) % shards.len();
        let mut links = links.lock().await;
        let make = || {
            // Any shard serves any volume: the first address helps when a restart moved or removed this one.
            let mut addresses = vec![shards[shard].clone()];
            if shards[shard] != *address {
                addresses.push(address.clone());
            }
            Link::start(addresses, options)
        };
        links[shard].get_or_insert_with(make).clone()
    }
}

fn resolve_all(dialled: &str, entries: &[String]) -> Result<Vec<String>> {
    let resolved: std::result::Result<_, String> = entries.iter().map(|e| address::resolve(dialled, e)).collect();
    resolved.map_err(|e| Error::new(ErrorKind::Protocol, e))
}

fn senseless() -> Error {
    Error::new(ErrorKind::Bug, "an answer of another kind than its question")
}
