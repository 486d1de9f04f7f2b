//! What connections of this shard ask: answered here, or by the shard that owns the volume.

use crate::error::{Error, Result, Status};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::{ConnectionId, Handler, Reply, Request, ShardMap};
use crate::shard::datapath::Claim;
use crate::shard::mesh::MeshMessage;
use crate::types::VolumeId;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    /// The shard that owns what a request is about.
    fn owner(&self, request: &Request) -> usize {
        let shards = self.0.config.shards;
        match request {
            Request::Attach { name, .. } | Request::Lookup { name } => VolumeId::new(name, 0).owner(shards),
            Request::ListVolumes { .. } => self.0.config.shard,
            Request::Detach { volume, .. }
            | Request::Read { volume, .. }
            | Request::Write { volume, .. }
            | Request::Flush { volume, .. }
            | Request::Discard { volume, .. }
            | Request::WriteZeroes { volume, .. }
            | Request::PriorityFetch { volume, .. }
            | Request::Residency { volume, .. }
            | Request::ResidencyWait { volume, .. }
            | Request::Stat { volume } => volume.owner(shards),
        }
    }

    async fn forward(&self, owner: usize, request: Request, from: ConnectionId) -> Result<Reply> {
        self.0.counters.requests_forwarded.add(1);
        let (reply, answer) = flume::bounded(1);
        if let Err(error) = self.0.mesh.send(owner, MeshMessage::Request { request, from, reply }) {
            self.0.counters.requests_refused_busy.add(1);
            return Err(error);
        }
        let stopped = |_| Err(Error::new(Status::ShuttingDown, format!("shard {owner} has stopped")));
        answer.recv_async().await.unwrap_or_else(stopped)
    }
}

impl<P: Platform, O: ObjectStore> Handler for Shard<P, O> {
    fn try_now(&self, request: &Request, from: ConnectionId) -> Option<Result<Reply>> {
        let here =
            |volume: VolumeId| !self.0.stopping.get() && volume.owner(self.0.config.shards) == self.0.config.shard;
        match *request {
            Request::PriorityFetch { volume, offset, len, until } if here(volume) => {
                self.priority_fetch_now(volume, offset, len, until)
            }
            Request::Read { volume, generation, offset, len } if here(volume) => {
                self.read_now(Claim { volume, generation, from }, offset, len)
            }
            _ => None,
        }
    }

    async fn handle(&self, request: Request, from: ConnectionId) -> Result<Reply> {
        let owner = self.owner(&request);
        if owner == self.0.config.shard {
            self.serve(request, from).await
        } else {
            self.forward(owner, request, from).await
        }
    }

    fn connection_lost(&self, volume: VolumeId, from: ConnectionId) {
        let owner = volume.owner(self.0.config.shards);
        if owner == self.0.config.shard {
            self.drop_attachment(volume, from);
        } else if let Err(error) = self.0.mesh.send(owner, MeshMessage::ConnectionLost { volume, from }) {
            tracing::warn!(%error, "a lost connection was not told to the volume's shard");
        }
    }

    fn node_id(&self) -> u128 {
        self.0.config.node_id
    }

    fn boot_id(&self) -> u64 {
        self.0.config.boot_id
    }

    fn shard(&self) -> usize {
        self.0.config.shard
    }

    fn shard_map(&self) -> ShardMap {
        self.0.config.shard_map.clone()
    }
}
