use std::net::SocketAddr;

use serde::Deserialize;

/// Section `[telemetry]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// What is logged, in the syntax of `RUST_LOG`: `info`, `warn,mesh=debug`.
    pub level: String,
    pub format: LogFormat,
    /// OTLP/gRPC collector, for example `http://127.0.0.1:4317`. Absent: the variable `OTEL_EXPORTER_OTLP_ENDPOINT`, and without it no export.
    pub otlp_endpoint: Option<String>,
    /// Share of new traces that are exported, 0..=1. A caller's decision is followed.
    pub sampling_ratio: f64,
    /// Address of `/metrics`, `/healthz` and `/readyz`. Absent: no endpoint.
    pub metrics_listen: Option<SocketAddr>,
}

/// Shape of a log line on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `human` on a terminal, `json` otherwise.
    #[default]
    Auto,
    Human,
    /// One object per line with `trace_id` and `span_id`.
    Json,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Auto, otlp_endpoint: None, sampling_ratio: 1.0, metrics_listen: None }
    }
}
