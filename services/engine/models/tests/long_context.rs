//! A prompt of 131,072 tokens through the step API, on a compressed cache of the size that the family promises.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use backend_native::Native;
use checkpoint::Checkpoint;
use layers::{BLOCK_TOKENS, Head, NoObserver, RowInput};
use serde_json::json;
use support::{
    Sequence, argmax, assert_close, decode, naive, prefill, tokens,
    writer::{Random, Stored},
    writer_deepseek::deepseek,
};

const PROMPT: usize = 131_072;
const CHUNK: usize = 2048;
const RANK: usize = 8;
const ROPE: usize = 8;

#[test]
fn a_prompt_of_131072_tokens() {
    const TOLERANCE: f32 = 5e-5;
    const STEPS: usize = 3;
    let config = json!({
        "model_type": "deepseek_v2", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 50, "max_position_embeddings": 163_840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "q_lora_rank": null,
        "kv_lora_rank": RANK, "qk_nope_head_dim": 8, "qk_rope_head_dim": ROPE, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    });
    let dir = tempfile::tempdir().unwrap();
    let tensors = deepseek(dir.path(), &config, Stored::BF16, 21);
    let mut random = Random(77);
    let mut ids: Vec<u32> = (0..PROMPT).map(|_| ((random.uniform() + 1.0) / 2.0 * 50.0) as u32 % 50).collect();

    let blocks = (PROMPT + STEPS).div_ceil(BLOCK_TOKENS);
    let backend = Arc::new(Native::new(0).unwrap());
    let mut model = models::load_language_on(&backend, &Checkpoint::open(dir.path()).unwrap(), blocks).unwrap();
    assert_eq!(model.kv_block_bytes(), BLOCK_TOKENS * (RANK + ROPE) * size_of::<f32>());
    assert_eq!(model.card().context_length, 163_840);

    // Blocks from the end of the cache: no position is where its number says.
    let mut sequence = Sequence::new(tokens(&ids), (0..blocks as u32).rev().collect(), Head::Text);
    let mut last = prefill(model.as_mut(), &mut sequence, CHUNK, &mut NoObserver);
    for step in 0..STEPS {
        let expected: Vec<_> = naive::last_logits(&config, &tensors, &ids).into_iter().map(|v| v as f32).collect();
        assert_close(&format!("logits at position {}", PROMPT + step - 1), &last, &expected, TOLERANCE);
        ids.push(argmax(&last));
        last = decode(model.as_mut(), &mut sequence, RowInput::Token(*ids.last().unwrap()));
    }
}
