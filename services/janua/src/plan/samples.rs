//! Configurations at their published sizes, for tests (spec: moe.md 1.1, language.md 2.1).
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::shape::Shape;

pub fn moe_16b() -> Shape {
    read(json!({
        "model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "vocab_size": 102400,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }))
}

pub fn lite() -> Shape {
    read(json!({
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": null,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "vocab_size": 102400,
        "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    }))
}

/// V2 and Coder-V2, 236B.
pub fn v2() -> Shape {
    read(json!({
        "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "routed_scaling_factor": 16.0, "vocab_size": 102400, "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    }))
}

fn read(config: Value) -> Shape {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Shape::read(folder.path()).unwrap()
}
