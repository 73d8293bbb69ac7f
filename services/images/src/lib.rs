//! Image codes to pictures, as a service: one instance per model that can draw.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | decoding codes, painting previews, encoding files |
//! | `config.rs`, `error.rs`, `metrics.rs` | settings, errors, metric names |

mod config;
mod error;
mod metrics;
mod server;
mod stage;

use anyhow::Context;
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use models::{OnnxOptions, VqDecoder};
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::images_server::ImagesServer;

pub use config::ImagesConfig;
pub use server::Server;
pub use stage::Stage;

/// The image decoders of those models of `host` that have one, each offered as `images.<model>`.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: ImagesConfig = host.config.section("images")?;
    config.check()?;
    let mut offers = Vec::new();
    for model in &host.models {
        if let Some(decoder) = load(model.clone(), config.threads).await? {
            let routes = routes(Stage::new(&model.name, decoder, &config));
            offers.push(Offer { target: Target::new("images", &model.name), routes });
        }
    }
    Ok(offers)
}

/// The service of one model, with health and reflection.
pub fn routes(stage: Stage) -> Routes {
    let server =
        ImagesServer::new(Server::new(stage)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Routes::new().service(server).reflection(proto::FILE_DESCRIPTOR_SET)
}

async fn load(model: LoadedModel, threads: usize) -> anyhow::Result<Option<VqDecoder>> {
    let load = move || {
        let decoder = models::load_vq(&model.checkpoint, &OnnxOptions { threads });
        decoder.map_err(|error| BadCheckpoint { model: model.name, reason: error.to_string() })
    };
    Ok(tokio::task::spawn_blocking(load).await.context("loading the image decoders")??)
}
