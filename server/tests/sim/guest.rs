//! Random guests: requests of every kind at any shard, each answer judged by the model.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures::future::{join_all, select};
use volley_server::error::{Error, Result, Status};
use volley_server::platform::Platform;
use volley_server::platform::sim::{Sim, SimRng};
use volley_server::shard::api::{Command, ConnectionId, FetchUntil, Reply, Request};
use volley_server::types::{HydrationRate, VolumeId, VolumeSpec};

use crate::model::{BLOCK, Existence, Tag, VolumeModel, WriteStart, ZEROES};
use crate::node::{CHUNK_BYTES, Node, Snapshot};
use crate::snapshots::Snapshots;

const SCATTERED_WRITES: usize = 30;

pub type VolumeRc = Rc<RefCell<VolumeModel>>;

/// Which errors a guest may see in this life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Excuses {
    pub object_store: bool,
    pub disk: bool,
    pub no_space: bool,
}

/// All that the test knows; it outlives the node.
pub struct Guests {
    pub volumes: RefCell<Vec<VolumeRc>>,
    /// Volumes whose deletion was answered: they never come back.
    pub deleted: RefCell<Vec<VolumeSpec>>,
    /// Images, which are there from the beginning to the end.
    pub snapshots: Vec<Snapshot>,
    pub snapshots_taken: Snapshots,
    pub(crate) rng: RefCell<SimRng>,
    next_tag: Cell<Tag>,
    pub(crate) next_name: Cell<u32>,
    pub excuses: Cell<Excuses>,
    pub stopping: Cell<bool>,
    /// What happened how often, to see that the runs reach everything.
    pub happened: RefCell<BTreeMap<String, u64>>,
}

/// A request's view of its volume at its start.
pub(crate) struct Session {
    pub(crate) model: VolumeRc,
    pub(crate) id: VolumeId,
    pub(crate) generation: u64,
    pub(crate) connection: ConnectionId,
    pub(crate) attach_changes: u64,
    /// An attach or detach was under way at the start.
    pub(crate) contested: bool,
    rolls: u64,
}

impl Session {
    pub(crate) fn of(model: &VolumeRc) -> Session {
        let volume = model.borrow();
        Session {
            id: volume.spec.id,
            generation: volume.generation,
            connection: volume.connection,
            attach_changes: volume.attach_changes,
            contested: volume.attaching > 0,
            rolls: volume.rolls,
            model: model.clone(),
        }
    }

    /// The volume was rolled back meanwhile, or may have been.
    fn rolled(&self) -> bool {
        let volume = self.model.borrow();
        volume.is_rolling() || volume.rolls != self.rolls
    }
}

impl Guests {
    pub fn new(rng: SimRng, snapshots: Vec<Snapshot>, snapshots_taken: Snapshots) -> Guests {
        Guests {
            volumes: RefCell::default(),
            deleted: RefCell::default(),
            snapshots,
            snapshots_taken,
            rng: RefCell::new(rng),
            next_tag: Cell::new(ZEROES + 1),
            next_name: Cell::new(0),
            excuses: Cell::default(),
            stopping: Cell::new(false),
            happened: RefCell::default(),
        }
    }

    pub fn count(&self, what: impl Into<String>) {
        *self.happened.borrow_mut().entry(what.into()).or_default() += 1;
    }

    pub fn count_many(&self, what: &str, times: u64) {
        if times > 0 {
            *self.happened.borrow_mut().entry(what.into()).or_default() += times;
        }
    }

    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().below(bound)
    }

    /// One guest: `requests` requests of any kind, one after the other.
    pub async fn run(self: Rc<Self>, sim: Sim, node: Rc<Node>, requests: u64) {
        for _ in 0..requests {
            if self.stopping.get() {
                return;
            }
            if self.below(3) == 0 {
                let pause = Duration::from_micros(self.below(20_000));
                sim.sleep(pause).await;
            }
            self.any_request(&sim, &node).await;
        }
    }

    async fn any_request(&self, sim: &Sim, node: &Node) {
        if self.below(60) == 0 {
            // Often a checkpoint comes into the middle of it.
            let pause = Duration::from_micros(self.below(3000));
            let checkpoint = async {
                sim.sleep(pause).await;
                if self.below(2) == 0 {
                    join_all(node.shards.iter().map(|shard| shard.checkpoint_now())).await;
                }
            };
            futures::join!(self.create_some(node), checkpoint);
            return;
        }
        if self.below(30) == 0 {
            if let Some(session) = self.session(node).await {
                self.take_over(sim, node, &session).await;
            }
            return;
        }
        if self.below(30) == 0 {
            if let Some(session) = self.session(node).await {
                self.leave_early(sim, node, &session).await;
            }
            return;
        }
        if self.below(60) == 0 {
            self.count("checkpoint");
            return node.shards[self.below(node.shards.len() as u64) as usize].checkpoint_now().await;
        }
        if self.below(40) == 0 {
            return self.set_deadline(node).await;
        }
        let dice = self.below(102);
        self.request(node, dice).await;
    }

    /// The request that a throw of the die asks for.
    pub async fn request(&self, node: &Node, dice: u64) {
        let Some(session) = self.session(node).await else { return };
        match dice {
            0..30 => self.read(node, &session).await,
            30..58 => self.write(node, &session).await,
            58..66 => self.flush(node, &session).await,
            66..71 => self.zero(node, &session, false).await,
            71..77 => self.zero(node, &session, true).await,
            77..87 => self.fetch(node, &session).await,
            87..90 => self.attach(node, &session.model).await,
            90..92 => self.detach(node, &session).await,
            92..95 => self.stale_write(node, &session).await,
            95..97 => self.bad_range(node, &session).await,
            97..98 => self.set_rate(node, &session).await,
            98..99 => self.resume(node, &session).await,
            99 => self.delete(node, &session).await,
            _ => self.scatter(node).await,
        }
    }

    /// A volume that is there, attached.
    async fn session(&self, node: &Node) -> Option<Session> {
        let model = {
            let volumes = self.volumes.borrow();
            let usable = |v: &&VolumeRc| v.borrow().existence == Existence::Sure && !v.borrow().is_rolling();
            let known: Vec<_> = volumes.iter().filter(usable).collect();
            if known.is_empty() {
                return None;
            }
            known[self.below(known.len() as u64) as usize].clone()
        };
        if !model.borrow().attached {
            self.attach(node, &model).await;
        }
        if !model.borrow().attached {
            return None;
        }
        Some(Session::of(&model))
    }

    pub(crate) async fn send(&self, node: &Node, from: ConnectionId, request: Request) -> Result<Reply> {
        let shard = self.below(node.shards.len() as u64) as usize;
        let kind = kind(&request);
        let reply = node.request(shard, from, request).await;
        match &reply {
            Ok(_) => self.count(kind),
            Err(error) => self.count(format!("{:?}", error.status)),
        }
        reply
    }

    /// Panics unless this life has an excuse for the error.
    pub(crate) fn excuse(&self, session: &Session, what: &str, error: &Error) {
        let excuses = self.excuses.get();
        let volume = session.model.borrow();
        let excused = match error.status {
            Status::StaleGeneration | Status::NotAttached => {
                session.contested || volume.attach_changes != session.attach_changes
            }
            _ if volume.existence == Existence::Leaving => true,
            Status::Busy | Status::Conflict if volume.is_rolling() || volume.rolls != session.rolls => true,
            Status::DeadlineExceeded | Status::ObjectStore | Status::Corrupt => excuses.object_store,
            Status::Io => excuses.disk,
            Status::NoSpace => excuses.no_space,
            Status::ShuttingDown | Status::Busy => self.stopping.get(),
            _ => false,
        };
        assert!(excused, "{what} of volume {:?} failed without an excuse: {error:?}", &*volume.spec.name);
    }

    /// Any range of whole blocks, of many shapes.
    fn range(&self, volume: &VolumeModel) -> (u64, u64) {
        let size = volume.spec.size_bytes;
        let most = match self.below(10) {
            0..4 => 4096,
            4..9 => u64::from(CHUNK_BYTES),
            _ => 4 * u64::from(CHUNK_BYTES),
        };
        let mut offset = self.below(size / BLOCK) * BLOCK;
        let mut len = (1 + self.below(most / BLOCK)) * BLOCK;
        match self.below(4) {
            0 => {
                offset -= offset % 4096;
                len = len.next_multiple_of(4096);
            }
            1 => {
                offset -= offset % u64::from(CHUNK_BYTES);
                len = len.next_multiple_of(u64::from(CHUNK_BYTES));
            }
            _ => {}
        }
        (offset, len.min(size - offset))
    }

    /// The node was stopped: nobody is attached any more.
    pub fn forget_attachments(&self) {
        for volume in &*self.volumes.borrow() {
            volume.borrow_mut().attached = false;
        }
    }

    pub(crate) fn new_connection(&self) -> ConnectionId {
        ConnectionId(u64::from(self.new_tag()))
    }

    fn new_tag(&self) -> Tag {
        self.next_tag.set(self.next_tag.get() + 1);
        self.next_tag.get()
    }

    async fn read(&self, node: &Node, session: &Session) {
        let range = self.range(&session.model.borrow());
        self.read_from(node, session, range).await;
    }

    pub(crate) async fn read_from(&self, node: &Node, session: &Session, (offset, len): (u64, u64)) {
        let start = session.model.borrow().begin_read(offset, len);
        let (volume, generation, len) = (session.id, session.generation, len as u32);
        match self.send(node, session.connection, Request::Read { volume, generation, offset, len }).await {
            Ok(Reply::Data(data)) => {
                assert_eq!(data.len(), len as usize);
                session.model.borrow().check_read(&start, &data).unwrap_or_else(|complaint| panic!("{complaint}"));
            }
            Ok(other) => panic!("a read was answered with {other:?}"),
            Err(error) => self.excuse(session, "read", &error),
        }
    }

    async fn write(&self, node: &Node, session: &Session) {
        let range = self.range(&session.model.borrow());
        self.write_to(node, session, range).await;
    }

    /// Single sectors all over every volume, then flushes together: residency that takes more than one disk sector of the
    /// journal to write down.
    async fn scatter(&self, node: &Node) {
        self.count("scatter");
        let volumes = self.volumes.borrow().clone();
        let attached = volumes.iter().filter(|volume| volume.borrow().attached).map(Session::of);
        let scattered = attached.map(|session| async move {
            let sectors = session.model.borrow().spec.size_bytes / 4096;
            let offsets: Vec<u64> = (0..SCATTERED_WRITES).map(|_| self.below(sectors) * 4096).collect();
            let writes = offsets.iter().map(|offset| self.write_to(node, &session, (*offset, 4096)));
            join_all(writes).await;
            session
        });
        let sessions = join_all(scattered).await;
        join_all(sessions.iter().map(|session| self.flush(node, session))).await;
    }

    /// Another host attaches while writes are under way, one behind the other, and writes the same place: what the old
    /// host sent must not come after it.
    async fn take_over(&self, sim: &Sim, node: &Node, session: &Session) {
        self.count("take over");
        let (offset, len) = self.range(&session.model.borrow());
        let first = BLOCK.min(len);
        let pause = Duration::from_micros(self.below(1000));
        let newcomer = async {
            sim.sleep(pause).await;
            self.attach(node, &session.model).await;
            let session = Session::of(&session.model);
            if session.model.borrow().attached {
                self.write_to(node, &session, (offset, len)).await;
                self.read_from(node, &session, (offset, len)).await;
            }
        };
        let old_head = self.write_to(node, session, (offset, first));
        let old_rest = self.write_to(node, session, (offset + first, len - first));
        futures::join!(old_head, old_rest, newcomer);
    }

    /// A reader that goes away before its answer, and another one that wants the same and stays.
    async fn leave_early(&self, sim: &Sim, node: &Node, session: &Session) {
        self.count("left early");
        let range = self.range(&session.model.borrow());
        let (patience, delay) = (self.below(20_000), self.below(5_000));
        let leaver = async {
            let (read, patience) = (self.read_from(node, session, range), sim.sleep(Duration::from_micros(patience)));
            select(pin!(read), pin!(patience)).await;
        };
        let stayer = async {
            sim.sleep(Duration::from_micros(delay)).await;
            self.read_from(node, session, range).await;
        };
        futures::join!(leaver, stayer);
    }

    pub(crate) async fn write_to(&self, node: &Node, session: &Session, (offset, len): (u64, u64)) {
        if len == 0 {
            return;
        }
        let tag = self.new_tag();
        let fua = self.below(5) == 0;
        let Some(write) = session.model.borrow_mut().begin_write(offset, len, tag) else { return };
        let data = session.model.borrow().content(offset, len, tag);
        let (volume, generation) = (session.id, session.generation);
        let reply = self.send(node, session.connection, Request::Write { volume, generation, offset, data, fua }).await;
        self.end_write(session, &write, fua, "write", reply);
    }

    fn end_write(&self, session: &Session, write: &WriteStart, fua: bool, what: &str, reply: Result<Reply>) {
        match reply {
            Ok(_) => session.model.borrow_mut().write_done(write, fua),
            Err(error) => {
                // Fenced requests have no effect; of a zeroing in several steps the first ones may have happened.
                match error.status {
                    Status::StaleGeneration | Status::NotAttached if what == "write" => {
                        session.model.borrow_mut().write_refused(write);
                    }
                    _ => session.model.borrow_mut().write_failed(write),
                }
                self.excuse(session, what, &error);
            }
        }
    }

    /// Discard or write-zeroes.
    async fn zero(&self, node: &Node, session: &Session, write: bool) {
        let (mut offset, mut len) = self.range(&session.model.borrow());
        if !write {
            // The edges of a discard are left alone: only whole sectors are promised to be zeroes.
            let end = (offset + len) / 4096 * 4096;
            offset = offset.next_multiple_of(4096);
            if offset >= end {
                return;
            }
            len = end - offset;
        }
        let Some(zeroing) = session.model.borrow_mut().begin_write(offset, len, ZEROES) else { return };
        let (volume, generation) = (session.id, session.generation);
        let fua = write && self.below(4) == 0;
        let request = match write {
            true => Request::WriteZeroes { volume, generation, offset, len, fua },
            false => Request::Discard { volume, generation, offset, len },
        };
        let reply = self.send(node, session.connection, request).await;
        self.end_write(session, &zeroing, fua, "write-zeroes or discard", reply);
    }

    pub(crate) async fn flush(&self, node: &Node, session: &Session) {
        let start = session.model.borrow().begin_flush();
        let (volume, generation) = (session.id, session.generation);
        match self.send(node, session.connection, Request::Flush { volume, generation }).await {
            Ok(_) => session.model.borrow_mut().flush_done(&start),
            Err(error) => self.excuse(session, "flush", &error),
        }
    }

    async fn fetch(&self, node: &Node, session: &Session) {
        let (offset, len) = self.range(&session.model.borrow());
        let until = [FetchUntil::Readable, FetchUntil::Resident, FetchUntil::Durable][self.below(3) as usize];
        let volume = session.id;
        match self.send(node, session.connection, Request::PriorityFetch { volume, offset, len, until }).await {
            Ok(_) if until != FetchUntil::Readable && !session.rolled() => {
                self.check_resident(node, session, offset, len).await;
                if until == FetchUntil::Durable && !session.rolled() {
                    session.model.borrow_mut().fetched_durably.push((offset, len));
                }
            }
            Ok(_) => {}
            Err(error) => self.excuse(session, "priority fetch", &error),
        }
    }

    async fn check_resident(&self, node: &Node, session: &Session, offset: u64, len: u64) {
        match self.send(node, session.connection, Request::Residency { volume: session.id, offset, len }).await {
            Ok(Reply::Residency { extents, .. }) => {
                assert_eq!(extents.iter().map(|e| e.len_bytes).sum::<u64>(), len, "the extents cover the range");
                let there = session.rolled() || extents.iter().all(|e| e.resident);
                assert!(there, "fetched, but not resident: {offset}+{len} {extents:?}");
            }
            Ok(other) => panic!("residency was answered with {other:?}"),
            Err(error) => self.excuse(session, "residency", &error),
        }
    }

    /// P7: neither a host that was fenced nor a connection that was replaced can write.
    async fn stale_write(&self, node: &Node, session: &Session) {
        let volume = session.id;
        let (generation, connection) = match self.below(2) {
            0 => (session.generation, self.new_connection()),
            _ => (session.generation.saturating_sub(1 + self.below(2)), session.connection),
        };
        let data = vec![0xee; BLOCK as usize];
        match self.send(node, connection, Request::Write { volume, generation, offset: 0, data, fua: false }).await {
            Ok(_) => panic!("a write of generation {generation} was taken, current is {}", session.generation),
            Err(error) if matches!(error.status, Status::StaleGeneration | Status::NotAttached) => {}
            Err(error) => self.excuse(session, "stale write", &error),
        }
    }

    /// P6: a range outside the device or of odd bytes is refused.
    async fn bad_range(&self, node: &Node, session: &Session) {
        let size = session.model.borrow().spec.size_bytes;
        let (volume, generation) = (session.id, session.generation);
        let (offset, len) = [(size, 512), (size - 512, 1024), (100, 512), (0, 0)][self.below(4) as usize];
        match self.send(node, session.connection, Request::Read { volume, generation, offset, len }).await {
            Ok(_) => panic!("a read of {len} bytes at {offset} of {size} was answered"),
            Err(error) if matches!(error.status, Status::OutOfRange | Status::Misaligned) => {}
            Err(error) => self.excuse(session, "bad read", &error),
        }
    }

    async fn set_rate(&self, node: &Node, session: &Session) {
        let rate = [HydrationRate::None, HydrationRate::Unlimited, HydrationRate::BytesPerSecond(2 << 20)]
            [self.below(3) as usize];
        let name = session.model.borrow().spec.name.to_string();
        let make = |reply| Command::SetRate { name: name.clone(), rate, reply };
        if let Err(error) = node.command(&name, make).await {
            self.excuse(session, "set rate", &error);
        }
    }
}

/// What a request is counted as.
fn kind(request: &Request) -> &'static str {
    let cut = |offset: u64, len: u64| !offset.is_multiple_of(4096) || !len.is_multiple_of(4096);
    match request {
        Request::Attach { resume_generation: None, .. } => "attach",
        Request::Attach { .. } => "resume",
        Request::Detach { .. } => "detach",
        Request::Read { .. } => "read",
        Request::Write { fua: true, .. } => "write with FUA",
        Request::Write { offset, data, .. } if cut(*offset, data.len() as u64) => "write of parts of sectors",
        Request::Write { .. } => "write",
        Request::Flush { .. } => "flush",
        Request::Discard { .. } => "discard",
        Request::WriteZeroes { .. } => "write zeroes",
        Request::PriorityFetch { until: FetchUntil::Readable, .. } => "fetch until readable",
        Request::PriorityFetch { until: FetchUntil::Resident, .. } => "fetch until resident",
        Request::PriorityFetch { until: FetchUntil::Durable, .. } => "fetch until durable",
        _ => "question",
    }
}
