//! A server on simulated connections, and a peer that sees frames.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures::channel::oneshot;
use volley_protocol::messages as m;
use volley_protocol::{Decoded, FetchUntil, Status, decode, encode};
use volley_server::connection::{self, Connections};
use volley_server::error::{Error, Result};
use volley_server::platform::sim::{SimConnection, SimReader, SimWorld, SimWriter};
use volley_server::platform::{ByteReader, ByteWriter, Connection, Platform};
use volley_server::shard::api::{AttachInfo, ConnectionId, Handler, Reply, Request, ShardMap};
use volley_server::types::VolumeId;

/// The volume that the fake handler answers for at once.
pub const RESIDENT: u64 = 1;
pub const VOLUME: u64 = 7;

/// A shard that answers what the tests expect and remembers what it was asked.
#[derive(Clone, Default)]
pub struct Fake(pub Rc<FakeState>);

#[derive(Default)]
pub struct FakeState {
    pub seen: Cell<usize>,
    pub made_bytes: Cell<usize>,
    holding: Cell<bool>,
    held: RefCell<Vec<oneshot::Sender<()>>>,
    pub lost: RefCell<Vec<(VolumeId, ConnectionId)>>,
}

impl Fake {
    pub fn hold(&self) {
        self.0.holding.set(true);
    }

    pub fn release(&self) {
        self.0.holding.set(false);
        for held in self.0.held.take() {
            let _ = held.send(());
        }
    }
}

impl Handler for Fake {
    fn try_now(&self, request: &Request, _: ConnectionId) -> Option<Result<Reply>> {
        let resident = matches!(request, Request::PriorityFetch { volume: VolumeId(RESIDENT), .. });
        resident.then_some(Ok(Reply::Done))
    }

    async fn handle(&self, request: Request, _: ConnectionId) -> Result<Reply> {
        self.0.seen.set(self.0.seen.get() + 1);
        if self.0.holding.get() {
            let (sender, receiver) = oneshot::channel();
            self.0.held.borrow_mut().push(sender);
            let _ = receiver.await;
        }
        match request {
            Request::Attach { resume_generation, .. } => {
                let generation = resume_generation.unwrap_or(3);
                let volume = VolumeId(VOLUME);
                Ok(Reply::Attached(AttachInfo { volume, generation, size_bytes: 1 << 20, chunk_bytes: 1 << 19 }))
            }
            Request::Read { len, .. } => {
                self.0.made_bytes.set(self.0.made_bytes.get() + len as usize);
                Ok(Reply::Data(vec![7; len as usize].into()))
            }
            Request::Stat { .. } => Err(Error::new(Status::UnknownVolume, "no such volume")),
            Request::ListVolumes { .. } => Ok(Reply::Names(vec!["a".to_owned()])),
            _ => Ok(Reply::Done),
        }
    }

    fn connection_lost(&self, volume: VolumeId, from: ConnectionId) {
        self.0.lost.borrow_mut().push((volume, from));
    }

    fn node_id(&self) -> u128 {
        11
    }

    fn boot_id(&self) -> u64 {
        13
    }

    fn shard(&self) -> usize {
        1
    }

    fn shard_map(&self) -> ShardMap {
        [":7400".to_owned(), ":7401".to_owned()].into()
    }
}

/// A client end that sees frames.
pub struct Peer {
    pub reader: SimReader,
    pub writer: SimWriter,
    pub received: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub op: u8,
    pub request_id: u64,
    pub status: Status,
    pub body: Vec<u8>,
    pub payload_len: usize,
}

impl Peer {
    pub async fn send(&mut self, frames: &[u8]) {
        self.writer.write_all(frames).await.expect("the server reads");
    }

    /// `None`: the server closed.
    pub async fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Decoded::Frame(frame) = decode(&self.received).expect("the server sends sound frames") {
                assert!(frame.header.is_reply());
                let answer = Answer {
                    op: frame.header.op,
                    request_id: frame.header.request_id,
                    status: Status::from_wire(frame.header.status).expect("known status"),
                    body: frame.body.to_vec(),
                    payload_len: frame.payload.len(),
                };
                let len = frame.len();
                self.received.drain(..len);
                return Some(answer);
            }
            let mut part = [0; 4096];
            match self.reader.read(&mut part).await {
                Ok(0) | Err(_) => return None,
                Ok(len) => self.received.extend_from_slice(&part[..len]),
            }
        }
    }

    /// The status of the answer to this request, which is the next one.
    pub async fn status(&mut self, request_id: u64) -> Status {
        let answer = self.answer().await.expect("an answer");
        assert_eq!(answer.request_id, request_id);
        answer.status
    }

    pub async fn hello(&mut self) {
        self.send(&hello(1, 1)).await;
        assert_eq!(self.status(1).await, Status::Ok);
    }
}

pub struct Lab {
    pub world: SimWorld,
    pub fake: Fake,
    pub connections: Rc<Connections>,
}

impl Lab {
    pub fn new(seed: u64) -> Lab {
        Lab { world: SimWorld::new(seed), fake: Fake::default(), connections: Rc::default() }
    }

    pub fn connect(&self) -> Peer {
        let (client, server) = SimConnection::pair(&self.world);
        connection::serve(&self.world.platform(), &self.connections, &self.fake, server);
        let (reader, writer) = client.split();
        Peer { reader, writer, received: Vec::new() }
    }

    /// Lets everything that can happen happen.
    pub async fn settle(&self) {
        self.world.platform().sleep(Duration::from_secs(1)).await;
    }

    pub async fn all_closed(&self) {
        self.settle().await;
        assert_eq!(self.connections.open(), 0, "the server let go of the connection");
    }
}

pub fn hello(version_min: u16, version_max: u16) -> Vec<u8> {
    frame(1, 0, &m::Hello { version_min, version_max, features: 0, client: "test".to_owned() }, &[])
}

pub fn frame<T: encode::EncodeBody>(request_id: u64, flags: u8, body: &T, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode::request(&mut out, request_id, flags, body, payload);
    out
}

pub fn fetch(request_id: u64, volume: u64) -> Vec<u8> {
    frame(request_id, 0, &m::PriorityFetch { volume, offset: 0, len: 512, until: FetchUntil::Resident }, &[])
}

pub fn read(request_id: u64, len: u32) -> Vec<u8> {
    frame(request_id, 0, &m::Read { volume: VOLUME, generation: 3, offset: 0, len }, &[])
}

pub fn attach(request_id: u64, resume_generation: Option<u64>) -> Vec<u8> {
    frame(request_id, 0, &m::Attach { name: "v".to_owned(), resume_generation }, &[])
}

pub fn detach(request_id: u64, generation: u64) -> Vec<u8> {
    frame(request_id, 0, &m::Detach { volume: VOLUME, generation }, &[])
}
