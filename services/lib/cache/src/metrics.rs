//! Every metric of the cache.

use metrics::{counter, gauge};

/// Values found, by where: `memory` or `redis`.
const HITS: &str = "janua_cache_hits_total";
/// Values found nowhere.
const MISSES: &str = "janua_cache_misses_total";
/// Commands to Redis that failed or took too long, by command.
const FAILURES: &str = "janua_cache_redis_failures_total";
/// Commands not sent because Redis had failed just before, by command.
const SKIPPED: &str = "janua_cache_redis_skipped_total";
/// Entries that gave way in memory.
const EVICTIONS: &str = "janua_cache_evictions_total";
/// Memory taken.
const MEMORY: &str = "janua_cache_memory_bytes";

pub(crate) fn hit(layer: &'static str) {
    counter!(HITS, "layer" => layer).increment(1);
}

pub(crate) fn miss() {
    counter!(MISSES).increment(1);
}

pub(crate) fn failed(command: &'static str) {
    counter!(FAILURES, "command" => command).increment(1);
}

pub(crate) fn skipped(command: &'static str) {
    counter!(SKIPPED, "command" => command).increment(1);
}

pub(crate) fn memory(bytes: usize, evicted: u64) {
    gauge!(MEMORY).set(bytes as f64);
    counter!(EVICTIONS).increment(evicted);
}
