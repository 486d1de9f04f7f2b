//! The control thread: the HTTP/JSON API, metrics and the upkeep of snapshot references, on one ordinary tokio thread.
//!
//! It owns no volume: everything it knows it asks the shards for, by message, so reads, writes and priority fetches
//! don't notice when it stalls. What it decides itself is which volumes a request makes, in which stores, and which
//! snapshots this node holds a reference on. `docs/http-api.md` documents the routes.

mod batches;
mod blocks;
mod boot_sets;
mod cache;
mod collecting;
mod create;
mod extract;
mod http;
mod ledger;
mod manifests;
mod node;
mod objects;
mod place;
mod problem;
mod references;
mod restoring;
mod scrub;
mod shards;
mod snapshots;
mod snapshotting;
mod taking;
mod uploads;
mod volumes;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post, put};

use crate::datadir::Store;
use crate::error::{Error, Status};
use crate::object_store::any::StoreChoice;
use crate::placement::Overcommit;
use crate::shard::api::Command;
use crate::types::HydrationRate;

use batches::Batches;
use blocks::{BlockTally, BlockTurns, Operation};
use boot_sets::BootSets;
use collecting::Collected;
use manifests::Manifests;
use place::Reasons;
pub use place::{Measure, Space, measure};
use problem::Problem;
use references::References;
use scrub::Scrubbed;
use shards::Shards;
use snapshotting::Snapshotting;
use uploads::Uploads;

/// Largest request body: creation requests are a few hundred bytes.
const BODY_BYTES_MAX: usize = 64 << 10;

/// What the control thread knows of its node.
#[derive(Clone)]
pub struct Settings {
    pub node_id: u128,
    pub data: PathBuf,
    /// URL of the object store, for display.
    pub object_store: String,
    /// How threads that may block open it; `None`: not at all.
    pub object_store_choice: Option<StoreChoice>,
    /// What snapshots of volumes read each second; `None`: as much as guests leave.
    pub snapshot_bandwidth: Option<u64>,
    /// What the scrub reads of volumes each second; `None`: there is none.
    pub scrub_bandwidth: Option<u64>,
    /// Between two rounds of it; `None`: a minute.
    pub scrub_pause: Option<Duration>,
    /// So often the node collects garbage in the object store; `None`: never.
    pub gc_every: Option<Duration>,
    pub stores: Vec<Store>,
    pub default_rate: HydrationRate,
    /// Of stores that have no ratio of their own.
    pub overcommit: Overcommit,
    pub measure: Measure,
    pub price_per_million_gets: u64,
    /// Command channel of each shard, by shard number.
    pub commands: Vec<flume::Sender<Command>>,
    /// Data port of each shard, as an operator writes it.
    pub addresses: Vec<String>,
}

/// State of the control thread. A clone is another handle to it.
#[derive(Clone)]
pub struct Control(Arc<Inner>);

struct Inner {
    settings: Settings,
    shards: Shards,
    started: SystemTime,
    reasons: std::sync::Mutex<Reasons>,
    /// Also serialises creation with the upkeep that drops unneeded references.
    references: tokio::sync::Mutex<References>,
    upkeep_due: tokio::sync::Notify,
    boot_sets: tokio::sync::Mutex<BootSets>,
    batches: Batches,
    snapshotting: Snapshotting,
    scrubbed: Scrubbed,
    collected: Collected,
    manifests: Manifests,
    block_turns: BlockTurns,
    block_tally: Arc<BlockTally>,
    uploads: Uploads,
    http: Arc<http::Tally>,
}

impl Control {
    #[must_use]
    #[allow(clippy::disallowed_methods)] // The control thread is outside of the platform seam.
    pub fn new(settings: Settings) -> Control {
        Control(Arc::new(Inner {
            batches: Batches::load(&settings.data),
            manifests: Manifests::default(),
            block_turns: BlockTurns::default(),
            block_tally: Arc::default(),
            uploads: Uploads::load(&settings.data),
            shards: Shards::new(&settings.commands),
            settings,
            started: SystemTime::now(),
            reasons: std::sync::Mutex::default(),
            references: tokio::sync::Mutex::new(References::default()),
            upkeep_due: tokio::sync::Notify::new(),
            boot_sets: tokio::sync::Mutex::new(BootSets::default()),
            snapshotting: Snapshotting::default(),
            scrubbed: Scrubbed::default(),
            collected: Collected::default(),
            http: Arc::default(),
        }))
    }

    /// Serves the API until `stop` is ready. Requests in flight then may be cut off, but no creation is left half done.
    ///
    /// # Errors
    /// The listener can't be used.
    pub async fn serve(&self, listener: std::net::TcpListener, stop: impl Future<Output = ()>) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        futures::pin_mut!(stop);
        tokio::select! {
            never = http::serve(listener, self.router(), self.0.http.clone()) => match never {},
            () = self.keep_references() => {}
            () = self.keep_boot_sets() => {}
            () = self.keep_batches() => {}
            () = self.keep_scrubbing() => {}
            () = self.keep_collecting() => {}
            () = self.keep_uploads() => {}
            () = &mut stop => {}
        }
        Ok(())
    }

    /// Stops all shards cleanly: a creation in progress finishes first, then every shard checkpoints.
    ///
    /// # Errors
    /// Names the shards that had not stopped after `timeout`.
    pub async fn stop_shards(&self, timeout: Duration) -> Result<(), String> {
        let shards = &self.0.shards;
        let stopped = tokio::time::timeout(timeout, async {
            let _no_creation = self.0.references.lock().await;
            shards.stop().await;
        });
        stopped.await.map_err(|_| format!("the shards did not stop within {timeout:?}"))
    }

    /// Blocks of snapshots, and uploads.
    fn block_routes(&self) -> Router<Control> {
        let counted = |operation, handlers| self.counted(operation, handlers);
        let abandon = counted(Operation::Abandon, delete(uploads::abandon));
        Router::new()
            .route("/v1/snapshots/{name}/blocks", counted(Operation::List, get(blocks::list)))
            .route("/v1/snapshots/{name}/blocks/{index}", counted(Operation::Read, get(blocks::show)))
            .route("/v1/snapshots/{name}/changed", counted(Operation::Changed, get(blocks::changed)))
            .route("/v1/snapshots/{name}/upload", counted(Operation::Start, post(uploads::start)))
            .route("/v1/uploads", get(uploads::list))
            .route("/v1/uploads/{id}", get(uploads::show).merge(abandon))
            .route("/v1/uploads/{id}/blocks/{index}", counted(Operation::Put, put(uploads::put)))
            .route("/v1/uploads/{id}/complete", counted(Operation::Complete, post(uploads::complete)))
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/healthz", get(node::health))
            .route("/metrics", get(node::metrics))
            .route("/v1/node", get(node::show))
            .route("/v1/ledger", get(ledger::show))
            .route("/v1/stores", get(node::list_stores))
            .route("/v1/stores/{label}", get(node::show_store))
            .route("/v1/images", get(snapshots::list))
            .route("/v1/images/{name}", get(snapshots::show))
            .route("/v1/images/{name}/bootset", get(boot_sets::show).put(boot_sets::record).delete(boot_sets::drop_set))
            .route("/v1/snapshots", get(snapshots::list).post(snapshotting::take))
            .route("/v1/snapshot-tasks", get(snapshotting::list))
            .route("/v1/snapshot-tasks/{name}", get(snapshotting::show))
            .route("/v1/snapshots/{name}", get(snapshots::show))
            .merge(self.block_routes())
            .route("/v1/volumes", get(volumes::list).post(create::create))
            .route("/v1/volumes/{name}", get(volumes::show).delete(volumes::delete).patch(volumes::change))
            .route("/v1/place", post(place::place))
            .route("/v1/volumes/{name}/wait", get(volumes::wait))
            .route("/v1/volumes/{name}/rollback", post(restoring::roll_back))
            .route("/v1/volumes/{name}/verify", post(restoring::verify))
            .route("/v1/volumes/{name}/at-risk", get(restoring::at_risk))
            .route("/v1/cache", get(cache::show))
            .route("/v1/cache/images/{name}", delete(cache::drop_image))
            .route("/v1/cache/images/{name}/warm", post(cache::warm))
            .route("/v1/cache/images/{name}/pin", delete(cache::unpin))
            .route("/v1/batches", get(batches::list).post(batches::create))
            .route("/v1/batches/{id}", get(batches::show))
            .route("/v1/batches/{id}/events", get(batches::events))
            .route("/v1/batches/{id}/cancel", post(batches::cancel))
            .route("/v1/batches/{id}/retry", post(batches::retry))
            .fallback(Problem::unknown_route)
            .method_not_allowed_fallback(Problem::method_not_allowed)
            .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
            .with_state(self.clone())
    }
}

/// Runs it on a thread that nobody uses afterwards: it may block for long, and lower its priority.
async fn on_own_thread<T: Send + 'static>(name: &str, run: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || drop(sender.send(run())));
    thread.map_err(|e| Error::from_io(&format!("thread {name:?}"), &e))?;
    receiver.await.map_err(|_| Error::new(Status::Internal, "it ended early"))
}

#[cfg(test)]
mod tests;
