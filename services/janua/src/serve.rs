use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::client::Door;
use crate::local::{Local, LocalOptions};
use crate::models::describe;
use crate::terminal::{self, BOLD, DIM, paint};
use crate::{Failure, events};

/// Serve checkpoints: every service in this process, or one service of a larger installation
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua serve --model ./janus-pro-1b
  janua serve --model chat=./deepseek-llm-7b --model eyes=./janus-pro-1b --listen 0.0.0.0:50051
  janua serve --service language --config janua.toml        (over NATS, as `make up` does it)

Settings come from --set, then JANUA_<SECTION>_<KEY>, then the file, then the defaults.")]
pub struct Serve {
    #[command(flatten)]
    pub process: process::Args,
    /// Run this service alone, over NATS
    #[arg(long, value_enum, value_name = "NAME")]
    pub service: Option<Service>,
    /// Address of the gRPC door [default: `router.listen`, 127.0.0.1:50051]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Print one line of JSON when ready
    #[arg(long)]
    pub json: bool,
}

/// A service that can run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Service {
    Router,
    Tokenizer,
    Vision,
    Language,
    Experts,
    Images,
}

/// Runs one service until a signal, as its own program `janua-NAME` would.
pub fn one(service: Service, flags: &Serve) -> ExitCode {
    let mut args = flags.process.clone();
    if let Some(listen) = flags.listen {
        args.settings.push(("router.listen".to_owned(), listen.to_string()));
    }
    match service {
        Service::Router => process::run_with("router", &args, router::start),
        Service::Tokenizer => process::run_with("tokenizer", &args, tokenizer::start),
        Service::Vision => process::run_with("vision", &args, vision::start),
        Service::Language => process::run_with("language", &args, language::start),
        Service::Experts => process::run_with("experts", &args, experts::start),
        Service::Images => process::run_with("images", &args, images::start),
    }
}

/// Runs all services until a signal.
pub async fn all(flags: Serve) -> Result<(), Failure> {
    let config = flags.process.load().map_err(|error| Failure::usage(crate::failure::chain(&error)))?;
    let settings = config.section("telemetry").map_err(|error| Failure::usage(error.to_string()))?;
    let telemetry = telemetry::init(&settings, "janua").await.map_err(|error| Failure::usage(crate::failure::chain(&error)))?;
    let progress = if flags.json { std::sync::Arc::new(process::Silent) } else { flags.process.progress() };
    let result = serve(LocalOptions { config, listen: flags.listen, progress, trace_context: true }, flags.json).await;
    telemetry.shutdown().await;
    result
}

async fn serve(options: LocalOptions, json: bool) -> Result<(), Failure> {
    // Listened for from the first moment on: a signal that comes while the models load ends the program, too.
    let mut signal = pin!(signal());
    let local = tokio::select! {
        biased;
        stop = &mut signal => return stop,
        local = Local::start(options) => local?,
    };
    announce(&local, json).await?;
    signal.await?;
    local.drain().await;
    Ok(())
}

/// Ends with the first SIGTERM or SIGINT.
pub async fn signal() -> Result<(), Failure> {
    process::until_signal().await.map_err(|error| Failure::software(format!("cannot wait for a signal: {error}")))
}

/// Says on stdout that requests are taken, and how to send one.
pub async fn announce(local: &Local, json: bool) -> Result<(), Failure> {
    let address = local.address();
    let models = Door::of(local, "").await?.models().await?;
    if json {
        let models: Vec<_> = models.iter().map(events::model).collect();
        return terminal::json(&json!({"event": "ready", "address": address, "models": models})).map(drop);
    }
    for model in &models {
        terminal::line(&describe(model))?;
    }
    let host = address.trim_start_matches("http://");
    terminal::line(&format!("{} {}", paint(BOLD, "listening on"), paint(BOLD, &address)))?;
    terminal::line(&paint(DIM, format!("  janua chat --server {address} \"Why is the sky blue?\"")))?;
    terminal::line(&paint(DIM, format!("  grpcurl -plaintext {host} janua.v1.Janua/ListModels")))?;
    terminal::line(&paint(DIM, "Ctrl-C drains and stops.")).map(drop)
}
