//! DeepSeek-VL's towers at sizes that no fixture has and in the published layout, against sums written out by hand; and broken checkpoints.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use models::{LoadOptions, OnnxOptions, Planes, VisionEncoder, card, load_language, load_vision};
use serde_json::{Value, json};
use support::naive_pixels::{self, Tower};
use support::naive_sam::{self, Sam};
use support::original::{self, Raw, random_weights};
use support::writer::{Random, write};
use support::{KV_BLOCKS, assert_close, fixture, golden::Golden};

const OPTIONS: OnnxOptions = OnnxOptions { threads: 2 };
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

fn open(dir: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn encoder(dir: &Path) -> VisionEncoder {
    load_vision(&open(dir), &OPTIONS).unwrap().unwrap()
}

/// What a tower that normalises turns into these pixels: levels in 0..=1.
fn levels(pixels: &[f32], side: usize) -> Vec<f32> {
    let plane = side * side;
    pixels.iter().enumerate().map(|(i, value)| value * DEVIATION[i / plane % 3] + MEAN[i / plane % 3]).collect()
}

/// A picture as a processor that normalises has it.
fn normalised(levels: &[f64]) -> Vec<f32> {
    let plane = levels.len() / 3;
    let value = |(i, level): (usize, &f64)| (*level as f32 - MEAN[i / plane]) / DEVIATION[i / plane];
    levels.iter().enumerate().map(value).collect()
}

fn pixels(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..count).map(|_| (1.7 * random.uniform()) as f32).collect()
}

/// Sizes of a hybrid model, with the configuration that says so.
fn hybrid(sam: &Sam, tower: &Tower, text: usize) -> Value {
    json!({
        "model_type": "deepseek_vl_hybrid",
        "text_config": {"hidden_size": text, "num_attention_heads": 1},
        "vision_config": {
            "image_size": tower.image, "patch_size": tower.patch, "hidden_size": tower.hidden, "intermediate_size": tower.inner,
            "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads, "hidden_act": "gelu",
        },
        "high_res_vision_config": {
            "image_size": sam.image, "patch_size": sam.patch, "hidden_size": sam.hidden, "mlp_dim": sam.inner,
            "num_hidden_layers": sam.layers, "num_attention_heads": sam.heads, "window_size": sam.window,
            "global_attn_indexes": sam.global, "output_channels": sam.channels,
        },
    })
}

/// Windows that stick out of the map, exactly fit it, or are larger than it; maps that grow and shrink on their way to the other tower's grid.
#[test]
fn towers_of_odd_sizes() {
    let sizes = [
        // (image, patch, window, global, side of the other tower)
        (37, 5, 3, vec![1, 2], 3),
        (24, 4, 3, vec![3, 0], 2),
        (20, 5, 7, vec![2], 1),
        (63, 7, 4, vec![0, 1, 2, 3], 1),
        (18, 6, 1, vec![1], 5),
    ];
    for (seed, (image, patch, window, global, side)) in sizes.into_iter().enumerate() {
        let sam = Sam { image, patch, hidden: 15, inner: 22, layers: 4, heads: 3, window, global, channels: 5, side };
        let tower = Tower {
            image: side * 6 + 5,
            patch: 6,
            hidden: 20,
            inner: 33,
            layers: 1,
            heads: 5,
            width: 0,
            depth: 0,
            epsilon: 1e-6,
            names: naive_pixels::DEEPSEEK_VL,
        };
        let text = 14;
        let mut shapes = [sam.shapes(), tower.shapes()].concat();
        for (name, output, input) in [("high_res_vision_proj", text / 2, 20), ("vision_proj", text / 2, 20), ("proj", text, text)] {
            naive_pixels::pair(&mut shapes, format!("model.aligner.{name}"), &[output, input]);
        }
        let (raw, plain) = random_weights(&shapes, 31 + seed as u64);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &raw, &hybrid(&sam, &tower, text));
        let encoder = encoder(dir.path());
        assert_eq!((encoder.tokens_per_image(), encoder.image_size(), encoder.high_res_size()), (side * side, side * 6 + 5, Some(image)));
        let (high, low) = (pixels(2 * 3 * image * image, 7), pixels(2 * 3 * tower.image * tower.image, 8));
        let found = encoder.encode(Planes { main: &low, high_res: Some(&high) }).unwrap();
        let mut expected = Vec::new();
        for (high, low) in high.chunks(3 * image * image).zip(low.chunks(3 * tower.image * tower.image)) {
            let (high, low) = (sam.run(&plain, high), tower.tokens(&plain, low));
            expected.extend(naive_sam::align(&plain, &high, 20, &low, 20, text));
        }
        assert_close(&format!("image {image}, window {window}"), &found, &expected, 3e-5);
    }
}

/// Files written by newer versions of the library have one level less in their names.
#[test]
fn both_forms_of_the_towers_name_are_taken() {
    for name in ["deepseek_vl", "deepseek_vl_hybrid"] {
        let shorter = |name: String| name.replace("model.vision_model.vision_model.", "model.vision_model.");
        let raw: Raw = original::raw(&fixture(name)).into_iter().map(|(name, tensor)| (shorter(name), tensor)).collect();
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &raw, &config(name));
        let golden = Golden::open(&fixture(name));
        let high = (name == "deepseek_vl_hybrid").then(|| golden.values("p0.high_res_pixel_values"));
        let planes = Planes { main: &golden.values("p0.pixel_values"), high_res: high.as_deref() };
        assert_close(name, &encoder(dir.path()).encode(planes).unwrap(), &golden.values("p0.image_features"), 1e-4);
    }
}

fn config(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap()
}

#[test]
fn the_published_layout_of_one_tower_gives_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    original::deepseek_vl(&fixture("deepseek_vl"), dir.path());
    let (encoder, golden) = (encoder(dir.path()), Golden::open(&fixture("deepseek_vl")));
    assert_eq!((encoder.tokens_per_image(), encoder.image_size(), encoder.high_res_size()), (36, 48, None));
    // The tower normalises by itself.
    let levels = levels(&golden.values("p1.pixel_values"), 48);
    assert_close("features", &encoder.encode(&levels).unwrap(), &golden.values("p1.image_features"), 5e-5);
}

/// The published model takes one picture, for the high-resolution tower, and shrinks it for the other one.
#[test]
fn the_published_layout_of_two_towers_gives_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    original::deepseek_vl(&fixture("deepseek_vl_hybrid"), dir.path());
    let (published, golden) = (encoder(dir.path()), Golden::open(&fixture("deepseek_vl_hybrid")));
    assert_eq!((published.tokens_per_image(), published.image_size(), published.high_res_size()), (36, 96, None));
    let high = golden.values("p0.high_res_pixel_values");
    let levels = levels(&high, 96);
    let probes = published.probe(&levels).unwrap();
    let sam: Vec<_> = probes.iter().filter(|probe| probe.0.starts_with("sam.")).collect();
    assert_eq!(sam.len(), golden.names("p0.sam.").len());
    for (name, _, values) in sam {
        assert_close(name, values, &golden.values(&format!("p0.{name}")), 2e-4);
    }
    let exact: Vec<f64> = levels.iter().map(|level| f64::from(*level)).collect();
    let low = normalised(&naive_sam::resize(&exact, 96, 48, true));
    let expected = encoder(&fixture("deepseek_vl_hybrid")).encode(Planes { main: &low, high_res: Some(&high) }).unwrap();
    assert_close("features", &published.encode(&levels).unwrap(), &expected, 5e-5);
}

/// Every weight of both towers, and whether the model shrinks the picture, decide what a cached result is worth.
#[test]
fn both_towers_decide_the_fingerprint() {
    let source = fixture("deepseek_vl_hybrid");
    let print = |change: fn(&mut Raw), config: &Value, raw: Raw| {
        let (dir, mut raw) = (tempfile::tempdir().unwrap(), raw);
        change(&mut raw);
        write(dir.path(), &raw, config);
        encoder(dir.path()).fingerprint()
    };
    let port = config("deepseek_vl_hybrid");
    let plain = print(|_| (), &port, original::raw(&source));
    let changes: [fn(&mut Raw); 3] = [
        |raw| raw.get_mut("model.high_res_vision_alpha").unwrap().2[1] ^= 1,
        |raw| raw.get_mut("model.high_res_vision_model.vision_encoder.layers.1.attn.rel_pos_w").unwrap().2[0] ^= 1,
        |raw| raw.get_mut("model.aligner.vision_proj.bias").unwrap().2[0] ^= 1,
    ];
    for change in changes {
        assert_ne!(print(change, &port, original::raw(&source)), plain);
    }
    let mut published = original::config(&source);
    let print = |config: &Value| print(|_| (), config, original::tensors(&source));
    let before = print(&published);
    published["vision_config"]["params"]["low_res_cfg"]["pixel_mean"] = json!([0.5, 0.5, 0.5]);
    assert_ne!(print(&published), before);
}

#[test]
fn cards_count_the_positions_of_a_picture() {
    for name in ["deepseek_vl", "deepseek_vl_hybrid"] {
        let dir = tempfile::tempdir().unwrap();
        original::deepseek_vl(&fixture(name), dir.path());
        let (port, published) = (card(&open(&fixture(name))).unwrap(), card(&open(dir.path())).unwrap());
        assert_eq!((port.family.as_str(), port.tokens_per_image, port.code_grid), (name, Some(36), None));
        assert_eq!((published.family.as_str(), published.tokens_per_image, published.code_grid), ("multi_modality", Some(36), None));
        assert_eq!((port.hidden_size, port.vocabulary_size, port.context_length), (64, 496, 16_384));
        assert_eq!((published.hidden_size, published.vocabulary_size, published.context_length), (64, 496, 16_384));
    }
}

/// The published configuration of the 7B model says little about its language model; the rest are the defaults of the architecture.
#[test]
fn partial_language_configurations_are_completed() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = original::config(&fixture("deepseek_vl_hybrid"));
    config["language_config"] =
        json!({"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102_400, "max_position_embeddings": 16_384});
    config["aligner_config"]["params"]["n_embed"] = json!(4096);
    write(dir.path(), &original::tensors(&fixture("deepseek_vl_hybrid")), &config);
    let card = card(&open(dir.path())).unwrap();
    assert_eq!((card.hidden_size, card.vocabulary_size, card.context_length), (4096, 102_400, 16_384));
}

type Change = fn(&mut Raw, &mut Value);

/// What loading the towers, or else the language model, of a changed checkpoint says.
fn refusal(mut raw: Raw, mut config: Value, change: Change) -> String {
    let dir = tempfile::tempdir().unwrap();
    change(&mut raw, &mut config);
    write(dir.path(), &raw, &config);
    let checkpoint = open(dir.path());
    let language = || load_language(&checkpoint, &LoadOptions { kv_blocks: KV_BLOCKS, threads: 1 }).err();
    let message = load_vision(&checkpoint, &OPTIONS).err().or_else(language).expect("not refused").to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

#[test]
fn broken_checkpoints_of_the_ports_are_refused() {
    const GLOBAL: &str = "model.high_res_vision_model.vision_encoder.layers.1.attn.rel_pos_w";
    let rows: [(&str, Change); 22] = [
        ("missing tensor model.high_res_vision_alpha", |raw, _| drop(raw.remove("model.high_res_vision_alpha"))),
        ("missing tensor model.aligner.vision_proj.bias", |raw, _| drop(raw.remove("model.aligner.vision_proj.bias"))),
        ("missing tensor model.high_res_vision_neck.conv2.weight", |raw, _| drop(raw.remove("model.high_res_vision_neck.conv2.weight"))),
        ("missing tensor lm_head.weight", |raw, _| drop(raw.remove("lm_head.weight"))),
        ("rel_pos_h: wrong shape: [9, 8] expected, [7, 8] found", |_, config| config["high_res_vision_config"]["window_size"] = json!(5)),
        ("rel_pos_w: wrong shape: [11, 8] expected, [9, 8] found", |raw, _| {
            let table = raw.get_mut(GLOBAL).unwrap();
            table.1[0] = 9;
            table.2.truncate(9 * 8 * 2);
        }),
        ("layers.0.attn.rel_pos_h: wrong shape: [11, 8]", |_, config| {
            config["high_res_vision_config"]["global_attn_indexes"] = json!([0, 1, 3])
        }),
        ("pos_embed: wrong shape: [1, 4, 4, 32] expected, [1, 6, 6, 32] found", |_, config| {
            config["high_res_vision_config"]["image_size"] = json!(64)
        }),
        ("position_embedding.weight: wrong shape: [49, 48]", |_, config| config["vision_config"]["image_size"] = json!(56)),
        ("neck.conv1.weight: wrong shape", |_, config| config["high_res_vision_config"]["output_channels"] = json!(8)),
        ("field high_res_vision_config.global_attn_indexes: 4 is not one of 4 layers", |_, config| {
            config["high_res_vision_config"]["global_attn_indexes"] = json!([1, 4])
        }),
        ("field high_res_vision_config.global_attn_indexes: empty", |_, config| {
            config["high_res_vision_config"]["global_attn_indexes"] = json!([])
        }),
        ("field high_res_vision_config.hidden_size: 32 is not a multiple of 5 heads", |_, config| {
            config["high_res_vision_config"]["num_attention_heads"] = json!(5)
        }),
        ("field high_res_vision_config.window_size", |_, config| config["high_res_vision_config"]["window_size"] = json!(0)),
        ("field high_res_vision_config.use_rel_pos", |_, config| config["high_res_vision_config"]["use_rel_pos"] = json!(false)),
        ("field high_res_vision_config.hidden_act", |_, config| config["high_res_vision_config"]["hidden_act"] = json!("relu")),
        ("field high_res_vision_config.image_size", |_, config| config["high_res_vision_config"]["image_size"] = json!(8)),
        ("field high_res_vision_config.num_channels", |_, config| config["high_res_vision_config"]["num_channels"] = json!(1)),
        ("field high_res_vision_config: missing", |_, config| drop(config.as_object_mut().unwrap().remove("high_res_vision_config"))),
        ("field vision_config: missing", |_, config| drop(config.as_object_mut().unwrap().remove("vision_config"))),
        ("field vision_config.hidden_size: 48 is not a multiple of 5 heads", |_, config| {
            config["vision_config"]["num_attention_heads"] = json!(5)
        }),
        ("field text_config.hidden_size: 65 is odd", |_, config| {
            config["text_config"]["hidden_size"] = json!(65);
            config["text_config"]["head_dim"] = json!(16);
        }),
    ];
    for (expected, change) in rows {
        let message = refusal(original::raw(&fixture("deepseek_vl_hybrid")), config("deepseek_vl_hybrid"), change);
        assert!(message.contains(expected), "{message}\nshould name: {expected}");
    }
}

#[test]
fn broken_checkpoints_of_the_published_layout_are_refused() {
    let rows: [(&str, Change); 16] = [
        ("field vision_config.cls: \"SAMTower\" is not supported", |_, config| config["vision_config"]["cls"] = json!("SAMTower")),
        ("field vision_config.cls: missing", |_, config| drop(config["vision_config"].as_object_mut().unwrap().remove("cls"))),
        ("field aligner_config.params.projector_type: \"linear\" is not supported", |_, config| {
            config["aligner_config"]["params"]["projector_type"] = json!("linear")
        }),
        ("field aligner_config.params.projector_type: \"mlp_gelu\" is not supported for this tower", |_, config| {
            config["aligner_config"]["params"]["projector_type"] = json!("mlp_gelu")
        }),
        ("field aligner_config.params.projector_type: missing", |_, config| {
            drop(config["aligner_config"]["params"].as_object_mut().unwrap().remove("projector_type"))
        }),
        ("field vision_config.params.concat_type: \"add\"", |_, config| config["vision_config"]["params"]["concat_type"] = json!("add")),
        ("field vision_config.params.high_res_cfg: missing", |_, config| {
            drop(config["vision_config"]["params"].as_object_mut().unwrap().remove("high_res_cfg"))
        }),
        ("field vision_config.params.low_res_cfg: missing", |_, config| {
            drop(config["vision_config"]["params"].as_object_mut().unwrap().remove("low_res_cfg"))
        }),
        ("field vision_config.params.high_res_cfg.model_name: Some(\"sam_h\") is not known", |_, config| {
            config["vision_config"]["params"]["high_res_cfg"] = json!({"model_name": "sam_h", "image_size": 96})
        }),
        ("field vision_config.params.high_res_cfg.width: 32 is not a multiple of 3 heads", |_, config| {
            config["vision_config"]["params"]["high_res_cfg"]["heads"] = json!(3)
        }),
        ("field vision_config.params.high_res_cfg.pixel_std", |_, config| {
            config["vision_config"]["params"]["high_res_cfg"]["pixel_std"] = json!([0.5, 0.0, 0.5])
        }),
        ("field vision_config.params.low_res_cfg.width", |_, config| config["vision_config"]["params"]["low_res_cfg"]["heads"] = json!(7)),
        ("field aligner_config.params.n_embed: pictures become rows of 64", |_, config| {
            config["language_config"]["hidden_size"] = json!(128)
        }),
        ("missing tensor vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples", |raw, _| {
            drop(raw.remove("vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples"))
        }),
        ("missing tensor language_model.model.norm.weight", |raw, _| drop(raw.remove("language_model.model.norm.weight"))),
        ("blocks.1.attn.qkv.weight: wrong shape", |raw, _| {
            raw.get_mut("vision_model.vision_tower_low.vision_tower.blocks.1.attn.qkv.weight").unwrap().1.reverse()
        }),
    ];
    let source = fixture("deepseek_vl_hybrid");
    for (expected, change) in rows {
        let message = refusal(original::tensors(&source), original::config(&source), change);
        assert!(message.contains(expected), "{message}\nshould name: {expected}");
    }
}
