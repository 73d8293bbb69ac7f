//! Random checkpoints of sizes that fit nothing, against a decoder written out in f64.

#![allow(clippy::unwrap_used)]

mod support;

use backend_native::Isa;
use serde_json::{Value, json};
use support::{
    Recorder, Sequence, argmax, assert_close, generate, load_with, naive, prefill,
    writer::{self, Random, Stored},
    writer_deepseek::deepseek,
};

fn config(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 120, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 5,
        "num_key_value_heads": 1, "vocab_size": 131, "max_position_embeddings": 300, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn five_heads_share_one() {
    check(&config(json!({})), Stored::F32, 1);
}

#[test]
fn heads_that_do_not_add_up_to_the_hidden_size_and_biases_everywhere() {
    let changes = json!({
        "hidden_size": 90, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "attention_bias": true, "mlp_bias": true,
        "rms_norm_eps": 1e-5,
    });
    check(&config(changes), Stored::BF16, 2);
}

#[test]
fn tied_tables_stretched_positions_and_another_base() {
    let changes = json!({
        "hidden_size": 44, "num_attention_heads": 11, "num_key_value_heads": 11, "tie_word_embeddings": true,
        "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0},
    });
    check(&config(changes), Stored::F16, 3);
}

#[test]
fn sums_longer_than_a_block_of_the_kernels() {
    let changes = json!({
        "hidden_size": 1100, "intermediate_size": 1031, "num_hidden_layers": 1, "num_attention_heads": 10, "num_key_value_heads": 5,
    });
    check(&config(changes), Stored::BF16, 4);
}

/// A model with experts and heads.
fn experts(changes: Value) -> Value {
    let mut config = config(json!({
        "model_type": "deepseek", "hidden_size": 60, "num_key_value_heads": 5, "num_hidden_layers": 3, "n_routed_experts": 7,
        "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "norm_topk_prob": false, "scoring_func": "softmax", "rope_scaling": null,
    }));
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// A model with experts and latent attention.
fn latent(changes: Value) -> Value {
    let mut config = experts(json!({
        "model_type": "deepseek_v2", "q_lora_rank": null, "kv_lora_rank": 13, "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 7,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    }));
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn experts_in_every_second_layer_with_weights_that_add_up_to_one() {
    let changes = json!({"num_hidden_layers": 5, "moe_layer_freq": 2, "norm_topk_prob": true, "num_key_value_heads": 1});
    check(&experts(changes), Stored::BF16, 6);
}

#[test]
fn one_expert_per_token_none_shared_and_no_dense_layer() {
    let changes = json!({"first_k_dense_replace": 0, "num_experts_per_tok": 1, "n_shared_experts": null, "moe_intermediate_size": 1});
    check(&experts(changes), Stored::F32, 7);
}

#[test]
fn all_experts_for_every_token() {
    check(&experts(json!({"num_experts_per_tok": 7, "n_shared_experts": 3})), Stored::F16, 8);
}

#[test]
fn five_latent_heads_of_sizes_that_differ() {
    check(&latent(json!({})), Stored::BF16, 9);
}

#[test]
fn low_rank_queries_groups_of_experts_and_biases() {
    let changes = json!({
        "hidden_size": 46, "num_attention_heads": 7, "num_key_value_heads": 7, "q_lora_rank": 11, "kv_lora_rank": 37, "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 10, "v_head_dim": 12, "attention_bias": true, "n_routed_experts": 15, "num_experts_per_tok": 4,
        "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_scaling": {
            "type": "yarn", "factor": 8.5, "beta_fast": 20, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 20,
        },
    });
    check(&latent(changes), Stored::F16, 10);
}

#[test]
fn latent_attention_of_one_head_without_scaling_and_without_experts() {
    let changes = json!({
        "hidden_size": 9, "num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2,
        "v_head_dim": 3, "rope_scaling": null, "n_routed_experts": null,
    });
    check(&latent(changes), Stored::F32, 11);
}

#[test]
fn latent_sums_longer_than_a_block_of_the_kernels() {
    let changes = json!({
        "hidden_size": 530, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1, "kv_lora_rank": 521,
        "qk_nope_head_dim": 33, "qk_rope_head_dim": 18, "v_head_dim": 70, "q_lora_rank": 515, "n_routed_experts": null,
    });
    check(&latent(changes), Stored::BF16, 12);
}

#[test]
fn one_head_of_two_dimensions_and_one_layer() {
    let changes = json!({
        "hidden_size": 3, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
        "vocab_size": 2,
    });
    check(&config(changes), Stored::F32, 5);
}

/// Logits at all positions, on every instruction set, and the greedy continuation where it is clear.
fn check(config: &Value, stored: Stored, seed: u64) {
    const TOLERANCE: f32 = 5e-5;
    const STEPS: usize = 5;
    let dir = tempfile::tempdir().unwrap();
    let write = if config["model_type"] == "llama" { writer::llama } else { deepseek };
    let tensors = write(dir.path(), config, stored, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let vocabulary = config["vocab_size"].as_u64().unwrap() as usize;
    let mut random = Random(seed * 77 + 1);
    let ids: Vec<_> = (0..35).map(|_| ((random.uniform() + 1.0) / 2.0 * vocabulary as f64) as u32 % vocabulary as u32).collect();
    let expected: Vec<f32> = naive::logits(config, &tensors, &ids).concat().into_iter().map(|v| v as f32).collect();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut model = load_with(dir.path(), isa, 2);
        for chunk in [support::WHOLE, 7] {
            let mut recorder = Recorder::default();
            prefill(model.as_mut(), &mut Sequence::tokens(&ids), chunk, &mut recorder);
            assert_close(&format!("logits on {isa}"), &recorder.tensors["logits"], &expected, TOLERANCE);
        }
        let outcome = |threads, chunk| generate(load_with(dir.path(), isa, threads).as_mut(), &mut Sequence::tokens(&ids), chunk, STEPS);
        let (generated, logits) = outcome(2, 7);
        assert!(outcome(1, support::WHOLE) == (generated.clone(), logits), "one thread and no chunks give other bits on {isa}");
        let mut history = ids.clone();
        for id in generated {
            let last: Vec<_> = naive::logits(config, &tensors, &history).pop().unwrap().into_iter().map(|v| v as f32).collect();
            assert!(last[argmax(&last) as usize] - last[id as usize] <= 2.0 * TOLERANCE, "{id} is not among the most likely on {isa}");
            history.push(id);
        }
    }
}
