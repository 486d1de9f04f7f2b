//! What random guests do to whole volumes: create, attach, resume, detach, delete.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use volley_server::error::Status;
use volley_server::shard::api::{Command, Reply, Request};
use volley_server::types::VolumeSpec;

use crate::deadlines::BATCHES;
use crate::guest::{Guests, Session, VolumeRc};
use crate::model::{BLOCK, Existence, Image, VolumeModel};
use crate::node::{Node, volume_spec};

pub const VOLUMES_MAX: usize = 8;

impl Guests {
    /// A fresh attach: everyone before it is fenced.
    pub(crate) async fn attach(&self, node: &Node, model: &VolumeRc) {
        if model.borrow().is_rolling() {
            return;
        }
        model.borrow_mut().attach_changes += 1;
        let session = Session::of(model);
        let name = model.borrow().spec.name.to_string();
        model.borrow_mut().attaching += 1;
        let connection = self.new_connection();
        let reply = self.send(node, connection, Request::Attach { name, resume_generation: None }).await;
        model.borrow_mut().attaching -= 1;
        match reply {
            Ok(Reply::Attached(info)) => {
                let mut volume = model.borrow_mut();
                assert_eq!((info.volume, info.size_bytes), (volume.spec.id, volume.spec.size_bytes));
                // Another attach may have been answered meanwhile, but never with the same generation.
                assert_ne!(info.generation, volume.generation, "a generation was handed out twice");
                let newest = info.generation > volume.generation;
                assert!(newest || volume.attach_changes != session.attach_changes, "a generation went back");
                if newest {
                    volume.generation = info.generation;
                    volume.connection = connection;
                    volume.attached = true;
                    if volume.attach_changes == session.attach_changes {
                        volume.fence_writes();
                    }
                }
                volume.attach_changes += 1;
            }
            Ok(other) => panic!("an attach was answered with {other:?}"),
            Err(error) => {
                // Older generations may be fenced all the same: attach again before the next request.
                model.borrow_mut().attached = false;
                model.borrow_mut().attach_changes += 1;
                self.excuse(&session, "attach", &error);
            }
        }
    }

    /// A reconnect of the same host: the old connection can do nothing any more.
    pub(crate) async fn resume(&self, node: &Node, session: &Session) {
        if session.model.borrow().attaching > 0 {
            return;
        }
        session.model.borrow_mut().attach_changes += 1;
        let name = session.model.borrow().spec.name.to_string();
        let session = Session::of(&session.model);
        session.model.borrow_mut().attaching += 1;
        let connection = self.new_connection();
        let resume_generation = Some(session.generation);
        let reply = self.send(node, connection, Request::Attach { name, resume_generation }).await;
        session.model.borrow_mut().attaching -= 1;
        match reply {
            Ok(Reply::Attached(info)) => {
                assert_eq!(info.generation, session.generation);
                let mut volume = session.model.borrow_mut();
                if volume.generation == info.generation {
                    volume.connection = connection;
                    if volume.attach_changes == session.attach_changes {
                        volume.fence_writes();
                    }
                }
                drop(volume);
                session.model.borrow_mut().attach_changes += 1;
            }
            Ok(other) => panic!("an attach was answered with {other:?}"),
            Err(error) => {
                session.model.borrow_mut().attached = false;
                session.model.borrow_mut().attach_changes += 1;
                self.excuse(&session, "resume", &error);
            }
        }
    }

    pub(crate) async fn detach(&self, node: &Node, session: &Session) {
        session.model.borrow_mut().attach_changes += 1;
        session.model.borrow_mut().attached = false;
        let session = Session::of(&session.model);
        session.model.borrow_mut().attaching += 1;
        let reply = self
            .send(node, session.connection, Request::Detach { volume: session.id, generation: session.generation })
            .await;
        session.model.borrow_mut().attaching -= 1;
        if let Err(error) = reply {
            self.excuse(&session, "detach", &error);
        }
        session.model.borrow_mut().attach_changes += 1;
    }

    /// Attaches every volume and flushes it: what an earlier life wrote must be on the disk then.
    pub async fn flush_all(&self, node: &Node) {
        let volumes = self.volumes.borrow().clone();
        for model in volumes.into_iter().filter(|model| model.borrow().existence == Existence::Sure) {
            self.attach(node, &model).await;
            if model.borrow().attached {
                self.flush(node, &Session::of(&model)).await;
            }
        }
    }

    /// One request that creates a few volumes, all of one shard.
    pub async fn create_some(&self, node: &Node) {
        self.create(node, 1 + self.below(4) as usize).await;
    }

    /// One request that creates so many volumes, if there may be so many, all of one shard.
    pub async fn create(&self, node: &Node, count: usize) {
        let room = VOLUMES_MAX.saturating_sub(self.volumes.borrow().len());
        let count = room.min(count);
        let owner = |spec: &VolumeSpec| spec.id.owner(node.shards.len());
        let mut specs: Vec<VolumeSpec> = Vec::new();
        let mut models = Vec::new();
        while specs.len() < count {
            let (spec, image) = self.new_spec();
            if specs.first().is_none_or(|first| owner(first) == owner(&spec)) {
                models.push(Rc::new(RefCell::new(VolumeModel::new(spec.clone(), image))));
                specs.push(spec);
            }
        }
        self.create_all(node, specs, models).await;
    }

    /// One request for volumes of one shard.
    pub(crate) async fn create_all(&self, node: &Node, specs: Vec<VolumeSpec>, models: Vec<VolumeRc>) {
        let Some(first) = specs.first() else { return };
        let name = first.name.clone();
        self.volumes.borrow_mut().extend(models.iter().cloned());
        match node.command(&name, |reply| Command::CreateVolumes { specs, reply }).await {
            Ok(()) => {
                for model in models {
                    self.count(if model.borrow().is_blank() { "create blank" } else { "create" });
                    model.borrow_mut().existence = Existence::Sure;
                }
            }
            // A failed commit may have become durable nevertheless: they stay maybes until the next life.
            Err(error) => self.excuse(&Session::of(&models[0]), "create", &error),
        }
    }

    /// A volume as large as its snapshot, or larger, or blank.
    fn new_spec(&self) -> (VolumeSpec, Option<Rc<Image>>) {
        // Long names make journal batches of more than one sector, which a crash may tear.
        let padding = "x".repeat(self.below(100) as usize);
        let name = format!("vm-{}{padding}", self.next_name.replace(self.next_name.get() + 1));
        let snapshot = &self.snapshots[self.below(self.snapshots.len() as u64) as usize];
        let rng = &mut *self.rng.borrow_mut();
        let blocks = snapshot.image.bytes.len() as u64 / BLOCK;
        let batch = Some(u64::from(self.next_name.get()) % (BATCHES + 1)).filter(|batch| *batch < BATCHES);
        let (spec, image) = match rng.below(6) {
            0 => (volume_spec(rng, &name, (200 + blocks / 4) * BLOCK, None), None),
            1 => {
                let blocks = blocks + 1 + rng.below(300);
                (volume_spec(rng, &name, blocks * BLOCK, Some(snapshot)), Some(snapshot.image.clone()))
            }
            _ => (volume_spec(rng, &name, blocks * BLOCK, Some(snapshot)), Some(snapshot.image.clone())),
        };
        (VolumeSpec { batch, ..spec }, image)
    }

    pub(crate) async fn delete(&self, node: &Node, session: &Session) {
        if self.volumes.borrow().len() >= 3 && self.below(3) == 0 {
            self.delete_for_sure(node, session).await;
        }
    }

    pub async fn delete_for_sure(&self, node: &Node, session: &Session) {
        let name: Arc<str> = session.model.borrow().spec.name.clone();
        session.model.borrow_mut().existence = Existence::Leaving;
        let make = |reply| Command::DeleteVolume { name: name.to_string(), force: true, reply };
        match node.command(&name, make).await {
            Ok(()) => {
                self.count("delete");
                self.deleted.borrow_mut().push(session.model.borrow().spec.clone());
                self.volumes.borrow_mut().retain(|v| !Rc::ptr_eq(v, &session.model));
            }
            Err(error) => {
                if error.status == Status::Conflict {
                    session.model.borrow_mut().existence = Existence::Sure;
                }
                self.excuse(session, "delete", &error);
            }
        }
    }
}
