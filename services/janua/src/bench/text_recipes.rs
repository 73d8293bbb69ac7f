//! Text models at the sizes that were published, some with fewer layers (spec: language.md 1.1 and 2.1, moe.md 1.1).

use serde_json::{Value, json};

use super::recipe::{Fill, Recipe, Tensors, Voice};

/// Text heads are twice as steep as other layers, so that the likeliest token stands out.
const HEAD_GAIN: f32 = 2.0;

/// A llama-shaped decoder.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub vocabulary: usize,
    /// Positions that the configuration promises.
    pub context: usize,
}

/// The decoder of the small models: DeepSeek LLM at 1.3 billion parameters.
pub const DECODER_1B: Decoder = Decoder { hidden: 2048, inner: 5632, layers: 24, heads: 16, vocabulary: 102_400, context: 16_384 };

/// Ids that the tokenizers in the repository use.
pub const BOS: u32 = 480;
pub const EOS: u32 = 481;

impl Decoder {
    /// The fields of a llama configuration.
    pub fn config(&self) -> Value {
        json!({
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": null, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "bos_token_id": BOS, "eos_token_id": EOS,
        })
    }

    /// `model` holds the layers, `head` the text head.
    pub fn tensors(&self, tensors: &mut Tensors, model: &str, head: &str) {
        let hidden = self.hidden;
        ends(tensors, model, head, hidden, self.vocabulary);
        for layer in 0..self.layers {
            let root = format!("{model}.layers.{layer}");
            norms(tensors, &root, hidden);
            attention(tensors, &root, hidden);
            mlp(tensors, &format!("{root}.mlp"), hidden, self.inner);
        }
    }
}

/// DeepSeek LLM, the size of the text side of the small multimodal models.
pub fn llama(decoder: &Decoder) -> Recipe {
    let mut tensors = Tensors::default();
    decoder.tensors(&mut tensors, "model", "lm_head");
    let mut config = decoder.config();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    text_recipe("llama", "DeepSeek LLM 1.3B", Voice::Llm, decoder.vocabulary, config, tensors)
}

/// The expert layers of DeepSeekMoE and DeepSeek-V2.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    pub routed: usize,
    pub shared: usize,
    pub per_token: usize,
    pub inner: usize,
}

pub const EXPERTS_16B: Experts = Experts { routed: 64, shared: 2, per_token: 6, inner: 1408 };

/// DeepSeekMoE 16B with 4 of its 28 layers.
pub const MOE_16B: Decoder = Decoder { hidden: 2048, inner: 10_944, layers: 4, heads: 16, vocabulary: 102_400, context: 4096 };

/// DeepSeekMoE: the first layer is dense.
pub fn moe(decoder: &Decoder, experts: &Experts) -> Recipe {
    let (mut tensors, hidden) = (Tensors::default(), decoder.hidden);
    ends(&mut tensors, "model", "lm_head", hidden, decoder.vocabulary);
    for layer in 0..decoder.layers {
        let root = format!("model.layers.{layer}");
        norms(&mut tensors, &root, hidden);
        attention(&mut tensors, &root, hidden);
        feed_forward(&mut tensors, &root, layer, decoder, experts);
    }
    let mut config = decoder.config();
    config["model_type"] = "deepseek".into();
    config["architectures"] = json!(["DeepseekForCausalLM"]);
    add_experts(&mut config, experts);
    text_recipe("moe", "DeepSeekMoE 16B, 4 of 28 layers", Voice::Llm, decoder.vocabulary, config, tensors)
}

/// Multi-head latent attention without a compressed query.
#[derive(Debug, Clone, Copy)]
pub struct Latent {
    pub kv_rank: usize,
    pub nope: usize,
    pub rope: usize,
    pub value: usize,
}

pub const LATENT_LITE: Latent = Latent { kv_rank: 512, nope: 128, rope: 64, value: 128 };

/// DeepSeek-V2-Lite with 4 of its 27 layers.
pub const V2_LITE: Decoder = Decoder { hidden: 2048, inner: 10_944, layers: 4, heads: 16, vocabulary: 102_400, context: 163_840 };

/// DeepSeek-V2-Lite: latent attention, experts from the second layer on.
pub fn v2(decoder: &Decoder, experts: &Experts, latent: &Latent) -> Recipe {
    let (mut tensors, hidden) = (Tensors::default(), decoder.hidden);
    ends(&mut tensors, "model", "lm_head", hidden, decoder.vocabulary);
    for layer in 0..decoder.layers {
        let root = format!("model.layers.{layer}");
        norms(&mut tensors, &root, hidden);
        latent_attention(&mut tensors, &format!("{root}.self_attn"), decoder, latent);
        feed_forward(&mut tensors, &root, layer, decoder, experts);
    }
    let mut config = decoder.config();
    config["model_type"] = "deepseek_v2".into();
    config["architectures"] = json!(["DeepseekV2ForCausalLM"]);
    add_experts(&mut config, experts);
    let fields = json!({
        "q_lora_rank": null, "kv_lora_rank": latent.kv_rank, "qk_nope_head_dim": latent.nope, "qk_rope_head_dim": latent.rope,
        "v_head_dim": latent.value, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096},
    });
    merge(&mut config, fields);
    text_recipe("v2-lite", "DeepSeek-V2-Lite 16B, 4 of 27 layers", Voice::V2, decoder.vocabulary, config, tensors)
}

fn text_recipe(name: &'static str, about: &'static str, tokenizer: Voice, vocabulary: usize, config: Value, tensors: Tensors) -> Recipe {
    let json = vec![("config.json", config), ("generation_config.json", generation())];
    Recipe { name, about, tokenizer, vocabulary, json, tensors, vae: None }
}

pub fn generation() -> Value {
    json!({"bos_token_id": BOS, "eos_token_id": EOS})
}

/// Adds the fields of one object to another.
pub fn merge(config: &mut Value, fields: Value) {
    if let (Some(config), Value::Object(fields)) = (config.as_object_mut(), fields) {
        config.extend(fields);
    }
}

/// What comes before and behind the layers.
fn ends(tensors: &mut Tensors, model: &str, head: &str, hidden: usize, vocabulary: usize) {
    tensors.table(&format!("{model}.embed_tokens"), vocabulary, hidden);
    tensors.norm(&format!("{model}.norm"), hidden, false);
    tensors.add(format!("{head}.weight"), &[vocabulary, hidden], Fill::Noise(HEAD_GAIN / (hidden as f32).sqrt()));
}

fn norms(tensors: &mut Tensors, layer: &str, hidden: usize) {
    tensors.norm(&format!("{layer}.input_layernorm"), hidden, false);
    tensors.norm(&format!("{layer}.post_attention_layernorm"), hidden, false);
}

fn attention(tensors: &mut Tensors, layer: &str, hidden: usize) {
    for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        tensors.weight(&format!("{layer}.self_attn.{part}"), &[hidden, hidden], false);
    }
}

fn latent_attention(tensors: &mut Tensors, name: &str, decoder: &Decoder, latent: &Latent) {
    let Latent { kv_rank, nope, rope, value } = *latent;
    let (hidden, heads) = (decoder.hidden, decoder.heads);
    tensors.weight(&format!("{name}.q_proj"), &[heads * (nope + rope), hidden], false);
    tensors.weight(&format!("{name}.kv_a_proj_with_mqa"), &[kv_rank + rope, hidden], false);
    tensors.norm(&format!("{name}.kv_a_layernorm"), kv_rank, false);
    tensors.weight(&format!("{name}.kv_b_proj"), &[heads * (nope + value), kv_rank], false);
    tensors.weight(&format!("{name}.o_proj"), &[hidden, heads * value], false);
}

fn mlp(tensors: &mut Tensors, name: &str, hidden: usize, inner: usize) {
    tensors.weight(&format!("{name}.gate_proj"), &[inner, hidden], false);
    tensors.weight(&format!("{name}.up_proj"), &[inner, hidden], false);
    tensors.weight(&format!("{name}.down_proj"), &[hidden, inner], false);
}

fn feed_forward(tensors: &mut Tensors, layer: &str, index: usize, decoder: &Decoder, experts: &Experts) {
    let (hidden, name) = (decoder.hidden, format!("{layer}.mlp"));
    if index == 0 {
        return mlp(tensors, &name, hidden, decoder.inner);
    }
    tensors.weight(&format!("{name}.gate"), &[experts.routed, hidden], false);
    for expert in 0..experts.routed {
        mlp(tensors, &format!("{name}.experts.{expert}"), hidden, experts.inner);
    }
    mlp(tensors, &format!("{name}.shared_experts"), hidden, experts.shared * experts.inner);
}

fn add_experts(config: &mut Value, experts: &Experts) {
    let fields = json!({
        "n_routed_experts": experts.routed, "n_shared_experts": experts.shared, "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.inner, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": false,
        "scoring_func": "softmax",
    });
    merge(config, fields);
}
