//! A node with in-memory volumes that speaks the real protocol, and misbehaves as told.
//!
//! It loses what was not flushed when it restarts, like the worst server that keeps the protocol's promises.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use volley_protocol::messages::*;
use volley_protocol::{Decoded, Frame, Op, Request, Status, decode, encode, name_tag};

pub const SIZE: usize = 8 << 20;
const CHUNK: u32 = 64 << 10;

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Serve,
    Refuse(Status),
    /// Close the connection without carrying it out.
    Drop,
    /// Carry it out, then close the connection without an answer.
    ServeAndDrop,
    /// Never answer.
    Hold,
    /// Answer with bytes that are no frame.
    Garbage,
}

pub struct Volume {
    pub id: u64,
    pub generation: u64,
    pub data: Vec<u8>,
    pub durable: Vec<u8>,
}

type Rule = Box<dyn FnMut(Op) -> Act + Send>;

pub struct State {
    pub volumes: BTreeMap<String, Volume>,
    pub boot_id: u64,
    pub node_id: u128,
    /// Operations carried out, with the shard that did.
    pub seen: Vec<(u32, Op)>,
    pub rule: Rule,
    /// Answer the requests of one read in reverse order, once this many are there.
    pub reverse: usize,
    connections: Vec<JoinHandle<()>>,
    ports: Vec<u16>,
}

impl State {
    pub fn count(&self, op: Op) -> usize {
        self.seen.iter().filter(|(_, seen)| *seen == op).count()
    }

    fn by_id(&mut self, id: u64) -> Option<&mut Volume> {
        self.volumes.values_mut().find(|v| v.id == id)
    }
}

pub struct FakeNode {
    pub state: Arc<Mutex<State>>,
    listeners: Vec<JoinHandle<()>>,
}

impl FakeNode {
    pub async fn start(shards: usize, names: &[&str]) -> FakeNode {
        let volumes = names.iter().enumerate().map(|(i, name)| {
            let id = u64::from(name_tag(name)) << 48 | (i as u64 + 1);
            (name.to_string(), Volume { id, generation: 0, data: vec![0; SIZE], durable: vec![0; SIZE] })
        });
        let state = State {
            volumes: volumes.collect(),
            boot_id: 100,
            node_id: 7,
            seen: Vec::new(),
            rule: Box::new(|_| Act::Serve),
            reverse: 0,
            connections: Vec::new(),
            ports: vec![0; shards],
        };
        let mut node = FakeNode { state: Arc::new(Mutex::new(state)), listeners: Vec::new() };
        node.listen().await;
        node
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.lock().ports[0])
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn rule(&self, rule: impl FnMut(Op) -> Act + Send + 'static) {
        self.lock().rule = Box::new(rule);
    }

    /// The first `n` requests of `op` get `act`, all others are served.
    pub fn first(&self, op: Op, mut n: usize, act: Act) {
        self.rule(move |got| {
            if got == op && n > 0 {
                n -= 1;
                return act;
            }
            Act::Serve
        });
    }

    /// All connections break; the process lives.
    pub fn cut(&self) {
        self.lock().connections.drain(..).for_each(|c| c.abort());
    }

    /// The process is gone, and with it what was not flushed.
    pub async fn kill(&mut self) {
        for listener in self.listeners.drain(..) {
            listener.abort();
            let _ = listener.await;
        }
        let connections: Vec<_> = self.lock().connections.drain(..).collect();
        for connection in connections {
            connection.abort();
            let _ = connection.await;
        }
        let mut state = self.lock();
        state.boot_id += 1;
        for volume in state.volumes.values_mut() {
            volume.data = volume.durable.clone();
        }
    }

    /// Listens again, at the same ports.
    pub async fn listen(&mut self) {
        let ports = self.lock().ports.clone();
        for (shard, port) in ports.into_iter().enumerate() {
            let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
            let state = self.state.clone();
            self.lock().ports[shard] = listener.local_addr().unwrap().port();
            self.listeners.push(tokio::spawn(async move {
                while let Ok((socket, _)) = listener.accept().await {
                    let task = tokio::spawn(converse(shard as u32, state.clone(), socket));
                    state.lock().unwrap().connections.push(task);
                }
            }));
        }
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.cut();
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

async fn converse(shard: u32, state: Arc<Mutex<State>>, mut socket: TcpStream) {
    let (mut input, mut replies) = (Vec::new(), Vec::new());
    let mut attached = HashSet::new();
    while let Ok(1..) = socket.read_buf(&mut input).await {
        let mut at = 0;
        let mut close = false;
        while let Decoded::Frame(frame) = decode(&input[at..]).unwrap() {
            at += frame.len();
            let mut reply = Vec::new();
            close |= serve(shard, &mut state.lock().unwrap(), &mut attached, &frame, &mut reply);
            replies.push(reply);
            if close {
                break;
            }
        }
        input.drain(..at);
        let out = {
            let reverse = state.lock().unwrap().reverse;
            if reverse > 0 && replies.len() < reverse && !attached.is_empty() && !close {
                continue;
            }
            if reverse > 0 {
                replies.reverse();
            }
            replies.drain(..).flatten().collect::<Vec<u8>>()
        };
        if socket.write_all(&out).await.is_err() || close {
            return;
        }
    }
}

/// Carries out one request; true when the connection is to be closed.
fn serve(shard: u32, state: &mut State, attached: &mut HashSet<u64>, frame: &Frame<'_>, out: &mut Vec<u8>) -> bool {
    let id = frame.header.request_id;
    let op = Op::from_wire(frame.header.op).unwrap();
    let act = (state.rule)(op);
    match act {
        Act::Serve | Act::ServeAndDrop => {}
        Act::Refuse(status) => {
            encode::reply_error(out, op as u8, id, status, "told to refuse");
            return false;
        }
        Act::Drop => return true,
        Act::Hold => return false,
        Act::Garbage => {
            out.extend_from_slice(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            return false;
        }
    }
    state.seen.push((shard, op));
    let mut reply = Vec::new();
    if let Err(status) = carry_out(shard, state, attached, frame, &mut reply) {
        reply.clear();
        encode::reply_error(&mut reply, op as u8, id, status, "refused by the fake");
    }
    if act == Act::ServeAndDrop {
        return true;
    }
    out.append(&mut reply);
    false
}

fn carry_out(
    shard: u32,
    state: &mut State,
    attached: &mut HashSet<u64>,
    frame: &Frame<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Status> {
    let id = frame.header.request_id;
    let request = frame.request().map_err(|e| e.status)?;
    let change = |state: &mut State, volume: u64, generation: u64, offset: u64, data: &[u8], fua: bool| {
        let volume = state.by_id(volume).ok_or(Status::UnknownVolume)?;
        check(volume, attached, generation)?;
        let range = offset as usize..offset as usize + data.len();
        volume.data.get_mut(range.clone()).ok_or(Status::OutOfRange)?.copy_from_slice(data);
        if fua {
            volume.durable[range].copy_from_slice(data);
        }
        Ok(())
    };
    match request {
        Request::Hello(_) => {
            let reply = HelloReply {
                version: 1,
                features: 0,
                node_id: state.node_id,
                boot_id: state.boot_id,
                shard,
                shards: state.ports.iter().map(|p| format!(":{p}")).collect(),
                payload_bytes_max: 1 << 20,
                in_flight_max: 64,
            };
            encode::reply(out, Op::Hello, id, &reply);
        }
        Request::Attach(body) => {
            let volume = state.volumes.get_mut(body.name.as_str()).ok_or(Status::UnknownVolume)?;
            match body.resume_generation.as_ref().map(|g| g.to_native()) {
                Some(generation) if generation != volume.generation => return Err(Status::StaleGeneration),
                Some(_) => {}
                None => volume.generation += 1,
            }
            attached.insert(volume.id);
            encode::reply(out, Op::Attach, id, &info(volume));
        }
        Request::Lookup(body) => {
            let volume = state.volumes.get(body.name.as_str()).ok_or(Status::UnknownVolume)?;
            encode::reply(out, Op::Lookup, id, &info(volume));
        }
        Request::Read(body) => {
            let volume = state.by_id(body.volume.to_native()).ok_or(Status::UnknownVolume)?;
            check(volume, attached, body.generation.to_native())?;
            let at = body.offset.to_native() as usize;
            let data = volume.data.get(at..at + body.len.to_native() as usize).ok_or(Status::OutOfRange)?;
            encode::reply_data(out, id, data);
        }
        Request::Write { body, data, fua } => {
            change(state, body.volume.into(), body.generation.into(), body.offset.into(), data, fua)?;
            encode::reply_done(out, Op::Write, id);
        }
        Request::Discard(body) => {
            let zeroes = vec![0; body.len.to_native() as usize];
            change(state, body.volume.into(), body.generation.into(), body.offset.into(), &zeroes, false)?;
            encode::reply_done(out, Op::Discard, id);
        }
        Request::WriteZeroes { body, fua } => {
            let zeroes = vec![0; body.len.to_native() as usize];
            change(state, body.volume.into(), body.generation.into(), body.offset.into(), &zeroes, fua)?;
            encode::reply_done(out, Op::WriteZeroes, id);
        }
        Request::Flush(body) => {
            let volume = state.by_id(body.volume.to_native()).ok_or(Status::UnknownVolume)?;
            check(volume, attached, body.generation.to_native())?;
            volume.durable = volume.data.clone();
            encode::reply_done(out, Op::Flush, id);
        }
        Request::Detach(body) => {
            attached.remove(&body.volume.to_native());
            encode::reply_done(out, Op::Detach, id);
        }
        Request::PriorityFetch(_) => encode::reply_done(out, Op::PriorityFetch, id),
        // Two chunks of every question: the client has to ask again for the rest.
        Request::Residency(body) => {
            let part = body.len.to_native().min(u64::from(CHUNK) * 2);
            let extents = vec![Extent { len_bytes: part, resident: true, hole: false }];
            encode::reply(out, Op::Residency, id, &ResidencyReply { version: 5, extents });
        }
        Request::ResidencyWait(body) => {
            let reply = ResidencyReply { version: body.seen_version.to_native() + 1, extents: Vec::new() };
            encode::reply(out, Op::ResidencyWait, id, &reply);
        }
        Request::Stat(_) => return Err(Status::Internal),
        Request::List(body) => {
            let shards = state.ports.len();
            let mine = |name: &&String| usize::from(name_tag(name)) % shards == shard as usize;
            let after = |name: &&String| name.as_str() > body.after.as_str();
            let names = state.volumes.keys().filter(mine).filter(after).take(2).cloned().collect();
            encode::reply(out, Op::List, id, &ListReply { names });
        }
    }
    Ok(())
}

fn check(volume: &Volume, attached: &HashSet<u64>, generation: u64) -> Result<(), Status> {
    if generation != volume.generation {
        return Err(Status::StaleGeneration);
    }
    if !attached.contains(&volume.id) {
        return Err(Status::NotAttached);
    }
    Ok(())
}

fn info(volume: &Volume) -> AttachReply {
    let (size_bytes, chunk_bytes) = (volume.data.len() as u64, CHUNK);
    AttachReply { volume: volume.id, generation: volume.generation, size_bytes, chunk_bytes }
}
