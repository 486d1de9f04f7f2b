//! Fills: the one place where what was fetched for a volume comes into it, behind an answered guest, before the answer
//! of a priority fetch, ahead of a reader or for the hydrator.
//!
//! On a store with a base, a chunk goes there first and volumes share it from there: that moves no data, so only the
//! first copy is charged to the store's share, and a clone a block. Neighbours that lie together in the base are cloned together.
//! Everywhere else, and where sharing fails, the chunk is copied.

use std::rc::Rc;

use futures::stream::{self, Stream};

use crate::cache::ChunkData;
use crate::error::{Error, Result};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue, Time};
use crate::shard::Shard;
use crate::shard::base::{Place, Supplied, Supply, Want};
use crate::shard::fill_turns::FillTurn;
use crate::shard::harm::GuestIo;
use crate::shard::hydrate::Store;
use crate::shard::hydration_queue::Class;
use crate::shard::signal::within;
use crate::shard::volume::Volume;
use crate::transfer::{ChunkSource, FetchClass, Fetched, Story};

/// Fills behind read misses that may hold their chunk in memory at once, per shard; beyond it they are owed.
pub(super) const MISS_FILLS_MAX: usize = 64;
/// What a clone counts for in its store's share and turns: it writes blocks of the filesystem's own, no data.
pub(super) const CLONE_BYTES: u64 = 4096;
/// Chunks of one clone: guests that write to any of them wait for the whole, a millisecond at worst.
const CLONE_CHUNKS_MAX: usize = 64;

/// Content of a chunk in the snapshot.
#[derive(Clone)]
pub(super) enum Content {
    Zero,
    Data(Fetched),
    /// It is in the base of the volume's store.
    Place(Place),
}

impl Content {
    /// Nothing, if it is not in memory.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Content::Zero | Content::Place(_) => &[],
            Content::Data(fetched) => &fetched.data,
        }
    }

    pub(super) fn story(&self) -> Option<Story> {
        match self {
            Content::Zero | Content::Place(_) => None,
            Content::Data(fetched) => Some(fetched.story),
        }
    }
}

impl From<Supply> for Content {
    fn from(supply: Supply) -> Content {
        match supply {
            Supply::Data(fetched) => Content::Data(fetched),
            Supply::Place(place) => Content::Place(place),
        }
    }
}

/// What one write, punch or clone fills.
pub(super) enum Fill {
    Zero(u32),
    Data(u32, Fetched),
    /// Neighbours from this chunk on, whose places are neighbours too.
    Run(u32, Vec<Place>),
}

impl Fill {
    fn of(chunk: u32, content: Content) -> Fill {
        match content {
            Content::Zero => Fill::Zero(chunk),
            Content::Data(fetched) => Fill::Data(chunk, fetched),
            Content::Place(place) => Fill::Run(chunk, vec![place]),
        }
    }

    /// The chunks it fills.
    pub(super) fn chunks(&self) -> std::ops::Range<u32> {
        match self {
            Fill::Zero(chunk) | Fill::Data(chunk, _) => *chunk..*chunk + 1,
            Fill::Run(first, places) => *first..*first + places.len() as u32,
        }
    }

    fn may_grow(&self) -> bool {
        matches!(self, Fill::Run(_, places) if places.len() < CLONE_CHUNKS_MAX)
    }

    /// Takes the next fill in; gives it back where the two are not to be cloned together.
    fn join(&mut self, next: Fill, chunk_bytes: u32) -> Option<Fill> {
        let end = self.chunks().end;
        match (self, next) {
            (Fill::Run(_, places), Fill::Run(chunk, mut more))
                if chunk == end
                    && places.len() + more.len() <= CLONE_CHUNKS_MAX
                    && places.last().zip(more.first()).is_some_and(|(a, b)| a.joins(b, chunk_bytes.into())) =>
            {
                places.append(&mut more);
                None
            }
            (_, next) => Some(next),
        }
    }
}

/// What became of chunks that were asked for: a fill, or why one of them can't be had.
pub(super) type Arrived = std::result::Result<Fill, (u32, Error)>;

/// Fills for contents in their order, as few as they can be.
pub(super) fn gather(contents: Vec<(u32, Content)>, chunk_bytes: u32) -> Vec<Fill> {
    let mut fills: Vec<Fill> = Vec::new();
    for (chunk, content) in contents {
        let next = Fill::of(chunk, content);
        let apart = match fills.last_mut() {
            Some(last) => last.join(next, chunk_bytes),
            None => Some(next),
        };
        fills.extend(apart);
    }
    fills
}

/// [`gather`] for chunks that are on their way: whatever is there is not kept waiting for what is not.
pub(super) fn gathered(
    supplied: impl Iterator<Item = (u32, Supplied)>,
    chunk_bytes: u32,
) -> impl Stream<Item = Arrived> {
    stream::unfold((supplied.peekable(), None), move |(mut supplied, held)| async move {
        let first = match held {
            Some(held) => held,
            None => {
                let (chunk, answer) = supplied.next()?;
                arrived(chunk, answer).await
            }
        };
        let Ok(mut fill) = first else { return Some((first, (supplied, None))) };
        while fill.may_grow()
            && let Some((chunk, answer)) = supplied.next_if(|(_, answer)| answer.is_ready())
        {
            let held = match arrived(chunk, answer).await {
                Ok(next) => fill.join(next, chunk_bytes).map(Ok),
                error => Some(error),
            };
            if held.is_some() {
                return Some((Ok(fill), (supplied, held)));
            }
        }
        Some((Ok(fill), (supplied, None)))
    })
}

async fn arrived(chunk: u32, answer: Supplied) -> Arrived {
    match answer.get().await {
        Ok(supply) => Ok(Fill::of(chunk, supply.into())),
        Err(error) => Err((chunk, error)),
    }
}

/// A guest's I/O while the disk has it.
pub(super) struct AtTheDisk<'a, P: Platform> {
    store: &'a Store,
    platform: &'a P,
    io: GuestIo,
    begun: Time,
}

impl<P: Platform> Drop for AtTheDisk<'_, P> {
    fn drop(&mut self) {
        self.store.guests.set(self.store.guests.get() - 1);
        self.store.fills.guest_ends(self.io, self.begun, self.platform.now());
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Fills the volume behind an answered read: at once while the store's hydration share lasts or nothing has to be
    /// copied, else the hydrator owes it and later misses are answered from the cache again.
    pub(super) fn fill_behind(&self, volume: &Rc<Volume<P>>, chunk: u32, content: Content) {
        let shares = matches!(content, Content::Place(_)) || self.0.bases[volume.store].is_usable();
        let shares = shares && !matches!(content, Content::Zero);
        let bytes = content.bytes().len() as u64;
        if !self.may_fill(volume, chunk, (!shares).then_some(bytes)) {
            return;
        }
        self.0.miss_fills.set(self.0.miss_fills.get() + 1);
        let (shard, volume) = (self.clone(), volume.clone());
        self.0.platform.spawn(Queue::Background, async move {
            let filled = match content {
                Content::Data(fetched) if shares => shard.share_or_copy(&volume, chunk, fetched).await,
                content => shard.fill(&volume, Fill::of(chunk, content), FillTurn::Admitted(Class::Priority)).await,
            };
            if let Err(error) = filled {
                shard.owe(&volume, chunk, &error);
            }
            shard.0.miss_fills.set(shard.0.miss_fills.get() - 1);
        });
    }

    /// Fills with a chunk that is in memory, by way of the base.
    async fn share_or_copy(&self, volume: &Rc<Volume<P>>, chunk: u32, fetched: Fetched) -> Result<()> {
        if let Some(manifest) = volume.manifest() {
            let orders = self.orders(volume, &manifest, &[chunk], Some(&fetched.data));
            for answer in self.supplies(volume, orders, Want::Place, FetchClass::Background) {
                if let Ok(Supply::Place(place)) = answer.get().await
                    && self.share(volume, chunk, &[place], FillTurn::Admitted(Class::Priority)).await
                {
                    return Ok(());
                }
            }
        }
        self.charge_store(volume, fetched.data.len() as u64);
        self.fill_data(volume, chunk, &fetched.data, FillTurn::Paced(Class::Priority)).await
    }

    /// A guest's I/O at a volume's store begins; it ends when this is dropped.
    pub(super) fn guest_io(&self, volume: &Volume<P>, io: GuestIo, bytes: u64) -> AtTheDisk<'_, P> {
        let (store, platform) = (&self.0.stores[volume.store], &self.0.platform);
        let begun = platform.now();
        store.fills.guest_begins(begun);
        store.guest_io.add(bytes);
        store.guests.set(store.guests.get() + 1);
        AtTheDisk { store, platform, io, begun }
    }

    /// Takes bytes off the share of the volume's store, whether they are there or not.
    pub(super) fn charge_store(&self, volume: &Volume<P>, bytes: u64) {
        self.0.stores[volume.store].budget.borrow_mut().charge(bytes, self.0.platform.now());
    }

    /// Whether an absent chunk may be filled at once; if so the store's share and pace are charged with `bytes`, if not the
    /// chunk is owed. `None`: whoever copies it into the base pays.
    pub(super) fn may_fill(&self, volume: &Volume<P>, chunk: u32, bytes: Option<u64>) -> bool {
        if volume.map.borrow().is_chunk_resident(chunk) {
            return false;
        }
        let store = &self.0.stores[volume.store];
        let over = self.0.miss_fills.get() >= MISS_FILLS_MAX;
        let now = self.0.platform.now();
        let spent = |bytes| !store.fills.may_admit(now) || store.budget.borrow_mut().take(bytes, now).is_err();
        if over || bytes.is_some_and(spent) {
            self.0.counters.fills_deferred.add(1);
            volume.hydration.borrow_mut().owed.insert(chunk);
            self.wake_hydrator(volume);
            return false;
        }
        store.fills.admit(bytes.unwrap_or(0), now);
        true
    }

    /// A fill failed: the hydrator tries again.
    pub(super) fn owe(&self, volume: &Volume<P>, chunk: u32, error: &Error) {
        self.0.counters.event(self.0.platform.wall_clock_ms(), &error.message);
        volume.hydration.borrow_mut().owed.insert(chunk);
        self.wake_hydrator(volume);
    }

    /// Fills when its turn has come, also what is in the base and has to be copied after all.
    pub(super) async fn fill(&self, volume: &Rc<Volume<P>>, fill: Fill, turn: FillTurn) -> Result<()> {
        match fill {
            Fill::Zero(chunk) => {
                volume.fill_zero(chunk..=chunk).await?;
                self.note_dirty(volume);
                Ok(())
            }
            Fill::Data(chunk, fetched) => self.fill_data(volume, chunk, &fetched.data, turn).await,
            Fill::Run(first, places) => {
                if self.share(volume, first, &places, turn).await {
                    return Ok(());
                }
                let mut all = Ok(());
                for chunk in (first..).take(places.len()) {
                    all = all.and(self.copy_instead(volume, chunk, turn).await);
                }
                all
            }
        }
    }

    /// Copies a chunk that could not be shared.
    async fn copy_instead(&self, volume: &Rc<Volume<P>>, chunk: u32, turn: FillTurn) -> Result<()> {
        let Some(fetched) = self.fetch_instead(volume, chunk, turn.fetch_class()).await? else { return Ok(()) };
        self.charge_store(volume, fetched.data.len() as u64);
        self.fill_data(volume, chunk, &fetched.data, turn).await
    }

    /// The bytes of a chunk that could not be shared; `None`: nobody needs it any more.
    pub(super) async fn fetch_instead(
        &self,
        volume: &Rc<Volume<P>>,
        chunk: u32,
        class: FetchClass,
    ) -> Result<Option<Fetched>> {
        if volume.deleted.get() || volume.map.borrow().is_chunk_resident(chunk) {
            return Ok(None);
        }
        let manifest = self.manifest_of(volume).await?;
        let Some(source) = ChunkSource::of(&manifest, chunk, &volume.account.origin) else { return Ok(None) };
        match self.request(vec![source], class).pop() {
            Some(answer) => answer.chunk().await.map(Some),
            None => Ok(None),
        }
    }

    /// Chunks that are only in the base are shared at once, so that the read goes on to the file: that costs less than bringing
    /// them into memory, which is what is done where sharing fails.
    pub(super) async fn share_now(
        &self,
        volume: &Rc<Volume<P>>,
        contents: Vec<(u32, Content)>,
    ) -> Result<Vec<(u32, Content)>> {
        let mut rest = Vec::with_capacity(contents.len());
        for fill in gather(contents, volume.spec.chunk_bytes) {
            let (first, places) = match fill {
                Fill::Zero(chunk) => {
                    rest.push((chunk, Content::Zero));
                    continue;
                }
                Fill::Data(chunk, fetched) => {
                    rest.push((chunk, Content::Data(fetched)));
                    continue;
                }
                Fill::Run(first, places) => (first, places),
            };
            if self.share(volume, first, &places, FillTurn::AtOnce).await {
                continue;
            }
            for chunk in (first..).take(places.len()) {
                let fetch = self.fetch_instead(volume, chunk, FetchClass::Priority);
                match within(&self.0.platform, self.0.config.guest_deadline, fetch).await {
                    Some(fetched) => rest.extend(fetched?.map(|fetched| (chunk, Content::Data(fetched)))),
                    None => return Err(self.too_late(volume)),
                }
            }
        }
        Ok(rest)
    }

    /// Writes what is absent of a chunk, when its turn has come.
    async fn fill_data(&self, volume: &Rc<Volume<P>>, chunk: u32, data: &ChunkData, turn: FillTurn) -> Result<()> {
        let store = &self.0.stores[volume.store];
        let _turn = store.fills.turn(&self.0.platform, data.len() as u64, turn).await;
        if volume.deleted.get() {
            return Ok(());
        }
        let written = volume.fill(chunk, data).await?;
        if written > 0 {
            self.0.counters.filled_chunks.add(1);
            self.0.counters.filled_bytes.add(written);
            store.filled[turn.class() as usize].add(written);
            self.note_filled(volume, written);
        }
        Ok(())
    }

    /// So many bytes have come into the volume, written or shared.
    pub(super) fn note_filled(&self, volume: &Rc<Volume<P>>, bytes: u64) {
        let now = self.0.platform.now();
        volume.hydration.borrow_mut().meter.add(bytes, now);
        self.0.stores[volume.store].hydrated.borrow_mut().add(bytes, now);
        self.note_dirty(volume);
    }
}
