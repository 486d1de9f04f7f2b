//! Messages between the shards of a node: bounded channels into the target's pump. The only bytes that cross cores
//! are owned request data and reference-counted, immutable chunks.

use crate::error::{Error, Result, Status};
use crate::shard::api::{ConnectionId, Reply, Request};
use crate::shard::base::{Order, Place, Want};
use crate::transfer::{ChunkSource, Digest, FetchClass, FetchReply};
use crate::types::VolumeId;

/// Messages waiting for one shard: twice what its peers together keep in flight in ordinary use.
pub const MESH_DEPTH: usize = 4096;

pub enum MeshMessage {
    /// A request that arrived at the wrong shard.
    Request {
        request: Request,
        from: ConnectionId,
        reply: flume::Sender<Result<Reply>>,
    },
    /// Chunks that the target owns, wanted by a volume of the sender.
    Fetch {
        wanted: Vec<(ChunkSource, FetchReply)>,
        class: FetchClass,
        /// Guests of a wave want them.
        wave: bool,
    },
    /// The same, but as places in the base of a volume store where it has or takes them.
    Supply {
        store: usize,
        orders: Vec<Order>,
        want: Want,
        class: FetchClass,
        wave: bool,
    },
    /// Which of these chunks, which the target owns, the base of a volume store holds.
    Lend {
        store: usize,
        digests: Vec<Digest>,
        reply: flume::Sender<Vec<Option<Place>>>,
    },
    ConnectionLost {
        volume: VolumeId,
        from: ConnectionId,
    },
}

/// One shard's ends of all channels.
pub struct Mesh {
    peers: Vec<flume::Sender<MeshMessage>>,
    pub inbox: flume::Receiver<MeshMessage>,
}

impl Mesh {
    /// The meshes of all shards of a node.
    #[must_use]
    pub fn all(shards: usize) -> Vec<Mesh> {
        let channels: Vec<_> = (0..shards).map(|_| flume::bounded(MESH_DEPTH)).collect();
        let peers: Vec<_> = channels.iter().map(|(sender, _)| sender.clone()).collect();
        channels.into_iter().map(|(_, inbox)| Mesh { peers: peers.clone(), inbox }).collect()
    }

    #[must_use]
    pub fn shards(&self) -> usize {
        self.peers.len()
    }

    /// # Errors
    /// `Busy` when the target's inbox is full, `ShuttingDown` when it is gone.
    pub fn send(&self, shard: usize, message: MeshMessage) -> Result<()> {
        self.peers[shard].try_send(message).map_err(|error| match error {
            flume::TrySendError::Full(_) => Error::new(Status::Busy, format!("the queue to shard {shard} is full")),
            flume::TrySendError::Disconnected(_) => {
                Error::new(Status::ShuttingDown, format!("shard {shard} has stopped"))
            }
        })
    }
}
