use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use language::{Fleet, LanguageConfig};
use layers::RemoteExperts;
use process::Served;

use super::wires::Transport;
use crate::Failure;
use crate::hosts::Hosts;
use crate::local::{LocalOptions, model_name};

/// How long shards may take to be found.
const FOUND: Duration = Duration::from_secs(30);

/// Routed experts in services of their own, and the way to them.
pub struct Shards {
    served: Vec<Served>,
    fleet: Arc<Fleet>,
}

/// What the services of one process are told so that so many shards compute the routed experts.
pub fn settings(count: u16) -> [(String, String); 2] {
    [("language.experts".to_owned(), "remote".to_owned()), ("experts.shards".to_owned(), count.to_string())]
}

impl Shards {
    /// Starts `count` shards of the model in `dir`, and waits until every expert has been found.
    pub async fn start(dir: &Path, transport: &Transport, count: u16) -> Result<Self, Failure> {
        let settings = [transport.settings(), settings(count).to_vec()].concat();
        let options = LocalOptions::with_settings(vec![(model_name(dir)?, dir.to_owned())], &settings)?.quiet();
        let failed = |error: anyhow::Error| Failure::new(process::exit_code(&error), format!("{error:#}"));
        let shards = Self::try_start(options)
            .await
            .map_err(failed)?
            .ok_or_else(|| Failure::usage(format!("--shards: {} has no routed experts to put into shards", dir.display())))?;
        let mut complete = shards.fleet.complete();
        let found = tokio::time::timeout(FOUND, complete.wait_for(|complete| *complete)).await.is_ok_and(|found| found.is_ok());
        if found {
            return Ok(shards);
        }
        let missing = shards.fleet.check().err().unwrap_or_default();
        Err(Failure::software(format!("the shards were not found within {} s: {missing}", FOUND.as_secs())))
    }

    /// `None` where the model has no experts.
    async fn try_start(options: LocalOptions) -> anyhow::Result<Option<Self>> {
        let hosts = Hosts::open(options.config, options.progress, true, false).await?;
        let config: LanguageConfig = hosts.config.section("language")?;
        let host = hosts.host().await?;
        let Some(fleet) = language::fleet(&host, &hosts.models[0], &config).await? else { return Ok(None) };
        Ok(Some(Self { served: hosts.serve_experts().await?, fleet }))
    }

    /// As a model calls them.
    pub fn remote(&self) -> Arc<dyn RemoteExperts> {
        self.fleet.clone()
    }

    pub async fn drain(self) {
        drop(self.fleet);
        for served in self.served {
            served.drain(FOUND).await;
        }
    }
}
