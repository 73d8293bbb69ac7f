//! Every metric of the language service. Names end in their unit; `_total` marks counters. All are by model.

use std::collections::BTreeMap;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use placement::ExpertRange;
use sched::EngineStats;

/// Ended generations, by outcome: `stop`, `length`, `cancelled`, `failed`, `refused`.
const GENERATIONS: &str = "janua_language_generations_total";
/// From the arrival of a job to its first output: waiting, then reading the prompt.
const PREFILL: &str = "janua_language_prefill_duration_seconds";
/// From the first output to the last.
const DECODE: &str = "janua_language_decode_duration_seconds";
/// Prompt positions read, those found in the prefix cache included.
const PROMPT_TOKENS: &str = "janua_language_prompt_tokens_total";
/// Prompt positions found in the prefix cache.
const CACHED_TOKENS: &str = "janua_language_cached_tokens_total";
/// Tokens and image codes drawn, and steps of flows taken.
const OUTPUT_TOKENS: &str = "janua_language_output_tokens_total";
/// Jobs that hold blocks; that wait for some; whose reader is behind.
const JOBS: [&str; 3] = ["janua_language_running_jobs", "janua_language_waiting_jobs", "janua_language_paused_jobs"];
/// KV blocks in all; without contents; kept for reuse.
const BLOCKS: [&str; 3] = ["janua_language_kv_blocks", "janua_language_free_kv_blocks", "janua_language_cached_kv_blocks"];
/// Steps of the engine, and the rows in them.
const STEPS: [&str; 2] = ["janua_language_steps_total", "janua_language_step_rows_total"];
/// Jobs that lost their blocks to older ones and were computed again.
const PREEMPTIONS: &str = "janua_language_preemptions_total";

/// Positions that were computed without one of their experts.
const DEGRADED: &str = "janua_language_degraded_positions_total";
/// Replicas of each shard of experts.
const REPLICAS: &str = "janua_language_expert_replicas";
/// Batches that a replica gave no outputs for and that went to another one, by shard and reason: `gone`, `busy`, `not_held`, `fatal`.
const SHARD_FAILURES: &str = "janua_language_expert_failures_total";
/// Batches that were late and went to a second replica, by shard.
const SHARD_HEDGES: &str = "janua_language_expert_hedges_total";

/// How a generation ended, and what it did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    pub outcome: &'static str,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub output_tokens: u32,
    /// Absent when it ended before the first output.
    pub prefill: Option<Duration>,
    pub decode: Option<Duration>,
}

pub(crate) fn ended(model: &str, summary: &Summary) {
    let model = || model.to_owned();
    counter!(GENERATIONS, "model" => model(), "outcome" => summary.outcome).increment(1);
    counter!(PROMPT_TOKENS, "model" => model()).increment(summary.prompt_tokens.into());
    counter!(CACHED_TOKENS, "model" => model()).increment(summary.cached_tokens.into());
    counter!(OUTPUT_TOKENS, "model" => model()).increment(summary.output_tokens.into());
    if let Some(prefill) = summary.prefill {
        histogram!(PREFILL, "model" => model()).record(prefill);
    }
    if let Some(decode) = summary.decode {
        histogram!(DECODE, "model" => model()).record(decode);
    }
}

pub(crate) fn degraded(model: &str, positions: u32) {
    counter!(DEGRADED, "model" => model.to_owned()).increment(positions.into());
}

pub(crate) fn refused(model: &str) {
    counter!(GENERATIONS, "model" => model.to_owned(), "outcome" => "refused").increment(1);
}

/// How many replicas each shard of the manifest has, those without any included.
pub(crate) fn replicas<T>(model: &str, manifest: &BTreeMap<ExpertRange, T>, replicas: &BTreeMap<ExpertRange, usize>) {
    for shard in manifest.keys() {
        let count = replicas.get(shard).copied().unwrap_or(0);
        gauge!(REPLICAS, "model" => model.to_owned(), "shard" => shard.to_string()).set(count as f64);
    }
}

pub(crate) fn shard_failed(model: &str, shard: ExpertRange, reason: &'static str) {
    counter!(SHARD_FAILURES, "model" => model.to_owned(), "shard" => shard.to_string(), "reason" => reason).increment(1);
}

pub(crate) fn shard_hedged(model: &str, shard: ExpertRange) {
    counter!(SHARD_HEDGES, "model" => model.to_owned(), "shard" => shard.to_string()).increment(1);
}

pub(crate) fn engine(model: &str, stats: &EngineStats) {
    let gauges = JOBS.iter().zip([stats.running, stats.waiting, stats.paused]);
    let gauges = gauges.chain(BLOCKS.iter().zip([stats.blocks, stats.free_blocks, stats.cached_blocks]));
    gauges.for_each(|(name, value)| gauge!(*name, "model" => model.to_owned()).set(value as f64));
    for (name, value) in STEPS.iter().zip([stats.steps, stats.rows]).chain([(&PREEMPTIONS, stats.preemptions)]) {
        counter!(*name, "model" => model.to_owned()).absolute(value);
    }
}
