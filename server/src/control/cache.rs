//! `/v1/cache`: the chunk cache of the node, over all shards: looking at it, warming it with an image, unpinning, dropping.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures::future::join_all;
use serde::{Deserialize, Serialize};

use crate::cache::TierStatus;
use crate::error::Result;
use crate::shard::api::{CacheStatus, Command, Dropped, WarmStatus};
use crate::types::SnapshotRef;

use super::Control;
use super::extract::{Body, Segment};
use super::problem::Answer;

/// Both tiers of all shards together, and each.
#[derive(Serialize)]
pub(super) struct Cache {
    ram: TierStatus,
    /// `null`: no shard has a disk cache.
    disk: Option<TierStatus>,
    /// By image, over all shards.
    warming: Vec<WarmStatus>,
    shards: Vec<CacheStatus>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WarmRequest {
    #[serde(default)]
    pin: bool,
}

#[derive(Serialize)]
pub(super) struct Started {
    image: String,
    pin: bool,
}

#[derive(Serialize)]
pub(super) struct DroppedImage {
    image: String,
    #[serde(flatten)]
    dropped: Dropped,
}

#[derive(Serialize)]
pub(super) struct Unpinned {
    image: String,
    chunks_unpinned: u64,
}

pub(super) async fn show(State(control): State<Control>) -> Answer<Json<Cache>> {
    let shards = control.0.shards.query_all(|reply| Command::ShowCache { reply }).await?;
    Ok(Json(Cache::of(shards)))
}

pub(super) async fn warm(
    State(control): State<Control>,
    Segment(image): Segment,
    Body(WarmRequest { pin }): Body<WarmRequest>,
) -> Answer<(StatusCode, Json<Started>)> {
    let snapshot = control.snapshot(&image).await?;
    let shards = &control.0.shards;
    let asked = (0..shards.count()).map(|shard| {
        let snapshot = snapshot.clone();
        async move { shards.ask(shard, |reply| Command::WarmCache { snapshot, pin, reply }).await.flatten() }
    });
    join_all(asked).await.into_iter().collect::<Result<()>>()?;
    Ok((StatusCode::ACCEPTED, Json(Started { image, pin })))
}

pub(super) async fn unpin(State(control): State<Control>, Segment(image): Segment) -> Answer<Json<Unpinned>> {
    let answers = control.0.shards.query_all(|reply| Command::UnpinCache { image: image.clone(), reply }).await?;
    Ok(Json(Unpinned { image, chunks_unpinned: answers.into_iter().sum() }))
}

pub(super) async fn drop_image(State(control): State<Control>, Segment(image): Segment) -> Answer<Json<DroppedImage>> {
    let snapshot = control.snapshot(&image).await?;
    let shards = &control.0.shards;
    let asked = (0..shards.count()).map(|shard| {
        let snapshot = snapshot.clone();
        async move { shards.ask(shard, |reply| Command::DropCache { snapshot, reply }).await.flatten() }
    });
    let answers = join_all(asked).await.into_iter().collect::<Result<Vec<Dropped>>>()?;
    let mut dropped = Dropped::default();
    for answer in answers {
        dropped.chunks_ram += answer.chunks_ram;
        dropped.chunks_disk += answer.chunks_disk;
    }
    Ok(Json(DroppedImage { image, dropped }))
}

impl Control {
    async fn snapshot(&self, image: &str) -> Answer<SnapshotRef> {
        Ok(self.manifest_as_it_is(image).await?.reference())
    }
}

impl Cache {
    fn of(shards: Vec<CacheStatus>) -> Cache {
        let mut ram = TierStatus::default();
        let mut disk: Option<TierStatus> = None;
        let mut warming: BTreeMap<String, WarmStatus> = BTreeMap::new();
        for shard in &shards {
            ram.add(&shard.ram);
            if let Some(part) = &shard.disk {
                disk.get_or_insert_default().add(part);
            }
            for part in &shard.warming {
                let new = || WarmStatus { image: part.image.clone(), ..WarmStatus::default() };
                warming.entry(part.image.clone()).or_insert_with(new).add(part);
            }
        }
        Cache { ram, disk, warming: warming.into_values().collect(), shards }
    }
}
