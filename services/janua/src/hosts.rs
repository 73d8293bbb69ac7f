//! What the services of one process find when they start: settings, models, and a mesh of their own or a shared one.

use std::sync::Arc;

use anyhow::Context;
use config::Config;
use experts::ExpertsConfig;
use mesh::{Mesh, MeshConfig, Wire};
use process::{Host, LoadedModel, Progress, Served};

/// Makes hosts.
pub struct Hosts {
    pub config: Config,
    wire: MeshConfig,
    /// For services that call each other as functions.
    shared: Mesh,
    pub models: Vec<LoadedModel>,
    progress: Arc<dyn Progress>,
    trace_context: bool,
}

impl Hosts {
    /// Opens the models of `config`; with `weights` reads every weight once.
    pub async fn open(config: Config, progress: Arc<dyn Progress>, trace_context: bool, weights: bool) -> anyhow::Result<Self> {
        let models = process::open_models(&config, &progress, weights).await?;
        let wire: MeshConfig = config.section("mesh")?;
        Ok(Self { config, wire, shared: Mesh::in_process(), models, progress, trace_context })
    }

    /// A host for one service. Over a broker it gets a connection of its own, as in a process of its own.
    pub async fn host(&self) -> anyhow::Result<Host> {
        self.host_with(self.config.clone()).await
    }

    async fn host_with(&self, config: Config) -> anyhow::Result<Host> {
        let mesh = match self.wire.wire {
            Wire::InProcess => self.shared.clone(),
            Wire::Nats | Wire::Direct => Mesh::connect(&self.wire).await.context("cannot join the mesh")?,
        };
        let mesh = if self.trace_context { mesh } else { mesh.without_trace_context() };
        Ok(Host::new(config, mesh, self.models.clone(), self.progress.clone()))
    }

    /// All shards of all models that have experts, each served as if it were a process of its own.
    pub async fn serve_experts(&self) -> anyhow::Result<Vec<Served>> {
        let shards = self.config.section::<ExpertsConfig>("experts")?.count();
        let mut served = Vec::with_capacity(shards);
        for shard in 0..shards {
            let host = self.host_with(self.config.clone().with("experts.shard", &shard.to_string())?).await?;
            let offers = experts::start(&host).await?;
            served.push(process::serve(&host.mesh, &host.doors, offers).await?);
        }
        Ok(served)
    }
}
