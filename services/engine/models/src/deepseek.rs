//! DeepSeekMoE (`model_type: deepseek`): the llama decoder with layers of experts instead of all but the first feed-forward parts (spec: moe.md).
//!
//! The reference computes the gate of the 16B model in bf16, where scores that differ little become equal and either expert may be taken. Here it
//! is f32, as in every later model: the choice is the one that the weights mean, and for a few tokens it is another than the reference's.

use checkpoint::Checkpoint;
use layers::{EngineError, Gating, Groups, MoeShape};
use serde::Deserialize;

use crate::text_config::{ExpertLayers, Fields, MOST_UNITS, TextConfig, Written};

/// The fields that say where experts are and how they are chosen.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WrittenExperts {
    n_routed_experts: Option<usize>,
    n_shared_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    first_k_dense_replace: Option<usize>,
    moe_layer_freq: Option<usize>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<f64>,
}

/// Most experts that are believed.
const MOST_EXPERTS: usize = 1 << 16;

/// The configuration is `config.json` itself.
pub(crate) fn read(checkpoint: &Checkpoint) -> Result<TextConfig, EngineError> {
    require_sizes(checkpoint)?;
    let text = TextConfig::read(checkpoint, "")?;
    Ok(TextConfig { experts: experts(checkpoint, text.hidden_size)?, ..text })
}

/// The sizes that every published configuration of these families has. A default here would be a guess at how many layers to run.
pub(crate) fn require_sizes(checkpoint: &Checkpoint) -> Result<(), EngineError> {
    let written: Written = checkpoint.config_as("")?;
    let at = Fields { checkpoint, path: "" };
    for (field, size) in [
        ("hidden_size", written.hidden_size),
        ("intermediate_size", written.intermediate_size),
        ("num_hidden_layers", written.num_hidden_layers),
        ("num_attention_heads", written.num_attention_heads),
        ("vocab_size", written.vocab_size),
        ("max_position_embeddings", written.max_position_embeddings),
    ] {
        at.required(field, size)?;
    }
    Ok(())
}

/// Which layers have experts; `None` where `n_routed_experts` is not set.
pub(crate) fn experts(checkpoint: &Checkpoint, hidden: usize) -> Result<Option<ExpertLayers>, EngineError> {
    let written: WrittenExperts = checkpoint.config_as("")?;
    let at = Fields { checkpoint, path: "" };
    let Some(routed) = written.n_routed_experts else { return Ok(None) };
    let routed = at.size("n_routed_experts", Some(routed), 0, MOST_EXPERTS)?;
    let inner = at.required("moe_intermediate_size", written.moe_intermediate_size)?;
    let inner = at.size("moe_intermediate_size", Some(inner), 0, MOST_UNITS)?;
    let shared = written.n_shared_experts.unwrap_or(0);
    if shared.checked_mul(inner).is_none_or(|width| width > MOST_UNITS) {
        return Err(at.refuse("n_shared_experts", format!("{shared} experts of {inner} are beyond the limit of {MOST_UNITS}")));
    }
    Ok(Some(ExpertLayers {
        shape: MoeShape { gating: gating(&at, &written, routed)?, hidden, inner, shared },
        first: written.first_k_dense_replace.unwrap_or(0),
        every: at.size("moe_layer_freq", written.moe_layer_freq, 1, usize::MAX)?,
    }))
}

fn gating(at: &Fields<'_>, written: &WrittenExperts, experts: usize) -> Result<Gating, EngineError> {
    match written.scoring_func.as_deref() {
        None | Some("softmax") => (),
        Some(other) => return Err(at.refuse("scoring_func", format!("{other:?} is not supported, only \"softmax\""))),
    }
    let groups = match written.topk_method.as_deref() {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => Some(groups(at, written, experts)?),
        Some(other) => {
            let known = "\"greedy\" or \"group_limited_greedy\"";
            return Err(at.refuse("topk_method", format!("{other:?} is not supported, only {known}")));
        }
    };
    let top_k = at.required("num_experts_per_tok", written.num_experts_per_tok)?;
    let top_k = at.size("num_experts_per_tok", Some(top_k), 0, experts)?;
    let candidates = groups.map_or(experts, |groups| experts / groups.count * groups.kept);
    if top_k > candidates {
        return Err(at.refuse("num_experts_per_tok", format!("{top_k} of the {candidates} experts in topk_group groups")));
    }
    Ok(Gating {
        experts,
        top_k,
        groups,
        norm_topk_prob: written.norm_topk_prob.unwrap_or(false),
        routed_scaling_factor: at.positive("routed_scaling_factor", written.routed_scaling_factor, 1.0)? as f32,
    })
}

fn groups(at: &Fields<'_>, written: &WrittenExperts, experts: usize) -> Result<Groups, EngineError> {
    let count = at.size("n_group", Some(at.required("n_group", written.n_group)?), 0, experts)?;
    if !experts.is_multiple_of(count) {
        return Err(at.refuse("n_group", format!("{count} does not divide n_routed_experts {experts}")));
    }
    let kept = at.size("topk_group", Some(at.required("topk_group", written.topk_group)?), 0, count)?;
    Ok(Groups { count, kept })
}
