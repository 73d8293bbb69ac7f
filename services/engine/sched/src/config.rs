/// Fewest rows per step that an engine works with: a guidance pair that decodes and one that prefills.
pub const MIN_BATCH_TOKENS: usize = 4;

/// Bounds of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most rows per step: decode rows and prefill chunks together. At least [`MIN_BATCH_TOKENS`].
    pub max_batch_tokens: usize,
    /// Most sequences that hold blocks at a time; a guidance pair counts as two. A job alone always runs.
    pub max_sequences: usize,
    /// Most jobs that wait for their first admission; more are refused.
    pub queue_limit: usize,
    /// Reuse the blocks of equal prompt beginnings.
    pub prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { max_batch_tokens: 512, max_sequences: 64, queue_limit: 256, prefix_cache: true }
    }
}

impl EngineConfig {
    /// The same with every bound at least at its minimum.
    pub(crate) fn bounded(self) -> Self {
        Self { max_batch_tokens: self.max_batch_tokens.max(MIN_BATCH_TOKENS), max_sequences: self.max_sequences.max(1), ..self }
    }
}

/// What an engine is doing, as of its last step. Counters start at zero with the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Jobs that hold blocks.
    pub running: usize,
    /// Of these, jobs whose reader is behind.
    pub paused: usize,
    /// Jobs that wait for blocks, preempted ones included.
    pub waiting: usize,
    /// KV blocks in all.
    pub blocks: usize,
    /// Blocks that hold nothing.
    pub free_blocks: usize,
    /// Blocks that no job refers to, kept for reuse by the prefix cache.
    pub cached_blocks: usize,
    /// Counter: steps computed.
    pub steps: u64,
    /// Counter: rows computed, prefill and decode.
    pub rows: u64,
    /// Counter: prompt rows found in the prefix cache instead of being computed.
    pub cached_rows: u64,
    /// Counter: outputs delivered.
    pub outputs: u64,
    /// Counter: jobs that lost their blocks and were computed again.
    pub preemptions: u64,
    /// Counter: jobs ended by their reader.
    pub cancelled: u64,
    /// Counter: jobs that failed.
    pub failed: u64,
}
