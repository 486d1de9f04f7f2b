//! What a storm boots from: a volume through the data port, or an export of an NBD server.

use tokio::sync::Mutex;
use volley_client::{Client, FetchUntil, Volume};

use super::super::nbd::{self, Servers};
use super::super::trace::Event;
use super::Plan;

/// An NBD server does not tell the size of chunks; this is what they have by default.
const NBD_CHUNK_BYTES: u32 = 512 << 10;

/// A hypervisor host: how it reaches volumes.
pub(super) enum Host {
    Client(Client),
    Nbd(Servers),
}

impl Host {
    pub(super) async fn new(plan: &Plan) -> Result<Host, String> {
        match &plan.nbd {
            Some(servers) => Ok(Host::Nbd(servers.clone())),
            None => plan.target.connect().await.map(Host::Client),
        }
    }

    pub(super) async fn attach(&self, plan: &Plan, name: &str) -> Result<Disk, String> {
        match self {
            Host::Client(client) => client.attach(name).await.map(Disk::Volume).map_err(|error| error.to_string()),
            Host::Nbd(servers) => {
                let disk = nbd::Disk::open(&servers.of(name)?, name, plan.target.deadline).await?;
                Ok(Disk::Nbd(Mutex::new(disk)))
            }
        }
    }
}

/// One machine's disk.
pub(super) enum Disk {
    Volume(Volume),
    /// One request at a time.
    Nbd(Mutex<nbd::Disk>),
}

impl Disk {
    pub(super) fn chunk_bytes(&self) -> u32 {
        match self {
            Disk::Volume(volume) => volume.chunk_bytes().max(1),
            Disk::Nbd(_) => NBD_CHUNK_BYTES,
        }
    }

    /// Reads, and hands the bytes to `check`.
    pub(super) async fn read<R>(&self, event: &Event, check: impl FnOnce(&[u8]) -> R) -> Result<R, String> {
        match self {
            Disk::Volume(volume) => {
                let data = volume.read(event.offset, event.len as usize).await;
                data.map(|data| check(&data)).map_err(|error| error.to_string())
            }
            Disk::Nbd(disk) => disk.lock().await.read(event.offset, event.len).await.map(check),
        }
    }

    pub(super) async fn fetch(&self, event: &Event, until: FetchUntil) -> Result<(), String> {
        match self {
            Disk::Volume(volume) => {
                let fetched = volume.priority_fetch(event.offset, event.len, until).await;
                fetched.map_err(|error| error.to_string())
            }
            Disk::Nbd(_) => Err("priority fetches go to the data port, not to an NBD server".to_owned()),
        }
    }

    /// Ends the attachment. What counts was measured; a volume that another host took meanwhile is its own affair.
    pub(super) async fn detach(self) {
        if let Disk::Volume(volume) = self {
            let _ = volume.detach().await;
        }
    }
}
