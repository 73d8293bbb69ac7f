//! Pictures to embeddings of the language model, as a service: one instance per model that can see.
//!
//! | File | Holds |
//! |---|---|
//! | `server.rs` | the tonic service |
//! | `stage.rs` | one picture: cache, decoding, preprocessing, tower |
//! | `flights.rs` | equal pictures at the same time are computed once |
//! | `config.rs`, `error.rs`, `metrics.rs` | settings, errors, metric names |

mod config;
mod error;
mod flights;
mod metrics;
mod server;
mod stage;

use ::config::ConfigError;
use anyhow::Context;
use cache::{Cache, CacheConfig};
use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use models::{OnnxOptions, VisionEncoder};
use pixels::Processor;
use process::{BadCheckpoint, Host, LoadedModel, Offer};
use proto::v1::vision_server::VisionServer;

pub use config::VisionConfig;
pub use server::Server;
pub use stage::{Encoded, Eye, Places, Stage};

const PREPROCESSOR: &str = "preprocessor_config.json";

/// The vision sides of the models of `host` that have one, each offered as `vision.<model>`.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: VisionConfig = host.config.section("vision")?;
    config.check()?;
    let cache: CacheConfig = host.config.section("cache")?;
    let cache = Cache::connect(&cache).await.map_err(|error| ConfigError::invalid("cache", error.key, error.reason))?;
    let places = Places::new(&config); // for the process, whatever the model
    let mut offers = Vec::new();
    for model in &host.models {
        let options = OnnxOptions { threads: config.threads };
        let loading = model.clone();
        let eye = tokio::task::spawn_blocking(move || load(&loading, &options)).await.context("loading the vision towers")??;
        if let Some(eye) = eye {
            let stage = Stage::new(&model.name, eye, cache.clone(), places.clone(), &config);
            offers.push(Offer { target: Target::new("vision", &model.name), routes: routes(stage) });
        }
    }
    Ok(offers)
}

/// The service of one model, with health and reflection.
pub fn routes(stage: Stage) -> Routes {
    let server =
        VisionServer::new(Server::new(stage)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    Routes::new().service(server).reflection(proto::FILE_DESCRIPTOR_SET)
}

/// Tower and processor of a model; `None` for a model that does not see.
fn load(model: &LoadedModel, options: &OnnxOptions) -> Result<Option<Eye>, BadCheckpoint> {
    let refuse = |reason: String| BadCheckpoint { model: model.name.clone(), reason };
    let Some(encoder) = models::load_vision(&model.checkpoint, options).map_err(|error| refuse(error.to_string()))? else {
        return Ok(None);
    };
    let dir = model.checkpoint.dir().display();
    let json = model.checkpoint.json(PREPROCESSOR).map_err(|error| refuse(error.to_string()))?;
    let json = json.ok_or_else(|| refuse(format!("{PREPROCESSOR} is missing (in {dir})")))?;
    let processor = Processor::from_config(&json).map_err(|error| refuse(format!("{error} (in {dir})")))?;
    check_sizes(&encoder, &processor).map_err(|reason| refuse(format!("{reason} (in {dir})")))?;
    Ok(Some(Eye::new(encoder, processor)))
}

/// Refuses a processor whose pictures the towers of `encoder` do not take, with the field that says so.
pub fn check_sizes(encoder: &VisionEncoder, processor: &Processor) -> Result<(), String> {
    let (made, taken) = (processor.size(), encoder.image_size());
    let refuse = |field: &str, reason: String| Err(format!("{PREPROCESSOR}: field {field}: {reason}"));
    if made != taken {
        return refuse(processor.size_field(), format!("{made}, but the vision tower takes {taken}"));
    }
    match (processor.high_res_size(), encoder.high_res_size()) {
        (made, taken) if made == taken => Ok(()),
        (None, Some(taken)) => refuse("high_res_size", format!("missing, but the model has a high-resolution tower that takes {taken}")),
        (Some(made), Some(taken)) => refuse("high_res_size", format!("{made}, but the high-resolution tower takes {taken}")),
        _ => refuse("high_res_size", "the model has no high-resolution tower".into()),
    }
}
