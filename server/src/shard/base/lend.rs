//! What a base holds of a volume already: one question to each owner, and a volume is born with all of it.

use std::rc::Rc;

use futures::stream::{self, StreamExt};

use super::Place;
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::fill_turns::FillTurn;
use crate::shard::fills::{Content, Fill, gather};
use crate::shard::hydrate::RUN_FILLS_MAX;
use crate::shard::hydration_queue::Class;
use crate::shard::mesh::MeshMessage;
use crate::shard::volume::{Volume, is_zero};
use crate::snapshot::Manifest;
use crate::transfer::{ChunkSource, Digest};

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// Has a volume share those of the chunks that the base of its store holds. Returns how many those were.
    pub(in crate::shard) async fn share_what_is_there(
        &self,
        volume: &Rc<Volume<P>>,
        manifest: &Manifest,
        chunks: &[u32],
    ) -> usize {
        let stored = chunks.iter().copied().filter(|chunk| !is_zero(manifest, *chunk));
        let places = self.lent(volume, manifest, stored.collect()).await;
        let count = places.len();
        let runs = gather(places, volume.spec.chunk_bytes);
        let clones = runs.into_iter().map(async |run| {
            if let Fill::Run(first, places) = run {
                // What could not be shared is copied in its turn.
                self.share(volume, first, &places, FillTurn::Paced(Class::Background)).await;
            }
            self.0.platform.yield_now().await;
        });
        stream::iter(clones).buffered(RUN_FILLS_MAX).for_each(async |()| ()).await;
        count
    }

    async fn lent(&self, volume: &Volume<P>, manifest: &Manifest, chunks: Vec<u32>) -> Vec<(u32, Content)> {
        let shards = self.0.config.shards;
        let mut by_owner: Vec<(Vec<u32>, Vec<Digest>)> = vec![Default::default(); shards];
        for chunk in chunks {
            if let Some(source) = ChunkSource::of(manifest, chunk, &volume.account.origin) {
                let (chunks, digests) = &mut by_owner[source.owner(shards)];
                chunks.push(chunk);
                digests.push(source.digest);
            }
        }
        let mut answers = Vec::with_capacity(shards);
        for (owner, (chunks, digests)) in by_owner.into_iter().enumerate().filter(|(_, (chunks, _))| !chunks.is_empty())
        {
            let (reply, answer) = flume::bounded(1);
            if owner == self.0.config.shard {
                self.lend(volume.store, &digests, &reply);
            } else if self.0.mesh.send(owner, MeshMessage::Lend { store: volume.store, digests, reply }).is_err() {
                // The hydrator asks for them one by one.
                continue;
            }
            answers.push((chunks, answer));
        }
        let mut places = Vec::new();
        for (chunks, answer) in answers {
            let lent = answer.recv_async().await.unwrap_or_default();
            let there = chunks.into_iter().zip(lent);
            places.extend(there.filter_map(|(chunk, place)| Some((chunk, Content::Place(place?)))));
        }
        places.sort_by_key(|(chunk, _)| *chunk);
        places
    }

    /// The owner's side.
    pub(in crate::shard) fn lend(&self, store: usize, digests: &[Digest], reply: &flume::Sender<Vec<Option<Place>>>) {
        let base = &self.0.bases[store];
        let _ = reply.send(digests.iter().map(|digest| base.find(digest)).collect());
    }
}
