//! An attached volume: the calls a block device needs, split to what a frame can carry.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use volley_protocol::messages::{AttachReply, Extent, StatReply};
use volley_protocol::{FetchUntil, name_tag};

use crate::call::{Answer, Call};
use crate::driver::Link;
use crate::error::Result;
use crate::senseless;

/// Which parts of a range are in the volume itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Pass it to [`Volume::residency_wait`] to learn of the next change.
    pub version: u64,
    /// Runs that follow each other from the asked offset and cover the range, clipped to the device.
    pub extents: Vec<Extent>,
}

/// An attached volume; clones are the same attachment. When the last one is dropped without [`Volume::detach`] the
/// attachment is no longer kept alive over lost connections, but stays valid on the server.
///
/// Offsets and lengths are bytes, multiples of 512. Errors of all calls: `Timeout`, `Fenced`, `Invalid`, `Retry`,
/// `NoSpace`, `Storage`, `Closed`, `Bug`; see [`crate::ErrorKind`].
#[derive(Clone)]
pub struct Volume {
    inner: Arc<Inner>,
}

struct Inner {
    link: Link,
    name: String,
    info: AttachReply,
    payload_bytes_max: u32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.link.forget(self.info.volume, self.info.generation);
    }
}

#[allow(clippy::missing_errors_doc, reason = "the errors are those listed at the type")]
impl Volume {
    pub(crate) fn new(link: Link, name: &str, info: AttachReply, payload_bytes_max: u32) -> Volume {
        debug_assert_eq!(info.volume >> 48, u64::from(name_tag(name)));
        Volume { inner: Arc::new(Inner { link, name: name.to_owned(), info, payload_bytes_max }) }
    }

    /// Name of the volume.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Size of the device in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.info.size_bytes
    }

    /// Size of a chunk, the unit of hydration, in bytes.
    #[must_use]
    pub fn chunk_bytes(&self) -> u32 {
        self.inner.info.chunk_bytes
    }

    /// Generation of this attachment.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.inner.info.generation
    }

    /// Reads `len` bytes at `offset`.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        let (volume, generation) = self.ids();
        let mut calls = self.pieces(offset, len as u64).map(|(offset, len)| {
            let len = u32::try_from(len).unwrap_or(self.inner.payload_bytes_max);
            Call::Read { volume, generation, offset, len }
        });
        if len <= self.inner.payload_bytes_max as usize {
            let call = calls.next().unwrap_or(Call::Read { volume, generation, offset, len: 0 });
            let Answer::Data(data) = self.call(call).await? else { return Err(senseless()) };
            return Ok(data);
        }
        let mut whole = BytesMut::with_capacity(len);
        for answer in self.call_all(calls).await? {
            let Answer::Data(data) = answer else { return Err(senseless()) };
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }

    /// Writes `data` at `offset`; with `fua` it is durable when this returns.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        let (volume, generation) = self.ids();
        if data.len() <= self.inner.payload_bytes_max as usize {
            return self.call(Call::Write { volume, generation, offset, data, fua }).await.map(drop);
        }
        let calls = self.pieces(offset, data.len() as u64).map(|(at, len)| {
            let start = (at - offset) as usize;
            Call::Write { volume, generation, offset: at, data: data.slice(start..start + len as usize), fua }
        });
        self.call_all(calls).await.map(drop)
    }

    /// Makes everything durable whose write was answered before this call.
    pub async fn flush(&self) -> Result<()> {
        let (volume, generation) = self.ids();
        self.call(Call::Flush { volume, generation }).await.map(drop)
    }

    /// Makes a range of any length read as zeroes and gives its space back.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let (volume, generation) = self.ids();
        self.call(Call::Discard { volume, generation, offset, len }).await.map(drop)
    }

    /// Makes a range of any length read as zeroes; with `fua` it is durable when this returns.
    pub async fn write_zeroes(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        let (volume, generation) = self.ids();
        self.call(Call::WriteZeroes { volume, generation, offset, len, fua }).await.map(drop)
    }

    /// Brings a range of any length ahead of everything in the background; `until` says how far.
    pub async fn priority_fetch(&self, offset: u64, len: u64, until: FetchUntil) -> Result<()> {
        let volume = self.inner.info.volume;
        self.call(Call::PriorityFetch { volume, offset, len, until }).await.map(drop)
    }

    /// Which parts of a range are in the volume itself, as far as one reply tells: its first thousands of extents.
    pub async fn residency_at(&self, offset: u64, len: u64) -> Result<Residency> {
        match self.call(Call::Residency { volume: self.inner.info.volume, offset, len }).await? {
            Answer::Residency(part) => Ok(Residency { version: part.version, extents: part.extents }),
            _ => Err(senseless()),
        }
    }

    /// Which parts of a range are in the volume itself.
    pub async fn residency(&self, offset: u64, len: u64) -> Result<Residency> {
        let end = offset.saturating_add(len).min(self.size_bytes());
        let mut whole: Option<Residency> = None;
        let mut at = offset;
        loop {
            let part = self.residency_at(at, end.saturating_sub(at)).await?;
            let covered: u64 = part.extents.iter().map(|e| e.len_bytes).fold(0, u64::saturating_add);
            // The first version: a change between two parts then shows up in residency_wait.
            let whole = whole.get_or_insert(Residency { version: part.version, extents: Vec::new() });
            whole.extents.extend(part.extents);
            at = at.saturating_add(covered);
            if covered == 0 || at >= end {
                return Ok(whole.clone());
            }
        }
    }

    /// Waits until the volume's residency version differs from `seen_version`, at most 10 s; returns the version then.
    pub async fn residency_wait(&self, seen_version: u64) -> Result<u64> {
        let call = Call::ResidencyWait { volume: self.inner.info.volume, seen_version };
        let Answer::Residency(now) = self.call(call).await? else { return Err(senseless()) };
        Ok(now.version)
    }

    /// What the server knows of the volume now.
    pub async fn stat(&self) -> Result<StatReply> {
        let Answer::Stat(stat) = self.call(Call::Stat { volume: self.inner.info.volume }).await? else {
            return Err(senseless());
        };
        Ok(*stat)
    }

    /// Flushes and ends the attachment; other clones of this volume get `Closed` from then on.
    pub async fn detach(self) -> Result<()> {
        self.flush().await?;
        let (volume, generation) = self.ids();
        self.call(Call::Detach { volume, generation }).await.map(drop)
    }

    fn ids(&self) -> (u64, u64) {
        (self.inner.info.volume, self.inner.info.generation)
    }

    async fn call(&self, call: Call) -> Result<Answer> {
        let link = &self.inner.link;
        link.call(call, link.deadline()).await
    }

    /// Sends all pieces of a large request, then collects their answers in order.
    async fn call_all(&self, calls: impl Iterator<Item = Call>) -> Result<Vec<Answer>> {
        let link = &self.inner.link;
        let deadline = link.deadline();
        let mut pending = Vec::new();
        for call in calls {
            pending.push(link.submit(call, deadline).await?);
        }
        let mut answers = Vec::with_capacity(pending.len());
        for piece in pending {
            answers.push(link.finish(piece, deadline).await?);
        }
        Ok(answers)
    }

    /// Splits a range at the payload limit.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let step = u64::from(self.inner.payload_bytes_max);
        (0..len.div_ceil(step)).map(move |i| (offset.saturating_add(i * step), step.min(len - i * step)))
    }
}
