use ::config::ConfigError;
use serde::Deserialize;
use wire::input::InputLimits;

/// Section `[tokenizer]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Most bytes of text in one request.
    pub max_text_bytes: usize,
    /// How many bytes of long texts are encoded at once in this process; others wait. While a line of text is encoded, it takes up to 300
    /// times its size in memory.
    pub parallel_text_bytes: usize,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { max_text_bytes: InputLimits::default().text_bytes, parallel_text_bytes: 4 << 20 }
    }
}

impl TokenizerConfig {
    /// Refuses limits of zero, under which nothing would be served.
    pub fn check(&self) -> Result<(), ConfigError> {
        let limits = [("max_text_bytes", self.max_text_bytes), ("parallel_text_bytes", self.parallel_text_bytes)];
        match limits.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(ConfigError::invalid("tokenizer", key, "must be at least 1")),
            None => Ok(()),
        }
    }

    pub(crate) fn input_limits(&self) -> InputLimits {
        // Pictures are counted where they are decoded: here they are only places in the prompt.
        InputLimits { text_bytes: self.max_text_bytes, images: usize::MAX, ..InputLimits::default() }
    }
}
