//! The language backbone as a service: one instance per model, prompt in; tokens, image codes or the steps of a flow out.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | one generation: its events, its spans, its counts |
//! | `experts/` | routed experts in other processes |
//! | `config.rs` | settings, and how large the KV cache is |
//! | `error.rs`, `metrics.rs` | errors, metric names |

mod config;
mod error;
mod experts;
mod metrics;
mod server;
mod stage;

use std::sync::{Arc, Weak};
use std::time::Duration;

use ::config::ConfigError;
use anyhow::Context;
use constraint::Grammars;
use layers::{LanguageModel, RemoteExperts};
use mesh::{MAX_MESSAGE_BYTES, MeshConfig, Routes, Target, Wire};
use models::LoadOptions;
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::language_server::LanguageServer;
use sched::Engine;
use tokio::sync::watch;

pub use config::{ExpertActivations, Experts, LanguageConfig};
pub use experts::{Fleet, Link};
pub use server::Server;
pub use stage::Stage;

/// Bytes of the rows of a step, which may all go to one shard: what a message holds, with room to spare.
const LARGEST_BATCH: usize = MAX_MESSAGE_BYTES - (4 << 20);
/// How often the gauges follow the engine.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// The language models of all models of `host`, each offered as `language.<model>`. Their weights are read first.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: LanguageConfig = host.config.section("language")?;
    config.check()?;
    let mut offers = Vec::with_capacity(host.models.len());
    for model in &host.models {
        let fleet = fleet(host, model, &config).await?;
        let all = fleet.is_none();
        host.read_weights(model, move |name| all || models::expert_of(name).is_none()).await?;
        let loaded = load(model.clone(), &config, host.models.len(), fleet.clone()).await?;
        let engine = Engine::start(loaded, config.engine()).with_guides(Arc::new(Grammars::of(model.checkpoint.dir())));
        offers.push(offer(&model.name, Arc::new(engine), fleet));
    }
    Ok(offers)
}

/// Whoever computes the routed experts of a model, if it has some and they are not to be here.
pub async fn fleet(host: &Host, model: &LoadedModel, config: &LanguageConfig) -> anyhow::Result<Option<Arc<Fleet>>> {
    let refused = |error: layers::EngineError| BadCheckpoint { model: model.name.clone(), reason: error.to_string() };
    let shape = models::expert_shape(&model.checkpoint).map_err(refused)?;
    let Some(shape) = shape.filter(|_| config.experts == Experts::Remote) else { return Ok(None) };
    let rows = LARGEST_BATCH / (size_of::<f32>() * shape.hidden);
    if config.max_batch_tokens > rows {
        let reason = format!("at most {rows} with remote experts: more rows of {} do not fit into a message", shape.hidden);
        return Err(ConfigError::invalid("language", "max_batch_tokens", reason).into());
    }
    let (fingerprint, encoding) = (model.checkpoint.fingerprint(), config.expert_activations.into());
    let wire: MeshConfig = host.config.section("mesh")?;
    let link = if wire.wire == Wire::InProcess { Link::Shared(host.mesh.clone()) } else { Link::Own(wire) };
    let fleet = Fleet::start(link, &model.name, shape, fingerprint, encoding).await;
    Ok(Some(fleet.context("looking for expert shards")?))
}

/// A running engine as `language.<model>`, with health and reflection. Must be called on a tokio runtime.
///
/// With remote experts the service is servable as long as each of them has a replica.
pub fn offer(model: &str, engine: Arc<Engine>, fleet: Option<Arc<Fleet>>) -> Offer {
    let complete = fleet.as_ref().map(|fleet| fleet.complete());
    let server = LanguageServer::new(Server::new(Stage::new(model, engine.clone(), fleet)));
    let server = server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    // Shares its health with what is offered, but not the server: engine and streams to experts end when the offer does.
    let health = Routes::new();
    if let Some(complete) = complete {
        tokio::spawn(follow(complete, engine.stopped(), health.clone()));
    }
    tokio::spawn(report(model.to_owned(), Arc::downgrade(&engine), engine.stopped(), health.clone()));
    Offer { target: Target::new("language", model), routes: health.service(server).reflection(proto::FILE_DESCRIPTOR_SET) }
}

/// Load one of `models` models, with its share of the memory for KV caches.
async fn load(
    model: LoadedModel,
    config: &LanguageConfig,
    models: usize,
    fleet: Option<Arc<Fleet>>,
) -> anyhow::Result<Box<dyn LanguageModel>> {
    let refused = |error: layers::EngineError| BadCheckpoint { model: model.name.clone(), reason: error.to_string() };
    let card = ::models::card(&model.checkpoint).map_err(refused)?;
    let block_bytes = ::models::kv_block_bytes(&model.checkpoint).map_err(refused)?;
    let kv_blocks = config.kv_blocks(card.context_length, block_bytes, models)?;
    let options = LoadOptions { kv_blocks, threads: config.threads };
    let name = model.name.clone();
    let load = move || {
        let remote = fleet.map(|fleet| fleet as Arc<dyn RemoteExperts>);
        let loaded = models::load_language_around(&model.checkpoint, &options, remote.as_ref());
        loaded.map_err(|error| BadCheckpoint { model: model.name, reason: error.to_string() })
    };
    let loaded = tokio::task::spawn_blocking(load).await.context("loading the language models")??;
    // Not before: a checkpoint that is refused is told in one line.
    tracing::info!(model = name, kv_blocks, kv_cache_bytes = kv_blocks * block_bytes, "loaded");
    Ok(loaded)
}

/// Report the service as servable while all experts have replicas and the engine lives.
async fn follow(mut complete: watch::Receiver<bool>, stopped: impl Future<Output = ()>, routes: Routes) {
    let mut stopped = std::pin::pin!(stopped);
    loop {
        routes.set_serving(*complete.borrow_and_update());
        tokio::select! {
            () = &mut stopped => return,
            changed = complete.changed() => if changed.is_err() { return },
        }
    }
}

/// Keep the gauges current while the engine lives, and report the service as not servable when it has died.
async fn report(model: String, engine: Weak<Engine>, stopped: impl Future<Output = ()>, routes: Routes) {
    let gauges = async {
        let mut ticks = tokio::time::interval(REPORT_EVERY);
        while let Some(engine) = {
            ticks.tick().await;
            engine.upgrade()
        } {
            metrics::engine(&model, &engine.stats());
        }
    };
    tokio::select! {
        // Not when it has been let go of.
        () = stopped => if engine.strong_count() > 0 { tracing::warn!(model, "the engine has stopped") },
        () = gauges => {}
    }
    routes.set_serving(false);
}
