use ::config::ConfigError;
use serde::Deserialize;

/// Section `[images]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Pictures painted at a time in this process.
    pub parallel_images: usize,
    /// Most pictures that wait; more are refused with RESOURCE_EXHAUSTED.
    pub queue_limit: usize,
    /// Threads that compute. 0: one per core that the process may use.
    pub threads: usize,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self { parallel_images: 2, queue_limit: 64, threads: 0 }
    }
}

impl ImagesConfig {
    /// Refuses limits under which nothing would be served.
    pub fn check(&self) -> Result<(), ConfigError> {
        let limits = [("parallel_images", self.parallel_images), ("queue_limit", self.queue_limit)];
        match limits.into_iter().find(|(_, value)| !(1..=1 << 20).contains(value)) {
            Some((key, _)) => Err(ConfigError::invalid("images", key, format!("must be in 1..={}", 1 << 20))),
            None => Ok(()),
        }
    }
}
