//! DeepSeek-V2, V2-Lite and Coder-V2 (`model_type: deepseek_v2`): latent attention with a compressed cache, YaRN, and layers of experts
//! (spec: language.md 2, moe.md).
//!
//! An early revision of V2-Chat calls itself `deepseek`; it is of this family because it has a `kv_lora_rank` (spec: language.md 2.8).

use checkpoint::Checkpoint;
use layers::{EngineError, LatentShape, Rope, rope::yarn_sharpness};
use serde::{Deserialize, Deserializer};

use crate::{
    deepseek,
    text_config::{AttentionConfig, Fields, MOST_UNITS, TextConfig, Turning, Written},
};

/// The fields of latent attention.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WrittenRanks {
    /// Must be there: null means a plain `q_proj`, which nobody should get by leaving the field out.
    #[serde(deserialize_with = "some")]
    q_lora_rank: Option<Option<usize>>,
    kv_lora_rank: Option<usize>,
    qk_nope_head_dim: Option<usize>,
    qk_rope_head_dim: Option<usize>,
    v_head_dim: Option<usize>,
}

fn some<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(value).map(Some)
}

/// Whether a configuration is of this family, whatever its name.
pub(crate) fn has_ranks(checkpoint: &Checkpoint) -> bool {
    checkpoint.config().get("kv_lora_rank").is_some_and(|rank| !rank.is_null())
}

/// The configuration is `config.json` itself.
pub(crate) fn read(checkpoint: &Checkpoint) -> Result<TextConfig, EngineError> {
    deepseek::require_sizes(checkpoint)?;
    let written: Written = checkpoint.config_as("")?;
    let at = Fields { checkpoint, path: "" };
    let turning = written.turning(&at, &["linear", "yarn"])?;
    let shape = latent(&at, &written, &turning)?;
    let text = written.complete(&at, rope(shape.qk_rope_head_dim, &turning), AttentionConfig::Latent(shape))?;
    Ok(TextConfig { experts: deepseek::experts(checkpoint, text.hidden_size)?, ..text })
}

fn rope(head_dim: usize, turning: &Turning) -> Rope {
    match &turning.yarn {
        Some(yarn) => Rope::yarn(head_dim, turning.theta, yarn),
        None => Rope::new(head_dim, turning.theta, turning.factor),
    }
    .neighbours()
}

fn latent(at: &Fields<'_>, written: &Written, turning: &Turning) -> Result<LatentShape, EngineError> {
    let ranks: WrittenRanks = at.checkpoint.config_as("")?;
    let size = |field, written| at.size(field, Some(at.required(field, written)?), 0, MOST_UNITS);
    let heads = size("num_attention_heads", written.num_attention_heads)?;
    if written.num_key_value_heads.is_some_and(|kv_heads| kv_heads != heads) {
        return Err(at.refuse("num_key_value_heads", format!("every one of the {heads} heads has its own key and value in this family")));
    }
    let shape = LatentShape {
        hidden: size("hidden_size", written.hidden_size)?,
        heads,
        q_lora_rank: at.required("q_lora_rank", ranks.q_lora_rank)?.map(|rank| size("q_lora_rank", Some(rank))).transpose()?,
        kv_lora_rank: size("kv_lora_rank", ranks.kv_lora_rank)?,
        qk_nope_head_dim: size("qk_nope_head_dim", ranks.qk_nope_head_dim)?,
        qk_rope_head_dim: size("qk_rope_head_dim", ranks.qk_rope_head_dim)?,
        v_head_dim: size("v_head_dim", ranks.v_head_dim)?,
        bias: written.attention_bias.unwrap_or(false),
        softmax_scale: 0.0,
    };
    let LatentShape { kv_lora_rank: rank, qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: v, .. } = shape;
    if !rope.is_multiple_of(2) {
        return Err(at.refuse("qk_rope_head_dim", format!("{rope} dimensions cannot be rotated in pairs")));
    }
    let widest = rank.max(nope + rope).max(nope + v);
    if widest * heads > MOST_UNITS {
        return Err(at.refuse("num_attention_heads", format!("{heads} heads of {widest} are beyond the limit of {MOST_UNITS}")));
    }
    // Sharper over a stretched context, at every length: the weights were trained with it (spec: language.md 2.2).
    let sharpness = yarn_sharpness(turning.factor, turning.mscale_all_dim).powi(2);
    Ok(LatentShape { softmax_scale: (sharpness / ((nope + rope) as f64).sqrt()) as f32, ..shape })
}
