//! The pixels' side at sizes that no fixture has, in both layouts of tensors, against sums written out by hand; and broken checkpoints.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use models::{OnnxOptions, load_vision, load_vq};
use serde_json::{Value, json};
use support::writer::{Random, Stored, write};
use support::{
    assert_close, fixture,
    golden::Golden,
    naive_pixels,
    original::{Raw, random_weights},
};

const OPTIONS: OnnxOptions = OnnxOptions { threads: 2 };

fn open(dir: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

/// The tensors of the Janus fixture.
fn fixture_tensors() -> Raw {
    let file = fs::read(fixture("janus").join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), (Stored::BF16, view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn fixture_config() -> Value {
    serde_json::from_slice(&fs::read(fixture("janus").join("config.json")).unwrap()).unwrap()
}

/// The same with the names of the published repositories: q, k and v in one tensor, other words for the rest.
fn original_tensors() -> Raw {
    let port = fixture_tensors();
    let mut raw = Raw::new();
    for (name, tensor) in &port {
        let renamed = name
            .replace("model.vision_model.embeddings.patch_embedding.", "vision_model.vision_tower.patch_embed.proj.")
            .replace("model.vision_model.embeddings.position_embedding.weight", "vision_model.vision_tower.pos_embed")
            .replace("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks.")
            .replace("model.vision_model.post_layernorm.", "vision_model.vision_tower.norm.")
            .replace(".layer_norm", ".norm")
            .replace(".self_attn.projection_layer.", ".attn.proj.")
            .replace("model.aligner.fc1.", "aligner.layers.0.")
            .replace("model.aligner.hidden_layers.0.", "aligner.layers.2.")
            .replace("model.vqmodel.decoder.mid.block_1.", "gen_vision_model.decoder.mid.0.")
            .replace("model.vqmodel.decoder.mid.attn_1.", "gen_vision_model.decoder.mid.1.")
            .replace("model.vqmodel.decoder.mid.block_2.", "gen_vision_model.decoder.mid.2.")
            .replace("model.vqmodel.", "gen_vision_model.")
            .replace("decoder.up.", "decoder.conv_blocks.")
            .replace(".block.", ".res.");
        let mut tensor = tensor.clone();
        if renamed.ends_with("pos_embed") {
            tensor.1.insert(0, 1);
        }
        if let Some((root, part)) = renamed.split_once(".self_attn.q_proj.") {
            for other in ["k_proj", "v_proj"] {
                tensor.2.extend(&port[&name.replace("q_proj", other)].2);
            }
            tensor.1[0] *= 3;
            raw.insert(format!("{root}.attn.qkv.{part}"), tensor);
        } else if !renamed.contains("_proj.") {
            raw.insert(renamed, tensor);
        }
    }
    raw
}

/// Configuration in the published form; `image_size` decides both what the tower takes and how large the code map is.
fn original_config(image_size: usize) -> Value {
    let tower = json!({
        "image_size": image_size, "model_name": "tiny", "select_feature": "same", "select_layer": -1,
        "width": 48, "layers": 3, "heads": 4, "patch_size": 8, "mlp_ratio": 4
    });
    let vq = json!({"image_token_size": 96, "n_embed": 8, "z_channels": 16, "ch": 32, "decoder_ch_mult": [2, 1], "num_res_blocks": 1});
    json!({
        "model_type": "multi_modality",
        "vision_config": {"cls": "CLIPVisionTower", "params": tower},
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "input_dim": 48, "n_embed": 64, "projector_type": "mlp_gelu"}},
        "gen_vision_config": {"cls": "VQ-16", "params": vq},
    })
}

#[test]
fn the_published_layout_gives_the_same_numbers() {
    let golden = Golden::open(&fixture("janus"));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &original_tensors(), &original_config(48));
    let encoder = load_vision(&open(dir.path()), &OPTIONS).unwrap().unwrap();
    let features = encoder.encode(&golden.values("p0.pixel_values")).unwrap();
    assert_close("image_features", &features, &golden.values("p0.image_features"), 5e-5);
    let probes = encoder.probe(&golden.values("p0.pixel_values")).unwrap();
    let (_, shape, values) = probes.iter().find(|probe| probe.0 == "vision.hidden.layer1").unwrap();
    assert_eq!(shape, &[36, 48]);
    assert_close("layer1", values, &golden.values("p0.vision.hidden.layer1"), 5e-5);
    assert!(probes.iter().any(|probe| probe.0 == "vision.hidden.final_norm" && probe.1 == [36, 48]));

    write(dir.path(), &original_tensors(), &original_config(12));
    let decoder = load_vq(&open(dir.path()), &OPTIONS).unwrap().unwrap();
    assert_eq!((decoder.grid().rows, decoder.image_size()), (6, (12, 12)));
    assert_close("pixels", &decoder.decode(&golden.ids("vq.ids")).unwrap(), &golden.values("vq.pixels"), 5e-5);
}

/// -1 all blocks, -2 all but the last; a tower that normalises takes pixels in 0..=1.
#[test]
fn feature_selection_and_the_towers_own_normalisation() {
    let golden = Golden::open(&fixture("janus"));
    let pixels = golden.values("p0.pixel_values");
    let dir = tempfile::tempdir().unwrap();
    let mut config = original_config(48);
    config["vision_config"]["params"]["select_layer"] = json!(-2);
    config["vision_config"]["params"]["pixel_mean"] = json!([0.5, 0.5, 0.5]);
    config["vision_config"]["params"]["pixel_std"] = json!([0.5, 0.5, 0.5]);
    write(dir.path(), &original_tensors(), &config);
    let encoder = load_vision(&open(dir.path()), &OPTIONS).unwrap().unwrap();
    let raw: Vec<f32> = pixels.iter().map(|value| value * 0.5 + 0.5).collect();
    let probes = encoder.probe(&raw).unwrap();
    let names: Vec<&str> = probes.iter().map(|probe| probe.0.as_str()).collect();
    let expected = ["embed", "layer0", "layer1", "final_norm"].map(|name| format!("vision.hidden.{name}"));
    assert_eq!(names[..4], expected.each_ref().map(String::as_str));
    assert_close("layer1", &probes[2].2, &golden.values("p0.vision.hidden.layer1"), 5e-5);
}

#[test]
fn a_tower_of_odd_sizes() {
    let sizes = naive_pixels::Tower {
        image: 30,
        patch: 7,
        hidden: 60,
        inner: 90,
        layers: 2,
        heads: 5,
        width: 44,
        depth: 3,
        epsilon: 1e-3,
        names: naive_pixels::JANUS,
    };
    let (raw, plain) = random_weights(&sizes.shapes_with_aligner(), 11);
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "janus", "vision_config": {
        "image_size": 30, "patch_size": 7, "hidden_size": 60, "mlp_ratio": 1.5, "num_hidden_layers": 2, "num_attention_heads": 5,
        "projection_dim": 44, "depth": 3, "layer_norm_eps": 1e-3, "hidden_act": "gelu"
    }});
    write(dir.path(), &raw, &config);
    let encoder = load_vision(&open(dir.path()), &OPTIONS).unwrap().unwrap();
    assert_eq!((encoder.tokens_per_image(), encoder.width()), (16, 44));
    let mut random = Random(5);
    let pixels: Vec<f32> = (0..3 * 30 * 30).map(|_| (1.7 * random.uniform()) as f32).collect();
    assert_close("features", &encoder.encode(&pixels).unwrap(), &sizes.run(&plain, &pixels), 2e-5);
}

#[test]
fn a_decoder_of_odd_sizes() {
    let sizes = naive_pixels::Vq { side: 3, codebook: 40, code: 5, latent: 7, levels: vec![64, 96, 32], blocks: 3 };
    let (raw, plain) = random_weights(&sizes.shapes(), 12);
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "janus", "vq_config": {
        "num_patches": 3, "num_embeddings": 40, "embed_dim": 5, "latent_channels": 7, "base_channels": 32,
        "channel_multiplier": [1, 3, 2], "num_res_blocks": 2
    }});
    write(dir.path(), &raw, &config);
    let decoder = load_vq(&open(dir.path()), &OPTIONS).unwrap().unwrap();
    assert_eq!(decoder.image_size(), (12, 12));
    let codes = [0, 39, 7, 7, 21, 3, 12, 30, 1];
    assert_close("pixels", &decoder.decode(&codes).unwrap(), &sizes.run(&plain, &codes), 2e-5);
}

/// What is wrong with a checkpoint is said in one line that names the tensor or the field.
#[test]
fn broken_checkpoints_are_refused() {
    type Change = fn(&mut Raw, &mut Value);
    let patch = "model.vision_model.embeddings.patch_embedding.weight";
    let rows: [(&str, Change); 11] = [
        ("missing tensor model.vision_model.post_layernorm.bias", |raw, _| drop(raw.remove("model.vision_model.post_layernorm.bias"))),
        ("tensor model.vision_model.embeddings.patch_embedding.weight: wrong shape", |_, config| {
            config["vision_config"]["patch_size"] = json!(4)
        }),
        ("tensor model.vqmodel.post_quant_conv.weight: wrong shape", |_, config| config["vq_config"]["latent_channels"] = json!(17)),
        ("missing tensor model.vqmodel.decoder.up.0.block.2.norm1.weight", |_, config| config["vq_config"]["num_res_blocks"] = json!(2)),
        ("field vision_config.hidden_act", |_, config| config["vision_config"]["hidden_act"] = json!("relu")),
        ("field vision_config.use_qk_norm", |_, config| config["vision_config"]["use_qk_norm"] = json!(true)),
        ("field vision_config.hidden_size", |_, config| config["vision_config"]["num_attention_heads"] = json!(5)),
        ("field vision_config.image_size", |_, config| config["vision_config"]["image_size"] = json!(0)),
        ("field vq_config.channel_multiplier", |_, config| config["vq_config"]["base_channels"] = json!(20)),
        ("field vq_config.channel_multiplier", |_, config| config["vq_config"]["channel_multiplier"] = json!([])),
        ("field vq_config.num_embeddings", |_, config| config["vq_config"]["num_embeddings"] = json!("many")),
    ];
    assert!(fixture_tensors().contains_key(patch));
    for (expected, change) in rows {
        let dir = tempfile::tempdir().unwrap();
        let (mut raw, mut config) = (fixture_tensors(), fixture_config());
        change(&mut raw, &mut config);
        write(dir.path(), &raw, &config);
        let checkpoint = open(dir.path());
        let error = [load_vision(&checkpoint, &OPTIONS).err(), load_vq(&checkpoint, &OPTIONS).err()].into_iter().flatten().next();
        let error = error.unwrap_or_else(|| panic!("nothing refused: {expected}")).to_string();
        assert!(error.contains(expected) && error.lines().count() == 1, "{error}\nshould name: {expected}");
    }
}
