//! The cache's tiers as the transfer uses them: a chunk is looked for in RAM, then on the disk, then in the object store.
//!
//! A read from the disk has its own single flight. When it finds nothing good, its waiters become a fetch like any other.

use std::time::Duration;

use super::{ChunkSource, Digest, FetchClass, FetchReply, Fetched, Story, Tier, Transfer};
use crate::cache::disk::{DiskTier, Loaded, READ_ATTEMPTS};
use crate::cache::{Rank, TierStatus};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::signal::within;
use crate::snapshot::ChunkEntry;

/// A read from the cache's disk that takes longer helps nobody: the object store answers sooner.
const DISK_READ_MAX: Duration = Duration::from_millis(500);

/// What only background work asked for is read in order and mostly once.
pub(super) fn rank_of(class: FetchClass) -> Rank {
    match class {
        FetchClass::Background => Rank::Low,
        FetchClass::Priority | FetchClass::ReadAhead | FetchClass::BootSet => Rank::Normal,
    }
}

fn queue_of(class: FetchClass) -> Queue {
    match class {
        FetchClass::Background => Queue::Background,
        FetchClass::Priority | FetchClass::ReadAhead | FetchClass::BootSet => Queue::Serve,
    }
}

impl<P: Platform, O: ObjectStore> Transfer<P, O> {
    /// Puts the disk tier into use; once.
    pub fn use_disk(&self, tier: DiskTier<P>) {
        assert!(self.0.disk.set(tier).is_ok(), "a shard opens its disk tier once");
    }

    /// The disk tier, if there is one and it could be opened.
    pub fn disk(&self) -> Option<&DiskTier<P>> {
        self.0.disk.get()
    }

    /// Whether either tier has the chunk; no request for it.
    #[must_use]
    pub fn is_cached(&self, digest: &Digest) -> (bool, bool) {
        (self.0.cache.borrow().holds(digest), self.disk().is_some_and(|disk| disk.holds(digest)))
    }

    /// Whether the disk should be asked for the chunk; counts it if not.
    pub(super) fn on_disk(&self, digest: &Digest) -> bool {
        let Some(disk) = self.disk() else { return false };
        let found = self.0.reads.borrow().contains(digest) || disk.is_ready_with(digest);
        if !found {
            disk.note_miss();
        }
        found
    }

    pub(super) fn start_reads(&self) {
        let Some(disk) = self.disk() else { return };
        loop {
            let Some((class, source)) = self.0.reads.borrow_mut().start() else { return };
            let task_queue = queue_of(class);
            self.0.platform.spawn(task_queue, self.clone().read_disk(class, source, disk.clone()));
        }
    }

    async fn read_disk(self, class: FetchClass, source: ChunkSource, disk: DiskTier<P>) {
        let begun = self.0.platform.now();
        let loaded = self.load_in_time(class, &source, &disk).await;
        let transfer = self.0.platform.now().since(begun);
        let urgent = self.0.reads.borrow().class_of(&source.digest).unwrap_or(class);
        let rest = self.clone().verify_read(class, source, disk, loaded, transfer);
        if queue_of(urgent) == queue_of(class) {
            rest.await;
        } else {
            // Somebody more urgent joined meanwhile: what is left to do runs at their urgency.
            self.0.platform.spawn(queue_of(urgent), rest);
        }
    }

    /// A disk that takes too long is left alone for a while, and its chunk is fetched.
    async fn load_in_time(&self, class: FetchClass, source: &ChunkSource, disk: &DiskTier<P>) -> Option<Loaded> {
        let (sender, answer) = flume::bounded(1);
        let (reader, wanted) = (disk.clone(), source.clone());
        // A task of its own: I/O is never dropped half done.
        self.0.platform.spawn(queue_of(class), async move {
            drop(sender.send(reader.load(&wanted, rank_of(class)).await));
        });
        let found = within(&self.0.platform, DISK_READ_MAX, answer.recv_async()).await;
        if found.is_none() {
            disk.pause(&format!("a read took longer than {DISK_READ_MAX:?}"));
        }
        found?.ok()?
    }

    async fn verify_read(
        self,
        class: FetchClass,
        source: ChunkSource,
        disk: DiskTier<P>,
        mut loaded: Option<Loaded>,
        transfer: Duration,
    ) {
        let begun = self.0.platform.now();
        let mut data = None;
        for attempt in 1..=READ_ATTEMPTS {
            let Some(found) = loaded.take() else { break };
            let last = attempt == READ_ATTEMPTS;
            data = disk.verify(&source, found, last).await;
            if data.is_none() && !last {
                loaded = self.load_in_time(class, &source, &disk).await;
            }
        }
        if data.is_none() {
            disk.note_miss();
        }
        let verify = self.0.platform.now().since(begun);
        let story = Story { tier: Tier::Disk, queue: Duration::ZERO, transfer, verify };
        self.read_done(class, &source, data.map(|data| Fetched { data, story }));
    }

    fn read_done(&self, class: FetchClass, source: &ChunkSource, found: Option<Fetched>) {
        let urgent = self.0.reads.borrow().class_of(&source.digest).unwrap_or(class);
        let waiters = self.0.reads.borrow_mut().end(class, &source.digest);
        match found {
            Some(found) => {
                self.0.cache.borrow_mut().insert(source.digest, found.data.clone(), rank_of(urgent));
                self.pin_for_wave(&source.digest);
                let (account, waiting) = (self.account(&source.origin), waiters.len() as u64);
                account.disk_bytes.add(waiting * u64::from(source.chunk_len));
                account.saved_bytes.add(waiting * u64::from(source.stored_len));
                waiters.into_iter().for_each(|(_, waiter)| drop(waiter.send(Ok(found.clone()))));
            }
            None => self.fetch_instead(source, waiters),
        }
        self.start_reads();
    }

    fn fetch_instead(&self, source: &ChunkSource, waiters: Vec<(FetchClass, FetchReply)>) {
        for (class, waiter) in waiters {
            self.enqueue(source.clone(), class, waiter);
        }
        self.dispatch();
    }

    /// Keeps a chunk that was just verified, in the form it arrived in.
    pub(super) fn keep_on_disk(&self, source: &ChunkSource, stored: &[u8]) {
        if !self.0.queue.borrow().shares() {
            return;
        }
        if let (Some(disk), ChunkEntry::Stored { encoding, .. }) = (self.disk(), source.entry) {
            disk.offer(source, encoding, stored);
        }
    }

    /// Keeps a chunk in RAM whatever else comes; see [`crate::cache::s3fifo::S3Fifo::pin`]. What is pinned for waves makes
    /// room.
    pub fn pin(&self, digest: &Digest) -> bool {
        let mut cache = self.0.cache.borrow_mut();
        while !cache.pin(digest) {
            let given_up = cache.holds(digest).then(|| self.0.waves.borrow_mut().give_up()).flatten();
            let Some(given_up) = given_up else { return false };
            cache.unpin(&given_up);
        }
        true
    }

    pub fn unpin(&self, digest: &Digest) {
        self.0.cache.borrow_mut().unpin(digest);
    }

    /// Drops a chunk from both tiers; from which ones it was.
    pub fn drop_cached(&self, digest: &Digest) -> (bool, bool) {
        self.0.waves.borrow_mut().forget(digest);
        self.0.near.borrow_mut().forget(digest);
        let ram = self.0.cache.borrow_mut().remove(digest);
        (ram, self.disk().is_some_and(|disk| disk.remove(digest)))
    }

    /// RAM, and the disk if it is in use.
    pub fn tiers(&self) -> (TierStatus, Option<TierStatus>) {
        let wave_pinned_bytes = self.0.waves.borrow().pinned_bytes() as u64;
        let ram = TierStatus { wave_pinned_bytes, ..self.0.cache.borrow().status() };
        (ram, self.disk().map(DiskTier::status))
    }

    pub(super) fn check_tiers(&self) -> Result<(), String> {
        self.0.cache.borrow().check()?;
        self.0.waves.borrow().check()?;
        let (pinned, for_waves) = (self.0.cache.borrow().status().pinned_bytes, self.0.waves.borrow().pinned_bytes());
        if (for_waves as u64) > pinned {
            return Err(format!("{for_waves} bytes are pinned for waves, of {pinned}"));
        }
        self.0.reads.borrow().check()?;
        self.disk().map_or(Ok(()), DiskTier::check)
    }
}

#[cfg(test)]
#[path = "tiers_tests.rs"]
mod tests;
