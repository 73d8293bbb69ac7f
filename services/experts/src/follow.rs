use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use placement::Manifest;
use process::{Host, LoadedModel};
use tokio::sync::watch;

use crate::stage::{Stage, WeakStage};

/// The entries of the bucket that says which shard holds what, as they stand now.
pub type Entries = watch::Receiver<Arc<BTreeMap<String, Bytes>>>;

/// Keeps what a stage holds as its entry says.
pub(crate) struct Follower {
    pub stage: WeakStage,
    pub model: LoadedModel,
    /// Reads weights.
    pub host: Host,
}

impl Follower {
    /// Ends with the stage, or when the entries cannot change any more.
    pub async fn run(self, mut entries: Entries) {
        let mut last = None;
        loop {
            let Some(stage) = self.stage.upgrade() else { return };
            let entry = entries.borrow_and_update().get(&stage.name().key()).cloned();
            if entry != last {
                if let Some(value) = &entry {
                    self.apply(&stage, value).await;
                }
                last = entry;
            }
            let mut held = stage.held();
            drop(stage); // or it would outlive everybody else
            tokio::select! {
                changed = entries.changed() => if changed.is_err() { return },
                _ = held.wait_for(Option::is_none) => return,
            }
        }
    }

    async fn apply(&self, stage: &Stage, entry: &Bytes) {
        let (model, shard) = (&stage.name().model, stage.name().shard);
        let entries = BTreeMap::from([(stage.name().key(), entry.clone())]);
        let Some(extra) = Manifest::read(model, &entries).0.shards.remove(&shard) else {
            tracing::warn!(model, %shard, "the entry of this shard cannot be read, what is held stays");
            return;
        };
        let (extra, ignored): (BTreeSet<_>, BTreeSet<_>) =
            extra.into_iter().partition(|&expert| expert < stage.shape().experts && !shard.contains(expert));
        if !ignored.is_empty() {
            tracing::warn!(model, %shard, experts = ?ignored, "copies of experts of its own or of none are ignored");
        }
        match self.hold(stage, extra).await {
            Ok(()) => {}
            Err(error) => tracing::error!(model, %shard, error = format!("{error:#}"), "copies cannot be held, what is held stays"),
        }
    }

    /// Reads what is new and swaps the shard: batches under way finish on the old one.
    async fn hold(&self, stage: &Stage, extra: BTreeSet<usize>) -> anyhow::Result<()> {
        let Some(now) = stage.held().borrow().clone() else { return Ok(()) };
        let (shard, held) = (stage.name().shard, now.shard.held());
        if held.iter().copied().filter(|&expert| !shard.contains(expert)).eq(extra.iter().copied()) {
            return Ok(());
        }
        let new: BTreeSet<_> = extra.difference(held).copied().collect();
        self.host.read_weights(&self.model, move |name| models::expert_of(name).is_some_and(|expert| new.contains(&expert))).await?;
        let swapped = tokio::task::spawn_blocking(move || now.with(shard, &extra));
        let swapped = swapped.await.context("loading the copies")??;
        tracing::info!(model = stage.name().model, %shard, extra = ?swapped.holdings.extra, "copies of other experts are held");
        stage.hold(swapped);
        Ok(())
    }
}
