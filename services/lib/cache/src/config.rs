use std::time::Duration;

use serde::Deserialize;

/// Section `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Where Redis is, `redis://host:port/database`. Absent: memory alone.
    pub redis_url: Option<String>,
    /// Memory for keys and values in each process that caches.
    pub max_bytes: usize,
    /// How long Redis keeps a value, seconds.
    pub ttl_s: u64,
    /// How long a command to Redis may take, milliseconds. After that the request goes on without it.
    pub timeout_ms: u64,
}

/// A setting of `[cache]` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cache.{key}: {reason}")]
pub struct CacheError {
    pub key: &'static str,
    pub reason: String,
}

impl Default for CacheConfig {
    fn default() -> Self {
        // 100 ms carry the embeddings of a picture (5 to 10 MB) over a gigabit network.
        Self { redis_url: None, max_bytes: 256 << 20, ttl_s: 24 * 3600, timeout_ms: 100 }
    }
}

impl CacheConfig {
    pub(crate) fn check(&self) -> Result<(), CacheError> {
        let ranges = [("ttl_s", self.ttl_s, 365 * 24 * 3600), ("timeout_ms", self.timeout_ms, 10_000)];
        match ranges.into_iter().find(|(_, value, most)| !(1..=*most).contains(value)) {
            Some((key, value, most)) => Err(CacheError { key, reason: format!("{value} is not in 1..={most}") }),
            None => Ok(()),
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}
