//! Routed experts of a checkpoint as a service: one shard per process, any number of replicas.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `replies.rs` | one open stream: batches in, answers out |
//! | `stage.rs` | what is held, the queue of batches, what has been done |
//! | `batch.rs` | what a batch must be like |
//! | `worker.rs` | the thread that computes |
//! | `follow.rs` | copies of other shards' experts, as the bucket says |
//! | `config.rs`, `error.rs`, `metrics.rs` | settings, errors, metric names |

mod batch;
mod config;
mod error;
mod follow;
mod metrics;
mod replies;
mod server;
mod stage;
mod worker;

use std::collections::BTreeSet;
use std::sync::Arc;

use ::config::{Config, ConfigError};
use anyhow::Context;
use layers::EngineError;
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use placement::{BUCKET, ExpertRange, Manifest};
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::experts_server::ExpertsServer;
use tokio::sync::watch;

pub use batch::Batch;
pub use config::ExpertsConfig;
pub use error::{Failure, Stopped};
pub use follow::Entries;
pub use replies::Replies;
pub use server::Server;
pub use stage::{Held, Name, Report, Stage, Waiting};
pub use worker::{Answer, Compute, Piece};

use follow::Follower;

/// The shard that is configured, of every model of `host` that has experts, each offered as `experts.<model>.<range>`. Its weights are read
/// first, and no others.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let bucket = host.mesh.bucket(BUCKET).await.context("opening the placement of experts")?;
    let shards = open(host, &bucket.entries()).await?;
    for Opened { name, .. } in &shards {
        // Where there is an entry it stays: it says which copies to hold.
        let created = bucket.create(&Manifest::key(&name.model, name.shard), Manifest::value(&BTreeSet::new())).await;
        created.context("writing the placement of experts")?;
    }
    Ok(shards.into_iter().map(|shard| shard.offer).collect())
}

/// A shard with its weights read, ready to be offered.
pub struct Opened {
    pub name: Name,
    pub offer: Offer,
}

/// As [`start`], with the entries of the bucket that says which copies to hold.
pub async fn open(host: &Host, entries: &Entries) -> anyhow::Result<Vec<Opened>> {
    let config: ExpertsConfig = host.config.section("experts")?;
    config.check()?;
    let mut opened = Vec::new();
    for model in &host.models {
        let shape = models::expert_shape(&model.checkpoint).map_err(|error| refused(&model.name, &error))?;
        let Some(shape) = shape else { continue };
        let name = Name { model: model.name.clone(), shard: config.range(&model.name, shape.experts)? };
        opened.push(open_shard(host, model, name, &config, entries.clone()).await?);
    }
    if opened.is_empty() {
        return Err(nothing_to_serve(&host.models));
    }
    Ok(opened)
}

async fn open_shard(host: &Host, model: &LoadedModel, name: Name, config: &ExpertsConfig, entries: Entries) -> anyhow::Result<Opened> {
    let shard = name.shard;
    host.read_weights(model, move |tensor| models::expert_of(tensor).is_some_and(|expert| shard.contains(expert))).await?;
    let (loading, threads) = (model.clone(), config.threads);
    let held = tokio::task::spawn_blocking(move || load(&loading, shard, threads)).await.context("loading the experts")??;
    // Not before: a checkpoint that is refused is told in one line.
    tracing::info!(model = name.model, %shard, weight_bytes = held.weight_bytes, "loaded");
    let stage = Stage::new(name.clone(), held, config.queue_limit).context("starting the thread that computes")?;
    // Of the host, only what reads weights outlives the start.
    let host = Host::new(Config::default(), host.mesh.clone(), Vec::new(), host.progress.clone());
    tokio::spawn(Follower { stage: stage.downgrade(), model: model.clone(), host }.run(entries));
    Ok(Opened { name, offer: offer(stage) })
}

/// A stage as `experts.<model>.<range>`, with health and reflection. Must be called on a tokio runtime.
pub fn offer(stage: Stage) -> Offer {
    let target = Target::new("experts", &stage.name().model).shard(stage.name().shard.to_string());
    let health = Routes::new();
    tokio::spawn(watch_health(stage.name().clone(), stage.held(), health.clone()));
    let server = ExpertsServer::new(Server::new(stage));
    let server = server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Offer { target, routes: health.service(server).reflection(proto::FILE_DESCRIPTOR_SET) }
}

/// Reports the service as not servable when its thread has crashed. `routes` share their health with the offer, but not its server, which
/// would otherwise live as long as this waits.
async fn watch_health(name: Name, mut held: watch::Receiver<Option<Arc<Held>>>, routes: Routes) {
    if held.wait_for(Option::is_none).await.is_ok() {
        tracing::warn!(model = name.model, shard = %name.shard, "the experts have stopped");
        routes.set_serving(false);
    }
}

fn load(model: &LoadedModel, shard: ExpertRange, threads: usize) -> Result<Held, BadCheckpoint> {
    let loaded = models::load_shard(&model.checkpoint, shard.experts(), threads).map_err(|error| refused(&model.name, &error))?;
    Ok(Held::new(loaded, shard, model.checkpoint.fingerprint().to_vec().into()))
}

fn refused(model: &str, error: &EngineError) -> BadCheckpoint {
    BadCheckpoint { model: model.to_owned(), reason: error.to_string() }
}

fn nothing_to_serve(models: &[LoadedModel]) -> anyhow::Error {
    let names: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
    match names.is_empty() {
        true => ConfigError::invalid("models", "", "none is configured").into(),
        false => BadCheckpoint { model: names.join(", "), reason: "no routed experts, there is nothing to serve".to_owned() }.into(),
    }
}
