//! The thread of one shard: its executor, its stages at the start, its accept loop, its end.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement, PoolPlacement};

use super::executor::{cannot_start, platform};
use super::listen::Bound;
use crate::connection::{self, Connections};
use crate::error::{Error, Result, Status};
use crate::journal::Journal;
use crate::limits::{ACCEPT_RETRY, FLUSH_REPLIES_MAX};
use crate::object_store::ObjectError;
use crate::object_store::any::{AnyStore, StoreChoice};
use crate::object_store::s3::RequestPolicy;
use crate::platform::glommio::{Acceptor, Glommio, GlommioHttp, HELPERS, Resolver};
use crate::platform::{Platform, Queue};
use crate::shard::api::Command;
use crate::shard::mesh::Mesh;
use crate::shard::{Shard, ShardConfig};
use crate::types::VolumeState;

/// Status of the error of a thread that ended without a report: the reason comes from joining it.
pub(super) const SILENT: Status = Status::Internal;

type GlommioStore = AnyStore<Glommio, GlommioHttp>;
type GlommioShard = Shard<Glommio, GlommioStore>;

/// What a shard's thread takes with it.
pub(super) struct ShardSeed {
    pub(super) cpu: usize,
    /// The shard looks for work this long before it sleeps.
    pub(super) idle_poll: Duration,
    pub(super) journal_dir: PathBuf,
    pub(super) epoch: u64,
    pub(super) object_store: StoreChoice,
    pub(super) resolver: Resolver,
    /// The node has volumes to serve, with or without its object store.
    pub(super) has_volumes: bool,
    pub(super) config: ShardConfig,
    pub(super) volumes: Vec<VolumeState>,
    pub(super) mesh: Mesh,
    pub(super) commands: flume::Receiver<Command>,
    pub(super) listener: Bound,
}

/// A shard's thread as the starting thread sees it.
pub(super) struct ShardThread {
    shard: usize,
    reports: flume::Receiver<Result<()>>,
    go: flume::Sender<()>,
    executor: ExecutorJoinHandle<Result<()>>,
}

impl ShardThread {
    pub(super) fn spawn(seed: ShardSeed) -> Result<ShardThread> {
        let shard = seed.config.shard;
        let (reporter, reports) = flume::bounded(1);
        let (go, gate) = flume::bounded(1);
        let stages = Stages { reporter, gate };
        let executor = LocalExecutorBuilder::new(Placement::Fixed(seed.cpu))
            .name(&format!("volley-{shard}"))
            .spin_before_park(seed.idle_poll)
            .blocking_thread_pool_placement(PoolPlacement::Unbound(HELPERS))
            .spawn(move || run(seed, stages))
            .map_err(cannot_start)?;
        Ok(ShardThread { shard, reports, go, executor })
    }

    /// Waits until the shard has passed its stage.
    pub(super) fn report(&self) -> Result<()> {
        let silent = |_| Err(Error::new(SILENT, format!("shard {} ended while starting", self.shard)));
        self.reports.recv().unwrap_or_else(silent)
    }

    /// Lets the shard go on to its next stage.
    pub(super) fn proceed(&self) {
        // A shard that is gone by now is noticed at its next report.
        let _ = self.go.send(());
    }

    /// Ends a start: a shard that waits for its next stage gives up.
    pub(super) fn abandon(self) -> Result<()> {
        let ShardThread { shard, reports, go, executor } = self;
        drop((reports, go));
        end_of(shard, executor)
    }

    /// Waits for the end of a shard that was started wholly.
    pub(super) fn join(self) -> Result<()> {
        end_of(self.shard, self.executor)
    }
}

fn end_of(shard: usize, executor: ExecutorJoinHandle<Result<()>>) -> Result<()> {
    let ended = executor.join().map_err(cannot_start).and_then(|result| result);
    ended.map_err(|error| Error::new(error.status, format!("shard {shard}: {}", error.message)))
}

/// A shard's side of the start: it reports each stage and waits until all others have passed it too.
struct Stages {
    reporter: flume::Sender<Result<()>>,
    gate: flume::Receiver<()>,
}

impl Stages {
    /// `false`: the start was abandoned.
    async fn passed(&self) -> bool {
        let _ = self.reporter.send(Ok(()));
        self.gate.recv_async().await.is_ok()
    }

    /// Reports a failure and hands the value on if there is none.
    fn check<T>(&self, result: Result<T>) -> Option<T> {
        result.map_err(|error| drop(self.reporter.send(Err(error)))).ok()
    }
}

async fn run(seed: ShardSeed, stages: Stages) -> Result<()> {
    let ShardSeed { journal_dir, epoch, has_volumes, config, volumes, mesh, commands, listener, .. } = seed;
    let shard = config.shard;
    let platform = platform()?;
    let opened = open_store(&platform, seed.object_store, seed.resolver, has_volumes).await;
    let Some(objects) = stages.check(opened) else { return Ok(()) };
    let prepared = prepare(&platform, &journal_dir, epoch, shard, &volumes, listener).await;
    let Some(Prepared { journal, acceptor, socket }) = stages.check(prepared) else { return Ok(()) };
    let mut end = Ok(());
    if stages.passed().await {
        let started = Shard::start(platform.clone(), objects, journal, config, volumes, mesh, commands).await;
        if let Some(shard) = stages.check(started) {
            let serving = stages.passed().await;
            end = serve(&platform, &shard, serving.then_some(acceptor)).await;
        }
    }
    if let Some(path) = socket {
        let _ = platform.remove_file(&path).await;
    }
    end
}

struct Prepared {
    journal: Journal<Glommio>,
    acceptor: Acceptor,
    socket: Option<PathBuf>,
}

/// Everything that can fail without having changed anything that counts. The listener last: it leaves a socket file.
async fn prepare(
    platform: &Glommio,
    journal_dir: &std::path::Path,
    epoch: u64,
    shard: usize,
    volumes: &[VolumeState],
    listener: Bound,
) -> Result<Prepared> {
    let journal = Journal::create(platform, journal_dir, epoch, shard, volumes.iter().cloned()).await?;
    let (acceptor, socket) = listener.into_acceptor()?;
    Ok(Prepared { journal, acceptor, socket })
}

/// The object store, asked once whether it lets us in. A node with volumes starts without one that is out of reach for
/// now: what is resident can be served, and the rest once it is back.
async fn open_store(
    platform: &Glommio,
    choice: StoreChoice,
    resolver: Resolver,
    has_volumes: bool,
) -> Result<GlommioStore> {
    let http = || {
        let (ca_file, connections_max) = choice.http_settings();
        GlommioHttp::new(platform.clone(), resolver, ca_file, connections_max)
    };
    let unchecked = choice.store(platform, http, RequestPolicy::SHARD).map_err(no_object_store)?;
    match unchecked.check().await {
        Err(ObjectError::Retry(why) | ObjectError::SlowDown(why)) if has_volumes => {
            tracing::error!("starting without the object store: {why}");
            Ok(unchecked)
        }
        checked => checked.map(|()| unchecked).map_err(no_object_store),
    }
}

fn no_object_store(error: ObjectError) -> Error {
    Error::new(Status::ObjectStore, error.to_string())
}

/// Accepts until the shard is told to stop, then lets the last replies leave. Without an acceptor it only stops.
async fn serve(platform: &Glommio, shard: &GlommioShard, acceptor: Option<Acceptor>) -> Result<()> {
    let connections = shard.connections();
    let acceptor = acceptor.map(Rc::new);
    if let Some(acceptor) = &acceptor {
        let (platform, shard, connections) = (platform.clone(), shard.clone(), connections.clone());
        platform.clone().spawn(Queue::Serve, accept(platform, shard, connections, acceptor.clone()));
    }
    shard.stopped().await;
    if let Some(acceptor) = acceptor {
        acceptor.close();
    }
    connections.close_all(platform, FLUSH_REPLIES_MAX).await;
    Ok(())
}

async fn accept(platform: Glommio, shard: GlommioShard, connections: Rc<Connections>, acceptor: Rc<Acceptor>) {
    loop {
        match acceptor.accept().await {
            Ok(_) if shard.is_stopping() => return,
            Ok(connection) => connection::serve(&platform, &connections, &shard, connection),
            Err(_) if shard.is_stopping() => return,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                platform.sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
