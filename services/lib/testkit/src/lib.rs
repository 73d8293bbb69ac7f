//! What tests of several crates share: real brokers on free ports, a trace collector, fixtures, and waiting for a condition.
//!
//! Everything started here stops when its handle is dropped.

mod broker;
mod collector;

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

pub use broker::{NatsOptions, NatsServer, RedisServer};
pub use collector::{CollectedSpan, TraceCollector};

/// A path below `tests/fixtures`, as `fixture("llama")`.
pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(path)
}

/// Waits until `holds` says so, asking every few milliseconds. Panics with `what` when `limit` has passed.
pub async fn wait_until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds().await {
        assert!(Instant::now() < end, "waited {limit:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
