use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Args as _, Command, FromArgMatches};
use config::{ConfigError, Origin};
use mesh::{Mesh, MeshConfig, Wire};

use crate::{Args, Host, Offer, ProcessConfig, Served, exit, open_models, serve, until_signal};

/// A usage error, after sysexits.h.
const USAGE: u8 = 64;

/// Services that read no file of a model.
const WITHOUT_FILES: [&str; 1] = ["router"];

/// The whole life of the process of one service, from its command line: `start` says what it offers.
pub fn run(service: &'static str, start: impl AsyncFn(&Host) -> anyhow::Result<Vec<Offer>>) -> ExitCode {
    let program = program(service);
    let command = Args::augment_args(Command::new(service).bin_name(&program).display_name(&program).version(env!("CARGO_PKG_VERSION")));
    match command.try_get_matches().and_then(|matches| Args::from_arg_matches(&matches)) {
        Ok(args) => run_with(service, &args, start),
        Err(error) => {
            // Help and version go to stdout and are no error; a closed pipe is not worth another one.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
        }
    }
}

/// [`run`] with the flags given.
pub fn run_with(service: &'static str, args: &Args, start: impl AsyncFn(&Host) -> anyhow::Result<Vec<Offer>>) -> ExitCode {
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(live(service, args, start)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&program(service), &error),
    }
}

fn program(service: &str) -> String {
    format!("janua-{service}")
}

async fn live(service: &str, args: &Args, start: impl AsyncFn(&Host) -> anyhow::Result<Vec<Offer>>) -> anyhow::Result<()> {
    let config = args.load()?;
    let telemetry = telemetry::init(&config.section("telemetry")?, service).await?;
    let result = serve_until_signal(service, args, config, start).await;
    telemetry.shutdown().await;
    result
}

async fn serve_until_signal(
    service: &str,
    args: &Args,
    config: config::Config,
    start: impl AsyncFn(&Host) -> anyhow::Result<Vec<Offer>>,
) -> anyhow::Result<()> {
    let process: ProcessConfig = config.section("process")?;
    let wire: MeshConfig = config.section("mesh")?;
    if wire.wire == Wire::InProcess {
        let reason = format!("a process that runs {service} alone needs \"nats\" or \"direct\"");
        return Err(ConfigError::Value { key: "mesh.wire".to_owned(), reason, origin: Origin::Absent }.into());
    }
    // Listened for from the first moment on: a signal that comes while models load ends the process well, too.
    let mut signal = pin!(until_signal());
    let served = tokio::select! {
        biased;
        signal = &mut signal => return Ok(signal?),
        served = begin(service, args, config, &wire, start) => served?,
    };
    tracing::info!(service, "serving");
    signal.await?;
    served.drain(process.grace()).await;
    tracing::info!(service, "drained");
    Ok(())
}

async fn begin(
    service: &str,
    args: &Args,
    config: config::Config,
    wire: &MeshConfig,
    start: impl AsyncFn(&Host) -> anyhow::Result<Vec<Offer>>,
) -> anyhow::Result<Served> {
    let progress = args.progress();
    let files = !WITHOUT_FILES.contains(&service);
    let models = if files { open_models(&config, &progress, false).await? } else { Vec::new() };
    let mesh = Mesh::connect(wire).await.context("cannot join the mesh")?;
    let host = Host::new(config, mesh, models, progress);
    let offers = start(&host).await?;
    ensure!(!offers.is_empty(), "{service} has nothing to serve: none of the configured models needs it");
    serve(&host.mesh, &host.doors, offers).await
}
