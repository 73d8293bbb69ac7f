//! Random checkpoints of the families with experts and latent attention.

use std::path::Path;

use serde_json::Value;

use super::writer::{Stored, Tensors, random};

/// Writes a random checkpoint for a `deepseek` or `deepseek_v2` configuration (`config` complete, as in config.json) and returns its tensors.
pub fn deepseek(dir: &Path, config: &Value, stored: Stored, seed: u64) -> Tensors {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (hidden, vocabulary) = (size("hidden_size"), size("vocab_size"));
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![vocabulary, hidden]),
    ];
    for i in 0..size("num_hidden_layers") {
        let attention = if config["kv_lora_rank"].is_null() { heads(config) } else { latent(config) };
        let mlp = if is_moe(config, i) { experts(config) } else { swiglu("mlp", size("hidden_size"), size("intermediate_size")) };
        let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| (name.to_owned(), vec![hidden]));
        let parts = norms.into_iter().chain(attention).chain(mlp);
        shapes.extend(
            parts.map(|(name, shape)| (format!("model.layers.{i}.{name}{}", if name.ends_with(".bias") { "" } else { ".weight" }), shape)),
        );
    }
    random(dir, config, shapes, stored, seed)
}

/// Names without `.weight`, and biases with `.bias`.
type Shapes = Vec<(String, Vec<usize>)>;

/// Whether layer `i` is a layer of experts.
pub fn is_moe(config: &Value, i: usize) -> bool {
    let size = |field: &str, default: u64| config[field].as_u64().unwrap_or(default) as usize;
    !config["n_routed_experts"].is_null() && i >= size("first_k_dense_replace", 0) && i.is_multiple_of(size("moe_layer_freq", 1))
}

fn heads(config: &Value) -> Shapes {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
    let (head_dim, kv_heads) = (hidden / heads, config["num_key_value_heads"].as_u64().map_or(heads, |n| n as usize));
    let linear = |name: &str, out, inner| (format!("self_attn.{name}_proj"), vec![out, inner]);
    let kv = kv_heads * head_dim;
    vec![linear("q", hidden, hidden), linear("k", kv, hidden), linear("v", kv, hidden), linear("o", hidden, hidden)]
}

fn latent(config: &Value) -> Shapes {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (hidden, heads, rank) = (size("hidden_size"), size("num_attention_heads"), size("kv_lora_rank"));
    let (nope, rope, v) = (size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim"));
    let at = |name: &str, shape: &[usize]| (format!("self_attn.{name}"), shape.to_vec());
    let mut shapes = vec![
        at("kv_a_proj_with_mqa", &[rank + rope, hidden]),
        at("kv_a_layernorm", &[rank]),
        at("kv_b_proj", &[heads * (nope + v), rank]),
        at("o_proj", &[hidden, heads * v]),
    ];
    match config["q_lora_rank"].as_u64().map(|rank| rank as usize) {
        None => shapes.push(at("q_proj", &[heads * (nope + rope), hidden])),
        Some(rank) => {
            shapes.extend([at("q_a_proj", &[rank, hidden]), at("q_a_layernorm", &[rank]), at("q_b_proj", &[heads * (nope + rope), rank])])
        }
    }
    if config["attention_bias"] == true {
        shapes.extend([at("kv_a_proj_with_mqa.bias", &[rank + rope]), at("o_proj.bias", &[hidden])]);
        shapes.extend(config["q_lora_rank"].as_u64().map(|rank| at("q_a_proj.bias", &[rank as usize])));
    }
    shapes
}

fn experts(config: &Value) -> Shapes {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (hidden, inner, routed) = (size("hidden_size"), size("moe_intermediate_size"), size("n_routed_experts"));
    let mut shapes = vec![("mlp.gate".to_owned(), vec![routed, hidden])];
    shapes.extend((0..routed).flat_map(|e| swiglu(&format!("mlp.experts.{e}"), hidden, inner)));
    let shared = config["n_shared_experts"].as_u64().unwrap_or(0) as usize;
    if shared > 0 {
        shapes.extend(swiglu("mlp.shared_experts", hidden, shared * inner));
    }
    shapes
}

fn swiglu(name: &str, hidden: usize, inner: usize) -> Shapes {
    let linear = |part: &str, shape: [usize; 2]| (format!("{name}.{part}_proj"), shape.to_vec());
    vec![linear("gate", [inner, hidden]), linear("up", [inner, hidden]), linear("down", [hidden, inner])]
}
