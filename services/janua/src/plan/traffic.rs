//! Bytes between the language node and the shards: what `proto/janua/v1/experts.proto` says, filled in as the language service does it.
//!
//! * To a shard goes one `ExpertBatch` per layer and step, with one row for each token that has an expert there.
//! * With exact activations (f32) one row comes back for each token *and* expert, and is weighted in the language node.
//! * With rounded ones (bf16, int8) the batch takes the weights along, the shard adds up, and one row comes back for each row sent.
//!
//! Counted are messages and the 5 bytes before each of them in gRPC. Headers of TCP/IP, HTTP/2 or NATS are not: a link carries some per cent less
//! than its nominal rate. A traced batch is 57 bytes longer.

use clap::ValueEnum;
use placement::ExpertRange;

use super::routing::{reach, touched};
use super::shape::Shape;

/// Before each message: a flag and its length.
const GRPC_PREFIX: f64 = 5.0;
/// The id of a batch: its tag and a number of up to 28 bits, as it is after some hours.
const ID: f64 = 1.0 + 4.0;
/// Most numbers of a piece of outputs, as `services/experts` sends them.
const PIECE_NUMBERS: usize = 1 << 18;
/// The number of a field, and any value below 128.
const TAG: f64 = 1.0;

/// How activations travel, as `language.expert_activations` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    F32,
    Bf16,
    Int8,
}

/// What goes to a shard in one layer of one step, or its mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Tokens that have an expert there.
    pub rows: f64,
    /// Pairs of a token and an expert.
    pub places: f64,
    pub experts: f64,
}

/// Bytes of one layer of one step, all shards together, expected.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Shards that one token goes to.
    pub shards_per_token: f64,
    /// Shards that get a batch.
    pub batches: f64,
    /// Rows that all shards get together.
    pub rows: f64,
    /// From the language node.
    pub up: f64,
    /// To the language node.
    pub down: f64,
    /// Of both: all that is not a number of an activation.
    pub overhead: f64,
    /// The largest batch that a shard gets.
    pub largest_batch: f64,
}

impl Activations {
    fn number_bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 => 2.0,
            Self::Int8 => 1.0,
        }
    }

    /// Whether a shard adds up before it answers.
    fn adds_up(self) -> bool {
        self != Self::F32
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// An `Activations` of `rows` rows of `hidden` numbers: two counts, the encoding, the numbers and, for int8, one f32 per row.
    fn message(self, rows: f64, hidden: usize) -> f64 {
        let data = rows * hidden as f64 * self.number_bytes();
        let scales = if self == Self::Int8 { field(4.0 * rows) } else { 0.0 };
        TAG + varint(rows) + TAG + varint(hidden as f64) + 2.0 * TAG + field(data) + scales
    }

    /// An `ExpertBatch` for experts of the shard.
    fn batch(self, load: &Load, shard: ExpertRange, hidden: usize) -> f64 {
        let weights = if self.adds_up() { field(4.0 * load.places) } else { 0.0 };
        let number = shard.experts().map(|expert| varint(expert as f64)).sum::<f64>() / shard.experts().count() as f64;
        let layer = 2.0 * TAG;
        ID + layer
            + field(self.message(load.rows, hidden))
            + field(load.experts * number)
            + field(load.experts * varint(load.places / load.experts))
            + field(load.places * varint_below(load.rows))
            + weights
    }

    /// The `ExpertReply`s to it: one for each expert, or for their sum, unless it takes more.
    fn answers(self, load: &Load, hidden: usize) -> f64 {
        let parts = if self.adds_up() { 1.0 } else { load.experts };
        let rows = self.answered_rows(load);
        let pieces = parts * (rows / parts / (PIECE_NUMBERS / hidden).max(1) as f64).ceil();
        // Which row a piece begins with is not written for the first one.
        let first = (TAG + varint(rows / 2.0)) * (pieces - 1.0) / pieces;
        pieces * (GRPC_PREFIX + field(ID + field(self.message(rows / pieces, hidden)) + first))
    }

    fn answered_rows(self, load: &Load) -> f64 {
        if self.adds_up() { load.rows } else { load.places }
    }
}

/// Bytes of a field of `bytes` bytes: its tag, its length, itself.
fn field(bytes: f64) -> f64 {
    TAG + varint(bytes) + bytes
}

/// Bytes of a whole number as protobuf writes it: 7 bits in each. Means are rounded.
fn varint(number: f64) -> f64 {
    let bits = u64::BITS - (number.round() as u64).leading_zeros();
    f64::from(bits.div_ceil(7).max(1))
}

/// The mean over the numbers `0..count`: all have a byte, those from 2^7 on a second one, and so on.
fn varint_below(count: f64) -> f64 {
    let longer = |bytes: i32| (count - 2f64.powi(7 * bytes)).max(0.0);
    1.0 + (1..4).map(longer).sum::<f64>() / count.max(1.0)
}

/// One layer of a step of `batch` tokens under uniform routing.
///
/// A shard with `s` of `E` experts gets, expected: rows `batch * reach`, places `batch * top_k * s / E`, and a batch at all with probability
/// `1 - (1 - reach)^batch`. Messages are linear in these but for the lengths of varints, which are taken at the mean of those that are sent.
pub fn traffic(shape: &Shape, shards: &[ExpertRange], batch: usize, activations: Activations) -> Traffic {
    let (gating, hidden) = (shape.gating(), shape.sizes.hidden);
    let mut traffic = Traffic::default();
    for &shard in shards {
        let reach = reach(gating, shard);
        let sent = 1.0 - (1.0 - reach).powf(batch as f64);
        let part = shard.experts().count() as f64 / gating.experts as f64;
        let load = Load {
            rows: batch as f64 * reach / sent,
            places: (batch * gating.top_k) as f64 * part / sent,
            experts: touched(gating, shard, batch) / sent,
        };
        let up = GRPC_PREFIX + activations.batch(&load, shard, hidden);
        let down = activations.answers(&load, hidden);
        let numbers = (load.rows + activations.answered_rows(&load)) * hidden as f64 * activations.number_bytes();
        traffic.shards_per_token += reach;
        traffic.batches += sent;
        traffic.rows += sent * load.rows;
        traffic.up += sent * up;
        traffic.down += sent * down;
        traffic.overhead += sent * (up + down - numbers);
        traffic.largest_batch = traffic.largest_batch.max(up);
    }
    traffic
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::samples::{lite, moe_16b, v2};
    use crate::plan::shape::split;
    use proto::v1;

    fn encoding(activations: Activations) -> v1::activations::Encoding {
        match activations {
            Activations::F32 => v1::activations::Encoding::F32,
            Activations::Bf16 => v1::activations::Encoding::Bf16,
            Activations::Int8 => v1::activations::Encoding::Int8,
        }
    }

    fn packed(activations: Activations, rows: usize, hidden: usize) -> Option<v1::Activations> {
        Some(wire::activations::pack(vec![0.5; rows * hidden], hidden, encoding(activations)))
    }

    /// The messages that the language service and a shard make of real choices of the gate, against the formulas for the same load.
    #[test]
    fn bytes_are_those_of_the_messages() {
        for (shape, nodes, batch) in
            [(moe_16b(), 2, 1), (moe_16b(), 3, 32), (lite(), 8, 512), (v2(), 8, 1), (v2(), 2, 200), (v2(), 160, 64)]
        {
            let (gating, hidden) = (shape.gating(), shape.sizes.hidden);
            let logits: Vec<f32> = (0..batch * gating.experts).map(|i| ((i * 7919 + i / 5) % 997) as f32 / 100.0).collect();
            let shares = gating.route(&logits).shares();
            for (shard, activations) in split(gating.experts, Some(nodes), &[])
                .unwrap()
                .into_iter()
                .flat_map(|shard| [Activations::F32, Activations::Bf16, Activations::Int8].map(|activations| (shard, activations)))
            {
                let here: Vec<_> = shares.iter().filter(|share| shard.contains(share.expert)).collect();
                let mut tokens: Vec<usize> = here.iter().flat_map(|share| share.rows.clone()).collect();
                let places = tokens.len();
                tokens.sort_unstable();
                tokens.dedup();
                if tokens.is_empty() {
                    continue;
                }
                let place = |row: &usize| tokens.binary_search(row).unwrap() as u32;
                let message = v1::ExpertBatch {
                    id: 1 << 24,
                    layer: 40,
                    rows: packed(activations, tokens.len(), hidden),
                    experts: here.iter().map(|share| share.expert as u32).collect(),
                    counts: here.iter().map(|share| share.rows.len() as u32).collect(),
                    places: here.iter().flat_map(|share| share.rows.iter().map(place)).collect(),
                    weights: if activations.adds_up() { vec![0.25; places] } else { Vec::new() },
                    traceparent: String::new(),
                };
                let load = Load { rows: tokens.len() as f64, places: places as f64, experts: here.len() as f64 };
                near(activations.batch(&load, shard, hidden), prost::Message::encoded_len(&message), 0.001);
                let parts = if activations.adds_up() { vec![tokens.len()] } else { here.iter().map(|share| share.rows.len()).collect() };
                near(activations.answers(&load, hidden), replies(activations, &parts, hidden), 0.001);
            }
        }
    }

    /// Bytes of the answers with parts of so many rows.
    fn replies(activations: Activations, parts: &[usize], hidden: usize) -> usize {
        let (mut first, mut bytes) = (0, 0);
        for part in parts {
            for begin in (0..*part).step_by(PIECE_NUMBERS / hidden) {
                let rows = (part - begin).min(PIECE_NUMBERS / hidden);
                let outputs = v1::ExpertOutputs { id: 1 << 24, rows: packed(activations, rows, hidden), first };
                let reply = v1::ExpertReply { reply: Some(v1::expert_reply::Reply::Outputs(outputs)) };
                bytes += GRPC_PREFIX as usize + prost::Message::encoded_len(&reply);
                first += rows as u32;
            }
        }
        bytes
    }

    fn near(planned: f64, sent: usize, within: f64) {
        assert!((planned - sent as f64).abs() <= sent as f64 * within, "{planned} planned, {sent} sent");
    }

    #[test]
    fn one_token_and_one_shard_by_hand() {
        let whole = split(64, Some(1), &[]).unwrap();
        let exact = traffic(&moe_16b(), &whole, 1, Activations::F32);
        // Activations: 2 + 3 + 2 and 1 + 2 + 8192. Around it: 5 + 2 + (1 + 2), and three fields of six bytes, each with two in front; 5 for gRPC.
        assert_eq!(exact.up, 8202.0 + 10.0 + 24.0 + 5.0);
        // Six times a row of 2048 f32: 7 + (1 + 2 + 8192), in a field of 1 + 2, behind an id of 5 and, but for the first, its number of 2; in a
        // field of 1 + 2; 5 for gRPC.
        assert!((exact.down - (6.0 * (8202.0 + 3.0 + 5.0 + 2.0 + 3.0 + 5.0) - 2.0)).abs() < 1e-6, "{}", exact.down);
        assert_eq!((exact.shards_per_token, exact.batches), (1.0, 1.0));
        let rounded = traffic(&moe_16b(), &whole, 1, Activations::Bf16);
        // One row of 4096 bytes each way, six weights on the way up.
        assert_eq!(rounded.up, 4106.0 + 10.0 + 24.0 + 26.0 + 5.0);
        assert_eq!(rounded.down, 4106.0 + 3.0 + 5.0 + 3.0 + 5.0);
    }

    #[test]
    fn more_shards_never_mean_fewer_bytes() {
        for shape in [moe_16b(), lite(), v2()] {
            for activations in [Activations::F32, Activations::Bf16, Activations::Int8] {
                let mut last = Traffic::default();
                // Where groups are cut matters as well: with groups, only splits that go on cutting the one before.
                let grouped = shape.gating().groups.is_some();
                let experts = shape.gating().experts;
                for nodes in (1..=experts).filter(|nodes| !grouped || [1, 2, 4, 8, 16, 32, 160].contains(nodes)) {
                    let now = traffic(&shape, &split(experts, Some(nodes), &[]).unwrap(), 16, activations);
                    assert!(now.up > last.up, "{nodes}");
                    // But for the numbers of pieces, which are whole.
                    assert!(now.down >= 0.999 * last.down, "{nodes}");
                    assert!(now.shards_per_token > last.shards_per_token, "{nodes}");
                    last = now;
                }
            }
        }
    }

    #[test]
    fn every_split_has_sensible_traffic() {
        for shape in [moe_16b(), v2()] {
            let top_k = shape.gating().top_k as f64;
            for nodes in 1..=300.min(shape.gating().experts) {
                let shards = split(shape.gating().experts, Some(nodes), &[]).unwrap();
                let now = traffic(&shape, &shards, 8, Activations::F32);
                assert!(now.shards_per_token >= 1.0 - 1e-9 && now.shards_per_token <= top_k.min(nodes as f64) + 1e-9, "{nodes}: {now:?}");
                assert!((now.rows - 8.0 * now.shards_per_token).abs() < 1e-6);
                let back = 8.0 * top_k * shape.sizes.hidden as f64 * 4.0;
                assert!(now.down > back && now.down < back * 1.01, "{nodes}: an expert's rows come back once wherever it is");
                assert!(now.overhead < 0.02 * (now.up + now.down), "{nodes}: {now:?}");
            }
        }
    }
}
