use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::task::JoinHandle;

use crate::TelemetryError;

/// Upper bounds of every histogram in seconds: from a hop between services to a long answer.
const SECONDS: [f64; 16] = [0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
static READY: AtomicBool = AtomicBool::new(false);

/// All metrics of this process as Prometheus text; empty before [`crate::init`].
pub fn metrics_text() -> String {
    RECORDER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Whether `/readyz` answers 200: true between the start and the drain of the services.
pub fn set_ready(ready: bool) {
    READY.store(ready, Ordering::Relaxed);
}

/// Makes this process's `metrics` macros count, and keeps the histograms small while nobody scrapes.
pub(crate) fn install() -> Result<JoinHandle<()>, TelemetryError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|source| TelemetryError::Metrics { source })?;
    let handle = RECORDER.get_or_init(|| handle).clone();
    Ok(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(5));
        loop {
            ticks.tick().await;
            handle.run_upkeep();
        }
    }))
}

/// Serves `/metrics`, `/healthz` (the process runs) and `/readyz` (it takes requests) on `address`.
pub(crate) async fn serve(address: SocketAddr) -> Result<JoinHandle<()>, TelemetryError> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|source| TelemetryError::Listen { address, source })?;
    let routes = Router::new()
        .route("/metrics", get(async || ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], metrics_text())))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready));
    Ok(tokio::spawn(async move {
        // Serving ends with the process; an accept error is retried by axum itself.
        let _ = axum::serve(listener, routes).into_future().await;
    }))
}

async fn ready() -> (StatusCode, &'static str) {
    if READY.load(Ordering::Relaxed) { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
}
