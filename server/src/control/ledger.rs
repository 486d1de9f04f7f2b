//! `/v1/ledger`: who caused which traffic since the server started, for the node, each image and each batch.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use crate::metrics::Metric;
use crate::shard::api::Command;
use crate::transfer::ledger::{Origin, Totals};
use crate::types::batch_text;

use super::Control;
use super::problem::Answer;

#[derive(Serialize)]
pub(super) struct Ledger {
    node: Line,
    images: Vec<Line>,
    batches: Vec<Line>,
    /// What `cost` is counted with.
    price_per_million_gets: u64,
}

#[derive(Serialize)]
struct Line {
    /// Name of the snapshot; `null` for the whole node.
    image: Option<String>,
    batch: Option<String>,
    #[serde(flatten)]
    totals: Totals,
    /// Price of the GETs.
    cost: f64,
}

pub(super) async fn show(State(control): State<Control>) -> Answer<Json<Ledger>> {
    let accounts = control.accounts().await?;
    let price = control.0.settings.price_per_million_gets;
    let line = |image: Option<&str>, batch: Option<u64>, totals: Totals| Line {
        image: image.map(str::to_owned),
        batch: batch.map(batch_text),
        totals,
        cost: totals.gets as f64 * price as f64 / 1e6,
    };
    let (mut node, mut images) = (Totals::default(), BTreeMap::<&str, Totals>::new());
    for (origin, totals) in &accounts {
        node += *totals;
        *images.entry(&*origin.snapshot).or_default() += *totals;
    }
    let batches = accounts.iter().filter(|(origin, _)| origin.batch.is_some());
    Ok(Json(Ledger {
        node: line(None, None, node),
        images: images
            .iter()
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, t)| line(Some(name), None, *t))
            .collect(),
        batches: batches.map(|(origin, totals)| line(Some(&origin.snapshot), origin.batch, *totals)).collect(),
        price_per_million_gets: price,
    }))
}

impl Control {
    /// The accounts of all shards, added up.
    async fn accounts(&self) -> Answer<BTreeMap<Origin, Totals>> {
        let shards = self.0.shards.query_all(|reply| Command::Ledger { reply }).await?;
        let mut accounts = BTreeMap::<Origin, Totals>::new();
        for (origin, totals) in shards.into_iter().flatten() {
            *accounts.entry(origin).or_default() += totals;
        }
        Ok(accounts)
    }

    /// The node's totals as metrics.
    pub(super) async fn ledger_metrics(&self) -> Answer<Vec<Metric>> {
        let mut node = Totals::default();
        self.accounts().await?.into_values().for_each(|totals| node += totals);
        Ok(node.metrics())
    }
}
