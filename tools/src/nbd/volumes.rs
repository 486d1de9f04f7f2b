//! Volumes of a node as NBD exports, through the client of the data port.

use bytes::Bytes;
use volley_client::{Client, FetchUntil, Volume};

use super::backend::{Backend, Description, ErrorKind, Export, ExportError, Extent, Result};
use crate::units::format_size;

/// Every volume of a node. Clones share the connections.
#[derive(Clone)]
pub struct Volumes {
    client: Client,
}

impl Volumes {
    /// Serves what `client` reaches.
    #[must_use]
    pub fn new(client: Client) -> Volumes {
        Volumes { client }
    }
}

impl Backend for Volumes {
    type Export = Volume;

    async fn names(&self) -> Result<Vec<String>> {
        self.client.volumes().await.map_err(unattached)
    }

    async fn describe(&self, name: &str) -> Result<Description> {
        check_name(name)?;
        let info = self.client.lookup(name).await.map_err(unattached)?;
        let text = format!("Volley volume {name}, {}", format_size(info.size_bytes));
        Ok(Description { size_bytes: info.size_bytes, text })
    }

    async fn attach(&self, name: &str) -> Result<Volume> {
        check_name(name)?;
        self.client.attach(name).await.map_err(unattached)
    }
}

impl Export for Volume {
    fn size_bytes(&self) -> u64 {
        Volume::size_bytes(self)
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes> {
        Volume::read(self, offset, len as usize).await.map_err(attached)
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        Volume::write(self, offset, data, fua).await.map_err(attached)
    }

    async fn flush(&self) -> Result<()> {
        Volume::flush(self).await.map_err(attached)
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        Volume::discard(self, offset, len).await.map_err(attached)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        Volume::write_zeroes(self, offset, len, fua).await.map_err(attached)
    }

    async fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        self.priority_fetch(offset, len, FetchUntil::Resident).await.map_err(attached)
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        // What one reply tells is more than BLOCK_STATUS may answer; the client asks again from its end.
        let residency = self.residency_at(offset, len).await.map_err(attached)?;
        let extents = residency.extents.into_iter().filter(|extent| extent.len_bytes > 0);
        Ok(extents.map(|e| Extent { len_bytes: e.len_bytes, resident: e.resident, hole: e.hole }).collect())
    }

    async fn detach(&self) -> Result<()> {
        Volume::detach(self.clone()).await.map_err(attached)
    }
}

/// No volume can have such a name, so the server need not be asked, and its refusal would read less clearly.
fn check_name(name: &str) -> Result<()> {
    volley_protocol::name::check_name(name).map_err(|error| ExportError::new(ErrorKind::UnknownExport, error))
}

/// An error before there is an attachment.
fn unattached(error: volley_client::Error) -> ExportError {
    let kind = match error.kind {
        volley_client::ErrorKind::NotFound => ErrorKind::UnknownExport,
        volley_client::ErrorKind::Invalid => ErrorKind::Invalid,
        _ => ErrorKind::Io,
    };
    ExportError::new(kind, error.message)
}

/// An error of an attached volume: it may be the end of the attachment.
fn attached(error: volley_client::Error) -> ExportError {
    use volley_client::ErrorKind as Client;
    let kind = match error.kind {
        Client::Fenced | Client::NotFound | Client::Closed => ErrorKind::Gone,
        Client::NoSpace => ErrorKind::NoSpace,
        Client::Invalid => ErrorKind::Invalid,
        _ => ErrorKind::Io,
    };
    ExportError::new(kind, error.message)
}
