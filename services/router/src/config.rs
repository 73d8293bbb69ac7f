use std::net::SocketAddr;
use std::time::Duration;

use ::config::ConfigError;
use serde::Deserialize;
use wire::input::InputLimits;

/// Section `[router]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// Where gRPC clients connect, over plain HTTP/2.
    pub listen: SocketAddr,
    /// Requests that run at once.
    pub max_concurrent: usize,
    /// Requests that wait for a place; more are refused.
    pub max_waiting: usize,
    /// Longest time in seconds for a request whose client sets no deadline.
    pub timeout_s: u64,
    /// Most text tokens that one choice may have.
    pub max_tokens: u32,
    /// Most pictures in one request.
    pub max_images: usize,
    /// Longest picture file in bytes.
    pub max_image_bytes: usize,
    /// Most bytes of text in one request.
    pub max_text_bytes: usize,
    /// Pictures of one request that are encoded at once.
    pub parallel_images: usize,
    /// How often a call is tried, the first time included, when an instance is gone.
    pub attempts: u32,
}

impl Default for RouterConfig {
    fn default() -> Self {
        let limits = InputLimits::default();
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            max_concurrent: 256,
            max_waiting: 256,
            timeout_s: 600,
            max_tokens: 32_768,
            max_images: limits.images,
            max_image_bytes: limits.image_bytes,
            max_text_bytes: limits.text_bytes,
            parallel_images: 4,
            attempts: 3,
        }
    }
}

impl RouterConfig {
    /// Refuses limits of zero, which would refuse every request, and ones that nothing can hold.
    pub fn check(&self) -> Result<(), ConfigError> {
        let limits: [(&str, u64, u64); 6] = [
            ("max_concurrent", self.max_concurrent as u64, 1_000_000),
            ("timeout_s", self.timeout_s, 7 * 24 * 3600),
            ("max_tokens", self.max_tokens.into(), u64::MAX),
            ("max_text_bytes", self.max_text_bytes as u64, u64::MAX),
            ("parallel_images", self.parallel_images as u64, 1024),
            ("attempts", self.attempts.into(), 100),
        ];
        match limits.iter().find(|(_, value, most)| *value == 0 || value > most) {
            Some((key, _, u64::MAX)) => Err(ConfigError::invalid("router", key, "must be at least 1")),
            Some((key, _, most)) => Err(ConfigError::invalid("router", key, format!("must be in 1..={most}"))),
            None => Ok(()),
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }

    pub(crate) fn input_limits(&self) -> InputLimits {
        InputLimits {
            images: self.max_images,
            image_bytes: self.max_image_bytes,
            text_bytes: self.max_text_bytes,
            ..InputLimits::default()
        }
    }
}
