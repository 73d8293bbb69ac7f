use ::config::ConfigError;
use pixels::Limits;
use serde::Deserialize;

/// Section `[vision]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionConfig {
    /// Longest picture file in bytes.
    pub max_image_bytes: usize,
    /// Most pixels of a picture, width times height.
    pub max_pixels: u64,
    /// Most pixels of a side.
    pub max_side: u32,
    /// Pictures decoded and encoded at a time in this process; decoding takes up to 8 bytes a pixel.
    pub parallel_images: usize,
    /// Most pictures that wait; more are refused with RESOURCE_EXHAUSTED.
    pub queue_limit: usize,
    /// Threads that compute. 0: one per core that the process may use.
    pub threads: usize,
}

impl Default for VisionConfig {
    fn default() -> Self {
        let Limits { max_bytes, max_pixels, max_side } = Limits::default();
        Self { max_image_bytes: max_bytes, max_pixels, max_side, parallel_images: 2, queue_limit: 64, threads: 0 }
    }
}

impl VisionConfig {
    /// Refuses limits under which nothing would be served.
    pub fn check(&self) -> Result<(), ConfigError> {
        let limits = [
            ("max_image_bytes", self.max_image_bytes as u64),
            ("max_pixels", self.max_pixels),
            ("max_side", self.max_side.into()),
            ("parallel_images", self.parallel_images as u64),
            ("queue_limit", self.queue_limit as u64),
        ];
        match limits.into_iter().find(|(_, value)| !(1..=1 << 40).contains(value)) {
            Some((key, _)) => Err(ConfigError::invalid("vision", key, format!("must be in 1..={}", 1_u64 << 40))),
            None => Ok(()),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { max_bytes: self.max_image_bytes, max_pixels: self.max_pixels, max_side: self.max_side }
    }
}
