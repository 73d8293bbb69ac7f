use std::sync::Arc;

use anyhow::Context;
use checkpoint::Checkpoint;
use config::Config;
use mesh::Mesh;

use crate::{Doors, Progress, Unit};

/// What a service finds when it starts.
pub struct Host {
    pub config: Config,
    pub mesh: Mesh,
    /// The models to serve, in the order of the configuration. Empty in a process that needs none of their files (the router).
    pub models: Vec<LoadedModel>,
    pub progress: Arc<dyn Progress>,
    /// Listeners beside the mesh that end with the process.
    pub doors: Doors,
}

/// A model of the configuration with its folder opened.
#[derive(Clone)]
pub struct LoadedModel {
    pub name: String,
    pub checkpoint: Arc<Checkpoint>,
}

impl Host {
    /// A host without doors yet.
    pub fn new(config: Config, mesh: Mesh, models: Vec<LoadedModel>, progress: Arc<dyn Progress>) -> Self {
        Self { config, mesh, models, progress, doors: Doors::default() }
    }
}

/// Opens the folder of every configured model. With `weights`, every weight is read once, so that a NaN is refused before anything is
/// served and the first request does not wait for the disk.
pub async fn open_models(config: &Config, progress: &Arc<dyn Progress>, weights: bool) -> anyhow::Result<Vec<LoadedModel>> {
    let models = config.models();
    let progress = progress.clone();
    let open = move || -> anyhow::Result<Vec<LoadedModel>> {
        let open = |model: config::ModelConfig| {
            let checkpoint = Checkpoint::open(&model.path).with_context(|| format!("model {}", model.name))?;
            if weights {
                let mut bar = progress.start(&format!("reading {}", model.name), checkpoint.total_bytes(), Unit::Bytes);
                checkpoint.scan(&mut |done| bar.set(done)).with_context(|| format!("model {}", model.name))?;
            }
            Ok(LoadedModel { name: model.name, checkpoint: Arc::new(checkpoint) })
        };
        models.into_iter().map(open).collect()
    };
    tokio::task::spawn_blocking(open).await.context("opening the models")?
}
