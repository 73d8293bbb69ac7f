//! Logs, traces and metrics of every service: set up once by [`init`], used through `tracing` and `metrics` everywhere else.
//!
//! | File | Holds |
//! |---|---|
//! | `settings.rs` | section `[telemetry]` of the configuration |
//! | `pipeline.rs` | subscriber, OTLP export, their start and their flush |
//! | `log.rs` | the JSON log line |
//! | `trace.rs` | spans of gRPC calls and the W3C context in their headers |
//! | `genai.rs` | the span of one model request, by the OpenTelemetry GenAI conventions |
//! | `scrape.rs` | Prometheus text and the HTTP endpoint that serves it |
//!
//! No other crate knows OpenTelemetry.

mod genai;
mod log;
mod pipeline;
mod scrape;
mod settings;
mod trace;

pub use genai::{RequestFacts, request_span};
pub use pipeline::{Guard, TelemetryError, init};
pub use scrape::{metrics_text, set_ready};
pub use settings::{LogFormat, TelemetryConfig};
pub use trace::{client_span, inject, record_status, server_span, traceparent};
