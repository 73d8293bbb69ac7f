//! Random checkpoints of sizes that fit nothing, against a decoder written out in f64.

#![allow(clippy::unwrap_used)]

mod support;

use backend_native::Isa;
use serde_json::{Value, json};
use support::{
    Recorder, Sequence, argmax, assert_close, generate, load_with, naive, prefill,
    writer::{self, Random, Stored},
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
    let tensors = writer::llama(dir.path(), config, stored, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
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
