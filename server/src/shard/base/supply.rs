//! How chunks come from the base: who wants one asks its owner, who answers with a place to clone from or with bytes.
//!
//! The owner writes a chunk into the base once, however many ask. Where the base can't or won't hold it, the bytes are
//! the answer; where a clone fails, the chunk is copied.

use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

use super::{Claim, Place, SECTOR, Seat};
use crate::cache::ChunkData;
use crate::error::{Error, Result, Status};
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::{Platform, Queue};
use crate::shard::Shard;
use crate::shard::datapath::Answer;
use crate::shard::fill_turns::FillTurn;
use crate::shard::fills::CLONE_BYTES;
use crate::shard::hydration_queue::Class;
use crate::shard::mesh::MeshMessage;
use crate::shard::volume::Volume;
use crate::snapshot::Manifest;
use crate::transfer::{ChunkSource, FetchClass, FetchReply, Fetched};

/// What a chunk is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A guest waits for its bytes: they come from the base only if they are not in RAM but there.
    Bytes,
    /// A volume is to have it: if the base can hold it, it goes there first.
    Place,
}

/// A chunk that is wanted, before anybody is asked.
pub struct Wanted {
    source: ChunkSource,
    seat: Seat,
    offered: Option<ChunkData>,
}

/// One chunk asked of its owner, which answers through one of the two senders.
pub struct Order {
    pub source: ChunkSource,
    /// Where it lies in its image.
    pub seat: Seat,
    /// The asker has it already.
    pub offered: Option<ChunkData>,
    pub data: FetchReply,
    pub place: flume::Sender<Place>,
}

/// A chunk as it comes from its owner.
pub enum Supply {
    Data(Fetched),
    Place(Place),
}

/// A chunk on its way from the shard that owns it. Dropping it cancels nothing.
pub struct Supplied {
    data: flume::Receiver<Result<Fetched>>,
    place: flume::Receiver<Place>,
}

impl Supplied {
    fn plain(answer: Answer) -> Supplied {
        Supplied { data: answer.0, place: flume::bounded(0).1 }
    }

    /// Whether the answer is there.
    pub fn is_ready(&self) -> bool {
        !self.data.is_empty() || self.data.is_disconnected()
    }

    pub async fn get(self) -> Result<Supply> {
        if let Ok(answer) = self.data.recv_async().await {
            return answer.map(Supply::Data);
        }
        // An owner that answers with a place lets go of the other sender afterwards.
        let overloaded = || Error::new(Status::Busy, "the shard that fetches the chunk is overloaded or stopping");
        self.place.try_recv().map(Supply::Place).map_err(|_| overloaded())
    }
}

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Where a base can't be opened, volumes get copies.
    pub(in crate::shard) async fn open_bases(&self) {
        for (base, store) in self.0.bases.iter().zip(&self.0.stores) {
            if let Err(error) = base.open(self.0.config.shards).await {
                let message = format!("volume store {:?}: no base in {}: {error}", store.label, base.dir.display());
                self.0.counters.event(self.0.platform.wall_clock_ms(), &message);
            }
        }
    }

    pub(in crate::shard) async fn watch_bases(&self) {
        for store in 0..self.0.bases.len() {
            if let Err(error) = self.0.bases[store].watch().await {
                self.base_failed(store, "punch", &error);
            }
        }
    }

    /// What to ask for to get these chunks; nothing for zero chunks. `offered`: the bytes of them all.
    pub(in crate::shard) fn orders(
        &self,
        volume: &Volume<P>,
        manifest: &Manifest,
        chunks: &[u32],
        offered: Option<&ChunkData>,
    ) -> Vec<Wanted> {
        let origin = &volume.account.origin;
        let wanted = |chunk: &u32| {
            let source = ChunkSource::of(manifest, *chunk, origin)?;
            let seat = Seat {
                image: origin.snapshot.clone(),
                chunk: *chunk,
                chunks: manifest.chunk_count(),
                chunk_bytes: volume.spec.chunk_bytes,
            };
            Some(Wanted { source, seat, offered: offered.cloned() })
        };
        chunks.iter().filter(|chunk| **chunk < manifest.chunk_count()).filter_map(wanted).collect()
    }

    /// Asks the shards that own the chunks for them: as places, or as plain bytes where the volume's store has no base.
    pub(in crate::shard) fn supplies(
        &self,
        volume: &Volume<P>,
        chunks: Vec<Wanted>,
        want: Want,
        class: FetchClass,
    ) -> Vec<Supplied> {
        if !self.0.bases[volume.store].is_usable() {
            let sources = chunks.into_iter().map(|wanted| wanted.source).collect();
            return self.request(sources, class).into_iter().map(Supplied::plain).collect();
        }
        let mut by_owner: Vec<Vec<Order>> = (0..self.0.config.shards).map(|_| Vec::new()).collect();
        let wave = class <= FetchClass::ReadAhead && volume.account.is_wave();
        let mut answers = Vec::with_capacity(chunks.len());
        for Wanted { source, seat, offered } in chunks {
            let ((data, data_answer), (place, place_answer)) = (flume::bounded(1), flume::bounded(1));
            by_owner[source.owner(self.0.config.shards)].push(Order { source, seat, offered, data, place });
            answers.push(Supplied { data: data_answer, place: place_answer });
        }
        for (owner, orders) in by_owner.into_iter().enumerate().filter(|(_, orders)| !orders.is_empty()) {
            if owner == self.0.config.shard {
                self.supply(volume.store, orders, want, class, wave);
                continue;
            }
            let message = MeshMessage::Supply { store: volume.store, orders, want, class, wave };
            if let Err(error) = self.0.mesh.send(owner, message) {
                // The senders inside the message are gone: the answers say so.
                self.0.counters.requests_refused_busy.add(1);
                tracing::debug!(%error, "order not sent");
            }
        }
        answers
    }

    /// The owner's side. All that must be fetched is queued before the first GET starts, so that neighbours share one.
    pub(in crate::shard) fn supply(&self, store: usize, orders: Vec<Order>, want: Want, class: FetchClass, wave: bool) {
        let base = &self.0.bases[store];
        let (mut wanted, mut kept) = (Vec::new(), Vec::new());
        for order in orders {
            let in_ram = want == Want::Bytes && self.0.transfer.is_cached(&order.source.digest).0;
            if !in_ram && let Some(place) = base.find(&order.source.digest) {
                let _ = order.place.send(place);
            } else if want == Want::Bytes || (order.offered.is_none() && !base.takes_more()) {
                wanted.push((order.source, order.data));
            } else if let Some(data) = order.offered.clone() {
                self.keep_for(store, order, class, async move { Ok(Fetched::from_ram(data)) });
            } else {
                let (sender, fetched) = flume::bounded(1);
                wanted.push((order.source.clone(), sender));
                kept.push((order, fetched));
            }
        }
        self.0.transfer.fetch(wanted, class, wave);
        for (order, fetched) in kept {
            let stopping = |_| Err(Error::new(Status::ShuttingDown, "the server is stopping"));
            self.keep_for(store, order, class, async move { fetched.recv_async().await.unwrap_or_else(stopping) });
        }
    }

    fn keep_for(
        &self,
        store: usize,
        order: Order,
        class: FetchClass,
        fetched: impl Future<Output = Result<Fetched>> + 'static,
    ) {
        let shard = self.clone();
        let queue = if class == FetchClass::Background { Queue::Background } else { Queue::Serve };
        self.0.platform.spawn(queue, async move {
            let fetched = match fetched.await {
                Ok(fetched) => fetched,
                Err(error) => return drop(order.data.send(Err(error))),
            };
            match shard.keep(store, &order, &fetched.data, class).await {
                Some(place) => drop(order.place.send(place)),
                None => drop(order.data.send(Ok(fetched))),
            }
        });
    }

    /// A verified chunk into the base, unless it is there; `None`: the base does not hold it.
    async fn keep(&self, store: usize, order: &Order, data: &ChunkData, class: FetchClass) -> Option<Place> {
        let digest = &order.source.digest;
        let base = &self.0.bases[store];
        let len = (data.len() as u64).next_multiple_of(SECTOR);
        let (place, evicted) = loop {
            let settled = base.settled.waiter();
            if !base.takes_more() {
                return base.find(digest);
            }
            let claim = base.slots.borrow_mut().claim(digest, len, Some(&order.seat));
            match claim {
                Claim::Ready(place, lease) => return Some(base.place((place, lease))),
                Claim::Coming => drop(settled.await),
                Claim::Write { place, evicted } => break (place, evicted),
                Claim::Full => return None,
            }
        };
        let punched = base.punch(evicted).await;
        // The only copy of the chunk that the store pays for.
        self.0.stores[store].budget.borrow_mut().charge(len, self.0.platform.now());
        let fills = &self.0.stores[store].fills;
        let turn = match class {
            FetchClass::Priority => FillTurn::AtOnce,
            // Guests may come to wait for it too: it is not held up, but what comes after it.
            _ => {
                fills.admit(len, self.0.platform.now());
                FillTurn::Admitted(Class::of(class))
            }
        };
        let _turn = fills.turn(&self.0.platform, len, turn).await;
        let written = match mutation::on(Mutation::PlaceBeforeItsBytes) {
            true => {
                self.write_later(store, &place, data);
                Ok(())
            }
            false => base.write(&place, data).await,
        };
        let kept = match written {
            Ok(()) => Some(base.slots.borrow_mut().written(digest)),
            Err(_) => None,
        };
        if kept.is_none() {
            let place = base.slots.borrow_mut().failed(digest);
            drop(base.punch(vec![place]).await);
        }
        base.settled.wake_all();
        if let Err(error) = written.and(punched) {
            self.base_failed(store, "write", &error);
            if error.kind() == std::io::ErrorKind::StorageFull {
                base.scarce.set(true);
                drop(base.drop_idle().await);
            }
        }
        let kept = base.place(kept?);
        base.counters.written_chunks.add(1);
        base.counters.written_bytes.add(len);
        self.0.stores[store].filled[Class::of(class) as usize].add(len);
        Some(kept)
    }

    fn write_later(&self, store: usize, place: &Range<u64>, data: &ChunkData) {
        let (shard, place, data) = (self.clone(), place.clone(), data.clone());
        self.0.platform.spawn(Queue::Background, async move { drop(shard.0.bases[store].write(&place, &data).await) });
    }

    fn base_failed(&self, store: usize, what: &str, error: &std::io::Error) {
        let base = &self.0.bases[store];
        base.counters.failures.add(1);
        let label = &self.0.stores[store].label;
        tracing::debug!(store = &**label, what, %error, "base");
        if base.trust.failed(self.0.platform.now()) {
            let message =
                format!("volume store {label:?}: {what} in its base: {error}; volumes get copies for a while");
            self.0.counters.event(self.0.platform.wall_clock_ms(), &message);
        }
    }

    /// Has the absent sectors of neighbouring chunks share what lies together in the base; whether that was done.
    pub(in crate::shard) async fn share(
        &self,
        volume: &Rc<Volume<P>>,
        first: u32,
        places: &[Place],
        turn: FillTurn,
    ) -> bool {
        let (base, store) = (&self.0.bases[volume.store], &self.0.stores[volume.store]);
        if !base.is_usable() {
            return false;
        }
        let _turn = store.fills.turn(&self.0.platform, CLONE_BYTES, turn).await;
        if volume.deleted.get() || volume.takes_no_writes() {
            return false;
        }
        let bytes: u64 = places.iter().map(|place| place.len).sum();
        let chunks = first..=first + (places.len() - 1) as u32;
        let shared = match base.file_with(&places[0]).await {
            Ok((file, _use)) => volume.share(chunks, &file, places[0].offset..places[0].offset + bytes).await,
            Err(error) => Err(Error::from_io("the base", &error)),
        };
        match shared {
            Ok(filled) if filled.bytes == 0 => true,
            Ok(filled) => {
                base.trust.worked();
                base.counters.cloned_chunks.add(filled.chunks);
                base.counters.cloned_bytes.add(filled.bytes);
                base.counters.clones.add(filled.clones);
                self.charge_store(volume, filled.clones * CLONE_BYTES);
                self.note_filled(volume, filled.bytes);
                true
            }
            Err(error) => {
                // A part of it may be there: what follows writes it all.
                self.base_failed(volume.store, "clone", &std::io::Error::other(error.message));
                false
            }
        }
    }
}
