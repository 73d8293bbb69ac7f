//! The DeepSeek-VL fixtures as the published repositories lay such models out: other names, q, k and v in one tensor, another configuration.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::{
    naive_pixels::Tensors,
    writer::{Random, Stored, write},
};

/// A tensor as it lies in a file.
pub type Raw = BTreeMap<String, (Stored, Vec<usize>, Vec<u8>)>;

/// Writes the fixture `source` (`deepseek_vl` or `deepseek_vl_hybrid`) to `dir`.
pub fn deepseek_vl(source: &Path, dir: &Path) {
    write(dir, &tensors(source), &config(source));
    for file in ["generation_config.json", "tokenizer.json"] {
        fs::copy(source.join(file), dir.join(file)).unwrap();
    }
    fs::write(dir.join("tokenizer_config.json"), without_template(source).to_string()).unwrap();
    fs::write(dir.join("preprocessor_config.json"), preprocessor(source).to_string()).unwrap();
}

/// The tensors of a fixture under their own names.
pub fn raw(source: &Path) -> Raw {
    let file = fs::read(source.join("model.safetensors")).unwrap();
    let stored = |dtype| match dtype {
        Dtype::F16 => Stored::F16,
        Dtype::BF16 => Stored::BF16,
        other => panic!("a fixture with {other:?}"),
    };
    let tensors = SafeTensors::deserialize(&file).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), (stored(view.dtype()), view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// The tensors of a fixture under the published names.
pub fn tensors(source: &Path) -> Raw {
    let port = raw(source);
    let hybrid = port.contains_key("model.high_res_vision_alpha");
    let mut renamed = Raw::new();
    for (name, tensor) in port.iter().filter(|(name, _)| !name.contains(".vision_model.head.")) {
        let mut tensor = tensor.clone();
        if let Some((root, part)) = name.split_once(".self_attn.q_proj.").filter(|_| name.contains("vision_model")) {
            for other in ["k_proj", "v_proj"] {
                tensor.2.extend(&port[&name.replace("q_proj", other)].2);
            }
            tensor.1[0] *= 3;
            renamed.insert(published(&format!("{root}.attn.qkv.{part}"), hybrid), tensor);
        } else if !name.contains("vision_model.encoder.layers.") || !(name.contains(".k_proj.") || name.contains(".v_proj.")) {
            if name.ends_with("position_embedding.weight") {
                tensor.1.insert(0, 1);
            }
            renamed.insert(published(name, hybrid), tensor);
        }
    }
    renamed
}

fn published(name: &str, hybrid: bool) -> String {
    let low = if hybrid { "vision_model.vision_tower_low.vision_tower." } else { "vision_model.vision_tower." };
    let high = "vision_model.vision_tower_high.vision_tower.";
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("language_model.model.{rest}");
    }
    let neck = |rest: &str| {
        rest.replace("conv1.", "0.").replace("layer_norm1.", "1.").replace("conv2.", "2.").replace("layer_norm2.", "3.") // Sequential
    };
    if let Some(rest) = name.strip_prefix("model.vision_model.vision_model.") {
        let rest = rest
            .replace("embeddings.patch_embedding.", "patch_embed.proj.")
            .replace("embeddings.position_embedding.weight", "pos_embed")
            .replace("encoder.layers.", "blocks.")
            .replace("post_layernorm.", "norm.")
            .replace(".layer_norm", ".norm")
            .replace(".self_attn.out_proj.", ".attn.proj.");
        return format!("{low}{rest}");
    }
    if let Some(rest) = name.strip_prefix("model.high_res_vision_model.vision_encoder.") {
        return match rest.strip_prefix("neck.") {
            Some(rest) => format!("{high}neck.{}", neck(rest)),
            None => format!(
                "{high}{}",
                rest.replace("patch_embed.projection.", "patch_embed.proj.").replace("layers.", "blocks.").replace("layer_norm", "norm")
            ),
        };
    }
    if let Some(rest) = name.strip_prefix("model.high_res_vision_neck.") {
        return format!("{high}neck_hd.{}", neck(rest));
    }
    let rows = [
        ("model.high_res_vision_proj.conv1.", format!("{high}downsamples.0.")),
        ("model.high_res_vision_proj.conv2.", format!("{high}downsamples.1.")),
        ("model.high_res_vision_alpha", format!("{high}hd_alpha_downsamples")),
        ("model.aligner.linear1.", "aligner.layers.0.".to_owned()),
        ("model.aligner.linear2.", "aligner.layers.2.".to_owned()),
        ("model.aligner.high_res_vision_proj.", "aligner.high_up_proj.".to_owned()),
        ("model.aligner.vision_proj.", "aligner.low_up_proj.".to_owned()),
        ("model.aligner.proj.", "aligner.layers.1.".to_owned()),
        ("lm_head.", "language_model.lm_head.".to_owned()),
    ];
    let found = rows.iter().find_map(|(port, original)| Some(format!("{original}{}", name.strip_prefix(port)?)));
    found.unwrap_or_else(|| panic!("{name} has no published name"))
}

fn read(source: &Path, file: &str) -> Value {
    serde_json::from_slice(&fs::read(source.join(file)).unwrap()).unwrap()
}

/// The configuration in the published form. The sizes of a tiny tower are in no table, so they are written out.
pub fn config(source: &Path) -> Value {
    let port = read(source, "config.json");
    let mut language = port["text_config"].clone();
    for usual in
        ["rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act", "attention_bias", "tie_word_embeddings", "num_key_value_heads"]
    {
        language.as_object_mut().unwrap().remove(usual); // published files leave them out
    }
    let low = &port["vision_config"];
    let mut low = json!({
        "image_size": low["image_size"], "model_name": "tiny", "select_feature": "same", "select_layer": -1, "width": low["hidden_size"],
        "layers": low["num_hidden_layers"], "heads": low["num_attention_heads"], "patch_size": low["patch_size"],
    });
    let clip = (json!([0.48145466, 0.4578275, 0.40821073]), json!([0.26862954, 0.26130258, 0.27577711]));
    (low["pixel_mean"], low["pixel_std"]) = clip.clone(); // what the processor of the fixture does
    let high = &port["high_res_vision_config"];
    let (vision, projector) = match high.is_null() {
        true => (json!({"cls": "CLIPVisionTower", "params": low}), "mlp_gelu"),
        false => {
            let channels = high["output_channels"].as_u64().unwrap();
            let high = json!({
                "image_size": high["image_size"], "model_name": "tiny", "select_feature": "same", "select_layer": -1,
                "width": high["hidden_size"], "layers": high["num_hidden_layers"], "heads": high["num_attention_heads"],
                "patch_size": high["patch_size"], "window_size": high["window_size"], "global_attn_indexes": high["global_attn_indexes"],
                "prompt_embed_dim": channels, "downsample_channels": [2 * channels, 4 * channels],
                "pixel_mean": clip.0, "pixel_std": clip.1,
            });
            let params = json!({"concat_type": "tuple", "high_res_cfg": high, "low_res_cfg": low});
            (json!({"cls": "HybridVisionTower", "params": params}), "low_high_hybrid_split_mlp_gelu")
        }
    };
    json!({
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": language,
        "vision_config": vision,
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "input_dim": 48, "n_embed": 64, "projector_type": projector}},
    })
}

/// `preprocessor_config.json` in the published form: one size, and no normalisation, which is the towers' own.
pub fn preprocessor(source: &Path) -> Value {
    let port = read(source, "preprocessor_config.json");
    let size = port.get("high_res_size").unwrap_or(&port["size"]);
    json!({
        "background_color": [122, 116, 104], "do_normalize": false, "image_mean": port["image_mean"], "image_std": port["image_std"],
        "image_processor_type": "VLMImageProcessor", "image_size": size["height"], "min_size": 14, "rescale_factor": 1.0 / 255.0,
    })
}

fn without_template(source: &Path) -> Value {
    let mut config = read(source, "tokenizer_config.json");
    config.as_object_mut().unwrap().remove("chat_template");
    config
}

/// Random weights for `shapes`, small where many are summed.
pub fn random_weights(shapes: &[(String, Vec<usize>)], seed: u64) -> (Raw, Tensors) {
    let mut random = Random(seed);
    let (mut raw, mut plain) = (Raw::new(), Tensors::new());
    for (name, shape) in shapes {
        let fan_in = shape[1..].iter().product::<usize>().max(1) as f64;
        let one_d = shape.len() == 1;
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                let value = (1.7 * random.uniform()) / if one_d { 5.0 } else { fan_in.sqrt() };
                (if one_d && name.ends_with("weight") { value + 1.0 } else { value }) as f32
            })
            .collect();
        raw.insert(name.clone(), (Stored::F32, shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
        plain.insert(name.clone(), values.iter().map(|&v| f64::from(v)).collect());
    }
    (raw, plain)
}
