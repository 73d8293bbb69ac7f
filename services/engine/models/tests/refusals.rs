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
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
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
        let slices = vec![Slice { rows: 0..rows.len(), start: 0, shift: 0, blocks, head: None }];
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
    let slices = vec![Slice { rows: 0..1, start: 0, shift: 0, blocks: vec![0], head: Some(layers::Head::Text) }];
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
