use ::config::ConfigError;
use serde::Deserialize;

/// Section `[images]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Threads that one decoding uses. 0: one per core that the process may use.
    pub threads: usize,
    /// Pictures that may wait for the decoder; one more is refused with `RESOURCE_EXHAUSTED`.
    pub queue_limit: usize,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self { threads: 0, queue_limit: 64 }
    }
}

impl ImagesConfig {
    /// Refuses a queue without places, which would serve nothing.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self.queue_limit {
            0 => Err(ConfigError::invalid("images", "queue_limit", "must be at least 1")),
            _ => Ok(()),
        }
    }
}
