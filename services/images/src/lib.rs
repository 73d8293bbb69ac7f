//! Image codes and latent maps to picture files, as a service: one instance per model that can draw.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | one picture: decoding, painting what is missing, writing the file |
//! | `config.rs`, `error.rs`, `metrics.rs` | settings, errors, metric names |

mod config;
mod error;
mod metrics;
mod server;
mod stage;

use std::path::Path;

use anyhow::Context;
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use models::{OnnxOptions, Painter};
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::images_server::ImagesServer;

pub use config::ImagesConfig;
pub use server::Server;
pub use stage::{Picture, Places, Stage};

/// The decoders of the models of `host` that have one, each offered as `images.<model>`.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: ImagesConfig = host.config.section("images")?;
    config.check()?;
    let places = Places::new(&config); // for the process, whatever the model
    let mut offers = Vec::new();
    for model in &host.models {
        let options = OnnxOptions { threads: config.threads };
        let (loading, vae) = (model.clone(), host.config.vae(&model.name));
        let painter =
            tokio::task::spawn_blocking(move || load(&loading, vae.as_deref(), &options)).await.context("loading the image decoders")??;
        if let Some(painter) = painter {
            let stage = Stage::new(&model.name, painter, places.clone());
            offers.push(Offer { target: Target::new("images", &model.name), routes: routes(stage) });
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

/// The decoder of a model; `None` for one that does not draw.
fn load(model: &LoadedModel, vae: Option<&Path>, options: &OnnxOptions) -> Result<Option<Painter>, BadCheckpoint> {
    let painter = models::load_painter(&model.checkpoint, vae, options);
    painter.map_err(|error| BadCheckpoint { model: model.name.clone(), reason: error.to_string() })
}
