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
    /// Whether every weight has been read and found to be a number.
    read: bool,
}

impl LoadedModel {
    /// A model whose weights have not been read yet.
    pub fn new(name: &str, checkpoint: Arc<Checkpoint>) -> Self {
        Self { name: name.to_owned(), checkpoint, read: false }
    }
}

impl Host {
    /// A host without doors yet.
    pub fn new(config: Config, mesh: Mesh, models: Vec<LoadedModel>, progress: Arc<dyn Progress>) -> Self {
        Self { config, mesh, models, progress, doors: Doors::default() }
    }

    /// Reads the weights of `model` whose names are `wanted`, so that a NaN is refused before anything is served and the first request does
    /// not wait for the disk. Does nothing where all have been read.
    pub async fn read_weights(&self, model: &LoadedModel, wanted: impl Fn(&str) -> bool + Send + 'static) -> anyhow::Result<()> {
        if model.read {
            return Ok(());
        }
        let (progress, model) = (self.progress.clone(), model.clone());
        tokio::task::spawn_blocking(move || read(&progress, &model.name, &model.checkpoint, &wanted))
            .await
            .context("reading the weights")?
    }
}

/// Opens the folder of every configured model. With `weights`, every weight is read once; see [`Host::read_weights`].
pub async fn open_models(config: &Config, progress: &Arc<dyn Progress>, weights: bool) -> anyhow::Result<Vec<LoadedModel>> {
    let models = config.models();
    let progress = progress.clone();
    let open = move || -> anyhow::Result<Vec<LoadedModel>> {
        let open = |model: config::ModelConfig| {
            let checkpoint = Checkpoint::open(&model.path).with_context(|| format!("model {}", model.name))?;
            if weights {
                read(&progress, &model.name, &checkpoint, &|_| true)?;
            }
            Ok(LoadedModel { name: model.name, checkpoint: Arc::new(checkpoint), read: weights })
        };
        models.into_iter().map(open).collect()
    };
    tokio::task::spawn_blocking(open).await.context("opening the models")?
}

fn read(progress: &Arc<dyn Progress>, model: &str, checkpoint: &Checkpoint, wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<()> {
    let mut bar = progress.start(&format!("reading {model}"), checkpoint.bytes_of(wanted), Unit::Bytes);
    checkpoint.scan_some(wanted, &mut |done| bar.set(done)).with_context(|| format!("model {model}"))
}
