//! Bytes by key, kept for as long as there is room: in memory, and behind it in Redis when one is configured.
//!
//! Everything in here may be lost at any moment. A Redis that is down, slow or full makes a request slower, never wrong and never an error:
//! commands have a short limit, failures are counted, and a Redis that fails is left alone for a moment.
//!
//! | File | Holds |
//! |---|---|
//! | `config.rs` | section `[cache]` |
//! | `memory.rs` | the least recently used bytes, bounded |
//! | `remote.rs` | Redis |
//! | `metrics.rs` | names of the counters |

mod config;
mod memory;
mod metrics;
mod remote;

use std::sync::Arc;

use bytes::Bytes;

pub use config::{CacheConfig, CacheError};
use memory::Memory;
use remote::Remote;

/// A cache that several tasks share. Cheap to clone.
///
/// Keys name content: whoever puts a value under a key promises that the key decides the value (a digest of all that went into it).
#[derive(Clone)]
pub struct Cache {
    memory: Arc<Memory>,
    remote: Option<Remote>,
}

impl Cache {
    /// Memory alone, at most `max_bytes` of keys and values.
    pub fn memory(max_bytes: usize) -> Self {
        Self { memory: Arc::new(Memory::new(max_bytes)), remote: None }
    }

    /// Memory, and Redis behind it when the configuration has one. A Redis that does not answer yet is no error: it is asked again later.
    pub async fn connect(config: &CacheConfig) -> Result<Self, CacheError> {
        config.check()?;
        let remote = match &config.redis_url {
            Some(url) => Some(Remote::connect(url, config).await?),
            None => None,
        };
        Ok(Self { memory: Arc::new(Memory::new(config.max_bytes)), remote })
    }

    /// The value of `key`, where it is still there.
    pub async fn get(&self, key: &str) -> Option<Bytes> {
        if let Some(value) = self.memory.get(key) {
            metrics::hit("memory");
            return Some(value);
        }
        let found = match &self.remote {
            Some(remote) => remote.get(key).await,
            None => None,
        };
        match &found {
            Some(value) => {
                metrics::hit("redis");
                self.memory.put(key, value.clone());
            }
            None => metrics::miss(),
        }
        found
    }

    /// Keeps `value` under `key`, as long as there is room. Waits for Redis, at most its limit.
    pub async fn put(&self, key: &str, value: Bytes) {
        self.memory.put(key, value.clone());
        if let Some(remote) = &self.remote {
            remote.put(key, &value).await;
        }
    }
}
