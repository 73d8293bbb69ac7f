//! Sizes, from `config.json` alone (spec: moe.md 1, language.md 2).

use std::path::Path;

use checkpoint::Checkpoint;
use layers::Gating;
use models::{DecoderSizes, ExpertSizes};
use placement::ExpertRange;

use crate::Failure;

/// A model with layers of experts, as it is laid out on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// `model_type`
    pub family: String,
    pub sizes: DecoderSizes,
    pub experts: ExpertSizes,
}

/// Bytes of weights that every token needs and no shard holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// Attention and norms.
    pub attention: u64,
    /// Layers without experts.
    pub dense: u64,
    pub shared_experts: u64,
    pub gates: u64,
    pub embedding: u64,
    pub head: u64,
}

impl Shape {
    /// Reads `config.json` of the folder `dir`; weights need not be there.
    pub fn read(dir: &Path) -> Result<Self, Failure> {
        let checkpoint = Checkpoint::open_config(dir).map_err(Failure::input)?;
        let sizes = models::sizes(&checkpoint).map_err(Failure::input)?;
        let none =
            || Failure::input(format!("{}: config.json: n_routed_experts: missing, the model has no experts to split", dir.display()));
        let experts = sizes.experts.ok_or_else(none)?;
        Ok(Self { family: checkpoint.model_type().to_owned(), sizes, experts })
    }

    pub fn gating(&self) -> &Gating {
        &self.experts.gating
    }

    /// One expert of one layer: gate, up and down projection, `3 * hidden * inner` numbers.
    pub fn expert_bytes(&self) -> u64 {
        self.experts.expert * self.number_bytes()
    }

    /// Experts of one number in all layers: what a shard grows by.
    pub fn column_bytes(&self) -> u64 {
        self.expert_bytes() * self.experts.layers as u64
    }

    /// What a shard holds.
    pub fn shard_bytes(&self, shard: ExpertRange) -> u64 {
        self.column_bytes() * shard.experts().count() as u64
    }

    /// What stays in the language node.
    pub fn rest(&self) -> Rest {
        let bytes = |numbers: u64| numbers * self.number_bytes();
        let DecoderSizes { embedding, head, attention, dense, .. } = self.sizes;
        Rest {
            attention: bytes(attention),
            dense: bytes(dense),
            shared_experts: bytes(self.experts.shared_experts),
            gates: bytes(self.experts.gates),
            embedding: bytes(embedding),
            head: bytes(head),
        }
    }

    /// The fewest equal shards of which each fits into `memory` bytes: with `m` experts of every layer in that memory, `ceil(experts / m)`.
    /// `None` where not even one does.
    pub fn fewest_shards(&self, memory: f64) -> Option<usize> {
        let each = (memory / self.column_bytes() as f64) as usize;
        (each > 0).then(|| self.gating().experts.div_ceil(each))
    }

    fn number_bytes(&self) -> u64 {
        self.sizes.number_bytes as u64
    }
}

impl Rest {
    pub fn total(&self) -> u64 {
        self.attention + self.dense + self.shared_experts + self.gates + self.embedding + self.head
    }

    /// What a step reads whatever its tokens are, without the shared experts: all but these and the table of embeddings, of which it reads one
    /// row per token. A table that is the head as well is read as such.
    pub fn read_per_step(&self) -> u64 {
        let head = if self.head == 0 { self.embedding } else { self.head };
        self.attention + self.dense + self.gates + head
    }
}

/// The shards that `--nodes` and `--starts` describe, in the words of those flags where there are none.
pub fn split(experts: usize, nodes: Option<usize>, starts: &[usize]) -> Result<Vec<ExpertRange>, Failure> {
    let named = |flag: &str, reason: &dyn std::fmt::Display| Failure::usage(format!("{flag}: {reason}"));
    let count = nodes.unwrap_or(starts.len());
    if count == 0 {
        return Err(named("--nodes", &"must be at least 1"));
    }
    if starts.is_empty() {
        let even = |index| ExpertRange::even(experts, count, index).map_err(|error| named("--nodes", &error));
        return even(count - 1).and_then(|_| (0..count).map(even).collect());
    }
    if count != starts.len() {
        return Err(named("--starts", &format!("{} shards, but --nodes is {count}", starts.len())));
    }
    (0..count).map(|index| ExpertRange::between(experts, starts, index).map_err(|error| named("--starts", &error))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::samples::{lite, moe_16b, v2};

    #[test]
    fn published_sizes() {
        // Numbers of all weights, in millions: moe.md 1.2 and language.md 2.1.
        for (shape, expert, all) in
            [(moe_16b(), 3 * 2048 * 1408 * 2, 16_376), (lite(), 3 * 2048 * 1408 * 2, 15_706), (v2(), 3 * 5120 * 1536 * 2, 235_741)]
        {
            assert_eq!(shape.expert_bytes(), expert);
            let numbers = (shape.rest().total() + shape.column_bytes() * shape.gating().experts as u64) / 2;
            assert_eq!((numbers + 500_000) / 1_000_000, all);
        }
        let moe = moe_16b();
        assert_eq!((moe.sizes.layers, moe.experts.layers), (28, 27));
        assert_eq!(moe.column_bytes(), 27 * 17_301_504);
        let rest = moe.rest();
        assert_eq!(rest.shared_experts, 27 * 3 * 2048 * 2816 * 2);
        assert_eq!(rest.dense, 3 * 2048 * 10_944 * 2);
        assert_eq!(rest.gates, 27 * 64 * 2048 * 2);
        assert_eq!((rest.embedding, rest.head), (102_400 * 2048 * 2, 102_400 * 2048 * 2));
        assert_eq!(rest.attention, (28 * (4 * 2048 * 2048 + 2 * 2048) + 2048) * 2);
    }

    #[test]
    fn shards_add_up_to_all_experts() {
        for shape in [moe_16b(), lite(), v2()] {
            let experts = shape.gating().experts;
            for nodes in 1..=300 {
                let shards = split(experts, Some(nodes), &[]);
                if nodes > experts {
                    assert!(shards.unwrap_err().to_string().starts_with("--nodes: "));
                    continue;
                }
                let bytes: Vec<_> = shards.unwrap().into_iter().map(|shard| shape.shard_bytes(shard)).collect();
                assert_eq!(bytes.iter().sum::<u64>(), shape.column_bytes() * experts as u64, "{nodes}");
                assert!(bytes.iter().max().unwrap() - bytes.iter().min().unwrap() <= shape.column_bytes());
            }
        }
        let uneven = split(64, None, &[0, 10, 40]).unwrap();
        assert_eq!(uneven.iter().map(ToString::to_string).collect::<Vec<_>>(), ["0-9", "10-39", "40-63"]);
    }

    #[test]
    fn the_fewest_shards_fit_and_one_less_does_not() {
        let shape = v2();
        for memory in [3e9, 5e9, 16e9, 24e9, 80e9, 1e12] {
            let fewest = shape.fewest_shards(memory).unwrap();
            let largest = |nodes| shape.shard_bytes(split(160, Some(nodes), &[]).unwrap()[0]) as f64;
            assert!(largest(fewest) <= memory, "{memory}");
            assert!(fewest == 1 || largest(fewest - 1) > memory, "{memory}");
        }
        assert_eq!(shape.fewest_shards(2e9), None);
    }

    #[test]
    fn wrong_splits_name_their_flag() {
        for (nodes, starts, said) in [
            (Some(0), vec![], "--nodes: must be at least 1"),
            (Some(65), vec![], "--nodes: 65 shards of 64 experts: some would be empty"),
            (None, vec![0, 9, 9], "--starts: [0, 9, 9]: each shard begins after the one before it"),
            (None, vec![1, 9], "--starts: [1, 9]: the first shard begins at expert 0"),
            (None, vec![0, 64], "--starts: [0, 64]: the model has 64 experts"),
            (Some(3), vec![0, 9], "--starts: 2 shards, but --nodes is 3"),
        ] {
            assert_eq!(split(64, nodes, &starts).unwrap_err().to_string(), said);
        }
    }
}
