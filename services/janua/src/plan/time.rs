//! A bound for the speed of one language node: what links, memories and round trips take at least, with nothing else in the way.
//!
//! Not in it: reading the KV cache (which depends on the context), queues behind other language nodes, and the time that programs take. A
//! measured rate is below the bound.

use placement::ExpertRange;

use super::routing::{Busiest, busiest};
use super::shape::Shape;
use super::traffic::Traffic;

/// What is assumed of machines and network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machines {
    /// Bytes per second of the language node's link, each direction.
    pub bandwidth: f64,
    /// Seconds from the language node to a shard and back, for a small message.
    pub round_trip: f64,
    /// Bytes per second that a node reads weights with.
    pub memory: f64,
    /// Seconds that a shard computes on one row of one expert, if it is known.
    pub per_row: Option<f64>,
}

/// Seconds, of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Of one layer of experts:
    pub transfer: f64,
    pub shard: f64,
    /// Shared experts, which the language node computes meanwhile.
    pub shared: f64,
    pub layer: f64,
    /// Attention, gates, dense layers and head of the whole step.
    pub rest: f64,
    pub step: f64,
    pub tokens_per_second: f64,
    /// What the shard that a layer waits for has to do.
    pub busiest: Busiest,
}

/// The bound for steps of `batch` tokens.
///
/// * transfer: batches leave one after the other over one link, and answers come over the same one. The last of `n` shards has its batch after
///   `up / bandwidth` and answers with `down / n`; the first has it after `up / n`, and behind its answer come all others: the larger of
///   `up + down / n` and `up / n + down`. For many shards that is the busier direction alone.
/// * shard: the weights of the experts that the busiest shard touches are read once, or its rows are computed, whichever takes longer.
/// * layer: `round trip + transfer + shard`, or the shared experts, which are read meanwhile.
/// * step: `layers * layer + rest`, where rest reads the other weights of the language node once.
/// * tokens per second: `batch / step`.
pub fn bound(shape: &Shape, shards: &[ExpertRange], batch: usize, traffic: &Traffic, machines: &Machines) -> Bound {
    let layers = shape.experts.layers as f64;
    let busiest = busiest(shape.gating(), shards, batch);
    let (most, least) = (traffic.up.max(traffic.down), traffic.up.min(traffic.down));
    let transfer = (most + least / traffic.batches.max(1.0)) / machines.bandwidth;
    let reading = busiest.experts * shape.expert_bytes() as f64 / machines.memory;
    let shard = machines.per_row.map_or(reading, |per_row| reading.max(busiest.rows * per_row));
    let shared = shape.rest().shared_experts as f64 / layers / machines.memory;
    let layer = (machines.round_trip + transfer + shard).max(shared);
    let rest = shape.rest().read_per_step() as f64 / machines.memory;
    let step = layers * layer + rest;
    Bound { transfer, shard, shared, layer, rest, step, tokens_per_second: batch as f64 / step, busiest }
}

impl Bound {
    /// How many language nodes `replicas` of the busiest shard can serve at this rate before steps wait for each other.
    pub fn language_nodes(&self, layers: usize, replicas: usize) -> f64 {
        replicas as f64 * self.step / (layers as f64 * self.shard)
    }

    /// What most of a step goes into.
    pub fn limit(&self, layers: usize, round_trip: f64) -> &'static str {
        let layers = layers as f64;
        let waits_for_shared = self.layer > round_trip + self.transfer + self.shard;
        let parts = [
            (round_trip * layers, "round trips"),
            (self.transfer * layers, "the language node's link"),
            (self.shard * layers, "the busiest shard"),
            (self.rest + if waits_for_shared { self.shared * layers } else { 0.0 }, "the language node's memory"),
        ];
        parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).map_or("", |(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::samples::{moe_16b, v2};
    use crate::plan::shape::split;
    use crate::plan::traffic::{Activations, traffic};

    const MACHINES: Machines = Machines { bandwidth: 1e9, round_trip: 1e-4, memory: 1e10, per_row: None };

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn one_shard_by_hand() {
        let (shape, shards) = (moe_16b(), split(64, Some(1), &[]).unwrap());
        let traffic = traffic(&shape, &shards, 1, Activations::F32);
        let bound = bound(&shape, &shards, 1, &traffic, &MACHINES);
        // 8241 bytes up and 49318 down, nothing at the same time; six experts of 17301504 bytes at 10 GB/s.
        close(bound.transfer, 57_559.0 / 1e9);
        close(bound.shard, 6.0 * 17_301_504.0 / 1e10);
        close(bound.shared, 2.0 * 17_301_504.0 / 1e10);
        close(bound.layer, 1e-4 + 57_559.0 / 1e9 + 6.0 * 17_301_504.0 / 1e10);
        let rest = shape.rest();
        close(bound.rest, (rest.attention + rest.dense + rest.gates + rest.head) as f64 / 1e10);
        close(bound.step, 27.0 * bound.layer + bound.rest);
        close(bound.tokens_per_second, 1.0 / bound.step);
        assert_eq!(bound.limit(27, 1e-4), "the busiest shard");
        close(bound.language_nodes(27, 3), 3.0 * bound.step / (27.0 * bound.shard));
    }

    #[test]
    fn rows_cost_at_least_what_is_said() {
        let (shape, shards) = (moe_16b(), split(64, Some(1), &[]).unwrap());
        let traffic = traffic(&shape, &shards, 512, Activations::Bf16);
        let slow = Machines { per_row: Some(1e-4), ..MACHINES };
        close(bound(&shape, &shards, 512, &traffic, &slow).shard, 512.0 * 6.0 * 1e-4);
    }

    #[test]
    fn each_limit_is_named() {
        let shape = v2();
        let shards = split(160, Some(160), &[]).unwrap();
        let traffic = traffic(&shape, &shards, 64, Activations::F32);
        for (machines, expected) in [
            (Machines { round_trip: 1.0, ..MACHINES }, "round trips"),
            (Machines { bandwidth: 1e6, ..MACHINES }, "the language node's link"),
            (Machines { per_row: Some(1.0), ..MACHINES }, "the busiest shard"),
            (Machines { memory: 1e6, bandwidth: 1e12, ..MACHINES }, "the language node's memory"),
        ] {
            assert_eq!(bound(&shape, &shards, 64, &traffic, &machines).limit(59, machines.round_trip), expected);
        }
    }
}
