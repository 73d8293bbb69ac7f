use std::io::IsTerminal;
use std::net::SocketAddr;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::task::JoinHandle;
use tracing::Subscriber;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::log::JsonLine;
use crate::{LogFormat, TelemetryConfig, scrape};

/// The standard variable for a collector's address.
const OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Spans that are exported. The transport's own are left out, or sending spans would make spans.
const EXPORTED: &str =
    "info,h2=off,hyper=off,hyper_util=off,tonic=off,tower=off,opentelemetry=off,opentelemetry_sdk=off,opentelemetry_otlp=off";

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("telemetry.level: {reason}")]
    Level { reason: String },
    #[error("telemetry.sampling_ratio: {ratio} is not in 0..=1")]
    Ratio { ratio: f64 },
    #[error("telemetry.otlp_endpoint: cannot export to {endpoint}")]
    Export { endpoint: String, source: opentelemetry_otlp::ExporterBuildError },
    #[error("telemetry.metrics_listen: cannot listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("metrics are already recorded elsewhere in this process")]
    Metrics { source: metrics_exporter_prometheus::BuildError },
    #[error("logging is already set up in this process")]
    Twice,
}

/// Keeps telemetry running; call [`Guard::shutdown`] before the process ends, or the last spans are lost.
#[derive(Debug)]
pub struct Guard {
    provider: SdkTracerProvider,
    tasks: Vec<JoinHandle<()>>,
}

impl Guard {
    /// Sends what is buffered and stops.
    pub async fn shutdown(self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        // The batch exporter blocks its caller until the collector answers or its own time limit passes.
        let _ = tokio::task::spawn_blocking(move || self.provider.shutdown()).await;
    }
}

/// Starts logs, traces and metrics of this process, once, from within the runtime that will run it. `service` is `router`,
/// `tokenizer`, ... or `janua` for all of them in one process.
pub async fn init(config: &TelemetryConfig, service: &str) -> Result<Guard, TelemetryError> {
    let provider = provider(config, service)?;
    let level = EnvFilter::try_new(&config.level).map_err(|error| TelemetryError::Level { reason: error.to_string() })?;
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("janua"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false)
        .with_filter(EnvFilter::new(EXPORTED));
    tracing_subscriber::registry()
        .with(spans)
        .with(log_layer(config.format, service).with_filter(level))
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    let mut tasks = vec![scrape::install()?];
    if let Some(address) = config.metrics_listen {
        tasks.push(scrape::serve(address).await?);
    }
    Ok(Guard { provider, tasks })
}

/// Lines on stderr; stdout belongs to answers.
fn log_layer<S>(format: LogFormat, service: &str) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Json => lines.event_format(JsonLine { service: service.to_owned() }).boxed(),
        LogFormat::Auto if !terminal => lines.event_format(JsonLine { service: service.to_owned() }).boxed(),
        LogFormat::Auto | LogFormat::Human => {
            let colour = terminal && std::env::var_os("NO_COLOR").is_none();
            lines.compact().with_ansi(colour).with_target(true).boxed()
        }
    }
}

/// Without a collector spans are made all the same: their ids tie log lines together and travel on to services that do export.
fn provider(config: &TelemetryConfig, service: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let ratio = config.sampling_ratio;
    if !(0.0..=1.0).contains(&ratio) {
        return Err(TelemetryError::Ratio { ratio });
    }
    let name = if service == "janua" { "janua".to_owned() } else { format!("janua-{service}") };
    let builder = SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
        .with_resource(Resource::builder().with_service_name(name).build());
    let endpoint = config.otlp_endpoint.clone().or_else(|| std::env::var(OTLP_ENDPOINT).ok()).filter(|endpoint| !endpoint.is_empty());
    let Some(endpoint) = endpoint else {
        return Ok(builder.build());
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&endpoint)
        .build()
        .map_err(|source| TelemetryError::Export { endpoint, source })?;
    Ok(builder.with_batch_exporter(exporter).build())
}
