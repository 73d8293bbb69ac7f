//! All services inside this process, talking over any wire, behind one HTTP/2 door.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use config::Config;
use language::{Experts, LanguageConfig};
use mesh::{Channel, Target};
use process::{Host, Offer, ProcessConfig, Progress, Served};
use router::RouterConfig;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::Failure;
use crate::hosts::Hosts;

/// The services behind the router, in the order in which they start: what is refused soonest first.
const STAGES: [&str; 4] = ["tokenizer", "images", "vision", "language"];

/// What to start.
pub struct LocalOptions {
    /// Models, wire and settings.
    pub config: Config,
    /// Where the door listens; port 0 takes a free one. `None`: where `[router] listen` says.
    pub listen: Option<SocketAddr>,
    pub progress: Arc<dyn Progress>,
    /// Whether calls between services carry the trace context. A test of tracing turns it off to see itself fail.
    pub trace_context: bool,
}

impl LocalOptions {
    /// Everything by default: `models` (name, folder) on the in-process wire behind a free port of the loopback interface.
    pub fn embedded(models: Vec<(String, PathBuf)>) -> Result<Self, Failure> {
        Self::with_settings(models, &[])
    }

    /// As [`LocalOptions::embedded`], with some settings changed.
    pub fn with_settings(models: Vec<(String, PathBuf)>, settings: &[(String, String)]) -> Result<Self, Failure> {
        let mut config = Config::load(None, settings).map_err(|error| Failure::usage(error.to_string()))?;
        for (name, path) in models {
            config.add_model(&format!("{name}={}", path.display())).map_err(|error| Failure::usage(error.to_string()))?;
        }
        Ok(Self { config, listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))), progress: bars(), trace_context: true })
    }

    /// Names the VAE folder of the only model.
    pub fn set_vae(&mut self, vae: Option<&Path>) -> Result<(), Failure> {
        let Some(vae) = vae else { return Ok(()) };
        let model = self.config.models().pop().map(|model| model.name).unwrap_or_default();
        self.config.add_vae(&format!("{model}={}", vae.display())).map_err(|error| Failure::usage(error.to_string()))
    }

    /// Without progress on stderr.
    pub fn quiet(self) -> Self {
        Self { progress: Arc::new(process::Silent), ..self }
    }
}

/// Bars on a terminal; a script that asks one question needs no lines about loading.
fn bars() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() { process::Bars::or_lines() } else { Arc::new(process::Silent) }
}

/// The services of one process, being served.
pub struct Local {
    address: SocketAddr,
    grace: Duration,
    router: Channel,
    /// Router first: the order in which they drain.
    served: Vec<Served>,
}

impl Local {
    /// Loads the models, starts every service that they need, and opens the door.
    pub async fn start(options: LocalOptions) -> Result<Self, Failure> {
        if options.config.models().is_empty() {
            return Err(Failure::usage("no model to serve: add --model DIR"));
        }
        Box::pin(Self::try_start(options)).await.map_err(|error| Failure::new(process::exit_code(&error), format!("{error:#}")))
    }

    async fn try_start(options: LocalOptions) -> anyhow::Result<Self> {
        let LocalOptions { config, listen, progress, trace_context } = options;
        let listen = match listen {
            Some(listen) => listen,
            None => config.section::<RouterConfig>("router")?.listen,
        };
        let listener = TcpListener::bind(listen).await.map_err(|error| process::Unreachable {
            what: format!("cannot listen on {listen}: {error}; choose another address with --listen"),
        })?;
        let address = listener.local_addr()?;
        let hosts = Hosts::open(config, progress, trace_context, true).await?;
        let mut served = Vec::with_capacity(STAGES.len() + 1);
        if hosts.config.section::<LanguageConfig>("language")?.experts == Experts::Remote {
            served = hosts.serve_experts().await?;
        }
        for stage in STAGES {
            let host = hosts.host().await?;
            let offers = start_stage(stage, &host).await?;
            served.push(process::serve(&host.mesh, &host.doors, offers).await?);
        }
        let host = hosts.host().await?;
        let routes = router::routes(&host)?;
        router::listen(&host, listener, routes.clone());
        let target = Target::new("router", "janua");
        let channel = host.mesh.channel(&target);
        let offer = Offer { target, routes };
        served.push(process::serve(&host.mesh, &host.doors, vec![offer]).await?);
        served.reverse();
        Ok(Self { address, grace: hosts.config.section::<ProcessConfig>("process")?.grace(), router: channel, served })
    }

    /// Where the door is: `http://127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The way to the router over the wire between services, past the door.
    pub fn router(&self) -> Channel {
        self.router.clone()
    }

    /// Lets calls in flight finish, then stops everything. Takes at most `[process] grace_s`.
    pub async fn drain(self) {
        let end = Instant::now() + self.grace;
        for served in self.served {
            served.drain(end.saturating_duration_since(Instant::now())).await;
        }
    }
}

async fn start_stage(stage: &str, host: &Host) -> anyhow::Result<Vec<Offer>> {
    match stage {
        "tokenizer" => tokenizer::start(host).await,
        "vision" => vision::start(host).await,
        "language" => language::start(host).await,
        "images" => images::start(host).await,
        other => anyhow::bail!("there is no service {other}"),
    }
}

/// The name under which the checkpoint in `dir` is served when nobody gives one: that of its folder.
pub fn model_name(dir: &Path) -> Result<String, Failure> {
    let full = dir.canonicalize().map_err(|error| Failure::input(format!("cannot open the model folder {}: {error}", dir.display())))?;
    let name = full.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    Ok(name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' }).take(64).collect())
}
