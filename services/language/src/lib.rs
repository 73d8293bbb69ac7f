//! The language backbone as a service: one instance per model, prompt in; tokens, image codes or the steps of a flow out.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | one generation: its events, its spans, its counts |
//! | `config.rs` | settings, and how large the KV cache is |
//! | `error.rs`, `metrics.rs` | errors, metric names |

mod config;
mod error;
mod metrics;
mod server;
mod stage;

use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use constraint::Grammars;
use layers::LanguageModel;
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use models::LoadOptions;
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::language_server::LanguageServer;
use sched::Engine;

pub use config::LanguageConfig;
pub use server::Server;
pub use stage::Stage;

/// How often the gauges follow the engine.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// The language models of all models of `host`, each offered as `language.<model>`. Their weights have been checked when the host opened them.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: LanguageConfig = host.config.section("language")?;
    config.check()?;
    let mut offers = Vec::with_capacity(host.models.len());
    for model in &host.models {
        let loaded = load(model.clone(), &config, host.models.len()).await?;
        let engine = Engine::start(loaded, config.engine()).with_guides(Arc::new(Grammars::of(model.checkpoint.dir())));
        offers.push(offer(&model.name, Arc::new(engine)));
    }
    Ok(offers)
}

/// A running engine as `language.<model>`, with health and reflection. Must be called on a tokio runtime.
pub fn offer(model: &str, engine: Arc<Engine>) -> Offer {
    let server = LanguageServer::new(Server::new(Stage::new(model, engine.clone())));
    let server = server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let routes = Routes::new().service(server).reflection(proto::FILE_DESCRIPTOR_SET);
    tokio::spawn(watch(model.to_owned(), Arc::downgrade(&engine), engine.stopped(), routes.clone()));
    Offer { target: Target::new("language", model), routes }
}

/// Load one of `models` models, with its share of the memory for KV caches.
async fn load(model: LoadedModel, config: &LanguageConfig, models: usize) -> anyhow::Result<Box<dyn LanguageModel>> {
    let refused = |error: layers::EngineError| BadCheckpoint { model: model.name.clone(), reason: error.to_string() };
    let card = ::models::card(&model.checkpoint).map_err(refused)?;
    let block_bytes = ::models::kv_block_bytes(&model.checkpoint).map_err(refused)?;
    let kv_blocks = config.kv_blocks(card.context_length, block_bytes, models)?;
    let options = LoadOptions { kv_blocks, threads: config.threads };
    let name = model.name.clone();
    let load = move || {
        let loaded = models::load_language(&model.checkpoint, &options);
        loaded.map_err(|error| BadCheckpoint { model: model.name, reason: error.to_string() })
    };
    let loaded = tokio::task::spawn_blocking(load).await.context("loading the language models")??;
    // Not before: a checkpoint that is refused is told in one line.
    tracing::info!(model = name, kv_blocks, kv_cache_bytes = kv_blocks * block_bytes, "loaded");
    Ok(loaded)
}

/// Keep the gauges current while the engine lives, and report the service as not servable when it has died.
async fn watch(model: String, engine: Weak<Engine>, stopped: impl Future<Output = ()>, routes: Routes) {
    let report = async {
        let mut ticks = tokio::time::interval(REPORT_EVERY);
        while let Some(engine) = {
            ticks.tick().await;
            engine.upgrade()
        } {
            metrics::engine(&model, &engine.stats());
        }
    };
    tokio::select! {
        () = stopped => tracing::warn!(model, "the engine has stopped"),
        () = report => {}
    }
    routes.set_serving(false);
}
