//! Configurations and checkpoints that make no model are refused with the field or tensor named; cards say what is in the files.

#![allow(clippy::unwrap_used)]

mod support;

use std::{fs, path::Path};

use checkpoint::Checkpoint;
use domain::CodeGrid;
use layers::{EngineError, NoObserver, RowInput, Slice, Step};
use models::{LoadOptions, card, load_language};
use serde_json::{Value, json};
use support::{KV_BLOCKS, fixture};

const OPTIONS: LoadOptions = LoadOptions { kv_blocks: KV_BLOCKS, threads: 1 };

/// A copy of a fixture with another config.json.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(fixture(name)).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    dir
}

fn refusal(dir: &Path) -> String {
    let outcome = Checkpoint::open(dir).map_err(EngineError::from).and_then(|checkpoint| load_language(&checkpoint.into(), &OPTIONS));
    let message = outcome.err().expect("not refused").to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

#[test]
fn contradictory_configurations_are_refused_by_field() {
    let rows = [
        ("hidden_size", json!(0), "hidden_size"),
        ("hidden_size", json!(-4), "hidden_size"),
        ("hidden_size", json!("wide"), "hidden_size"),
        ("hidden_size", json!(1u64 << 60), "hidden_size"),
        ("num_attention_heads", json!(5), "num_attention_heads"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        ("num_key_value_heads", json!(8), "num_key_value_heads"),
        ("head_dim", json!(15), "head_dim"),
        ("num_hidden_layers", json!(0), "num_hidden_layers"),
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers"),
        ("vocab_size", json!(0), "vocab_size"),
        ("intermediate_size", json!(0), "intermediate_size"),
        ("max_position_embeddings", json!(0), "max_position_embeddings"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("rope_theta", json!(0.0), "rope_theta"),
        ("hidden_act", json!("relu"), "hidden_act"),
        ("rope_scaling", json!({"type": "yarn", "factor": 40.0}), "rope_scaling.type"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling.rope_type"),
        ("rope_scaling", json!({"type": "linear"}), "rope_scaling.factor"),
        ("model_type", json!("gpt9"), "model_type"),
        ("model_type", json!("multi_modality"), "model_type"),
    ];
    for (field, value, named) in rows {
        let dir = changed("llama", |config| config[field] = value.clone());
        let message = refusal(dir.path());
        assert!(message.contains(&format!("config.json: field {named}: ")), "{field} = {value}: {message}");
    }
}

#[test]
fn contradictory_experts_are_refused_by_field() {
    check_refusals(
        "moe_v1",
        &[
            ("num_experts_per_tok", json!(17), "num_experts_per_tok"),
            ("num_experts_per_tok", json!(0), "num_experts_per_tok"),
            ("num_experts_per_tok", Value::Null, "num_experts_per_tok"),
            ("n_routed_experts", json!(0), "n_routed_experts"),
            ("n_routed_experts", json!(5), "num_experts_per_tok"),
            ("n_routed_experts", json!(1u64 << 40), "n_routed_experts"),
            ("n_routed_experts", json!("many"), "n_routed_experts"),
            ("n_shared_experts", json!(-1), "n_shared_experts"),
            ("n_shared_experts", json!(1u64 << 60), "n_shared_experts"),
            ("moe_intermediate_size", json!(0), "moe_intermediate_size"),
            ("moe_intermediate_size", Value::Null, "moe_intermediate_size"),
            ("moe_layer_freq", json!(0), "moe_layer_freq"),
            ("first_k_dense_replace", json!(-1), "first_k_dense_replace"),
            ("scoring_func", json!("sigmoid"), "scoring_func"),
            ("topk_method", json!("noaux_tc"), "topk_method"),
            ("topk_method", json!("group_limited_greedy"), "n_group"),
            ("norm_topk_prob", json!("yes"), "norm_topk_prob"),
            ("routed_scaling_factor", json!(0.0), "routed_scaling_factor"),
            ("routed_scaling_factor", json!("NaN"), "routed_scaling_factor"),
            ("num_hidden_layers", Value::Null, "num_hidden_layers"),
            ("hidden_size", Value::Null, "hidden_size"),
            ("num_key_value_heads", json!(3), "num_key_value_heads"),
            ("rope_scaling", json!({"type": "yarn", "factor": 40.0}), "rope_scaling.type"),
        ],
    );
}

#[test]
fn contradictory_groups_and_ranks_are_refused_by_field() {
    let yarn = |field: &str, value: Value| {
        let mut scaling = json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64});
        scaling[field] = value;
        scaling
    };
    check_refusals(
        "v2_full",
        &[
            ("n_group", json!(5), "n_group"),
            ("n_group", json!(0), "n_group"),
            ("n_group", json!(32), "n_group"),
            ("n_group", Value::Null, "n_group"),
            ("topk_group", json!(5), "topk_group"),
            ("topk_group", json!(0), "topk_group"),
            ("topk_group", Value::Null, "topk_group"),
            ("num_experts_per_tok", json!(9), "num_experts_per_tok"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("num_attention_heads", json!(1 << 19), "num_key_value_heads"),
            ("num_key_value_heads", json!(2), "num_key_value_heads"),
            ("q_lora_rank", json!(0), "q_lora_rank"),
            ("q_lora_rank", json!(4.5), "q_lora_rank"),
            ("kv_lora_rank", json!(0), "kv_lora_rank"),
            ("kv_lora_rank", Value::Null, "kv_lora_rank"),
            ("kv_lora_rank", json!(1 << 19), "num_attention_heads"),
            ("qk_nope_head_dim", Value::Null, "qk_nope_head_dim"),
            ("qk_rope_head_dim", json!(7), "qk_rope_head_dim"),
            ("qk_rope_head_dim", Value::Null, "qk_rope_head_dim"),
            ("v_head_dim", json!(0), "v_head_dim"),
            ("v_head_dim", json!("wide"), "v_head_dim"),
            ("rope_theta", json!(1.0), "rope_theta"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("rope_scaling", json!({"type": "dynamic", "factor": 4}), "rope_scaling.type"),
            ("rope_scaling", json!({"type": "linear"}), "rope_scaling.factor"),
            ("rope_scaling", yarn("factor", Value::Null), "rope_scaling.factor"),
            ("rope_scaling", yarn("factor", json!(-4)), "rope_scaling.factor"),
            ("rope_scaling", yarn("factor", json!("NaN")), "rope_scaling.factor"),
            ("rope_scaling", yarn("original_max_position_embeddings", Value::Null), "rope_scaling.original_max_position_embeddings"),
            ("rope_scaling", yarn("beta_fast", json!(0.5)), "rope_scaling.beta_fast"),
            ("rope_scaling", yarn("beta_slow", json!(0)), "rope_scaling.beta_slow"),
            ("rope_scaling", yarn("mscale", json!(-1)), "rope_scaling.mscale"),
            ("rope_scaling", yarn("mscale_all_dim", json!(-1)), "rope_scaling.mscale_all_dim"),
        ],
    );
    // Null means a plain q_proj, so leaving it out must mean nothing.
    for name in ["v2_full", "v2_lite"] {
        let dir = changed(name, |config| drop(config.as_object_mut().unwrap().remove("q_lora_rank")));
        let message = refusal(dir.path());
        assert!(message.contains("config.json: field q_lora_rank: missing"), "{message}");
    }
}

fn check_refusals(name: &str, rows: &[(&str, Value, &str)]) {
    for (field, value, named) in rows {
        let message = refusal(changed(name, |config| config[*field] = value.clone()).path());
        assert!(message.contains(&format!("config.json: field {named}: ")), "{name}: {field} = {value}: {message}");
    }
}

#[test]
fn fields_of_the_parts_are_named_with_their_path() {
    for (part, field, value) in [
        ("text_config", "num_attention_heads", json!(7)),
        ("vq_config", "num_patches", json!(0)),
        ("vq_config", "num_patches", Value::Null),
        ("vision_config", "patch_size", json!(0)),
    ] {
        let dir = changed("janus", |config| config[part][field] = value.clone());
        let message = refusal(dir.path());
        assert!(message.contains(&format!("{part}.{field}")), "{part}.{field} = {value}: {message}");
    }
    for part in ["text_config", "vq_config", "vision_config"] {
        let dir = changed("janus", |config| drop(config.as_object_mut().unwrap().remove(part)));
        assert!(refusal(dir.path()).contains(part));
    }
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    for (field, value, tensor) in [
        ("num_hidden_layers", 4, "model.layers.3.input_layernorm.weight"),
        ("intermediate_size", 177, "mlp.gate_proj.weight"),
        ("vocab_size", 497, "lm_head.weight"),
        ("num_key_value_heads", 2, "self_attn.k_proj.weight"),
    ] {
        let message = refusal(changed("llama", |config| config[field] = json!(value)).path());
        assert!(message.contains(tensor), "{field} = {value}: {message}");
    }
    let message = refusal(changed("janus", |config| config["vq_config"]["num_embeddings"] = json!(97)).path());
    assert!(message.contains("model.generation_embeddings.weight"), "{message}");
    for (name, field, value, tensor) in [
        ("moe_v1", "n_routed_experts", json!(17), "model.layers.1.mlp.gate.weight"),
        ("moe_v1", "moe_intermediate_size", json!(21), "model.layers.1.mlp.experts.0.gate_proj.weight"),
        ("moe_v1", "n_shared_experts", json!(3), "model.layers.1.mlp.shared_experts.gate_proj.weight"),
        ("moe_v1", "first_k_dense_replace", json!(0), "model.layers.0.mlp.gate.weight"),
        ("moe_v1", "moe_layer_freq", json!(2), "model.layers.1.mlp.gate_proj.weight"),
        ("v2_lite", "q_lora_rank", json!(8), "model.layers.0.self_attn.q_a_proj.weight"),
        ("v2_full", "q_lora_rank", Value::Null, "model.layers.0.self_attn.q_proj.weight"),
        ("v2_full", "q_lora_rank", json!(41), "model.layers.0.self_attn.q_a_proj.weight"),
        ("v2_full", "kv_lora_rank", json!(31), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        ("v2_full", "qk_nope_head_dim", json!(8), "model.layers.0.self_attn.q_b_proj.weight"),
        ("v2_full", "v_head_dim", json!(8), "model.layers.0.self_attn.kv_b_proj.weight"),
    ] {
        let message = refusal(changed(name, |config| config[field] = value.clone()).path());
        assert!(message.contains(tensor), "{name}: {field} = {value}: {message}");
    }
}

/// A header in which one tensor has its two sizes swapped.
#[test]
fn every_expert_is_looked_at() {
    for (name, tensor) in
        [("moe_v1", "model.layers.2.mlp.experts.15.down_proj.weight"), ("v2_lite", "model.layers.1.mlp.experts.7.up_proj.weight")]
    {
        let dir = changed(name, |_| ());
        let path = dir.path().join("model.safetensors");
        let file = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        header[tensor]["shape"].as_array_mut().unwrap().reverse();
        let header = serde_json::to_vec(&header).unwrap();
        fs::write(&path, [&(header.len() as u64).to_le_bytes(), &header[..], &file[8 + length..]].concat()).unwrap();
        let message = refusal(dir.path());
        assert!(message.contains(tensor) && message.contains("wrong shape"), "{message}");
    }
}

#[test]
fn a_model_with_ranks_is_of_the_second_family_whatever_its_name() {
    for name in ["v2_lite", "v2_full"] {
        let golden = support::golden::Golden::open(&fixture(name));
        let dir = changed(name, |config| {
            config["model_type"] = json!("deepseek");
            config["architectures"] = json!(["DeepseekForCausalLM"]);
        });
        let mut model = support::load(dir.path());
        let ids = golden.ids("p1.generated_ids");
        let mut sequence = support::Sequence::tokens(&golden.ids("p1.input_ids"));
        assert_eq!(support::generate(model.as_mut(), &mut sequence, 7, ids.len() - 1).0, ids);
    }
}

#[test]
fn the_compressed_cache_holds_one_narrow_row_per_position() {
    for (name, values) in [("v2_lite", 32 + 16), ("v2_full", 32 + 8), ("moe_v1", 2 * 64)] {
        let expected = layers::BLOCK_TOKENS * values * size_of::<f32>() * 3; // layers
        assert_eq!(support::load(&fixture(name)).kv_block_bytes(), expected, "{name}");
        assert_eq!(models::kv_block_bytes(&Checkpoint::open(&fixture(name)).unwrap()).unwrap(), expected, "{name}");
    }
}

#[test]
fn partial_configurations_take_the_defaults_of_the_architecture() {
    // Published multimodal configurations say little more than this; a wrong default would give wrong shapes.
    let dir = changed("janus", |config| {
        config["text_config"] =
            json!({"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102_400, "max_position_embeddings": 16_384});
    });
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let card = card(&checkpoint).unwrap();
    assert_eq!((card.hidden_size, card.vocabulary_size, card.context_length), (4096, 102_400, 16_384));
    let message = refusal(dir.path());
    assert!(message.contains("[4096]") && message.contains("input_layernorm"), "{message}");
}

#[test]
fn newer_exports_keep_the_rotary_base_elsewhere() {
    let ids = support::golden::Golden::open(&fixture("llama")).ids("p0.generated_ids");
    let prompt = support::golden::Golden::open(&fixture("llama")).ids("p0.input_ids");
    let dir = changed("llama", |config| {
        let config = config.as_object_mut().unwrap();
        config.remove("rope_scaling");
        let theta = config.remove("rope_theta").unwrap();
        config.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": theta}));
    });
    let mut model = support::load(dir.path());
    let (generated, _) = support::generate(model.as_mut(), &mut support::Sequence::tokens(&prompt), 7, ids.len() - 1);
    assert_eq!(generated, ids);
}

#[test]
fn cards_say_what_the_files_say() {
    let card_of = |dir: &Path| card(&Checkpoint::open(dir).unwrap()).unwrap();
    let llama = card_of(&fixture("llama"));
    assert_eq!((llama.family.as_str(), llama.context_length, llama.vocabulary_size, llama.hidden_size), ("llama", 4096, 496, 64));
    assert_eq!((llama.canvas, llama.tokens_per_image), (None, None));
    assert_eq!((llama.default_sampling.temperature, llama.default_sampling.top_p, llama.default_sampling.top_k), (0.7, 0.95, 0));

    let janus = card_of(&fixture("janus"));
    assert_eq!(janus.code_grid(), Some(CodeGrid { rows: 6, columns: 6, codebook_size: 96 }));
    assert_eq!(janus.tokens_per_image, Some(36));
    assert_eq!((janus.default_image_sampling.guidance, janus.default_image_sampling.temperature), (5.0, 1.0));

    let original = tempfile::tempdir().unwrap();
    support::writer::janus_original(&fixture("janus"), original.path());
    let original = card_of(original.path());
    assert_eq!((original.canvas, original.tokens_per_image), (janus.canvas, janus.tokens_per_image));
}

#[test]
fn sampling_defaults_are_read_or_refused() {
    let dir = changed("llama", |_| ());
    let file = dir.path().join("generation_config.json");
    let sampling = |written: Value| {
        fs::write(&file, written.to_string()).unwrap();
        card(&Checkpoint::open(dir.path()).unwrap()).map(|card| card.default_sampling)
    };
    assert_eq!(sampling(json!({"do_sample": false, "temperature": 0.7})).unwrap().temperature, 0.0);
    assert_eq!(sampling(json!({"temperature": 0.7})).unwrap().temperature, 0.0);
    assert_eq!(sampling(json!({"do_sample": true})).unwrap().temperature, 1.0);
    let all = sampling(json!({"do_sample": true, "temperature": 0.3, "top_p": null, "top_k": 50, "repetition_penalty": 1.1})).unwrap();
    assert_eq!((all.temperature, all.top_p, all.top_k, all.repetition_penalty), (0.3, 1.0, 50, 1.1));
    for (field, value) in [("temperature", json!(-1)), ("top_p", json!(1.5)), ("top_k", json!("many")), ("temperature", json!(1e300))] {
        let message = sampling(json!({ field: value })).unwrap_err().to_string();
        assert!(message.contains("generation_config.json") && message.contains(field), "{message}");
    }
    fs::remove_file(&file).unwrap();
    assert_eq!(card(&Checkpoint::open(dir.path()).unwrap()).unwrap().default_sampling.temperature, 0.0);
}

#[test]
fn steps_out_of_range_are_refused_and_leave_the_model_as_it_was() {
    let mut model = support::load(&fixture("llama"));
    let mut forward = |rows: Vec<RowInput>, blocks: Vec<u32>| {
        let slices = vec![Slice { rows: 0..rows.len(), start: 0, shift: 0, blocks, head: None, may_lose_experts: false }];
        model.forward(&Step { rows, slices }, &mut NoObserver)
    };
    for (rows, blocks) in [(vec![RowInput::Token(496)], vec![0]), (vec![RowInput::Code(0)], vec![0]), (vec![RowInput::Token(0)], vec![64])]
    {
        let error = forward(rows, blocks).unwrap_err();
        assert!(matches!(error, EngineError::Step(_)), "{error}");
    }
    assert!(forward(vec![RowInput::Token(0)], vec![0]).is_ok());
}

/// Weights that are not numbers are found when the checkpoint is scanned; if that was left out, at the latest in the logits.
#[test]
fn logits_that_are_not_finite_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    });
    support::writer::llama(dir.path(), &config, support::writer::Stored::F32, 3);
    let path = dir.path().join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let length = file.len();
    file[length - 4..].copy_from_slice(&f32::NAN.to_le_bytes()); // the last tensor by name: model.norm.weight
    fs::write(&path, file).unwrap();
    let mut model = support::load(dir.path());
    let slices = vec![Slice { rows: 0..1, start: 0, shift: 0, blocks: vec![0], head: Some(layers::Head::Text), may_lose_experts: false }];
    let error = model.forward(&Step { rows: vec![RowInput::Token(0)], slices }, &mut NoObserver).unwrap_err();
    assert!(matches!(&error, EngineError::Compute(reason) if reason.contains("logits")), "{error}");
}

#[test]
fn a_cache_of_no_blocks_or_beyond_memory_is_refused() {
    // Heads so wide that the largest cache has a petabyte: more than addresses can name, whatever the system promises.
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 64,
        "num_key_value_heads": 64, "head_dim": 64, "vocab_size": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    });
    support::writer::llama(dir.path(), &config, support::writer::Stored::F32, 3);
    let checkpoint = std::sync::Arc::new(Checkpoint::open(dir.path()).unwrap());
    for kv_blocks in [0, usize::MAX, u32::MAX as usize] {
        let error = load_language(&checkpoint, &LoadOptions { kv_blocks, threads: 1 }).err().expect("not refused");
        assert!(matches!(&error, EngineError::Compute(reason) if reason.contains("KV cache")), "{error}");
    }
    assert!(load_language(&checkpoint, &OPTIONS).is_ok());
}
