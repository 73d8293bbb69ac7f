use std::fs;

use ::config::ConfigError;
use layers::BLOCK_TOKENS;
use proto::v1::activations::Encoding;
use sched::{EngineConfig, MIN_BATCH_TOKENS};
use serde::Deserialize;

/// Section `[language]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LanguageConfig {
    /// Memory for the KV caches of all models together. 0: what `max_sequences` of the model's full context need, at most a quarter
    /// of the memory that is free at the start. Memory is taken as positions are used.
    pub kv_cache_bytes: u64,
    /// Most rows per step of the engine, prefill and decode together.
    pub max_batch_tokens: usize,
    /// Most sequences computed at a time; a guidance pair counts as two.
    pub max_sequences: usize,
    /// Most jobs that wait; more are refused with RESOURCE_EXHAUSTED.
    pub queue_limit: usize,
    /// Threads that compute. 0: one per core that the process may use.
    pub threads: usize,
    /// Reuse what has been computed for equal beginnings of prompts.
    pub prefix_cache: bool,
    /// Who computes routed experts.
    pub experts: Experts,
    /// How activations travel to remote experts and back.
    pub expert_activations: ExpertActivations,
}

/// Who computes routed experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Experts {
    /// This process, which holds all weights.
    #[default]
    Local,
    /// The service `experts`; this process reads no weights of theirs.
    Remote,
}

/// How activations travel to remote experts and back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpertActivations {
    /// As they are: results are those of local experts to the last bit.
    #[default]
    F32,
    /// Rounded to bf16: half the bytes, and shards add up before they answer.
    Bf16,
    /// Rounded to 8 bits by rows: a quarter of the bytes, and shards add up before they answer.
    Int8,
}

impl From<ExpertActivations> for Encoding {
    fn from(activations: ExpertActivations) -> Self {
        match activations {
            ExpertActivations::F32 => Self::F32,
            ExpertActivations::Bf16 => Self::Bf16,
            ExpertActivations::Int8 => Self::Int8,
        }
    }
}

impl Default for LanguageConfig {
    fn default() -> Self {
        let EngineConfig { max_batch_tokens, max_sequences, queue_limit, prefix_cache } = EngineConfig::default();
        let (experts, expert_activations) = (Experts::default(), ExpertActivations::default());
        Self { kv_cache_bytes: 0, max_batch_tokens, max_sequences, queue_limit, threads: 0, prefix_cache, experts, expert_activations }
    }
}

impl LanguageConfig {
    /// Refuses limits under which nothing, or not every model, could be served.
    pub fn check(&self) -> Result<(), ConfigError> {
        let least = [
            ("max_batch_tokens", self.max_batch_tokens, MIN_BATCH_TOKENS),
            ("max_sequences", self.max_sequences, 1),
            ("queue_limit", self.queue_limit, 1),
        ];
        match least.iter().find(|(_, value, least)| value < least) {
            Some((key, _, least)) => Err(ConfigError::invalid("language", key, format!("must be at least {least}"))),
            None => Ok(()),
        }
    }

    pub(crate) fn engine(&self) -> EngineConfig {
        EngineConfig {
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            queue_limit: self.queue_limit,
            prefix_cache: self.prefix_cache,
        }
    }

    /// Blocks of `block_bytes` for one of `models` models with this context.
    pub(crate) fn kv_blocks(&self, context: usize, block_bytes: usize, models: usize) -> Result<usize, ConfigError> {
        let wanted = context.saturating_mul(self.max_sequences).div_ceil(BLOCK_TOKENS);
        let share = |bytes: u64| usize::try_from(bytes / models.max(1) as u64).unwrap_or(usize::MAX) / block_bytes;
        let blocks = match self.kv_cache_bytes {
            0 => wanted.min(share(free_memory().unwrap_or(u64::MAX) / 4)),
            bytes => share(bytes),
        };
        // A guidance pair needs a block for each half.
        if blocks < 2 {
            let reason = format!("{models} models with blocks of {block_bytes} bytes need at least {}", 2 * block_bytes * models);
            return Err(ConfigError::invalid("language", "kv_cache_bytes", reason));
        }
        Ok(blocks)
    }
}

/// Bytes that this process can still take: what the machine has free, or what its control group leaves when that is less.
fn free_memory() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    let group = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    // "max" does not parse: then the machine alone counts.
    let group = group("memory.max").zip(group("memory.current")).map(|(limit, used)| limit.saturating_sub(used));
    machine.into_iter().chain(group).min()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_as_large_as_said_and_no_larger_than_useful() {
        let config = |kv_cache_bytes| LanguageConfig { kv_cache_bytes, ..LanguageConfig::default() };
        // 64 contexts of 100 positions in blocks of 16.
        assert_eq!(config(0).kv_blocks(100, 1, 1).unwrap(), 400);
        for (bytes, block_bytes, models, expected) in [(1000, 10, 1, 100), (1000, 10, 4, 25), (1009, 10, 1, 100), (20, 10, 1, 2)] {
            assert_eq!(config(bytes).kv_blocks(100, block_bytes, models).unwrap(), expected);
        }
        let error = config(39).kv_blocks(100, 10, 2).unwrap_err().to_string();
        assert!(error.contains("language.kv_cache_bytes") && error.contains("at least 40"), "{error}");
        let most = config(0).kv_blocks(1 << 30, 1 << 20, 1).unwrap() as u64;
        assert!(most << 20 <= free_memory().unwrap(), "the default leaves memory free");
    }

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available(text), Some(2 << 20));
        assert_eq!(available("MemTotal: 5 kB"), None);
    }

    #[test]
    fn useless_limits_are_refused() {
        let base = LanguageConfig::default;
        base().check().unwrap();
        for (config, key) in [
            (LanguageConfig { max_batch_tokens: MIN_BATCH_TOKENS - 1, ..base() }, "max_batch_tokens"),
            (LanguageConfig { max_sequences: 0, ..base() }, "max_sequences"),
            (LanguageConfig { queue_limit: 0, ..base() }, "queue_limit"),
        ] {
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(&format!("language.{key}")), "{error}");
        }
    }
}
