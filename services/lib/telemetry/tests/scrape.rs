//! The Prometheus endpoint, over a real socket.
#![allow(clippy::unwrap_used)]

use telemetry::TelemetryConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    socket.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_and_readiness() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let config = TelemetryConfig { metrics_listen: Some(address), ..TelemetryConfig::default() };
    let guard = telemetry::init(&config, "router").await.unwrap();
    metrics::counter!("janua_test_total").increment(3);
    metrics::histogram!("janua_test_seconds").record(0.2);

    let page = get(address, "/metrics").await;
    assert!(page.contains("janua_test_total 3"), "{page}");
    assert!(page.contains("janua_test_seconds_bucket{le=\"0.25\"} 1"), "{page}");
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
    telemetry::set_ready(true);
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    guard.shutdown().await;
}

#[tokio::test]
async fn bad_settings_are_named() {
    for (config, key) in [
        (TelemetryConfig { level: "=!".to_owned(), ..TelemetryConfig::default() }, "telemetry.level"),
        (TelemetryConfig { sampling_ratio: f64::NAN, ..TelemetryConfig::default() }, "telemetry.sampling_ratio"),
        (TelemetryConfig { otlp_endpoint: Some("no url".to_owned()), ..TelemetryConfig::default() }, "telemetry.otlp_endpoint"),
    ] {
        let error = telemetry::init(&config, "router").await.unwrap_err().to_string();
        assert!(error.starts_with(key), "{error}");
    }
}
