//! Who uses a volume: attaching, resuming and detaching, by generations (P7).

use std::rc::Rc;

use crate::error::{Error, Result, Status};
use crate::journal::Record;
use crate::mutation::{self, Mutation};
use crate::object_store::ObjectStore;
use crate::platform::Platform;
use crate::shard::Shard;
use crate::shard::api::{AttachInfo, ConnectionId, Reply};
use crate::shard::datapath::Claim;
use crate::shard::volume::Volume;
use crate::types::VolumeId;

impl<P: Platform, O: ObjectStore> Shard<P, O> {
    pub(super) async fn attach(&self, name: &str, resume: Option<u64>, from: ConnectionId) -> Result<Reply> {
        let volume = self.by_name(name)?;
        if volume.retired.get() {
            let message = format!("volume {name:?} is being rolled back or resized: try again");
            return Err(Error::new(Status::Busy, message));
        }
        match resume {
            Some(generation) => self.resume(&volume, generation, from).await?,
            None => self.attach_fresh(&volume, from).await?,
        }
        Ok(Reply::Attached(attach_info(&volume)))
    }

    /// The same writer on a new connection. What it sent over the old one ends before the answer or is refused: it may
    /// send it again and must not be overtaken by its own past.
    async fn resume(&self, volume: &Volume<P>, generation: u64, from: ConnectionId) -> Result<()> {
        let (name, current) = (&*volume.spec.name, volume.generation.get());
        if generation != current {
            self.0.counters.stale_generations.add(1);
            let message =
                format!("volume {name:?}: generation {generation} is fenced by {current}: another host attached");
            return Err(Error::new(Status::StaleGeneration, message));
        }
        volume.attached.set(Some(from));
        volume.writes_done.until(|| volume.writing.get() == 0).await;
        self.still_attached(volume, generation, from)
    }

    /// A new generation (P7): older ones are refused at once, their writes in flight end, the generation becomes
    /// durable, then the attach is answered.
    async fn attach_fresh(&self, volume: &Rc<Volume<P>>, from: ConnectionId) -> Result<()> {
        let generation = volume.generation.get() + 1;
        volume.generation.set(generation);
        volume.attached.set(Some(from));
        if !mutation::on(Mutation::AttachOvertakesWrites) {
            volume.writes_done.until(|| volume.writing.get() == 0).await;
        }
        if !mutation::on(Mutation::GenerationNotJournaled) {
            self.0.journal.admit().await?;
            let lsn = self.0.journal.append(&Record::Generation { volume: volume.spec.id, generation });
            self.0.journal.commit(lsn).await?;
        }
        self.begin_recording(volume);
        self.still_attached(volume, generation, from)
    }

    fn still_attached(&self, volume: &Volume<P>, generation: u64, from: ConnectionId) -> Result<()> {
        if volume.generation.get() != generation || volume.attached.get() != Some(from) {
            let message = format!("volume {:?}: another host attached meanwhile", &*volume.spec.name);
            return Err(Error::new(Status::StaleGeneration, message));
        }
        Ok(())
    }

    pub(super) fn detach(&self, claim: Claim) -> Result<Reply> {
        self.writer(claim)?.attached.set(None);
        Ok(Reply::Done)
    }

    pub(super) fn drop_attachment(&self, id: VolumeId, from: ConnectionId) {
        let Ok(volume) = self.volume(id) else { return };
        if volume.attached.get() == Some(from) {
            volume.attached.set(None);
        }
    }
}

pub(super) fn attach_info<P: Platform>(volume: &Volume<P>) -> AttachInfo {
    AttachInfo {
        volume: volume.spec.id,
        generation: volume.generation.get(),
        size_bytes: volume.spec.size_bytes,
        chunk_bytes: volume.spec.chunk_bytes,
    }
}
