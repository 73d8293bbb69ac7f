//! Text to token ids and back, as a service: one instance per model.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | preparing, encoding and decoding with limits |
//! | `config.rs`, `error.rs`, `metrics.rs` | settings, errors, metric names |

mod config;
mod error;
mod metrics;
mod server;
mod stage;

use anyhow::Context;
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::tokenizer_server::TokenizerServer;
use text::TextCodec;

pub use config::TokenizerConfig;
pub use server::Server;
pub use stage::{Budget, Stage};

/// The tokenizers of all models of `host`, each offered as `tokenizer.<model>`.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: TokenizerConfig = host.config.section("tokenizer")?;
    config.check()?;
    let budget = Budget::new(config.parallel_text_bytes); // for the process, whatever the model
    let mut offers = Vec::with_capacity(host.models.len());
    for model in &host.models {
        let codec = load(model.clone()).await?;
        let stage = Stage::new(&model.name, codec, budget.clone(), &config);
        offers.push(Offer { target: Target::new("tokenizer", &model.name), routes: routes(stage) });
    }
    Ok(offers)
}

/// The service of one model, with health and reflection.
pub fn routes(stage: Stage) -> Routes {
    let server =
        TokenizerServer::new(Server::new(stage)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Routes::new().service(server).reflection(proto::FILE_DESCRIPTOR_SET)
}

async fn load(model: LoadedModel) -> anyhow::Result<TextCodec> {
    let load = move || TextCodec::load(&model.checkpoint).map_err(|error| BadCheckpoint { model: model.name, reason: error.to_string() });
    Ok(tokio::task::spawn_blocking(load).await.context("loading the tokenizers")??)
}
