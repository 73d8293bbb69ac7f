//! Checkpoints made for a test: random ones of any size, and the Janus fixture under other names.

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use serde_json::{Value, json};

/// Storage type of a written tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    F32,
    BF16,
    F16,
}

/// Shape and values (as read back: rounded to the storage type) of every tensor.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Writes a random checkpoint for a llama configuration (`config` complete, as in config.json) and returns its tensors.
///
/// The data begins at an odd offset in the file, so nothing in it is aligned.
pub fn llama(dir: &Path, config: &Value, stored: Stored, seed: u64) -> Tensors {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let flag = |field: &str| config[field].as_bool().unwrap_or(false);
    let (hidden, inner, vocabulary) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let head_dim = config["head_dim"].as_u64().map_or(hidden / size("num_attention_heads"), |dim| dim as usize);
    let (q, kv) = (size("num_attention_heads") * head_dim, size("num_key_value_heads") * head_dim);

    let mut shapes =
        vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]), ("model.norm.weight".to_owned(), vec![hidden])];
    if !flag("tie_word_embeddings") {
        shapes.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
    }
    for i in 0..size("num_hidden_layers") {
        let mut linear = |name: &str, shape: [usize; 2], bias: bool| {
            shapes.push((format!("model.layers.{i}.{name}.weight"), shape.to_vec()));
            if bias {
                shapes.push((format!("model.layers.{i}.{name}.bias"), vec![shape[0]]));
            }
        };
        for (name, shape) in [("q", [q, hidden]), ("k", [kv, hidden]), ("v", [kv, hidden]), ("o", [hidden, q])] {
            linear(&format!("self_attn.{name}_proj"), shape, flag("attention_bias"));
        }
        for (name, shape) in [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])] {
            linear(&format!("mlp.{name}_proj"), shape, flag("mlp_bias"));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{i}.{name}.weight"), vec![hidden]));
        }
    }

    random(dir, config, shapes, stored, seed)
}

/// Writes a checkpoint of random tensors and returns them.
pub fn random(dir: &Path, config: &Value, shapes: Vec<(String, Vec<usize>)>, stored: Stored, seed: u64) -> Tensors {
    let mut random = Random(seed | 1);
    let tensors: Tensors = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| rounded(random.weight(&name, &shape), stored)).collect();
            (name, (shape, values))
        })
        .collect();
    let raw = tensors.iter().map(|(name, (shape, values))| (name.clone(), (stored, shape.clone(), bytes(values, stored)))).collect();
    write(dir, &raw, config);
    tensors
}

/// Copies the Janus fixture with the configuration and the tensor names of the published repositories.
pub fn janus_original(source: &Path, dir: &Path) {
    let read = |file: &str| -> Value { serde_json::from_slice(&fs::read(source.join(file)).unwrap()).unwrap() };
    let config = read("config.json");
    let mut language = config["text_config"].clone();
    for usual in ["rms_norm_eps", "rope_theta", "hidden_act", "attention_bias", "tie_word_embeddings"] {
        language.as_object_mut().unwrap().remove(usual); // published files leave them out
    }
    let original = json!({
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": language,
        // Sized so that the code map has the 6 x 6 codes of the fixture.
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 96, "patch_size": 16}},
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "input_dim": 48, "n_embed": 64}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 96, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "input_dim": 8, "n_embed": 64}},
        "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": 64, "image_token_size": 96, "n_embed": 64}},
    });
    let file = fs::read(source.join("model.safetensors")).unwrap();
    let mut raw = BTreeMap::new();
    for (name, view) in safetensors::SafeTensors::deserialize(&file).unwrap().iter() {
        assert_eq!(view.dtype(), safetensors::Dtype::BF16);
        if let Some(name) = original_name(name) {
            raw.insert(name, (Stored::BF16, view.shape().to_vec(), view.data().to_vec()));
        }
    }
    write(dir, &raw, &original);
    fs::copy(source.join("generation_config.json"), dir.join("generation_config.json")).unwrap();
}

/// `None` for the vision side, which these tests do not load.
fn original_name(name: &str) -> Option<String> {
    let renamed = [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.generation_embeddings.", "gen_embed."),
        ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
        ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
        ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
        ("model.generation_head.vision_head.", "gen_head.vision_head."),
    ];
    renamed.into_iter().find_map(|(port, original)| Some(format!("{original}{}", name.strip_prefix(port)?)))
}

/// Writes config.json and model.safetensors.
pub fn write(dir: &Path, tensors: &BTreeMap<String, (Stored, Vec<usize>, Vec<u8>)>, config: &Value) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (stored, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": format!("{stored:?}"), "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize((header.len() + 8).next_multiple_of(2) - 7, b' '); // 8 bytes of length before it: the data begins at an odd offset
    let file = [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat();
    assert_eq!((8 + header.len()) % 2, 1);
    fs::write(dir.join("model.safetensors"), file).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn rounded(value: f64, stored: Stored) -> f64 {
    match stored {
        Stored::F32 => f64::from(value as f32),
        Stored::BF16 => bf16::from_f64(value).to_f64(),
        Stored::F16 => f16::from_f64(value).to_f64(),
    }
}

fn bytes(values: &[f64], stored: Stored) -> Vec<u8> {
    let bytes = |value: &f64| match stored {
        Stored::F32 => (*value as f32).to_le_bytes().to_vec(),
        Stored::BF16 => bf16::from_f64(*value).to_le_bytes().to_vec(),
        Stored::F16 => f16::from_f64(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// A small generator of pseudo-random numbers.
pub struct Random(pub u64);

impl Random {
    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// A weight of a size that keeps activations near one: norms around one, matrices by their number of inputs.
    fn weight(&mut self, name: &str, shape: &[usize]) -> f64 {
        match shape {
            [_] if name.contains("norm") => 1.0 + 0.3 * self.uniform(),
            [_] => 0.2 * self.uniform(),
            [_, _] if name.contains("embed_tokens") => 1.7 * self.uniform(),
            [_, inputs] => 2.5 * self.uniform() / (*inputs as f64).sqrt(),
            _ => unreachable!("only vectors and matrices"),
        }
    }
}
