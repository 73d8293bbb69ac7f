//! How many numbers a decoder is made of, from its configuration alone (spec: language.md 1.4 and 2.6, moe.md 1.2).

use checkpoint::Checkpoint;
use layers::{AttentionShape, EngineError, Gating, LatentShape};

use crate::registry::decoder;
use crate::text_config::{AttentionConfig, Fields, TextConfig};

/// Numbers of each kind of weight, all layers together. What a multimodal model has beside its decoder is not counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderSizes {
    pub layers: usize,
    pub hidden: usize,
    /// Bytes of one number as `torch_dtype` has it.
    pub number_bytes: usize,
    /// The table of token embeddings, of which a step reads one row per token.
    pub embedding: u64,
    /// The text head; 0 where the table of embeddings serves as such.
    pub head: u64,
    /// Attention, and the norms around it and around the feed-forward parts.
    pub attention: u64,
    /// Feed-forward parts that every token passes.
    pub dense: u64,
    /// `None` where all are dense.
    pub experts: Option<ExpertSizes>,
}

/// Layers of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertSizes {
    /// How many layers have experts.
    pub layers: usize,
    pub gating: Gating,
    /// Width inside an expert.
    pub inner: usize,
    /// Shared experts of a layer.
    pub shared: usize,
    /// Numbers of one routed expert of one layer.
    pub expert: u64,
    /// Numbers of all gates.
    pub gates: u64,
    /// Numbers of all shared experts.
    pub shared_experts: u64,
}

/// Reads the configuration of a checkpoint, which may have been opened without weights.
pub fn sizes(checkpoint: &Checkpoint) -> Result<DecoderSizes, EngineError> {
    let text = decoder(checkpoint)?;
    let [hidden, vocabulary] = [text.hidden_size, text.vocab_size].map(|size| size as u64);
    let with_experts = (0..text.num_hidden_layers).filter(|&layer| text.experts_of(layer).is_some()).count();
    let biases = if text.mlp_bias { 2 * text.intermediate_size as u64 + hidden } else { 0 };
    let dense = swiglu(hidden, text.intermediate_size as u64) + biases;
    Ok(DecoderSizes {
        layers: text.num_hidden_layers,
        hidden: text.hidden_size,
        number_bytes: number_bytes(checkpoint)?,
        embedding: vocabulary * hidden,
        head: if text.tie_word_embeddings { 0 } else { vocabulary * hidden },
        // Two norms per layer and the last one.
        attention: text.num_hidden_layers as u64 * (attention(&text.attention) + 2 * hidden) + hidden,
        dense: (text.num_hidden_layers - with_experts) as u64 * dense,
        experts: (with_experts > 0).then(|| experts(&text, with_experts)).flatten(),
    })
}

/// Gate, up and down projection.
fn swiglu(hidden: u64, inner: u64) -> u64 {
    3 * hidden * inner
}

fn experts(text: &TextConfig, layers: usize) -> Option<ExpertSizes> {
    let shape = text.experts?.shape;
    let [hidden, inner, shared] = [shape.hidden, shape.inner, shape.shared].map(|size| size as u64);
    Some(ExpertSizes {
        layers,
        gating: shape.gating,
        inner: shape.inner,
        shared: shape.shared,
        expert: swiglu(hidden, inner),
        gates: layers as u64 * shape.gating.experts as u64 * hidden,
        // Stored as one of `shared` times the width.
        shared_experts: layers as u64 * swiglu(hidden, shared * inner),
    })
}

/// Of one layer, without the norm before it.
fn attention(config: &AttentionConfig) -> u64 {
    match config {
        AttentionConfig::Heads(AttentionShape { hidden, heads, kv_heads, head_dim, bias }) => {
            let [hidden, q, kv] = [*hidden, heads * head_dim, kv_heads * head_dim].map(|size| size as u64);
            let biases = if *bias { q + 2 * kv + hidden } else { 0 };
            2 * hidden * q + 2 * hidden * kv + biases
        }
        AttentionConfig::Latent(shape) => latent(shape),
    }
}

fn latent(shape: &LatentShape) -> u64 {
    let LatentShape { heads, qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: v, .. } = *shape;
    let [hidden, rank, row] = [shape.hidden, shape.kv_lora_rank, shape.kv_lora_rank + rope].map(|size| size as u64);
    let [q, kv, out] = [heads * (nope + rope), heads * (nope + v), heads * v].map(|size| size as u64);
    let bias = |width: u64| if shape.bias { width } else { 0 };
    let queries = match shape.q_lora_rank.map(|rank| rank as u64) {
        None => hidden * q,
        Some(rank) => hidden * rank + bias(rank) + rank + rank * q, // down, its norm, up
    };
    let keys_and_values = hidden * row + bias(row) + rank + rank * kv; // down, its norm, up
    queries + keys_and_values + out * hidden + bias(hidden)
}

/// As every release of these families is stored where the file does not say.
const DEFAULT_BYTES: usize = 2;

fn number_bytes(checkpoint: &Checkpoint) -> Result<usize, EngineError> {
    let Some(value) = checkpoint.config().get("torch_dtype").filter(|value| !value.is_null()) else { return Ok(DEFAULT_BYTES) };
    match value.as_str() {
        Some("bfloat16" | "float16") => Ok(2),
        Some("float32") => Ok(4),
        _ => {
            let known = "\"bfloat16\", \"float16\" or \"float32\"";
            Err(Fields { checkpoint, path: "" }.refuse("torch_dtype", format!("{value} is not supported, only {known}")))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    /// What the files of a checkpoint hold is what its configuration says.
    #[test]
    fn numbers_are_those_of_the_files() {
        for name in ["llama", "llama_gqa", "moe_v1", "v2_lite", "v2_full"] {
            let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(name);
            let whole = Checkpoint::open(&dir).unwrap();
            let paper = Checkpoint::open_config(&dir).unwrap();
            assert_eq!(paper.names().count(), 0);
            let sizes = sizes(&paper).unwrap();
            let of = |part: &'static str| whole.bytes_of(&move |name| name.contains(part));
            let bytes = sizes.number_bytes as u64;
            if let Some(experts) = sizes.experts {
                let routed = experts.layers as u64 * experts.gating.experts as u64 * experts.expert;
                assert_eq!(routed * bytes, of(".experts."), "{name}");
                assert_eq!(experts.shared_experts * bytes, of(".shared_experts."), "{name}");
                assert_eq!(experts.gates * bytes, of(".mlp.gate.weight"), "{name}");
            }
            assert_eq!(
                sizes.attention * bytes,
                of("self_attn") + of("norm.weight") - of("self_attn.q_a_layernorm") - of("self_attn.kv_a_layernorm"),
                "{name}"
            );
            assert_eq!(sizes.embedding * bytes, of("embed_tokens"), "{name}");
            let experts = sizes.experts.map_or(0, |e| e.layers as u64 * e.gating.experts as u64 * e.expert + e.gates + e.shared_experts);
            let all = sizes.embedding + sizes.head + sizes.attention + sizes.dense + experts;
            assert_eq!(all * bytes, whole.total_bytes(), "{name}");
        }
    }
}
